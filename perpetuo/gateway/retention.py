"""Deletes log rows that their workspace no longer keeps: whole rows of whole UTC hours; counters stay."""

from __future__ import annotations

from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from perpetuo.db import Database
from perpetuo.models import RequestLog, Workspace

LOGS = RequestLog.__table__
BATCH = 1000  # a short transaction, so that calls commit in between


def prune(database: Database) -> int:
    """Applies every workspace's `retention_days`; how many rows it deleted. Raises Unavailable."""
    statement = sa.select(Workspace.id, Workspace.retention_days).where(Workspace.retention_days.is_not(None))
    workspaces = database.read(lambda connection: connection.execute(statement).all())
    return sum(_prune(database, workspace_id, days) for workspace_id, days in workspaces if days)


def _prune(database: Database, workspace_id: str, days: int) -> int:
    before = database.transaction(lambda connection: _announce(database, connection, workspace_id, days))
    deleted = 0
    while count := database.transaction(lambda connection: _delete(connection, workspace_id, before)):
        deleted += count
    return deleted


def _announce(database: Database, connection: Connection, workspace_id: str, days: int) -> datetime:
    """From here on rows and totals need not agree any more; said before the first row goes."""
    now = database.now(connection)
    before = now.replace(minute=0, second=0, microsecond=0) - timedelta(days=days)
    statement = sa.update(Workspace).where(
        Workspace.id == workspace_id,
        sa.or_(Workspace.pruned_before.is_(None), Workspace.pruned_before < before),
    )
    connection.execute(statement.values(pruned_before=before))
    return before


def _delete(connection: Connection, workspace_id: str, before: datetime) -> int:
    old = (
        sa.select(LOGS.c.id)
        .where(LOGS.c.workspace_id == workspace_id, LOGS.c.created_at < before, LOGS.c.status != "open")
        .order_by(LOGS.c.created_at, LOGS.c.id)
        .limit(BATCH)
    )
    ids = connection.execute(old).scalars().all()
    if ids:
        connection.execute(sa.delete(RequestLog).where(LOGS.c.id.in_(ids)))
    return len(ids)
