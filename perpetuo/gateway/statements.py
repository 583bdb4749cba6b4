"""The ledger's SQL, written by hand for both databases, and how a row becomes its parameters.

By hand because a batch is one statement of many rows: Core costs a third of a millisecond more for it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import orjson

from perpetuo.columns import Json, UtcDateTime
from perpetuo.db import Database
from perpetuo.models import (
    BUCKET_RATIO,
    BUCKETS,
    COUNTS,
    LATENCY_BUCKETS,
    SUMS,
    TTFT_BUCKETS,
    RequestLog,
    UsageCounter,
)
from perpetuo.pricing import Price

Values = dict[str, Any]
CounterKey = tuple[str, datetime, str, str, str]  # workspace, hour, API key, provider, model

COLUMNS = tuple(column.name for column in RequestLog.__table__.columns)
TIMES = {c.name for c in RequestLog.__table__.columns if isinstance(c.type, UtcDateTime)}
JSON = {c.name for c in RequestLog.__table__.columns if isinstance(c.type, Json)}
FIXED = {"id", "workspace_id", "api_key_id", "api_key_name", "owner", "created_at"}
FIXED |= {"orphaned_at", "endpoint", "stream"}  # a settle leaves these as they are
DEFAULTS = {"swept": False, "count": 1, "model": ""}
DEFAULTED = [(COLUMNS.index(name), default) for name, default in DEFAULTS.items()]
TIMED = [place for place, name in enumerate(COLUMNS) if name in TIMES]
SPELLED = [place for place, name in enumerate(COLUMNS) if name in JSON]  # as JSON
# What a settled row has put into its counters, and so what a late settle must take out again.
COUNTED = ("status", "count", "provider", "model", "served_model", *SUMS, "latency_us", "ttft_us")
# What it took at its opening and gives back when it is settled.
HELD = ("created_at", "hold_nano", "key_period", "workspace_period", "token_advance_us", "checks")

COUNTER_KEYS = tuple(column.name for column in UsageCounter.__table__.primary_key.columns)
COUNTER_SUMS = COUNTS + SUMS + LATENCY_BUCKETS + TTFT_BUCKETS
BOUNDS_US = [int(1000 * BUCKET_RATIO**i) for i in range(BUCKETS - 1)]


def upsert_rows(count: int) -> str:
    """Inserts rows, or settles those that are open or swept; returns the ids that it really wrote."""
    row = "(" + ", ".join(["%s"] * len(COLUMNS)) + ")"
    updates = ", ".join(f"{name} = excluded.{name}" for name in COLUMNS if name not in FIXED)
    return (
        f"insert into request_logs ({', '.join(COLUMNS)}) values {', '.join([row] * count)} "  # noqa: S608
        f"on conflict (id) do update set {updates} "
        "where request_logs.status = 'open' or request_logs.swept returning id"
    )


def select_rows(count: int, locking: str) -> str:
    """The rows of a batch that may be there already, locked in the order of their ids."""
    names = ", ".join(("id", "swept", "orphaned_at", *HELD, *COUNTED))
    return (
        f"select {names} from request_logs where id in ({', '.join(['%s'] * count)}) "  # noqa: S608
        f"order by id{locking}"
    )


def upsert_counters(count: int) -> str:
    row = "(" + ", ".join(["%s"] * len(COUNTER_KEYS + COUNTER_SUMS)) + ")"
    updates = ", ".join(f"{name} = usage_counters.{name} + excluded.{name}" for name in COUNTER_SUMS)
    return (
        f"insert into usage_counters ({', '.join(COUNTER_KEYS + COUNTER_SUMS)}) "  # noqa: S608
        f"values {', '.join([row] * count)} on conflict ({', '.join(COUNTER_KEYS)}) do update set {updates}"
    )


def row_parameters(database: Database, values: Values) -> list[Any]:
    """The parameters of one row, in the order of COLUMNS."""
    row: list[Any] = list(map(values.get, COLUMNS))
    for place, default in DEFAULTED:
        if row[place] is None:
            row[place] = default
    for place in TIMED:
        moment = row[place]
        if moment is not None:
            row[place] = database.time(moment)
    for place in SPELLED:
        value = row[place]
        if value is not None:
            row[place] = value.text if isinstance(value, Price) else orjson.dumps(value).decode()
    return row


def counter_parameters(database: Database, key: CounterKey, sums: Values) -> list[Any]:
    workspace_id, hour, *rest = key
    return [workspace_id, database.time(hour), *rest, *(sums.get(name, 0) for name in COUNTER_SUMS)]


def contribution(
    created_at: datetime, workspace_id: str, api_key_id: str, values: Values
) -> tuple[CounterKey, Values]:
    """What a settled row adds to the counters: under which key, and how much of each sum.

    Refusals are counted under no provider and no model, so that invented names cost nothing.
    """
    status, count = values["status"], values.get("count", 1)
    hour = created_at.replace(minute=0, second=0, microsecond=0)
    is_refused = status == "refused"
    model = "" if is_refused else values.get("served_model") or values.get("model") or ""
    provider = "" if is_refused else values.get("provider") or ""
    sums: Values = {"requests": count}
    if status in ("error", "interrupted"):
        sums["errors"] = count
    elif status in ("refused", "client_closed"):
        sums[status] = count
    for name in SUMS:
        sums[name] = values.get(name) or 0
    if values.get("cost_nano") is None:
        sums["unpriced_requests"] = count
    if not is_refused:
        for name, buckets in (("latency_us", LATENCY_BUCKETS), ("ttft_us", TTFT_BUCKETS)):
            if values.get(name) is not None:
                sums[buckets[bisect_left(BOUNDS_US, values[name])]] = 1
    return (workspace_id, hour, api_key_id, provider, model), sums


def add(totals: dict[CounterKey, Values], key: CounterKey, sums: Values, sign: int = 1) -> None:
    """Adds (or with sign -1 takes out) one contribution."""
    into = totals.setdefault(key, {})
    for name, amount in sums.items():
        into[name] = into.get(name, 0) + sign * amount


def flat(rows: Iterable[Sequence[Any]]) -> tuple[Any, ...]:
    """The parameters of many rows as one tuple."""
    return tuple(value for row in rows for value in row)
