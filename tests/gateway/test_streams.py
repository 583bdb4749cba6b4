import gzip
import json
import threading

import pytest

from perpetuo.gateway import bodies
from perpetuo.gateway import upstream as upstream_module
from tests.fake_upstream import (
    USAGE,
    comments_forever,
    completion,
    cut_after,
    drip,
    empty,
    event,
    hang,
    headers_then_hang,
    html,
    raw,
    reset_after,
    stale,
    stall_after,
    status,
    stream,
)
from tests.gateway.conftest import with_settings
from tests.gateway.test_chat import events, text_of

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
ROLE = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}


@pytest.fixture(autouse=True)
def always(books_at_the_end):
    """Every test here ends with books that balance."""


@pytest.fixture
def talkative(monkeypatch):
    """A gateway that says something after a twentieth of a second of silence."""
    monkeypatch.setattr(upstream_module, "KEEP_ALIVE_SECONDS", 0.05)


def chunk(content, **choice):
    return {
        "id": "c",
        "choices": [{"index": 0, "delta": {"content": content}, "finish_reason": None, **choice}],
    }


def error_in(response):
    """The one error event that ends this stream; nothing follows it."""
    said = events(response)
    errors = [json.loads(item)["error"] for item in said if '"error"' in item]
    assert response.status_code == 200
    assert DONE not in response.get_data()
    assert len(errors) == 1
    assert set(errors[0]) == {"message", "type", "param", "code"}
    assert "choices" not in json.loads(said[-1])
    return errors[0]


def assert_failed_midway(response, logs, code="upstream_error"):
    error = error_in(response)
    (row,) = [row for row in logs() if row["id"] == response.headers["x-request-id"]]
    assert error["code"] == code == row["error_code"]
    assert (row["status"], row["http_status"], row["usage_source"]) == ("error", 200, "estimate")
    assert row["completion_tokens"] > 0
    assert row["ttft_us"] is not None
    return row


# Before the first content.


def test_an_early_failure_of_a_stream_has_its_real_status(ask, upstream, logs):
    for code, told in ((400, 400), (429, 429), (500, 502)):
        upstream.reply = status(code)
        response = ask(stream=True)
        assert (response.status_code, response.mimetype) == (told, "application/json")
    assert {row["http_status"] for row in logs()} == {400, 429, 502}
    assert all(row["stream"] for row in logs())


LATE = [
    stream([], done=False, usage=False),
    stream([]),
    stream([{"id": "c", "choices": [ROLE]}]),
    stream([{"id": "c", "choices": [ROLE]}], done=False, usage=False),
    stream([event({"error": {"message": "boom"}})]),
    stream([{"id": "c", "choices": [ROLE]}, event({"error": {"message": "boom"}})]),
    stream([b"data: {nonsense\n\n"]),
    stream([{"id": "c", "choices": [ROLE]}, b"data: \xff\n\n"]),
    cut_after(100, stream()),
    reset_after(100, stream()),
    reset_after(0, stream()),
    empty(),
    html(),
]


def test_a_stream_that_fails_before_its_first_content_is_502(ask, upstream, logs):
    for number, reply in enumerate(LATE):
        upstream.reply = reply
        response = ask(stream=True)
        assert (response.status_code, response.json["error"]["code"]) == (502, "upstream_error"), number
    assert {(row["status"], row["usage_source"]) for row in logs()} == {("error", None)}


def test_headers_wait_for_the_first_content(ask, upstream):
    upstream.reply = stall_after(1)  # only the role was said
    answers = []
    asking = threading.Thread(target=lambda: answers.append(ask(stream=True)))
    asking.start()
    upstream.wait_for_requests(1)
    asking.join(0.2)
    assert answers == []
    upstream.close()
    asking.join()
    assert answers[0].status_code == 502


def test_the_role_is_held_back_but_not_lost(ask, upstream):
    upstream.reply = stream([{"id": "c", "choices": [ROLE]}, chunk("Hi"), chunk("", finish_reason="stop")])
    response = ask(stream=True)
    chunks = [json.loads(item) for item in events(response)[:-1]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(response) == "Hi"


# Silence.


def test_a_silent_upstream_is_bridged_by_comments(talkative, ask, upstream, logs):
    upstream.reply = stream(first_delay=0.2)
    response = ask(stream=True)
    data = response.get_data()
    assert response.status_code == 200
    assert data.startswith(KEEP_ALIVE)
    assert data.endswith(DONE)
    assert text_of(response) == "Hello world"
    assert logs()[0]["status"] == "ok"


def test_comments_also_bridge_the_silence_before_the_headers_and_in_the_middle(talkative, ask, upstream):
    upstream.reply = lambda exchange: (exchange.wait(0.12), stream(delay=0.12)(exchange))
    data = ask(stream=True).get_data()
    first, rest = data.split(b"data: ", 1)
    assert set(first.split(b"\n\n")) == {b": keep-alive", b""}
    assert KEEP_ALIVE in rest
    assert data.endswith(DONE)


def test_a_failure_after_a_comment_is_an_error_event(talkative, ask, upstream, logs):
    upstream.reply = lambda exchange: (exchange.wait(0.12), status(500)(exchange))
    response = ask(stream=True)
    assert error_in(response)["code"] == "upstream_error"
    (row,) = logs()
    assert (row["status"], row["http_status"], row["usage_source"]) == ("error", 200, None)
    assert row["ttft_us"] is None


def test_a_row_stands_open_while_only_comments_went_out(talkative, ask, gateway, upstream, logs):
    upstream.reply = headers_then_hang()
    response = ask(stream=True)
    assert next(response.iter_encoded()) == KEEP_ALIVE
    assert [row["status"] for row in logs()] == ["open"]
    response.close()
    assert [row["status"] for row in logs()] == ["client_closed"]


@with_settings(first_byte_timeout=0.2)
def test_comments_are_not_the_first_byte(ask, upstream):
    upstream.reply = comments_forever(0.02)
    response = ask(stream=True)
    assert (response.status_code, response.json["error"]["code"]) == (504, "upstream_timeout")


@with_settings(idle_timeout=0.2)
def test_silence_in_the_middle_is_a_timeout(ask, upstream, logs):
    upstream.reply = stall_after(3)
    response = ask(stream=True)
    assert_failed_midway(response, logs, "upstream_timeout")
    upstream.wait_for_close(upstream.requests[0])


@with_settings(idle_timeout=0.2)
def test_comments_in_the_middle_are_silence(ask, upstream, logs):
    def reply(exchange):
        exchange.start(200, {"Content-Type": "text/event-stream"})
        exchange.write(event(chunk("Hi")))
        while True:
            exchange.write(b": still here\n\n")
            exchange.wait(0.02)

    upstream.reply = reply
    assert_failed_midway(ask(stream=True), logs, "upstream_timeout")


@with_settings(total_timeout=1.5, idle_timeout=1.0)
def test_a_stream_that_never_ends_is_ended_by_the_total_time(ask, upstream, logs):
    upstream.reply = stream(text="word " * 1000, delay=0.02)
    assert_failed_midway(ask(stream=True), logs, "upstream_timeout")


@with_settings(first_byte_timeout=0.1, idle_timeout=0.1)
def test_only_the_total_time_bounds_a_plain_call(ask, upstream):
    upstream.reply = completion(delay=0.3)
    assert ask().status_code == 200


# Broken in the middle.

BROKEN = {
    "closed": cut_after(400, stream()),
    "reset": reset_after(400, stream()),
    "no finish": stream(finish=None, usage=False),
    "no finish, no done": stream(finish=None, done=False, usage=False),
    "an error": stream([chunk("Hi"), event({"error": {"message": "boom"}})]),
    "an error as text": stream([chunk("Hi"), event({"error": "boom"})]),
    "an error with choices": stream(
        [{**chunk("Hi")}, {**chunk("x"), "error": {"message": "boom", "code": 502}}]
    ),
    "an error event": stream([chunk("Hi"), b'event: error\ndata: {"message": "boom"}\n\n']),
    "garbage": stream([chunk("Hi"), b"data: {nonsense\n\n"]),
    "NaN": stream([chunk("Hi"), b'data: {"choices": [{"delta": {}, "index": NaN}]}\n\n']),
    "not UTF-8": stream([chunk("Hi"), b'data: {"choices": "\xff"}\n\n']),
    "no list": stream([chunk("Hi"), {"choices": {}}, {"choices": "x"}]),
    "17 MiB": stream([chunk("Hi"), chunk("x" * (17 << 20))]),
    "17 MiB without an end": stream([chunk("Hi"), b"data: " + b"x" * (17 << 20)]),
}


def test_a_stream_that_breaks_ends_in_one_error_event(ask, upstream, logs):
    for name, reply in BROKEN.items():
        upstream.reply = reply
        row = assert_failed_midway(ask(stream=True), logs)
        (attempt,) = row["attempts"]
        assert (attempt["http_status"], attempt["error"]["code"]) == (200, "upstream_error"), name


def test_a_body_shorter_than_its_length_is_cut_short(ask, upstream, logs):
    body = event(chunk("Hi")) + event(chunk("", finish_reason="stop"))
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: {len(body) + 9}\r\n\r\n"
    upstream.reply = raw(head.encode() + body)
    error_in(ask(stream=True))
    assert logs()[0]["status"] == "error"


def test_words_of_an_error_in_the_middle_are_kept(ask, upstream):
    upstream.reply = stream([chunk("Hi"), event({"error": {"message": "out of oil"}})])
    assert error_in(ask(stream=True))["message"] == "out of oil"


def test_what_came_before_the_error_in_the_same_packet_reaches_the_client(ask, upstream):
    pieces = [event(chunk("Hi")) + event(chunk(" you")) + event({"error": "boom"})]
    upstream.reply = stream(pieces=pieces)
    response = ask(stream=True)
    error_in(response)
    assert '"Hi"' in events(response)[0]
    assert '" you"' in events(response)[1]


# The end.


def test_a_stream_without_done_that_is_finished_is_whole(ask, upstream, logs):
    upstream.reply = stream(done=False)
    assert ask(stream=True).get_data().endswith(DONE)
    assert logs()[0]["status"] == "ok"


def test_a_body_held_open_after_done_holds_nobody_up(ask, upstream, logs):
    upstream.reply = stall_after(6)
    assert ask(stream=True).get_data().endswith(DONE)
    upstream.wait_for_close(upstream.requests[0])
    assert logs()[0]["status"] == "ok"


def test_nothing_follows_done(ask, upstream):
    pieces = [
        event(chunk("Hi")) + event(chunk("", finish_reason="stop")) + DONE + event(chunk("more")) + DONE
    ]
    upstream.reply = stream(pieces=pieces)
    data = ask(stream=True).get_data()
    assert data.endswith(DONE)
    assert data.count(DONE) == 1
    assert b"more" not in data


def test_a_stream_by_length_ends_with_its_length(ask, upstream, logs):
    body = event(chunk("Hi")) + event(chunk("", finish_reason="stop"))

    def reply(exchange):
        exchange.start(200, {"Content-Type": "text/event-stream"}, length=len(body))
        exchange.write(body, last=True)

    upstream.reply = reply
    assert ask(stream=True).get_data().endswith(DONE)
    assert logs()[0]["status"] == "ok"
    ask(stream=True).get_data()
    assert upstream.connections == 1


# Shapes.


def test_a_dripping_stream_arrives_whole(ask, upstream, logs):
    upstream.reply = drip(0, stream(text="ünï 🎉"))
    assert text_of(ask(stream=True)) == "ünï 🎉"
    assert logs()[0]["usage_source"] == "provider"


def test_a_large_event_passes(ask, upstream):
    upstream.reply = stream([chunk("x" * 300_000), chunk("", finish_reason="stop")])
    assert text_of(ask(stream=True)) == "x" * 300_000


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_compressed_answer_is_unpacked(ask, upstream, is_stream):
    body = json.dumps(
        {"choices": [{"index": 0, "message": {"content": "Hi"}, "finish_reason": "stop"}]}
    ).encode()
    if is_stream:
        body = event(chunk("Hi")) + event(chunk("", finish_reason="stop")) + DONE
    upstream.reply = status(200, gzip.compress(body), {"Content-Encoding": "gzip"})
    response = ask(stream=is_stream)
    assert b'"Hi"' in response.get_data()
    assert "Content-Encoding" not in response.headers


@pytest.mark.parametrize("usage", [USAGE, {**USAGE, "prompt_tokens_details": {"cached_tokens": 4}}])
def test_the_usage_of_the_upstream_is_what_the_row_says(ask, upstream, logs, usage):
    upstream.reply = stream(usage=usage)
    ask(stream=True).get_data()
    (row,) = logs()
    assert (row["prompt_tokens"], row["completion_tokens"], row["total_tokens"]) == (9, 3, 12)
    assert row["cached_tokens"] == usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    assert row["usage_source"] == "provider"


def test_several_choices_and_tools_are_joined_in_the_row(ask, upstream, logs):
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    upstream.reply = stream(tool_calls=[call])
    ask(stream=True, n=2).get_data()
    joined = bodies.unpack(logs()[0]["response_body"])
    assert [c["message"]["tool_calls"] for c in joined["choices"]] == [[call], [call]]


def test_a_client_that_closes_early_is_seen_at_once_in_process_too(ask, upstream, logs):
    upstream.reply = stall_after(3)
    response = ask(stream=True)
    response.close()
    (row,) = logs()
    assert (row["status"], row["http_status"], row["usage_source"]) == ("client_closed", 200, "estimate")
    upstream.wait_for_close(upstream.requests[0])


# Plain answers, and connections.


@pytest.mark.parametrize("reply", [cut_after(60, completion()), reset_after(60, completion())])
def test_a_body_cut_short_is_never_taken_for_a_whole_one(ask, upstream, logs, reply):
    upstream.reply = reply
    assert ask().status_code == 502
    assert (logs()[0]["status"], logs()[0]["usage_source"]) == ("error", None)


@pytest.mark.parametrize(
    "framing", ["Content-Length: 3", "Transfer-Encoding: chunked", "Content-Length: 2\r\nContent-Length: 3"]
)
def test_valid_json_in_a_body_cut_short_is_no_answer(ask, upstream, framing):
    body = b"1\r\n{\r\n1\r\n}\r\n" if "chunked" in framing else b"{}"
    upstream.reply = raw(f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode() + body)
    response = ask()
    assert response.status_code == 502
    assert "JSON" not in response.json["error"]["message"]


def test_a_body_that_ends_with_its_connection_is_whole(ask, upstream):
    body = b'{"choices": [{"index": 0, "message": {"content": "Hi"}, "finish_reason": "stop"}]}'
    upstream.reply = raw(b"HTTP/1.0 200 OK\r\n\r\n" + body)
    assert ask().json["choices"][0]["message"]["content"] == "Hi"
    assert ask().status_code == 200
    assert upstream.connections == 2


def test_a_connection_serves_one_call_after_the_other(ask, upstream):
    for fields in ({}, {"stream": True}, {}, {"stream": True}):
        ask(**fields).get_data()
    assert len(upstream.requests) == 4
    assert upstream.connections == 1


def test_a_connection_survives_a_refusal(ask, upstream):
    for reply in (status(400), status(500), status(429), status(200, b"nonsense")):
        upstream.script([reply] * 3)
        assert ask().status_code >= 400
        upstream.script([])
    assert ask().status_code == 200
    assert upstream.connections == 1


@pytest.mark.parametrize("reply", [stream(finish=None, done=False), stall_after(6), cut_after(400, stream())])
def test_a_connection_with_a_doubtful_end_is_not_used_again(ask, upstream, reply):
    upstream.script([reply])
    ask(stream=True).get_data()
    assert ask().status_code == 200
    assert upstream.connections <= 2
    assert [request.path for request in upstream.requests] == ["/v1/chat/completions"] * 2


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_a_stale_connection_costs_a_second_try_and_no_error(ask, upstream, logs, first, second):
    upstream.script([stale()])
    ask(stream=first).get_data()
    response = ask(stream=second)
    assert response.status_code == 200
    response.get_data()
    assert (upstream.stale_closes, len(upstream.requests), upstream.connections) == (1, 2, 2)
    assert [row["status"] for row in logs()] == ["ok", "ok"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_connection_that_dies_on_its_first_request_is_an_error(ask, upstream, is_stream):
    upstream.reply = lambda exchange: exchange.reset()
    assert ask(stream=is_stream).status_code == 502
    assert len(upstream.requests) == 3


def test_what_is_sent_again_for_a_stale_connection_is_no_retry(ask, upstream, logs):
    upstream.script([stale(), *[lambda exchange: exchange.reset()] * 3])
    assert ask().status_code == 200
    assert ask().status_code == 502
    assert len(upstream.requests) == 4


@with_settings(total_timeout=0.3)
def test_a_call_given_up_leaves_no_connection_behind(ask, upstream):
    upstream.script([hang()])
    assert ask().status_code == 504
    upstream.wait_for_close(upstream.requests[0])
    assert ask().status_code == 200


@with_settings(first_byte_timeout=0.3)
def test_keep_alives_do_not_put_off_the_time_out_to_the_first_byte(ask, upstream, monkeypatch):
    monkeypatch.setattr(upstream_module, "KEEP_ALIVE_SECONDS", 0.05)
    upstream.reply = hang()
    body = ask(stream=True).get_data()
    assert body.count(KEEP_ALIVE) >= 3
    assert b'"upstream_timeout"' in body
