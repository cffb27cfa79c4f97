"""Brings a database to the schema of this version, from an empty one or from that of any earlier version.

`versions` holds one Alembic script per change, numbered; they only go forwards, because the way back would
lose accepted jobs.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection


def migrate(connection: Connection) -> None:
    """Apply what is missing, in the transaction that `connection` is in."""
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    command.upgrade(config, "head")
