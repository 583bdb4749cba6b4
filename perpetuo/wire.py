"""How values look in an answer: JSON, times and money. Pure."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import orjson


def to_json(value: Any) -> bytes:
    """JSON as we answer it: times with `Z` and microseconds, money as plain decimals."""
    try:
        return orjson.dumps(value, default=_plain, option=orjson.OPT_PASSTHROUGH_DATETIME)
    except orjson.JSONEncodeError:  # lone surrogates, huge integers and deep nesting, in stored bodies
        return json.dumps(value, default=_plain_slowly).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return orjson.Fragment(f"{value:f}".encode())
    if isinstance(value, datetime):
        return rfc3339(value)
    raise TypeError(type(value))


def _plain_slowly(value: Any) -> Any:
    return float(value) if isinstance(value, Decimal) else _plain(value)


def rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def usd(nano: int | None) -> Decimal | None:
    """Nano-dollars as dollars, exactly and without trailing zeros; null stays null."""
    if nano is None:
        return None
    whole, part = divmod(abs(nano), 10**9)
    digits = f"{whole}.{part:09}".rstrip("0").rstrip(".")
    return Decimal(f"-{digits}" if nano < 0 else digits)
