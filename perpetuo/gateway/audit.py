"""Recomputes the books from the rows, on one snapshot, and names each difference. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from perpetuo.db import Database
from perpetuo.gateway import statements
from perpetuo.gateway.statements import COUNTED, COUNTER_KEYS, COUNTER_SUMS, CounterKey, Values
from perpetuo.models import RequestLog, UsageCounter, Workspace

LOGS = RequestLog.__table__
COUNTERS = UsageCounter.__table__
BATCH = 5000
AUDIT_SECONDS = 600.0


def differences(database: Database) -> list[str]:
    """A sentence for each counter that is not the sum of its rows. Raises Unavailable."""
    return database.snapshot(lambda connection: list(_differences(connection)), AUDIT_SECONDS)


def _differences(connection: Connection) -> Iterator[str]:
    statement = sa.select(Workspace.id, Workspace.pruned_before)
    pruned = dict(iter(connection.execute(statement)))
    sums = _sums_of_rows(connection)
    counters = _counters(connection)
    for key in sorted(sums.keys() | counters.keys()):
        workspace_id, hour, *_ = key
        since = pruned.get(workspace_id)
        if since is not None and hour < since:
            continue  # its rows are gone, the counters stay
        stored, summed = counters.get(key, {}), sums.get(key, {})
        wrong = [n for n in COUNTER_SUMS if stored.get(n, 0) != summed.get(n, 0)]
        if wrong:
            told = ", ".join(f"{n} is {stored.get(n, 0)}, rows say {summed.get(n, 0)}" for n in wrong)
            place = f"workspace {workspace_id}, {hour:%Y-%m-%d %H}:00, key {key[2]}"
            yield f"{place}, {key[3] or 'no provider'}, {key[4] or 'no model'}: {told}"


def _sums_of_rows(connection: Connection) -> dict[CounterKey, Values]:
    names = ("id", "workspace_id", "api_key_id", "created_at", *COUNTED)
    statement = (
        sa.select(*(LOGS.c[name] for name in names))
        .where(LOGS.c.status != "open")
        .execution_options(yield_per=BATCH)
    )
    totals: dict[CounterKey, Values] = {}
    for row in connection.execute(statement).mappings():
        place = (row["created_at"].astimezone(UTC), row["workspace_id"], row["api_key_id"])
        statements.add(totals, *statements.contribution(*place, dict(row)))
    return totals


def _counters(connection: Connection) -> dict[CounterKey, Values]:
    rows = connection.execute(sa.select(COUNTERS)).mappings()
    return {_key(row): {name: row[name] for name in COUNTER_SUMS} for row in rows}


def _key(row: Any) -> CounterKey:
    key: CounterKey = tuple(row[name] for name in COUNTER_KEYS)
    return key


def open_rows(database: Database) -> int:
    """How many calls are in flight, or left by the dead until the sweep settles them."""
    statement = sa.select(sa.func.count()).select_from(LOGS).where(LOGS.c.status == "open")
    return database.read(lambda connection: connection.execute(statement).scalar_one())
