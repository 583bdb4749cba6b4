"""Anthropic's rate-limit headers under OpenAI's names, which clients know.

Source: `anthropic-ratelimit-*` with RFC 3339 resets; OpenAI's resets are durations (`6m0s`, `120ms`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime

_LIMIT = re.compile(r"anthropic-ratelimit-(requests|tokens)-(limit|remaining|reset)")


def openai_headers(headers: Mapping[str, str], now: datetime) -> dict[str, str]:
    """`x-ratelimit-*` and `x-request-id` from an answer's `headers` (lower-case names); `now` is aware."""
    made: dict[str, str] = {}
    for name, value in headers.items():
        if name == "request-id":
            made["x-request-id"] = value
        elif found := _LIMIT.fullmatch(name):
            told = _duration(value, now) if found[2] == "reset" else value if value.isdecimal() else None
            if told is not None:
                made[f"x-ratelimit-{found[2]}-{found[1]}"] = told
    return made


def _duration(reset: str, now: datetime) -> str | None:
    try:
        at = datetime.fromisoformat(reset)
    except ValueError:
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    milliseconds = max(0, round((at - now).total_seconds() * 1000))
    minutes, rest = divmod(milliseconds, 60_000)
    if 0 < milliseconds < 1_000:
        return f"{milliseconds}ms"
    seconds = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{minutes}m{seconds}" if minutes else seconds
