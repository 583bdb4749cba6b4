import json
from typing import Any

import pytest

from perpetuo.errors import UpstreamError
from perpetuo.providers.openai import OpenAI

SECRET = "sk-very-secret"


def read(status: int, body: Any = b"", **headers: str) -> UpstreamError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return OpenAI().read_error(status, sent, raw, SECRET)


def envelope(message: str = "no", **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, **fields}}


@pytest.mark.parametrize("status", [400, 404, 405, 413, 418, 422, 451])
def test_refusal_keeps_the_words_of_the_upstream(status: int) -> None:
    error = read(status, envelope(type="bad", code="model_not_found", param="model"))
    assert (error.status, error.upstream_status) == (status, status)
    assert error.body() == {
        "error": {"message": "no", "type": "bad", "param": "model", "code": "model_not_found"}
    }
    assert error.headers == {}


def test_refusal_without_type_and_code_is_an_invalid_request() -> None:
    error = read(400, envelope())
    assert (error.type, error.code, error.param) == ("invalid_request_error", None, None)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": "plain"}, "plain"),
        ({"message": "top", "object": "error"}, "top"),
        ({"detail": "Not Found"}, "Not Found"),
        ({"detail": [{"loc": ["body", "model"], "msg": "missing"}, "odd"]}, "body.model: missing; odd"),
        ({"detail": {"message": "in detail"}}, "in detail"),
        ([{"error": {"message": "gemini", "code": 400, "status": "INVALID_ARGUMENT"}}], "gemini"),
        ({"error": {"message": {"a": 1}}}, '{"a":1}'),
        ("text in JSON", "text in JSON"),
        (b"plain text", "plain text"),
    ],
)
def test_message_is_found_in_every_shape(body: Any, message: str) -> None:
    assert read(400, body).message == message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"<html>secret page</html>",
        b"{}",
        b"[]",
        b"null",
        {"error": {}},
        {"error": None},
        {"error": ""},
    ]
    + [{"detail": []}, {"error": []}, b"\n<!doctype html>"],
)
def test_body_without_words_gets_a_short_honest_message(body: Any) -> None:
    message = read(404, body).message
    assert "404" in message or message == "[]"
    assert "html" not in message


@pytest.mark.parametrize(
    "body", [b"\xff\xfe", b'{"error":' * 900, b'{"error":{"message":' + b"[" * 800 + b"]" * 800 + b"}}"]
)
def test_odd_bytes_do_not_fail(body: bytes) -> None:
    assert read(400, body).message


def test_code_becomes_a_string() -> None:
    assert read(400, envelope(code=1301)).code == "1301"


@pytest.mark.parametrize("status", [401, 403])
def test_refused_credentials_are_not_the_clients(status: int) -> None:
    error = read(status, envelope("Incorrect API key", type="invalid_request_error", code="invalid_api_key"))
    assert (error.status, error.type, error.code) == (502, "upstream_error", "upstream_auth")
    assert "Incorrect API key" in error.message
    assert error.headers == {"x-should-retry": "false"}


@pytest.mark.parametrize(
    ("status", "fields"),
    [
        (402, {}),
        (429, {"code": "insufficient_quota"}),
        (429, {"type": "insufficient_quota"}),
        (429, {"code": "enforced_spend_limit_reached"}),
        (429, {"message": "You exceeded your current quota, please check your plan"}),
        (429, {"message": "Your credit balance is too low"}),
        (429, {"message": "See Billing"}),
        (429, {"message": "Spend limit reached"}),
    ],
)
def test_upstream_out_of_credit_forbids_retries(status: int, fields: dict[str, str]) -> None:
    error = read(status, {"error": {"message": "no", **fields}}, retry_after="1")
    assert (error.status, error.type, error.code) == (429, "insufficient_quota", "upstream_quota")
    assert error.headers == {"x-should-retry": "false"}


@pytest.mark.parametrize("value", ["0", "7", "1.5", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_rate_limit_passes_the_waiting_time_on(value: str) -> None:
    error = read(
        429, envelope("slow down", code="rate_limit_exceeded"), Retry_After=value, X_Should_Retry="true"
    )
    assert (error.status, error.type, error.code) == (429, "rate_limit_error", "upstream_rate_limited")
    assert error.headers == {"retry-after": value}


@pytest.mark.parametrize("value", ["", "soon", "-1", "1e9", "inf", "nan", "٣", "5\r\nx: y", "9" * 30, "1;2"])
def test_rate_limit_drops_a_waiting_time_that_makes_no_sense(value: str) -> None:
    error = read(429, envelope("slow"), retry_after=value, retry_after_ms=value)
    assert error.headers == {"x-should-retry": "false"}


def test_milliseconds_alone_give_whole_seconds_too() -> None:
    assert read(429, retry_after_ms="1200").headers == {"retry-after": "2", "retry-after-ms": "1200"}
    assert read(429, retry_after_ms="1200", retry_after="5").headers["retry-after"] == "5"


@pytest.mark.parametrize("status", [408, 409, 500, 501, 503, 529, 599, 100])
def test_failure_of_the_upstream_is_502_with_its_words(status: int) -> None:
    error = read(status, envelope("overloaded", type="overloaded_error", code="x"), x_should_retry="true")
    assert error.body()["error"] == {
        "message": "overloaded",
        "type": "upstream_error",
        "param": None,
        "code": "upstream_error",
    }
    assert (error.status, error.headers) == (502, {"x-should-retry": "false"})


def test_failure_with_a_waiting_time_keeps_it() -> None:
    assert read(503, retry_after="3").headers == {"retry-after": "3"}


def test_redirect_is_not_followed() -> None:
    error = read(307, b"", location="http://elsewhere")
    assert (error.status, error.code, error.upstream_status) == (502, "upstream_redirect", 307)
    assert "elsewhere" not in error.message


@pytest.mark.parametrize("status", [400, 401, 402, 429, 500])
def test_secret_is_cut_out_of_every_text(status: int) -> None:
    said = f"key {SECRET} and {SECRET}"
    error = read(status, envelope(said, type=said, code=said, param=said))
    assert SECRET not in json.dumps(error.body())
    assert "key [redacted] and [redacted]" in error.message


def test_secret_is_cut_out_before_the_message_is_cut_short() -> None:
    error = read(400, envelope("x" * 3995 + SECRET))
    assert error.message == "x" * 3995 + "[reda"


@pytest.mark.parametrize("status", [400, 401])
def test_long_message_is_cut(status: int) -> None:
    assert len(read(status, envelope("x" * 100_000)).message) == 4000


def test_empty_secret_redacts_nothing() -> None:
    assert OpenAI().read_error(400, {}, b'{"error":{"message":"abc"}}', "").message == "abc"


def test_message_can_be_written_as_utf_8() -> None:
    assert read(400, b'{"error":{"message":"a\\ud800\\u0000"}}').message.encode() == b"a?\x00"
