"""Usage: sums over whole hours of the counters, grouped as asked. Knows no Flask and reads no log row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from math import ceil
from typing import Any

import sqlalchemy as sa

from perpetuo.db import Database
from perpetuo.models import BUCKET_RATIO, COUNTS, LATENCY_BUCKETS, SUMS, TTFT_BUCKETS, UsageCounter
from perpetuo.native import breathe
from perpetuo.wire import usd

GROUPS = ("hour", "day", "month", "model", "provider", "api_key_id")
DEFAULT_DAYS = 30
PIECE = 50  # groups made ready before others run: two milliseconds
ADDED = (*COUNTS, *SUMS, *LATENCY_BUCKETS, *TTFT_BUCKETS)
HOUR = timedelta(hours=1)

counters = UsageCounter.__table__.c
Sums = dict[str, int]


def window(from_: datetime | None, to: datetime | None, now: datetime) -> tuple[datetime, datetime]:
    """The window in whole hours: rounded outwards, by default the 30 days to the end of this hour."""
    end = _hour(to + HOUR - timedelta(microseconds=1)) if to is not None else _hour(now) + HOUR
    start = _hour(from_) if from_ is not None else end - timedelta(days=DEFAULT_DAYS)
    return start, end


def _hour(moment: datetime) -> datetime:
    return moment.replace(minute=0, second=0, microsecond=0)


def usage(
    database: Database, workspace_id: str, start: datetime, end: datetime, groups: Sequence[str]
) -> dict[str, Any]:
    """`{"from", "to", "totals", "data"}`; `groups` are names from GROUPS."""
    columns = [_column(name).label(f"group_{name}") for name in groups]
    query = sa.select(*columns, *(sa.func.sum(counters[name]).label(name) for name in ADDED))
    query = query.where(counters.workspace_id == workspace_id, counters.hour >= start, counters.hour < end)
    query = query.group_by(*columns).order_by(*columns) if columns else query
    rows = database.read_many(lambda connection: database.all(connection, query))
    totals: Sums = dict.fromkeys(ADDED, 0)
    rows_shown = []
    for number, row in enumerate(rows):
        if number % PIECE == 0:
            breathe()
        keys, values = row[: len(groups)], row[len(groups) :]
        sums = {name: int(value or 0) for name, value in zip(ADDED, values, strict=True)}
        for name in ADDED:
            totals[name] += sums[name]
        labels = {name: _label(name, key) for name, key in zip(groups, keys, strict=True)}
        rows_shown.append({**labels, **_shape(sums)})
    return {"from": start, "to": end, "totals": _shape(totals), "data": rows_shown}


def _column(name: str) -> Any:
    if name == "day":
        return sa.func.substr(sa.cast(counters.hour, sa.Text), 1, 10)  # sessions run in UTC
    if name == "month":
        return sa.func.substr(sa.cast(counters.hour, sa.Text), 1, 7)
    return counters[name]


def _label(name: str, key: Any) -> Any:
    return key.astimezone(UTC) if isinstance(key, datetime) else key or None


def known_cost(sums: Mapping[str, int]) -> int | None:
    """The sum of the known costs; None where no call that came to something had a price.

    A refusal and a failure before the first byte cost 0 without having had a price: the first of them must
    not turn "unknown" into "free". So a total of 0 beside unpriced calls counts only where more calls are
    known than these can be: then an answer was free.
    """
    known = sums["requests"] - sums["unpriced_requests"]
    ended_early = sums["refused"] + sums["errors"] + sums["client_closed"]
    is_unknown = sums["unpriced_requests"] > 0 and not sums["cost_nano"] and known <= ended_early
    return None if is_unknown else sums["cost_nano"]


def _shape(sums: Sums) -> dict[str, Any]:
    return {
        "requests": sums["requests"],
        "errors": sums["errors"],
        "refused": sums["refused"],
        "client_closed": sums["client_closed"],
        "prompt_tokens": sums["prompt_tokens"],
        "completion_tokens": sums["completion_tokens"],
        "cached_tokens": sums["cached_tokens"],
        "total_tokens": sums["total_tokens"],
        "cost_usd": usd(known_cost(sums)),
        "unpriced_requests": sums["unpriced_requests"],
        "cache_hits": 0,
        "latency_ms": percentiles([sums[name] for name in LATENCY_BUCKETS]),
        "ttft_ms": percentiles([sums[name] for name in TTFT_BUCKETS]),
    }


def percentiles(buckets: Sequence[int]) -> dict[str, float | None]:
    """p50, p95 and p99 in milliseconds: the geometric middle of the bucket where each falls."""
    return {f"p{part}": _percentile(buckets, part) for part in (50, 95, 99)}


def _percentile(buckets: Sequence[int], part: int) -> float | None:
    wanted = ceil(sum(buckets) * part / 100)
    if wanted == 0:
        return None
    bucket = next(i for i, reached in enumerate(accumulate(buckets)) if reached >= wanted)
    return round(float(BUCKET_RATIO ** (bucket - 0.5)), 3)
