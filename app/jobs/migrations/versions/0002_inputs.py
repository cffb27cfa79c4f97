"""Which jobs refer to which pictures that came with requests."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "inputs",
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("job_id", "sha256", name="pk_inputs"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_inputs_job_id", ondelete="CASCADE"),
    )
    op.create_index("ix_inputs_sha256", "inputs", ["sha256"])
