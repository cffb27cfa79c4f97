"""Webhooks: whom a job tells what, and what has still to be told."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column and the table."""
    op.add_column("jobs", sa.Column("webhook", sa.Text))
    op.create_table(
        "deliveries",
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("receiver", sa.Text, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("due_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("job_id", "status", name="pk_deliveries"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_deliveries_job_id", ondelete="CASCADE"),
    )
    op.create_index("ix_deliveries_due_at", "deliveries", ["due_at"])
