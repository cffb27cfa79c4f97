"""The tables, one schema for SQLite and PostgreSQL. Columns exist for what queries need; the rest is JSON.

`migrations` leads to this schema from every earlier one; a test compares the two.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
    }
)

jobs = Table(
    "jobs",
    metadata,
    # The order of arrival. Times would not do: clocks jump, and no job may wait longer for that.
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    Column("tenant", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("completed_at", Double),
    Column("deadline_at", Double),
    Column("cost_seconds", Double, nullable=False),
    Column("on_disconnect", Text, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("worker", Text),
    Column("lease_until", Double),
    Column("crashes", Integer, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    Column("request", Text, nullable=False),  # GenerationRequest
    Column("metadata", Text, nullable=False),
    Column("webhook", Text),  # Webhook
    Column("timings", Text, nullable=False),  # Timings
    Column("failure", Text),  # Failure
    Column("progress", Text),  # Progress, where there are other servers to be told
    Index("ix_jobs_status_number", "status", "number"),
    Index("ix_jobs_tenant_created_at", "tenant", "created_at", "id"),
    Index("ix_jobs_completed_at", "completed_at"),
    sqlite_autoincrement=True,  # the number of a deleted job is not used again
)

pictures = Table(
    "pictures",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("idx", Integer, primary_key=True, autoincrement=False),
    Column("seed", BigInteger, nullable=False),
    Column("latents", LargeBinary),  # of Stage C, until the picture is there or the job has ended
    Column("image", Text),  # StoredImage
)

inputs = Table(
    "inputs",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("sha256", Text, primary_key=True),  # of a picture that came with the request
    Index("ix_inputs_sha256", "sha256"),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("fingerprint", Text, nullable=False),
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("expires_at", Double, nullable=False),
    Index("ix_idempotency_job_id", "job_id"),
    Index("ix_idempotency_expires_at", "expires_at"),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("status", Text, primary_key=True),  # that the job has reached
    Column("tenant", Text, nullable=False),
    Column("receiver", Text, nullable=False),  # host of the webhook's URL
    Column("attempts", Integer, nullable=False),  # begun so far
    Column("due_at", Double, nullable=False),
    Index("ix_deliveries_due_at", "due_at"),
)
