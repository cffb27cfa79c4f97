"""Alembic runs this file, under the name `env_py`, with the connection that `migrate` was given."""

from alembic import context

from app.jobs.tables import metadata

if __name__ == "env_py":
    context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
    context.run_migrations()
