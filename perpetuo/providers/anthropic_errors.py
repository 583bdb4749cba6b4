"""What Anthropic says when it refuses, as one of our errors.

Its texts are declared unstable, so what decides is the status, the type and `error_code`, the text only
where there is nothing else. The texts are kept, since clients match on them, but for the provider key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from perpetuo.errors import UpstreamError
from perpetuo.providers.jsonbody import read_json
from perpetuo.providers.openai_errors import MAX_MESSAGE_CHARACTERS, read_words, redact

# The status that goes with a type: in a stream there is no other.
_STATUSES = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "conflict_error": 409,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
_SPENT = ("enforced_spend_limit_reached", "contract_spend_limit_reached")
# A 400: the account is out of credit, or has reached the limit that its owner set.
_NO_MONEY = re.compile(
    r"credit balance is too low"
    r"|(reached|exceeded) your (specified |workspace |api )*(usage|spend(ing)?) limit",
    re.IGNORECASE,
)
_TOO_LONG = re.compile(r"prompt is too long|exceed context limit", re.IGNORECASE)
_UNKNOWN_PARAMETER = "Extra inputs are not permitted"
_SECONDS = re.compile(r"\d{1,9}(\.\d{1,9})?", re.ASCII)


class _Said(NamedTuple):
    message: str | None
    type: str | None
    error_code: str | None


def read_error(status: int, headers: Mapping[str, str], body: bytes, secret: str) -> UpstreamError:
    """The error for an answer with a status other than 2xx. `headers` in any case, `secret` is cut out."""
    try:
        said = _read(read_json(body), secret)
    except ValueError:
        text = body.decode("utf-8", "replace").strip()
        said = _Said(None if text.startswith("<") else _clean(text, secret), None, None)
    return _error(status, headers, said)


def failure(fields: object, secret: str) -> UpstreamError:
    """The error for one that came with status 200: `fields` are the whole answer or a stream's event."""
    said = _read(fields, secret)
    status = _STATUSES.get(said.type or "")
    if status is None:
        message = said.message or "The upstream reported an error without a message."
        return UpstreamError(message, upstream_status=200)
    return _error(status, {}, said)


def _read(fields: object, secret: str) -> _Said:
    words = redact(read_words(fields), secret)
    error = fields.get("error") if isinstance(fields, dict) else None
    details = error.get("details") if isinstance(error, dict) else None
    code = details.get("error_code") if isinstance(details, dict) else None
    return _Said(words.message, words.type, code if isinstance(code, str) else None)


def _clean(text: str, secret: str) -> str | None:
    return redact(read_words(text), secret).message


def _error(status: int, headers: Mapping[str, str], said: _Said) -> UpstreamError:
    message = said.message or f"The upstream answered with status {status} and without a usable message."
    if 300 <= status < 400:
        message = f"The upstream answered with a redirect (status {status}), which is not followed."
        return UpstreamError(message, code="upstream_redirect", upstream_status=status)
    if _is_out_of_money(status, said):
        return UpstreamError(
            message,
            status=429,
            type="insufficient_quota",
            code="upstream_quota",
            headers={"x-should-retry": "false"},
            upstream_status=status,
        )
    if status in (401, 403):
        message = f"The upstream refused the provider key (status {status}): {message}"
        return UpstreamError(message[:MAX_MESSAGE_CHARACTERS], code="upstream_auth", upstream_status=status)
    waiting = _waiting_time(headers)
    if status == 429:
        return UpstreamError(
            message,
            status=429,
            type="rate_limit_error",
            code="upstream_rate_limited",
            headers=waiting or {"x-should-retry": "false"},
            upstream_status=status,
        )
    if not 400 <= status < 500 or status in (408, 409):
        return UpstreamError(message, headers=waiting, upstream_status=status)
    return _refusal(status, message, said.type)


def _is_out_of_money(status: int, said: _Said) -> bool:
    if status == 402 or said.error_code in _SPENT or said.type == "billing_error":
        return True
    return status == 400 and _NO_MONEY.search(said.message or "") is not None


def _refusal(status: int, message: str, kind: str | None) -> UpstreamError:
    """A refusal of this very request, in the words of OpenAI's API."""
    error = UpstreamError(message, status=status, type="invalid_request_error", upstream_status=status)
    error.code = None  # not by the constructor, which takes None for its default
    if kind == "not_found_error":  # a 404 of another type is a wrong base URL
        error.code = "model_not_found"
    elif status == 413:
        error.code = "request_too_large"
    elif _TOO_LONG.search(message):
        error.code = "context_length_exceeded"
    elif _UNKNOWN_PARAMETER in message:
        error.code = "unsupported_parameter"
        error.param = message.partition(":")[0].strip() or None
    return error


def _waiting_time(headers: Mapping[str, str]) -> dict[str, str]:
    """`retry-after`, which Anthropic sends in seconds, if it makes sense."""
    for name, value in headers.items():
        if name.lower() == "retry-after" and _SECONDS.fullmatch(value.strip()):
            return {"retry-after": value.strip()}
    return {}
