"""Deletes log rows that their workspace no longer keeps: whole rows of whole UTC hours; counters stay.

Of a workspace that was deleted while calls were in flight, what these left behind goes too.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from perpetuo.db import Database
from perpetuo.models import RequestLog, UsageCounter, Workspace

LOGS = RequestLog.__table__
COUNTERS = UsageCounter.__table__
BATCH = 1000  # a short transaction, so that calls commit in between


def prune(database: Database) -> int:
    """Applies every workspace's `retention_days`; how many rows it deleted. Raises Unavailable."""
    statement = sa.select(Workspace.id, Workspace.retention_days).where(Workspace.retention_days.is_not(None))
    kept = database.read(lambda connection: connection.execute(statement).all())
    pruned = sum(_prune(database, workspace_id, days) for workspace_id, days in kept if days)
    return pruned + sum(_forget(database, workspace_id) for workspace_id in database.read(_strays))


def _prune(database: Database, workspace_id: str, days: int) -> int:
    before = database.transaction(lambda connection: _announce(database, connection, workspace_id, days))
    return _delete_before(database, workspace_id, before)


def _forget(database: Database, workspace_id: str) -> int:
    deleted = _delete_before(database, workspace_id, None)
    counters = sa.delete(UsageCounter).where(COUNTERS.c.workspace_id == workspace_id)
    database.transaction(lambda connection: connection.execute(counters))
    return deleted


def _strays(connection: Connection) -> list[str]:
    """Workspaces that are gone but still have counters."""
    known = sa.select(Workspace.id)
    statement = sa.select(COUNTERS.c.workspace_id).distinct().where(COUNTERS.c.workspace_id.not_in(known))
    return list(connection.execute(statement).scalars())


def _delete_before(database: Database, workspace_id: str, before: datetime | None) -> int:
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


def _delete(connection: Connection, workspace_id: str, before: datetime | None) -> int:
    old = sa.select(LOGS.c.id).where(LOGS.c.workspace_id == workspace_id, LOGS.c.status != "open")
    if before is not None:
        old = old.where(LOGS.c.created_at < before)
    ids = connection.execute(old.order_by(LOGS.c.created_at, LOGS.c.id).limit(BATCH)).scalars().all()
    if ids:
        connection.execute(sa.delete(RequestLog).where(LOGS.c.id.in_(ids)))
    return len(ids)
