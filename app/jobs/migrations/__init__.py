"""Upgrades a database to the schema of this version, from an empty one or from any earlier version.

`versions` holds one Alembic script per change, numbered. There are no downgrades, because they would lose
accepted jobs.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection


def migrate(connection: Connection) -> None:
    """Apply the missing migrations, in the transaction of `connection`."""
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    command.upgrade(config, "head")
