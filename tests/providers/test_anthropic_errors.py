import json
from datetime import UTC, datetime
from typing import Any

import pytest

from perpetuo.errors import UpstreamError
from perpetuo.providers.anthropic import Anthropic
from perpetuo.providers.anthropic_headers import openai_headers

STOP = {"x-should-retry": "false"}
WAIT = {"retry-after": "7"}
REFUSED, AUTH, FAILED = "invalid_request_error", "upstream_auth", "upstream_error"
QUOTA = (429, "insufficient_quota", "upstream_quota", STOP)


def read(status: int, body: bytes, headers: dict[str, str] | None = None) -> UpstreamError:
    return Anthropic().read_error(status, headers or {}, body, "sk-ant-1")


def said(kind: str, message: str = "as said", code: str | None = None) -> bytes:
    error: dict[str, Any] = {"type": kind, "message": message}
    if code:
        error["details"] = {"error_code": code}
    return json.dumps({"type": "error", "error": error, "request_id": "req_1"}).encode()


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (400, said("invalid_request_error"), (400, REFUSED, None, {})),
        (
            400,
            said("invalid_request_error", "prompt is too long: 200001 tokens > 200000 maximum"),
            (400, REFUSED, "context_length_exceeded", {}),
        ),
        (
            400,
            said("invalid_request_error", "input length and `max_tokens` exceed context limit: 1 + 2 > 3"),
            (400, REFUSED, "context_length_exceeded", {}),
        ),
        (
            400,
            said("invalid_request_error", "temperature: Extra inputs are not permitted"),
            (400, REFUSED, "unsupported_parameter", {}),
        ),
        (400, said("invalid_request_error", "You have reached your specified API usage limits."), QUOTA),
        (400, said("invalid_request_error", "Your credit balance is too low to use the API."), QUOTA),
        (400, said("invalid_request_error", "as said", "enforced_spend_limit_reached"), QUOTA),
        (401, said("authentication_error"), (502, FAILED, AUTH, STOP)),
        (402, said("billing_error"), QUOTA),
        (403, said("permission_error"), (502, FAILED, AUTH, STOP)),
        (404, said("not_found_error", "model: claude-0"), (404, REFUSED, "model_not_found", {})),
        (404, b"<html>", (404, REFUSED, None, {})),
        (408, said("timeout_error"), (502, FAILED, FAILED, WAIT)),
        (409, said("conflict_error"), (502, FAILED, FAILED, WAIT)),
        (413, said("request_too_large"), (413, REFUSED, "request_too_large", {})),
        (422, b'{"message": "as said"}', (422, REFUSED, None, {})),
        (429, said("rate_limit_error"), (429, "rate_limit_error", "upstream_rate_limited", WAIT)),
        (
            429,
            said("rate_limit_error", "billing tier, credit, quota", "ramp_limit_exceeded"),
            (429, "rate_limit_error", "upstream_rate_limited", WAIT),
        ),
        (429, said("rate_limit_error", "as said", "enforced_spend_limit_reached"), QUOTA),
        (429, said("rate_limit_error", "as said", "contract_spend_limit_reached"), QUOTA),
        (500, said("api_error"), (502, FAILED, FAILED, WAIT)),
        (504, said("timeout_error"), (502, FAILED, FAILED, WAIT)),
        (529, said("overloaded_error"), (502, FAILED, FAILED, WAIT)),
        (302, b"", (502, FAILED, "upstream_redirect", STOP)),
    ],
)
def test_every_refusal_has_the_contracts_words(
    status: int, body: bytes, expected: tuple[int, str, str | None, dict[str, str]]
) -> None:
    error = read(status, body, {"Retry-After": "7"})
    assert (error.status, error.type, error.code, error.headers) == expected
    assert error.upstream_status == status


@pytest.mark.parametrize("waiting", [{}, {"retry-after": "soon"}, {"retry-after": "-1"}])
def test_without_a_time_to_wait_nobody_retries(waiting: dict[str, str]) -> None:
    assert read(429, said("rate_limit_error"), waiting).headers == STOP
    assert read(529, said("overloaded_error"), waiting).headers == STOP


def test_words_are_kept_but_for_the_secret() -> None:
    assert read(400, said("invalid_request_error", "no sk-ant-1 here")).message == "no [redacted] here"
    assert read(500, b"no sk-ant-1 here").message == "no [redacted] here"
    assert read(401, said("authentication_error", "sk-ant-1")).message.endswith("401): [redacted]")


def test_the_parameter_at_fault_is_named() -> None:
    error = read(400, said("invalid_request_error", "thinking.foo: Extra inputs are not permitted"))
    assert error.param == "thinking.foo"


@pytest.mark.parametrize("body", [b"", b"<html>Bad gateway</html>", b"null", b"{}", b'{"error": {}}'])
def test_a_body_without_words_says_so(body: bytes) -> None:
    error = read(502, body)
    assert (error.status, error.code) == (502, FAILED)
    assert "without a usable message" in error.message


def test_a_long_text_is_cut() -> None:
    assert len(read(500, b"x" * 10_000).message) == 4_000
    assert len(read(401, b"x" * 10_000).message) == 4_000


NOW = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("reset", "told"),
    [
        ("2026-11-22T12:00:12Z", "12s"),
        ("2026-11-22T12:06:00Z", "6m0s"),
        ("2026-11-22T12:01:02.250Z", "1m2.25s"),
        ("2026-11-22T12:00:00.120Z", "120ms"),
        ("2026-11-22T11:00:00Z", "0s"),
        ("2026-11-22T12:00:12", "12s"),
    ],
)
def test_a_reset_becomes_a_duration(reset: str, told: str) -> None:
    headers = {"anthropic-ratelimit-requests-reset": reset}
    assert openai_headers(headers, NOW) == {"x-ratelimit-reset-requests": told}


def test_rate_limit_headers_get_the_names_that_clients_know() -> None:
    headers = {
        "anthropic-ratelimit-requests-limit": "50",
        "anthropic-ratelimit-tokens-remaining": "39000",
        "anthropic-ratelimit-input-tokens-limit": "1",
        "anthropic-ratelimit-tokens-limit": "many",
        "anthropic-ratelimit-tokens-reset": "soon",
        "request-id": "req_1",
        "date": "today",
    }
    assert openai_headers(headers, NOW) == {
        "x-ratelimit-limit-requests": "50",
        "x-ratelimit-remaining-tokens": "39000",
        "x-request-id": "req_1",
    }
