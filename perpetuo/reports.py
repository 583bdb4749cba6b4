"""The queries behind logs and spending. Reads only, from rows and counters; knows no Flask.

A list never touches the stored bodies. What a filter may read is bounded; a page says where it stopped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from perpetuo.db import Database
from perpetuo.gateway import costs
from perpetuo.gateway.bodies import unpack
from perpetuo.listing import Cursor, Page, ordered, page_of
from perpetuo.models import ApiKey, RequestLog, UsageCounter, Workspace
from perpetuo.native import breathe
from perpetuo.periods import period_start
from perpetuo.pricing import Price
from perpetuo.usage import known_cost
from perpetuo.wire import usd

SCAN = 20_000  # rows that one filtered page may read
EXPORT_BATCH = 500
SPENT = ("requests", "unpriced_requests", "refused", "errors", "client_closed", "cost_nano")
PIECE = 50  # rows made ready before others run: two milliseconds, as CSV ten

logs = RequestLog.__table__.c
counters = UsageCounter.__table__.c
BODIES = ("request_body", "response_body")
NARROW: list[Any] = [column for column in logs if column.name not in (*BODIES, "price", "checks", "count")]
NARROW += [logs["count"].label("count_")]  # a Row has a method `count`
WHOLE = [*NARROW, logs.price, logs.checks, logs.request_body, logs.response_body]


@dataclass(frozen=True, slots=True)
class Filter:
    """Which rows to list; several values of one field are alternatives. Times are half-open."""

    from_: datetime | None = None
    to: datetime | None = None
    statuses: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    api_key_ids: tuple[str, ...] = ()
    end_user: str | None = None
    text: str | None = None

    @property
    def is_open_only(self) -> bool:
        """What is in flight has an index of its own."""
        return self.statuses == ("open",)

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """What a row must fulfil beyond its place in time."""
        found: list[sa.ColumnElement[bool]] = []
        if self.statuses and not self.is_open_only:
            found.append(logs.status.in_(self.statuses))
        if self.models:
            found.append(sa.or_(logs.model.in_(self.models), logs.served_model.in_(self.models)))
        if self.providers:
            found.append(logs.provider.in_(self.providers))
        if self.api_key_ids:
            found.append(logs.api_key_id.in_(self.api_key_ids))
        if self.end_user is not None:
            found.append(logs.end_user == self.end_user)
        if self.text:
            pattern = _pattern(self.text)
            found.append(sa.or_(*(sa.func.lower(it).like(pattern, escape="\\") for it in _previews())))
        return found

    def fits(self, row: Any) -> bool:
        """The last word on text beyond ASCII, whose case the two databases fold differently."""
        if self.text is None or self.text.isascii():
            return True
        wanted = self.text.lower()
        return any(wanted in (text or "").lower() for text in (row.preview_prompt, row.preview_answer))


def _previews() -> tuple[Any, Any]:
    return logs.preview_prompt, logs.preview_answer


def _pattern(text: str) -> str:
    """`text` taken literally inside a lower-cased value. A letter beyond ASCII that has a case may be any
    character here: `fits` looks again."""

    def piece(char: str) -> str:
        if char in "%_\\":
            return f"\\{char}"
        return char.lower() if char.isascii() or char.lower() == char.upper() else "_"

    return f"%{''.join(piece(char) for char in text)}%"


def log_page(
    database: Database, workspace_id: str, wanted: Filter, cursor: Cursor | None, limit: int
) -> Page[Any]:
    """A page of log rows, newest first."""
    query = _rows_of(workspace_id, wanted)
    conditions = wanted.conditions()
    if not conditions:
        page = ordered(query(NARROW), logs.created_at, logs.id, cursor).limit(limit + 1)
        return page_of(database.read_many(lambda connection: database.all(connection, page)), cursor, limit)
    return database.read_many(lambda connection: _scan(connection, query, wanted, cursor, limit))


def _rows_of(workspace_id: str, wanted: Filter) -> Any:
    def query(columns: list[Any]) -> Any:
        found = sa.select(*columns).where(logs.workspace_id == workspace_id)
        if wanted.from_ is not None:
            found = found.where(logs.created_at >= wanted.from_)
        if wanted.to is not None:
            found = found.where(logs.created_at < wanted.to)
        if wanted.is_open_only:  # literally, or the partial index does not serve it
            found = found.where(logs.status == sa.literal_column("'open'"))
        return found

    return query


def _scan(
    connection: sa.Connection, query: Any, wanted: Filter, cursor: Cursor | None, limit: int
) -> Page[Any]:
    """Reads at most SCAN rows for one page, and says where it stopped if they were not enough."""
    place = ordered(query([logs.id, logs.created_at]), logs.created_at, logs.id, cursor)
    end = connection.execute(place.offset(SCAN - 1).limit(1)).first()
    matching = ordered(query([logs.id, logs.created_at, *_previews()]), logs.created_at, logs.id, cursor)
    matching = matching.where(*wanted.conditions())
    if end is not None:
        beyond = sa.tuple_(logs.created_at, logs.id)
        last = sa.tuple_(sa.literal(end.created_at, logs.created_at.type), sa.literal(end.id))
        is_backwards = cursor is not None and cursor.is_backwards
        matching = matching.where(beyond <= last if is_backwards else beyond >= last)
    if wanted.text is None or wanted.text.isascii():
        matching = matching.limit(limit + 1)
    found = [row for row in connection.execute(matching) if wanted.fits(row)][: limit + 1]
    rows = _in_order(connection, [row.id for row in found])
    return page_of(rows, cursor, limit, stopped=end if len(found) <= limit else None)


def _in_order(connection: sa.Connection, ids: list[str]) -> list[Any]:
    if not ids:
        return []
    rows = {row.id: row for row in connection.execute(sa.select(*NARROW).where(logs.id.in_(ids)))}
    return [rows[id] for id in ids if id in rows]  # retention may have been quicker


def export(database: Database, workspace_id: str, wanted: Filter) -> Iterator[list[dict[str, Any]]]:
    """All matching rows in pieces. Each batch is its own short read, and no picture of the database is kept:
    one would keep SQLite from ever emptying its write-ahead log."""
    cursor: Cursor | None = None
    while True:
        page = log_page(database, workspace_id, wanted, cursor, EXPORT_BATCH)
        for start in range(0, max(len(page.rows), 1), PIECE):
            yield [shape_log(row) for row in page.rows[start : start + PIECE]]
            breathe()
        if page.next is None:
            return
        cursor = page.next


def log_row(database: Database, workspace_id: str, id: str) -> dict[str, Any] | None:
    """One row with its bodies and its arithmetic."""
    query = sa.select(*WHOLE).where(logs.workspace_id == workspace_id, logs.id == id)
    row = database.read(lambda connection: connection.execute(query).first())
    if row is None:
        return None
    return {
        **shape_log(row),
        "request": unpack(row.request_body),
        "response": unpack(row.response_body),
        "cost": costs.arithmetic(row._mapping, Price.from_json(row.price) if row.price else None),
        "checks": [_check(check) for check in row.checks or ()],
    }


def _check(check: dict[str, Any]) -> dict[str, Any]:
    """One limit's arithmetic: requests and tokens as they are, money in dollars."""
    if not check["limit"].endswith("_budget"):
        return check
    return check | {name: usd(check[name]) for name in ("spent", "held", "this", "allowed")}


def shape_log(row: Any) -> dict[str, Any]:
    """A log row as it is answered."""
    return {
        "id": row.id,
        "created_at": row.created_at,
        "finished_at": row.finished_at,
        "status": row.status,
        "http_status": row.http_status,
        "endpoint": row.endpoint,
        "stream": row.stream,
        "count": row.count_,
        "model": row.model,
        "served_model": row.served_model,
        "provider": row.provider,
        "provider_key_id": row.provider_key_id,
        "api_key_id": row.api_key_id,
        "api_key_name": row.api_key_name,
        "end_user": row.end_user,
        "usage": _usage(row),
        "preview": _preview(row),
        "cost_usd": usd(row.cost_nano),
        "latency_ms": _ms(row.latency_us),
        "ttft_ms": _ms(row.ttft_us),
        "overhead_ms": _ms(row.overhead_us),
        "cache": None,
        "cached_from": None,
        "error": _error(row),
        "attempts": row.attempts or [],
    }


def _usage(row: Any) -> dict[str, Any] | None:
    if row.usage_source is None:
        return None
    names = ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens", "reasoning_tokens")
    return {**{name: getattr(row, name) for name in names}, "source": row.usage_source}


def _preview(row: Any) -> dict[str, str | None] | None:
    if row.preview_prompt is None and row.preview_answer is None:
        return None
    return {"prompt": row.preview_prompt, "answer": row.preview_answer}


def _error(row: Any) -> dict[str, str | None] | None:
    if row.error_type is None and row.error_message is None:
        return None
    return {"type": row.error_type, "code": row.error_code, "message": row.error_message}


def _ms(microseconds: int | None) -> float | None:
    return None if microseconds is None else microseconds / 1000


@dataclass(slots=True)
class Spending:
    """What was spent in a span of time: `nano` is None where nothing had a price (see `known_cost`)."""

    sums: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(SPENT, 0))

    @property
    def nano(self) -> int | None:
        return known_cost(self.sums)


def spent_by_workspace(connection: sa.Connection, ids: Collection[str]) -> dict[str, Spending]:
    """By workspace what was spent in this month; workspaces without a request are left out."""
    since = period_start("month", datetime.now(UTC))
    query = _spending(counters.workspace_id).where(counters.workspace_id.in_(ids), counters.hour >= since)
    return {id: _spent(row) for id, *row in connection.execute(query.group_by(counters.workspace_id))}


def spent_by_api_key(
    connection: sa.Connection, workspace_id: str, periods: Collection[str]
) -> dict[tuple[str, str], Spending]:
    """By (period, API key) what was spent in the present one of each of these periods."""
    found = {}
    for period in periods:
        query = _spending(counters.api_key_id).where(
            counters.workspace_id == workspace_id,
            counters.hour >= period_start(period, datetime.now(UTC)),
        )
        for id, *row in connection.execute(query.group_by(counters.api_key_id)):
            found[period, id] = _spent(row)
    return found


def held_now(account: ApiKey | Workspace, period: str) -> int:
    """What calls in flight hold of a budget in its present period, in nano-dollars."""
    start = period_start(period, datetime.now(UTC))
    return account.held_nano if account.period_start == start else 0


def _spending(column: Any) -> Any:
    return sa.select(column, *(sa.func.sum(counters[name]) for name in SPENT))


def _spent(row: list[Any]) -> Spending:
    return Spending(dict(zip(SPENT, map(int, row), strict=True)))
