"""Recomputes cost, counters and budgets from the rows, on one snapshot, and names each difference.

Changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from perpetuo.db import Database
from perpetuo.gateway import budgets, costs, statements
from perpetuo.gateway.limits import Kind
from perpetuo.gateway.statements import COUNTED, COUNTER_KEYS, COUNTER_SUMS, CounterKey, Values
from perpetuo.models import ApiKey, RequestLog, UsageCounter, Workspace
from perpetuo.periods import period_end
from perpetuo.pricing import read_price

LOGS = RequestLog.__table__
COUNTERS = UsageCounter.__table__
BATCH = 5000
AUDIT_SECONDS = 600.0


def differences(database: Database) -> list[str]:
    """A sentence for each cost that is not its usage at its price, each counter that is not the sum of its
    rows, and each budget whose spent is not that of its period or whose held is not that of its open rows.

    Raises Unavailable.
    """
    return database.snapshot(lambda connection: list(_differences(connection)), AUDIT_SECONDS)


def _differences(connection: Connection) -> Iterator[str]:
    sums: dict[CounterKey, Values] = {}
    for row in _rows(connection):
        place = (row["created_at"].astimezone(UTC), row["workspace_id"], row["api_key_id"])
        statements.add(sums, *statements.contribution(*place, row))
        cost = costs.cost_nano(row, read_price(row["price"]) if row["price"] else None)
        if cost != row["cost_nano"]:
            yield f"request {row['id']}: cost_nano is {row['cost_nano']}, its usage and price say {cost}"
    yield from _wrong_counters(connection, sums)
    yield from _wrong_budgets(connection, ApiKey)
    yield from _wrong_budgets(connection, Workspace)


def _wrong_counters(connection: Connection, sums: dict[CounterKey, Values]) -> Iterator[str]:
    statement = sa.select(Workspace.id, Workspace.pruned_before)
    pruned = dict(iter(connection.execute(statement)))
    counters = _counters(connection)
    for key in sorted(sums.keys() | counters.keys()):
        workspace_id, hour, api_key_id, provider, model = key
        since = pruned.get(workspace_id)
        if since is not None and hour < since:
            continue  # its rows are gone, the counters stay
        stored, summed = counters.get(key, {}), sums.get(key, {})
        wrong = [n for n in COUNTER_SUMS if stored.get(n, 0) != summed.get(n, 0)]
        if wrong:
            told = ", ".join(f"{n} is {stored.get(n, 0)}, rows say {summed.get(n, 0)}" for n in wrong)
            place = f"workspace {workspace_id}, {hour:%Y-%m-%d %H}:00, key {api_key_id}"
            yield f"{place}, {provider or 'no provider'}, {model or 'no model'}: {told}"


def _wrong_budgets(connection: Connection, model: type[ApiKey] | type[Workspace]) -> Iterator[str]:
    """Spent against the counters, which were held against the rows above; they outlive pruned rows."""
    owner = model.__table__.c
    kind: Kind = "api_key" if model is ApiKey else "workspace"
    budget = owner.budget_nano if model is ApiKey else owner.monthly_budget_nano
    period = owner.budget_period if model is ApiKey else sa.literal("month").label("budget_period")
    columns = (owner.id, period, owner.spent_nano, owner.held_nano, owner.period_start, owner.recount_until)
    statement = sa.select(*columns).where(budget.is_not(None), owner.period_start.is_not(None))
    for id, period, spent, held, start, recount_until in connection.execute(statement).all():
        end = period_end(period, start)
        spent_then = budgets.spent_between(connection, kind, id, start, end)
        if recount_until is None and spent != spent_then:
            yield f"{kind} {id}: spent_nano is {spent}, the counters since {start:%Y-%m-%d} say {spent_then}"
        held_then = budgets.held_since(connection, kind, id, start)
        if held != held_then:
            yield f"{kind} {id}: held_nano is {held}, its open rows say {held_then}"


def _rows(connection: Connection) -> Iterator[Values]:
    """Every settled row: what its cost depends on, and what it has put into the counters."""
    names = ("id", "workspace_id", "api_key_id", "created_at", "swept", "hold_nano", "usage_source")
    columns = [LOGS.c[name] for name in (*names, "cache_write_tokens", *COUNTED)]
    text = sa.type_coerce(LOGS.c.price, sa.Text).label("price")  # many rows have the same, read once
    statement = sa.select(*columns, text).where(LOGS.c.status != "open").execution_options(yield_per=BATCH)
    yield from map(dict, connection.execute(statement).mappings())


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
