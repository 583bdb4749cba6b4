import json
import time
import zlib

import pytest

from perpetuo.gateway import upstream as upstream_module
from tests.fake_upstream import FakeUpstream, completion, status, stream
from tests.fault_upstream import (
    ANSWERED,
    LAST,
    LATE,
    LATE_SILENT,
    METADATA,
    REDIRECTS,
    SILENT,
    UNANSWERED,
    WORDS,
    FaultUpstream,
)
from tests.gateway.conftest import with_settings
from tests.gateway.test_chat import text_of
from tests.gateway.test_errors import assert_row, error_of
from tests.gateway.test_streams import assert_failed_midway
from tests.tenants import new_tenant

LONELY = "gpt-4o-mini"  # only the faulty upstream serves it
BOTH = "gpt-4o"
FROM_SECOND = "from the second"
STREAMS = pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "stream"])
FAILED = (502, "upstream_error", "upstream_error")
TOO_SLOW = (504, "upstream_error", "upstream_timeout")
REDIRECTED = (502, "upstream_error", "upstream_redirect")
SHORT = {"total_timeout": 0.5, "first_byte_timeout": 0.2, "idle_timeout": 0.2}
PATIENT = {"total_timeout": 60.0, "first_byte_timeout": 50.0, "idle_timeout": 50.0}
SLACK_SECONDS = 20  # on a busy machine; without their bounds these calls never end


@pytest.fixture(autouse=True)
def always(books_at_the_end):
    """Every test here ends with books that balance."""


@pytest.fixture
def upstream():
    with FaultUpstream() as faulty:
        yield faulty


@pytest.fixture
def second():
    with FakeUpstream() as second:
        yield second


@pytest.fixture
def tenant(gateway, upstream, second):
    """One model that only the faulty upstream has, and one that it is asked for first."""
    tenant = new_tenant(gateway)
    tenant.first = tenant.add_provider_key(upstream.base_url, models=[LONELY, BOTH], priority=0)
    tenant.second = tenant.add_provider_key(
        second.base_url, "sk-second", provider="custom", models=[BOTH], priority=1
    )
    return tenant


@pytest.fixture
def timed(ask, changed):
    """Asks, within the time that the settings give the whole call."""

    def timed(**fields):
        began = time.monotonic()
        response = ask(**fields)
        response.get_data()
        assert time.monotonic() - began < changed["total_timeout"] + SLACK_SECONDS
        return response

    return timed


@pytest.fixture
def refused(timed, upstream, tenant, logs):
    """Asks for a model that nobody else serves, and compares answer, row and attempts."""

    def refused(reply, is_stream, outcome, seen, count):
        upstream.reply = reply
        response = timed(model=LONELY, stream=is_stream)
        error = error_of(response, *outcome)
        assert response.headers["x-should-retry"] == "false"
        assert "retry-after" not in response.headers
        assert response.headers["x-perpetuo-attempts"] == str(count)
        row = assert_row(logs, response, "error", outcome[2])
        assert (row["usage_source"], row["total_tokens"], row["ttft_us"]) == (None, None, None)
        assert [told(attempt) for attempt in row["attempts"]] == [
            ("openai", tenant.first, LONELY, seen, outcome[2])
        ] * count
        assert row["attempts"][-1]["error"]["message"] == error["message"]
        return error["message"]

    return refused


@pytest.fixture
def passed_over(timed, upstream, second, tenant, logs):
    """Asks for a model that the next target serves too: its answer comes whole, and its row tells of both."""

    def passed_over(reply, is_stream, code, seen):
        upstream.reply = reply
        second.reply = stream(text=FROM_SECOND) if is_stream else completion(FROM_SECOND)
        response = timed(model=BOTH, stream=is_stream)
        assert response.status_code == 200, response.get_data(as_text=True)
        assert response.headers["x-perpetuo-provider"] == "custom"
        assert response.headers["x-perpetuo-attempts"] == "2"
        assert answer_of(response, is_stream) == FROM_SECOND
        (row,) = logs()
        assert (row["status"], row["http_status"], row["error_code"]) == ("ok", 200, None)
        assert (row["provider"], row["provider_key_id"]) == ("custom", tenant.second)
        assert (row["total_tokens"], row["usage_source"]) == (12, "provider")
        assert [told(attempt) for attempt in row["attempts"]] == [
            ("openai", tenant.first, BOTH, seen, code),
            ("custom", tenant.second, BOTH, 200, None),
        ]
        assert len(second.requests) == 1

    return passed_over


def told(attempt):
    error = attempt["error"]
    return (
        *(attempt[name] for name in ("provider", "provider_key_id", "model", "http_status")),
        error and error["code"],
    )


def answer_of(response, is_stream):
    if not is_stream:
        return response.json["choices"][0]["message"]["content"]
    assert response.get_data().endswith(b"data: [DONE]\n\n")
    return text_of(response)


def test_every_kind_of_fault_is_among_them():
    names = {*SILENT, *UNANSWERED, *ANSWERED, *(f"redirect {name}" for name in REDIRECTS)}
    for fault in ("refuse", "hang", "drip", "cut", "reset", "garbage", "redirect", "bomb"):
        assert any(fault in name for name in names), fault


# No answer.


@pytest.fixture
def shut(request, upstream):
    """The door of an upstream that refuses connections."""
    if request.getfixturevalue("fault") == "refused":
        upstream.refuse()


@STREAMS
@with_settings(**PATIENT)
@pytest.mark.parametrize("fault", UNANSWERED)
def test_without_an_answer_all_tries_at_the_one_target_are_told(refused, shut, upstream, fault, is_stream):
    refused(UNANSWERED[fault], is_stream, FAILED, None, 3)
    assert len(upstream.requests) == (0 if fault == "refused" else 3)


@STREAMS
@with_settings(**PATIENT)
@pytest.mark.parametrize("fault", UNANSWERED)
def test_without_an_answer_the_next_target_gives_one(passed_over, shut, fault, is_stream):
    passed_over(UNANSWERED[fault], is_stream, "upstream_error", None)


# An answer that is none.


@STREAMS
@with_settings(**PATIENT)
@pytest.mark.parametrize("fault", ANSWERED)
def test_an_answer_that_is_none_is_one_honest_error(refused, upstream, fault, is_stream):
    reply, seen = ANSWERED[fault]
    message = refused(reply, is_stream, FAILED, seen, 3)
    assert "<" not in message
    assert message.isprintable()
    assert len(upstream.requests) == 3


@STREAMS
@with_settings(**PATIENT)
@pytest.mark.parametrize("fault", ANSWERED)
def test_behind_an_answer_that_is_none_the_next_target_gives_one(passed_over, fault, is_stream):
    reply, seen = ANSWERED[fault]
    passed_over(reply, is_stream, "upstream_error", seen)


@STREAMS
@with_settings(**PATIENT)
@pytest.mark.parametrize("fault", REDIRECTS)
def test_a_redirect_is_told_and_not_tried_again(refused, upstream, fault, is_stream):
    message = refused(REDIRECTS[fault], is_stream, REDIRECTED, int(fault), 1)
    assert METADATA not in message
    assert len(upstream.requests) == 1


@STREAMS
@with_settings(**PATIENT)
@pytest.mark.parametrize("fault", REDIRECTS)
def test_a_redirect_moves_on(passed_over, fault, is_stream):
    passed_over(REDIRECTS[fault], is_stream, "upstream_redirect", int(fault))


@with_settings(**PATIENT)
@pytest.mark.parametrize("kind", ["text/html", "", "application/octet-stream", "text/event-stream\xff"])
def test_a_good_answer_of_the_wrong_kind_is_a_good_answer(timed, upstream, kind):
    upstream.reply = completion("Hello", headers={"Content-Type": kind})
    response = timed()
    assert (response.mimetype, answer_of(response, False)) == ("application/json", "Hello")
    upstream.reply = stream(text="Hello", headers={"Content-Type": kind})
    response = timed(stream=True)
    assert (response.mimetype, answer_of(response, True)) == ("text/event-stream", "Hello")


@STREAMS
@with_settings(**PATIENT)
def test_a_page_that_refuses_the_request_is_told_in_our_own_words(timed, upstream, logs, is_stream):
    upstream.reply = status(404, b"<!DOCTYPE html><title>Not here</title>", {"Content-Type": "text/html"})
    response = timed(stream=is_stream)
    error_of(response, 404, "invalid_request_error", None)
    assert "<" not in response.json["error"]["message"]
    assert_row(logs, response, "error", None)


# Silence.


@STREAMS
@with_settings(**{**PATIENT, "total_timeout": 0.5})
@pytest.mark.parametrize("fault", SILENT)
def test_silence_is_bounded_by_the_time_of_the_whole_call(refused, upstream, fault, is_stream):
    reply, seen = SILENT[fault]
    refused(reply, is_stream, TOO_SLOW, seen, 1)
    for request in upstream.requests:
        upstream.wait_for_close(request)


@with_settings(**{**SHORT, "total_timeout": 60.0})
@pytest.mark.parametrize("fault", SILENT)
def test_a_silent_stream_is_tried_again_where_time_is_left(refused, upstream, fault):
    reply, seen = SILENT[fault]
    refused(reply, True, TOO_SLOW, seen, 3)
    for request in upstream.requests:
        upstream.wait_for_close(request)


@with_settings(**{**SHORT, "total_timeout": 60.0})
@pytest.mark.parametrize("fault", SILENT)
def test_behind_a_silent_stream_the_next_target_gives_its_own(passed_over, upstream, fault):
    reply, seen = SILENT[fault]
    passed_over(reply, True, "upstream_timeout", seen)
    upstream.wait_for_close(upstream.requests[0])


@with_settings(**SHORT)
@pytest.mark.parametrize("fault", SILENT)
def test_the_time_of_a_plain_call_is_that_of_all_its_targets(timed, upstream, second, logs, fault):
    upstream.reply = SILENT[fault][0]
    response = timed(model=BOTH)
    error_of(response, *TOO_SLOW)
    assert_row(logs, response, "error", "upstream_timeout")
    assert second.requests == []


# After the first words.


@pytest.fixture
def broken(timed, upstream, second, tenant, logs):
    """Asks for a stream that fails after its first words, although there would be another target."""

    def broken(reply, code):
        upstream.reply = reply
        response = timed(model=BOTH, stream=True)
        assert response.headers["x-perpetuo-provider"] == "openai"
        first = json.loads(response.get_data().split(b"\n\n")[0].removeprefix(b"data: "))
        assert first["choices"][0]["delta"]["content"] == "Once upon"
        row = assert_failed_midway(response, logs, code)
        assert [told(attempt) for attempt in row["attempts"]] == [("openai", tenant.first, BOTH, 200, code)]
        assert row["cost_nano"] > 0  # what was said will be billed
        assert second.requests == []

    return broken


@with_settings(**PATIENT)
@pytest.mark.parametrize("fault", LATE)
def test_what_breaks_after_its_first_words_ends_in_an_error_event(broken, fault):
    broken(LATE[fault], "upstream_error")


@with_settings(**{**SHORT, "total_timeout": 60.0})
@pytest.mark.parametrize("fault", LATE_SILENT)
def test_what_falls_silent_after_its_first_words_ends_in_an_error_event(broken, upstream, fault):
    broken(LATE_SILENT[fault], "upstream_timeout")
    upstream.wait_for_close(upstream.requests[0])


@with_settings(**PATIENT)
def test_what_the_client_has_is_whole_whatever_follows_it(timed, upstream, logs):
    for behind in (b"", b"<html>", b"data: {nonsense\n\n", WORDS):
        upstream.reply = stream(pieces=[WORDS, LAST + behind])
        response = timed(stream=True)
        assert answer_of(response, True) == "Once upon"
    assert {row["status"] for row in logs()} == {"ok"}


@with_settings(**PATIENT)
def test_the_silence_of_a_packed_stream_is_bridged_too(timed, upstream, monkeypatch):
    def reply(exchange):
        deflate = zlib.compressobj(wbits=zlib.MAX_WBITS + 16)
        exchange.start(200, {"Content-Encoding": "gzip"})
        exchange.write(deflate.compress(WORDS) + deflate.flush(zlib.Z_SYNC_FLUSH))
        exchange.wait(0.3)
        exchange.write(deflate.compress(LAST) + deflate.flush(), last=True)

    monkeypatch.setattr(upstream_module, "KEEP_ALIVE_SECONDS", 0.05)
    upstream.reply = reply
    response = timed(stream=True)
    assert b"\n\n: keep-alive\n\ndata: " in response.get_data()
    assert answer_of(response, True) == "Once upon"
    timed(stream=True)
    assert upstream.connections == 1  # it is at its end, and can be used again


# Bounds that keep a reader from talking for ever, made small.


@with_settings(**PATIENT)
def test_a_stream_that_talks_without_an_answer_is_ended(timed, upstream, monkeypatch):
    monkeypatch.setattr(upstream_module, "MAX_SILENT_BYTES", 50_000)
    for nothing in (b": x\n\n", b"data: {}\n\n", b"id: 1\n"):
        upstream.reply = stream([WORDS, nothing * 20_000, LAST], done=False, usage=False)
        response = timed(stream=True)
        assert json.loads(response.get_data().split(b"data: ")[-1])["error"]["code"] == "upstream_error"


@with_settings(**PATIENT)
def test_comments_between_words_do_not_add_up(timed, upstream, monkeypatch):
    monkeypatch.setattr(upstream_module, "MAX_SILENT_BYTES", 50_000)
    upstream.reply = stream([*[b": x\n" * 5000, WORDS] * 4, LAST], done=False, usage=False, delay=0.01)
    assert answer_of(timed(stream=True), True) == "Once upon" * 4
