"""Whether the books balance: what the counters say is exactly what the rows add up to."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from perpetuo.db import Database
from perpetuo.gateway import statements
from perpetuo.gateway.statements import COUNTED, COUNTER_KEYS, COUNTER_SUMS, CounterKey, Values
from perpetuo.models import RequestLog, UsageCounter

LOGS = RequestLog.__table__
READ = [LOGS.c[name] for name in ("id", "workspace_id", "api_key_id", "created_at", "finished_at", *COUNTED)]
SNAPSHOT_SECONDS = 60.0

Totals = dict[CounterKey, Values]


def books_balance(database: Database, *, may_be_open: bool = False) -> int:
    """Asserts it, every counter column and histogram bucket included; returns how many calls there were.

    Also that each settled row has its end and, unless `may_be_open`, that no row is left open.
    """
    rows, counted = database.snapshot(_read, SNAPSHOT_SECONDS)
    open_ids = [row["id"] for row in rows if row["status"] == "open"]
    assert may_be_open or not open_ids, f"{len(open_ids)} rows are still open: {open_ids[:5]}"
    settled = [row for row in rows if row["status"] != "open"]
    endless = [row["id"] for row in settled if row["finished_at"] is None]
    assert not endless, f"settled without an end: {endless[:5]}"
    differences = _differences(_summed(settled), counted)
    assert not differences, "rows and counters differ:\n" + "\n".join(differences[:20])
    return sum(row["count"] for row in settled)


def _read(connection: Connection) -> tuple[list[Values], Totals]:
    rows = [dict(row) for row in connection.execute(sa.select(*READ)).mappings()]
    counters = connection.execute(sa.select(UsageCounter.__table__)).mappings()
    return rows, {
        tuple(row[name] for name in COUNTER_KEYS): {name: row[name] for name in COUNTER_SUMS}  # type: ignore[misc]
        for row in counters
    }


def _summed(rows: list[Values]) -> Totals:
    totals: Totals = {}
    for row in rows:
        place = (row["created_at"], row["workspace_id"], row["api_key_id"])
        statements.add(totals, *statements.contribution(*place, row))
    return totals


def _differences(summed: Totals, counted: Totals) -> list[str]:
    """A line each; a counter of nothing but zeros is what a late settle leaves behind, and says nothing."""
    lines = []
    for key in sorted(summed.keys() | counted.keys()):
        for name in COUNTER_SUMS:
            of_rows, of_counter = summed.get(key, {}).get(name, 0), counted.get(key, {}).get(name, 0)
            if of_rows != of_counter:
                lines.append(f"  {key} {name}: rows {of_rows}, counter {of_counter}")
    return lines
