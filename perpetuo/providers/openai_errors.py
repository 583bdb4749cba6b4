"""What an OpenAI-compatible upstream says when it refuses, as one of our errors.

Its words are kept, since clients match on them, but for the provider key's value. The statuses are
those of the contract: a client must be able to tell its own mistake from ours and from the upstream's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from math import ceil
from typing import NamedTuple

from perpetuo.errors import UpstreamError
from perpetuo.providers.jsonbody import read_json, write_json

MAX_MESSAGE_CHARACTERS = 4_000

_NO_MONEY = re.compile(
    r"insufficient[_ ]quota|billing|credit|spend(ing)?[_ ]limit|exceeded your current quota", re.IGNORECASE
)
_SECONDS = re.compile(r"\d{1,9}(\.\d{1,9})?", re.ASCII)
# google.rpc.RetryInfo among an error's details. Gemini speaks of quota and billing in its limits per minute
# too, and says how long to wait here instead of in a header.
_RETRY_DELAY = re.compile(rb'"retryDelay"\s*:\s*"(\d{1,9}(?:\.\d{1,9})?)s"')


class Words(NamedTuple):
    """What an upstream said, each part a string or None where it said nothing usable."""

    message: str | None = None
    type: str | None = None
    code: str | None = None
    param: str | None = None


def read_error(
    status: int, headers: Mapping[str, str], body: bytes, secret: str, bad_key: re.Pattern[str] | None = None
) -> UpstreamError:
    """The error for an upstream's answer with a status other than 2xx.

    `headers` in any case; `secret` is cut out of all texts, "" for none; `bad_key` finds in a 400 that it is
    our key which is refused.
    """
    words = redact(_read_body(body), secret)
    delay = _RETRY_DELAY.search(body) if status == 429 else None
    if delay:
        headers = {"retry-after": str(max(1, ceil(float(delay[1]))))} | dict(headers)
    message = words.message or f"The upstream answered with status {status} and without a usable message."
    if 300 <= status < 400:
        return UpstreamError(
            f"The upstream answered with a redirect (status {status}), which is not followed.",
            code="upstream_redirect",
            upstream_status=status,
        )
    is_bad_key = status == 400 and bad_key is not None and bad_key.search(message)
    if status in (401, 403) or is_bad_key:
        return UpstreamError(
            f"The upstream refused the provider key (status {status}): {message}"[:MAX_MESSAGE_CHARACTERS],
            code="upstream_auth",
            upstream_status=status,
        )
    is_about_money = not delay and _NO_MONEY.search(" ".join(filter(None, words)))
    if status == 402 or (status in (412, 429) and is_about_money):  # 412: Fireworks
        return UpstreamError(
            message,
            status=429,
            type="insufficient_quota",
            code="upstream_quota",
            headers={"x-should-retry": "false"},
            upstream_status=status,
        )
    if status == 429:
        return UpstreamError(
            message,
            status=429,
            type="rate_limit_error",
            code="upstream_rate_limited",
            headers=_waiting_time(headers) or {"x-should-retry": "false"},
            upstream_status=status,
        )
    if not 400 <= status < 500 or status in (408, 409):
        return UpstreamError(message, headers=_waiting_time(headers), upstream_status=status)
    return _refusal(status, message, words)


def _refusal(status: int, message: str, words: Words) -> UpstreamError:
    """A refusal of this very request, which the client gets as the upstream put it."""
    error = UpstreamError(
        message,
        status=status,
        type=words.type or "invalid_request_error",
        param=words.param,
        upstream_status=status,
    )
    # Not by the constructor, which takes None for its default.
    error.code = words.code
    return error


def _waiting_time(headers: Mapping[str, str]) -> dict[str, str]:
    """`retry-after` and `retry-after-ms` as far as they make sense; the first also from the second."""
    sent = {name.lower(): value.strip() for name, value in headers.items()}
    kept: dict[str, str] = {}
    if _is_time(sent.get("retry-after", "")):
        kept["retry-after"] = sent["retry-after"]
    if _SECONDS.fullmatch(sent.get("retry-after-ms", "")):
        kept["retry-after-ms"] = sent["retry-after-ms"]
        kept.setdefault("retry-after", str(max(1, ceil(float(sent["retry-after-ms"]) / 1000))))
    return kept


def _is_time(value: str) -> bool:
    if _SECONDS.fullmatch(value):
        return True
    try:
        parsedate_to_datetime(value)
    except (ValueError, TypeError, OverflowError):
        return False
    return value.isascii() and value.isprintable()


def failure(fields: object, secret: str) -> UpstreamError:
    """The error for one that came with status 200: `fields` are the whole answer or a stream's event."""
    words = redact(read_words(fields), secret)
    return UpstreamError(
        words.message or "The upstream reported an error without a message.", upstream_status=200
    )


def redact(words: Words, secret: str) -> Words:
    """`words` without `secret`, without what UTF-8 cannot say, and not longer than an error may be."""
    return Words(*(None if word is None else _clean(word, secret) for word in words))


def _clean(word: str, secret: str) -> str:
    word = word.replace(secret, "[redacted]") if secret else word
    return word[:MAX_MESSAGE_CHARACTERS].encode("utf-8", "replace").decode()


def _read_body(body: bytes) -> Words:
    try:
        return read_words(read_json(body))
    except ValueError:
        return Words(_plain(body))


def _plain(body: bytes) -> str | None:
    """A body of text; nothing where it is a page, or bytes that say nothing to anyone."""
    try:
        text = body.decode().strip()
    except UnicodeDecodeError:
        return None
    is_readable = not text.startswith("<") and "".join(text.split()).isprintable()
    return text if text and is_readable else None


def read_words(fields: object) -> Words:
    """The words of an error body, parsed, in any of the shapes that are about. Never fails."""
    if isinstance(fields, list) and fields:
        fields = fields[0]  # Gemini wraps the object in a list
    if not isinstance(fields, dict):
        return Words(_text(fields))
    error = fields.get("error")
    if isinstance(error, dict):
        return _read_envelope(error)
    if isinstance(error, str) and error:
        return _read_envelope(fields)._replace(message=error)
    if fields.get("message"):  # Mistral, older vLLM
        message = fields["message"]
        if isinstance(message, dict) and "detail" in message:  # Mistral's 422
            return _read_envelope(fields)._replace(message=_read_detail(message["detail"]))
        return _read_envelope(fields)
    if fields.get("detail"):
        return _read_envelope(fields)._replace(message=_read_detail(fields["detail"]))
    return Words(_text(error))


def _read_envelope(error: dict[str, object]) -> Words:
    return Words(*(_text(error.get(name)) for name in Words._fields))


def _read_detail(detail: object) -> str | None:
    """FastAPI: a text, or a list of `{"loc": ["body", "model"], "msg": "…"}`."""
    if isinstance(detail, dict):
        return _text(detail.get("message")) or _text(detail)
    if not isinstance(detail, list):
        return _text(detail)
    return "; ".join(_read_problem(problem) for problem in detail) or None


def _read_problem(problem: object) -> str:
    if not isinstance(problem, dict) or "msg" not in problem:
        return _text(problem) or ""
    place = problem.get("loc")
    if not isinstance(place, list):
        return _text(problem["msg"]) or ""
    return ".".join(str(step) for step in place) + f": {_text(problem['msg'])}"


def _text(value: object) -> str | None:
    if value is None or value in ("", False):
        return None
    if not isinstance(value, (dict, list)):
        return str(value)
    try:
        return write_json(value).decode()
    except ValueError:  # nested too deeply to write
        return None
