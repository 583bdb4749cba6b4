import json
from dataclasses import dataclass

import openai
import pytest

from tests.fake_upstream import cut_after, drip, event, html, reset_after, status, stream

ASKED = {
    "model": "gpt-4o",
    "messages": [{"role": "user", "content": "Say hello"}],
    "stream_options": {"include_usage": True},
}
FRAME = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1790000000, "model": "gpt-4o"}
COUNTS = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
DONE = b"data: [DONE]\n\n"
ROLE = {"role": "assistant", "content": ""}


def chunk(delta, finish=None, **fields):
    return FRAME | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]} | fields


def body(*items):
    return b"".join(item if isinstance(item, bytes) else event(item) for item in items)


USAGE = chunk({}, choices=[], usage=COUNTS)
FIRST, SECOND, LAST = chunk(ROLE | {"content": "Hel"}), chunk({"content": "lo"}), chunk({}, "stop")
HELLO = body(FIRST, SECOND, LAST, USAGE, DONE)


def amid(*odd):
    """A proper stream with something odd in its middle."""
    return body(FIRST, *odd, SECOND, LAST, USAGE, DONE)


def without(*names, last=LAST):
    chunks = [
        {name: value for name, value in each.items() if name not in names} for each in (FIRST, SECOND, last)
    ]
    return body(*chunks, USAGE, DONE)


def deltas(*deltas, finish="stop"):
    return body(*(chunk(delta) for delta in deltas), chunk({}, finish), USAGE, DONE)


def calls(*parts):
    """Each part is what one delta says of tool calls: one of them, or a list."""
    lists = [part if isinstance(part, list) else [part] for part in parts]
    return deltas(
        {"role": "assistant", "content": None}, *({"tool_calls": p} for p in lists), finish="tool_calls"
    )


def call(arguments="", *, name=None, **fields):
    return fields | {"function": {"arguments": arguments} | ({"name": name} if name is not None else {})}


WHOLE = {
    "as it should be": HELLO,
    # Framing
    "a comment after an id line": b"id: 1\n: ping\n\n" + amid(b"id: 2\n: ping\n\n", b": ping\n\n"),
    "a named event without data": amid(b"event: ping\n\n"),
    "a named event with data": amid(b'event: ping\ndata: {"type":"ping"}\n\n'),
    "named chunks": HELLO.replace(b"data:", b"event: completion\ndata:"),
    "a retry line": b"retry: 1000\n\n" + amid(b"retry: 1000\n\n"),
    "unknown fields": HELLO.replace(b"data:", b"id: 7\nfoo: bar\nbar\ndata:"),
    "a byte order mark": b"\xef\xbb\xbf" + HELLO,
    "line ends CRLF": HELLO.replace(b"\n", b"\r\n"),
    "line ends CR": HELLO.replace(b"\n", b"\r"),
    "extra blank lines": b"\n\n" + HELLO.replace(b"\n\n", b"\n\n\n\n"),
    "no space after the colon": HELLO.replace(b"data: ", b"data:"),
    "data in two lines": HELLO.replace(b',"created"', b',\ndata: "created"'),
    "an empty data line": amid(b"data:\n\n", b"data: \n\n"),
    "a space after [DONE]": HELLO.replace(b"[DONE]", b"[DONE] "),
    "no [DONE]": HELLO.removesuffix(DONE),
    "a last event without its blank line": HELLO.removesuffix(b"\n\n"),
    "a last chunk without its blank line": HELLO.removesuffix(DONE).removesuffix(b"\n\n"),
    "more after [DONE]": HELLO + event(chunk({"content": "more"})) + b"garbage" + DONE,
    # Chunks
    "role in every chunk": deltas(ROLE, *({"role": "assistant", "content": text} for text in ("Hel", "lo"))),
    "an empty role": deltas({"role": "", "content": "Hel"}, {"role": "", "content": "lo"}),
    "another role": deltas({"role": "bot", "content": "Hel"}, {"role": None, "content": "lo"}),
    "no role": deltas({"content": "Hel"}, {"content": "lo"}),
    "delta null": amid(chunk(None)).replace(b'"delta":{}', b'"delta":null'),
    "no delta": HELLO.replace(b'"delta":{},', b""),
    "choices null": amid(chunk({}, choices=None)),
    "no choices": amid(FRAME),
    "empty choices first": body(chunk({}, choices=[], id="", model="", object="", created=0)) + HELLO,
    "no id": without("id"),
    "no object": without("object"),
    "no model": without("model"),
    "no id, object, model and created": without(*FRAME),
    "ids null": HELLO.replace(b'"chatcmpl-1"', b"null"),
    "ids that change": HELLO.replace(b'"chatcmpl-1"', b'"chatcmpl-2"', 1),
    "created as a float": HELLO.replace(b"1790000000", b"1790000000.5"),
    "another object at the end": without(last=LAST | {"object": "chat.completion.done"}),
    "no index": HELLO.replace(b'"index":0,', b""),
    "index null": HELLO.replace(b'"index":0', b'"index":null'),
    "no finish reason before the end": HELLO.replace(b',"finish_reason":null', b""),
    "empty finish reasons": HELLO.replace(b'"finish_reason":null', b'"finish_reason":""'),
    "the finish reason twice": without(last=LAST).replace(event(LAST), event(LAST) * 2),
    "the finish reason with text": body(FIRST, chunk({"content": "lo"}, "stop"), USAGE, DONE),
    "content as parts": deltas({"content": [{"type": "text", "text": "Hel"}]}, {"content": "lo"}),
    "content null": deltas(ROLE | {"content": None}, {"content": "Hello"}, {"content": None}),
    "tool calls null": deltas({"content": "Hello", "tool_calls": None}),
    "tool calls empty": deltas({"content": "Hello", "tool_calls": []}),
    "error null": amid(chunk({}, error=None)),
    "usage null": amid(chunk({}, usage=None)),
    "usage before the end": body(USAGE, FIRST, SECOND, USAGE, LAST, DONE),
    "usage before the last words": body(FIRST, USAGE, SECOND, LAST, chunk({}, choices=[]), DONE),
    "usage with the finish reason": body(FIRST, SECOND, LAST | {"usage": COUNTS}, DONE),
    "usage twice": body(FIRST, SECOND, LAST | {"usage": COUNTS}, USAGE, DONE),
    "usage in every chunk": body(*(each | {"usage": COUNTS} for each in (FIRST, SECOND, LAST)), DONE),
    "usage in an early chunk": body(FIRST | {"usage": COUNTS}, SECOND, LAST, DONE),
}

ONE = [("weather", {"a": 1})]
TWO = [*ONE, ("time", {})]
TOOL = {"id": "call_1", "type": "function"}
OPENING, PLAIN = call(name="weather", index=0, **TOOL), call('{"a":1}', index=0)
TOOLS = {
    "as it should be": (calls(OPENING, PLAIN), ONE),
    "no index": (calls(call(name="weather", **TOOL), call('{"a":', **TOOL), call("1}")), ONE),
    "index null": (calls(OPENING | {"index": None}, PLAIN | {"index": None}), ONE),
    "an index that starts at 1": (calls(OPENING | {"index": 1}, PLAIN | {"index": 1}), ONE),
    "an index as a text": (calls(OPENING | {"index": "0"}, PLAIN | {"index": "0"}), ONE),
    "the id repeated": (calls(OPENING, PLAIN | TOOL), ONE),
    "the id empty later": (calls(OPENING, PLAIN | {"id": ""}), ONE),
    "the name repeated": (calls(OPENING, call('{"a":1}', name="weather", index=0, **TOOL)), ONE),
    "the name empty later": (calls(OPENING, call('{"a":1}', name="", index=0, id="")), ONE),
    "the name null later": (
        calls(OPENING, {**PLAIN, "function": {"name": None, "arguments": '{"a":1}'}}),
        ONE,
    ),
    "no type": (calls(call(name="weather", index=0, id="call_1"), PLAIN), ONE),
    "no id": (calls(call(name="weather", index=0), PLAIN), ONE),
    "no arguments": (calls({"index": 0, "function": {"name": "weather"}}, PLAIN), ONE),
    "arguments as an object": (calls(call({"a": 1}, name="weather", index=0, **TOOL)), ONE),
    "all at once": (calls(call('{"a":1}', name="weather", index=0, **TOOL)), ONE),
    "two calls": (
        calls(OPENING, PLAIN, call(name="time", index=1, id="call_2", type="function"), call("{}", index=1)),
        TWO,
    ),
    "two calls in one chunk without an index": (
        calls([call('{"a":1}', name="weather", id="call_1"), call("{}", name="time", id="call_2")]),
        TWO,
    ),
    "two calls of index 0": (
        calls(
            call('{"a":1}', name="weather", index=0, **TOOL), call("{}", name="time", index=0, id="call_2")
        ),
        TWO,
    ),
    "two calls in turns": (
        calls(
            [OPENING, call(name="time", index=1, id="call_2", type="function")],
            [call('{"a"', index=0), call("{", index=1)],
            [call("}", index=1), call(":1}", index=0)],
        ),
        TWO,
    ),
    "finish reason stop": (calls(OPENING, PLAIN).replace(b'"tool_calls"}', b'"stop"}'), ONE),
    "role in every chunk": (
        calls(OPENING, PLAIN).replace(b'"delta":{"tool', b'"delta":{"role":"assistant","tool'),
        ONE,
    ),
}

ERROR = {"error": {"message": "as said", "type": "odd", "code": 529}}
FAILED = {
    "an error": (body(FIRST, ERROR), "as said"),
    "an error and [DONE]": (body(FIRST, ERROR, DONE), "as said"),
    "an error as a text": (body(FIRST, {"error": "as said"}, DONE), "as said"),
    "an error with choices": (body(chunk(ROLE | {"content": "Hel"}), LAST | ERROR, DONE), "as said"),
    "an error after the finish reason": (body(FIRST, LAST, ERROR, DONE), "as said"),
    "an error event": (body(FIRST, b"event: error\n", ERROR), "as said"),
    "an error event without error": (
        body(FIRST, b"event: error\n", {"message": "as said"}, LAST, DONE),
        "as said",
    ),
    "an error event of plain text": (body(FIRST, b"event: error\ndata: as said\n\n", LAST, DONE), "as said"),
    "an error as an object of its own": (
        body(FIRST, {"object": "error", "message": "as said", "code": 400}, DONE),
        "before it was finished",
    ),
    "an error first": (body(ERROR), "as said"),
    "an error with choices first": (body(chunk(ROLE) | ERROR, DONE), "as said"),
    "no end": (body(FIRST, SECOND), "before it was finished"),
    "no finish reason": (body(FIRST, SECOND, USAGE, DONE), "before it was finished"),
    "half an event": (body(FIRST, SECOND) + event(LAST)[:60], "before it was finished"),
    "nothing": (b"", "without an answer"),
    "only [DONE]": (DONE, "without an answer"),
    "only a role": (body(chunk(ROLE), DONE), "before it was finished"),
    "only usage": (body(USAGE, DONE), "without an answer"),
    "only comments": (b": ping\n\n" * 5, "without an answer"),
    "malformed JSON": (body(FIRST, b'data: {"choices": [\n\n', LAST, DONE), "not JSON"),
    "not a number": (body(FIRST, event(SECOND).replace(b"1790000000", b"NaN"), LAST, DONE), "not JSON"),
    "a list": (body(FIRST, b"data: []\n\n", LAST, DONE), "not a JSON object"),
    "choices that are no list": (body(FIRST, chunk({}, choices={"0": {}}), LAST, DONE), "no list"),
    "a choice that is none": (body(FIRST, chunk({}, choices=["x"]), LAST, DONE), "no object"),
    "a choice of index -1": (body(FIRST, event(SECOND).replace(b":0", b":-1"), LAST, DONE), "impossible"),
    "a tool call that is none": (calls("weather"), "no object"),
    "one of two choices unfinished": (
        body(FIRST, chunk({}, choices=[{"index": 1, "delta": {"content": "x"}}]), LAST, DONE),
        "before it was finished",
    ),
    "a whole answer instead of chunks": (
        json.dumps({"object": "chat.completion", "choices": [{"index": 0, "message": ROLE}]}).encode(),
        "without an answer",
    ),
}

BROKEN = {
    "cut": cut_after(300, stream()),
    "reset": reset_after(300, stream()),
    "reset before the first event": reset_after(0, stream()),
    "a page": html(200),
    "an empty answer": status(200, b""),
}


@dataclass
class Seen:
    role: str
    text: str | None
    calls: list
    finish: str
    total_tokens: int | None


def seen(client, **asked) -> Seen:
    """What the official client's own accumulator makes of a stream."""
    with client.chat.completions.stream(**ASKED, **asked) as events:
        answer = events.get_final_completion()
    (choice,) = answer.choices
    calls = choice.message.tool_calls or []
    assert all(call.id.startswith("call_") and call.id.count("call_") == 1 for call in calls)
    assert {call.type for call in calls} <= {"function"}
    assert (answer.object, type(answer.created)) == ("chat.completion", int)
    return Seen(
        choice.message.role,
        choice.message.content,
        [(call.function.name, json.loads(call.function.arguments)) for call in calls],
        choice.finish_reason,
        answer.usage and answer.usage.total_tokens,
    )


@pytest.fixture
def each_shape(upstream):
    def each_shape(sent):
        reply = stream(pieces=[sent] if sent else [])
        for shaped in (reply, drip(0, reply)):  # at once, then every byte in a packet of its own
            upstream.reply = shaped
            yield

    return each_shape


@pytest.mark.parametrize("sent", WHOLE.values(), ids=WHOLE)
def test_an_odd_answer_arrives_whole(client, rows, each_shape, sent):
    for _ in each_shape(sent):
        assert seen(client) == Seen("assistant", "Hello", [], "stop", 5)
    for row in rows(2):
        assert (row["status"], row["total_tokens"], row["usage_source"]) == ("ok", 5, "provider")


@pytest.mark.parametrize(("sent", "expected"), TOOLS.values(), ids=TOOLS)
def test_odd_tool_calls_arrive_whole(client, rows, each_shape, sent, expected):
    for _ in each_shape(sent):
        answer = seen(client)
        assert (answer.role, answer.calls, answer.total_tokens) == ("assistant", expected, 5)
    assert [row["status"] for row in rows(2)] == ["ok"] * 2


@pytest.mark.parametrize(("sent", "message"), FAILED.values(), ids=FAILED)
def test_a_stream_that_fails_raises(client, rows, each_shape, sent, message):
    for _ in each_shape(sent):
        with pytest.raises(openai.APIError, match=message) as caught:
            seen(client)
        assert (caught.value.type, caught.value.code) == ("upstream_error", "upstream_error")
    assert [row["status"] for row in rows(2)] == ["error"] * 2


@pytest.mark.parametrize("reply", BROKEN.values(), ids=BROKEN)
def test_a_broken_connection_raises(client, upstream, rows, reply):
    upstream.reply = reply
    with pytest.raises(openai.APIError) as caught:
        seen(client)
    assert caught.value.code == "upstream_error"
    assert rows()[0]["status"] == "error"


def test_usage_goes_out_once(client, upstream):
    # LangChain and Pydantic AI add up what the chunks say.
    upstream.reply = stream(pieces=[WHOLE["usage in every chunk"].replace(DONE, event(USAGE) + DONE)])
    with client.chat.completions.create(**ASKED, stream=True) as chunks:
        assert [chunk.usage.total_tokens for chunk in chunks if chunk.usage] == [5]


def test_usage_in_every_chunk_reaches_those_who_ask_for_it(client, upstream):
    upstream.reply = stream(pieces=[WHOLE["usage in every chunk"]])
    asked = ASKED | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    with client.chat.completions.create(**asked, stream=True) as chunks:
        assert [chunk.usage.total_tokens for chunk in chunks if chunk.usage] == [5, 5, 5]


def test_choices_in_reverse_order_do_not_mix(client, upstream):
    chunks = [
        FRAME | {"choices": [{"index": index, "delta": delta, "finish_reason": finish}]}
        for delta, finish in (({"content": "text "}, None), ({"content": "of"}, None), ({}, "stop"))
        for index in (1, 0)
    ]
    upstream.reply = stream(chunks)
    with client.chat.completions.stream(**ASKED, n=2) as events:
        answer = events.get_final_completion()
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.message.content for choice in answer.choices] == ["text of"] * 2


def test_line_separators_inside_a_text_stay(client, upstream):
    text = "a\u2028b\u2029c\u0085d\r\n\ve"
    upstream.reply = drip(0, stream(pieces=[deltas({"content": text})]))
    assert seen(client).text == text
