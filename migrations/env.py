"""Runs the migrations on the application's own database, under its lock."""

import sys

from alembic import context
from flask import current_app

from perpetuo.columns import Base, Json, UtcDateTime
from perpetuo.errors import Unavailable

database = current_app.extensions["perpetuo"].database


def render_type(kind, item, _context):
    """Migrations name plain types, so that an old one does not depend on today's code."""
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    if kind == "type" and isinstance(item, Json):
        return "sa.Text()"
    return False


def run(connection):
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=database.is_sqlite,  # SQLite cannot alter a column in place
        compare_type=True,
        render_item=render_type,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_offline():
    context.configure(url=database.url.render_as_string(), target_metadata=Base.metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    run_offline()
else:
    try:
        with database.migrating() as connection:
            run(connection)
    except Unavailable as error:
        sys.exit(error.message)
