"""Blueprint `logs`: request logs, their exports, and usage."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from flask import Blueprint, Response, request
from flask.typing import ResponseReturnValue

from perpetuo import listing, reports, schemas, usage, web
from perpetuo.errors import NotFound
from perpetuo.fields import is_storable, moment
from perpetuo.models import STATUSES
from perpetuo.reports import Filter
from perpetuo.wire import rfc3339, to_json

blueprint = web.protect(Blueprint("logs", __name__, url_prefix="/workspaces/<workspace_id>"))

MOST_TEXT = 200
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run (OWASP, CSV injection)
COLUMNS = (
    *("id", "created_at", "finished_at", "status", "http_status", "endpoint", "stream", "count"),
    *("model", "served_model", "provider", "provider_key_id", "api_key_id", "api_key_name", "end_user"),
    *("usage.prompt_tokens", "usage.completion_tokens", "usage.total_tokens", "usage.cached_tokens"),
    *("usage.reasoning_tokens", "usage.source", "preview.prompt", "preview.answer"),
    *("cost_usd", "latency_ms", "ttft_ms", "overhead_ms", "cache", "cached_from"),
    *("error.type", "error.code", "error.message", "attempts"),
)


@blueprint.get("/logs")
def list_logs(workspace_id: str) -> ResponseReturnValue:
    """The request logs of a workspace, newest first."""
    workspace = web.get_workspace(workspace_id)
    cursor = listing.read_cursor(request.args.get("cursor"))
    limit = listing.read_limit(request.args.get("limit"))
    page = reports.log_page(web.gateway().database, workspace.id, _filter(), cursor, limit)
    return web.answer(page.body(reports.shape_log))


@blueprint.get("/logs/<log_id>")
def show_log(workspace_id: str, log_id: str) -> ResponseReturnValue:
    """One request with its stored bodies and its arithmetic."""
    workspace = web.get_workspace(workspace_id)
    row = reports.log_row(web.gateway().database, workspace.id, log_id) if is_storable(log_id) else None
    if row is None:
        raise NotFound("There is no such request.")
    return web.answer(row)


@blueprint.get("/logs.csv")
def export_csv(workspace_id: str) -> ResponseReturnValue:
    """The same rows as CSV (RFC 4180)."""
    return _export(workspace_id, _csv, "csv", "text/csv; charset=utf-8")


@blueprint.get("/logs.jsonl")
def export_jsonl(workspace_id: str) -> ResponseReturnValue:
    """The same rows as JSON, one a line."""
    return _export(workspace_id, _jsonl, "jsonl", "application/jsonl")


def _export(
    workspace_id: str, write: Callable[[Iterable[Any]], Iterator[bytes]], ending: str, kind: str
) -> ResponseReturnValue:
    """Streams the rows. The first batch is read before the status goes out, so that a failure has its own."""
    workspace = web.get_workspace(workspace_id)
    batches = reports.export(web.gateway().database, workspace.id, _filter())
    first = next(batches)
    response = Response(write(_resumed(first, batches)), content_type=kind)
    response.headers["Content-Disposition"] = f'attachment; filename="logs.{ending}"'
    return response


def _resumed(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _jsonl(batches: Iterable[Any]) -> Iterator[bytes]:
    for batch in batches:
        yield b"".join(to_json(row) + b"\n" for row in batch)


def _csv(batches: Iterable[Any]) -> Iterator[bytes]:
    yield _lines([COLUMNS])
    for batch in batches:
        yield _lines([[_cell(row, column) for column in COLUMNS] for row in batch])


def _lines(rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _cell(row: dict[str, Any], column: str) -> str:
    """One value as text that no spreadsheet takes for a formula."""
    name, _, inner = column.partition(".")
    value = row[name]
    if inner:
        value = value and value[inner]
    if value is None:
        return ""
    if isinstance(value, datetime):
        return rfc3339(value)
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, bool | list):
        return to_json(value).decode()
    text = str(value)
    return f"'{text}" if text.startswith(FORMULA) else text


@blueprint.get("/usage")
def show_usage(workspace_id: str) -> ResponseReturnValue:
    """Sums over a window, grouped as asked."""
    workspace = web.get_workspace(workspace_id)
    names = [name.strip() for name in request.args.get("group_by", "").split(",") if name.strip()]
    for name in names:
        if name not in usage.GROUPS:
            raise schemas.invalid("group_by", f"Must be any of {', '.join(usage.GROUPS)}.")
    start, end = usage.window(_time("from"), _time("to"), datetime.now(UTC))
    if start > end:
        raise schemas.invalid("from", "Must not be after `to`.")
    groups = list(dict.fromkeys(names or ["day"]))
    return web.answer(usage.usage(web.gateway().database, workspace.id, start, end, groups))


def _filter() -> Filter:
    statuses = _texts("status")
    if not set(statuses) <= set(STATUSES):
        raise schemas.invalid("status", f"Must be one of {', '.join(STATUSES)}.")
    text = (_texts("q") or (None,))[-1]
    if text is not None and len(text) > MOST_TEXT:
        raise schemas.invalid("q", f"Must have at most {MOST_TEXT} characters.")
    return Filter(
        from_=_time("from"),
        to=_time("to"),
        statuses=tuple(dict.fromkeys(statuses)),
        models=_texts("model"),
        providers=_texts("provider"),
        api_key_ids=_texts("api_key_id"),
        end_user=(_texts("end_user") or (None,))[-1],
        text=text,
    )


def _texts(name: str) -> tuple[str, ...]:
    """The values of one query parameter; empty ones, which a form sends, are none."""
    values = tuple(value for value in request.args.getlist(name) if value)
    if not all(is_storable(value) for value in values) or len(values) > 100:
        raise schemas.invalid(name, "This cannot be looked for.")
    return values


def _time(name: str) -> datetime | None:
    text = request.args.get(name)
    if not text:
        return None
    try:
        return moment(text)
    except ValueError as exc:
        raise schemas.invalid(name, "Must be a time such as 2030-01-31T00:00:00Z, or a date.") from exc
