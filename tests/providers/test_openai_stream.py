import json
from collections.abc import Iterator
from typing import Any

import pytest

from perpetuo.errors import UpstreamError
from perpetuo.providers import openai_stream
from perpetuo.providers.base import ModelRequest, Usage
from perpetuo.providers.hosts import HOSTS
from perpetuo.providers.openai import OpenAI
from perpetuo.providers.openai_stream import OpenAIStream

FRAME = {"id": "c1", "object": "chat.completion.chunk", "created": 7, "model": "up"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
DONE = b"data: [DONE]\n\n"


def event(fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def chunk(delta: Any, finish: str | None = None, index: int = 0, **fields: Any) -> dict[str, Any]:
    return {**FRAME, "choices": [{"index": index, "delta": delta, "finish_reason": finish}], **fields}


def call(**fields: Any) -> dict[str, Any]:
    return chunk({"tool_calls": [fields]})


ROLE = chunk({"role": "assistant", "content": ""})
HELLO = chunk({"content": "Hello"})
STOP = chunk({}, "stop")
WHOLE = [ROLE, HELLO, STOP]


def open_stream(wants_usage: bool = False, keep_text: bool = True) -> OpenAIStream:
    fields: dict[str, Any] = {"stream": True, "messages": [{"role": "user", "content": "12345"}]}
    if wants_usage:
        fields["stream_options"] = {"include_usage": True}
    request = ModelRequest("chat.completions", "asked", b"", fields)
    return OpenAI().open_stream(request, keep_text=keep_text, secret="sk-1")


class Outcome:
    """What came of a stream: the client's events, the error in the end, the reader."""

    def __init__(self, pieces: list[bytes], **options: bool) -> None:
        self.reader = open_stream(**options)
        self.events: list[bytes] = []
        self.error: str | None = None
        self.answer: Any = (502, "upstream_error", 200)
        try:
            for piece in pieces:
                self.events += self.reader.feed(piece)
                assert self.reader.has_content is bool(self.events)
            self.events += self.reader.close()
        except UpstreamError as exc:
            self.error = exc.message
            self.answer = (exc.status, exc.code, exc.upstream_status)

    @property
    def chunks(self) -> list[Any]:
        return [json.loads(event.removeprefix(b"data: ")) for event in self.events]

    @property
    def deltas(self) -> list[Any]:
        return [choice["delta"] for chunk in self.chunks for choice in chunk["choices"]]

    def seen(self) -> Any:
        reader = self.reader
        flags = (reader.is_finished, reader.has_content, reader.model, reader.data_events)
        return self.events, self.error, flags, reader.usage(), reader.text(), reader.completion()


def ways_to_cut(stream: bytes) -> Iterator[list[bytes]]:
    yield [bytes([byte]) for byte in stream]
    for place in range(1, len(stream)):
        yield [stream[:place], stream[place:]]


@pytest.fixture(autouse=True)
def same_made_up_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_stream, "new_completion_id", lambda: "chatcmpl-new")
    monkeypatch.setattr("perpetuo.providers.openai_choice.new_call_id", lambda: "call_new")
    monkeypatch.setattr("perpetuo.providers.openai_answer.time.time", lambda: 1234.5)


def replay(*parts: Any, **options: bool) -> Outcome:
    """The outcome of a stream, the same whole, cut at any one place, and byte by byte."""
    stream = b"".join(part if isinstance(part, bytes) else event(part) for part in parts)
    whole = Outcome([stream], **options)
    for pieces in ways_to_cut(stream):
        assert Outcome(pieces, **options).seen() == whole.seen()
    assert whole.answer == (502, "upstream_error", 200)
    return whole


def deltas_of(*parts: Any) -> list[Any]:
    outcome = replay(*parts, STOP, DONE)
    assert outcome.error is None
    return outcome.deltas[:-1]


@pytest.mark.parametrize(
    "end", [DONE, b"data:[DONE] \n\n", b"data: [DONE]", b"", DONE + event(HELLO) + b"data: {"]
)
def test_well_formed_chunks_pass_byte_for_byte(end: bytes) -> None:
    outcome = replay(*WHOLE, end)
    assert outcome.events == [event(fields) for fields in WHOLE]
    assert outcome.error is None
    assert outcome.reader.is_finished
    assert outcome.reader.is_done is bool(end)
    assert outcome.reader.model == "up"


def test_odd_spelling_and_unknown_members_pass_byte_for_byte() -> None:
    odd = b'data: {"id" : "c1","object":"chat.completion.chunk","created":7,"model":"up","x_groq":{"a":1.0},'
    odd += b'"choices":[{"index":0,"delta":{"role":"assistant","content":"\\ud83d\\u0000\xe2\x80\xa8"},'
    odd += b'"finish_reason":null,"logprobs":null}],"usage":null}\n\n'
    assert replay(odd, STOP).events[0] == odd


def test_framing_other_than_data_is_left_out() -> None:
    stream = b": hi\r\n\r\nevent: message\r\nid: 1\r\nretry: 9\r\n" + event(ROLE).replace(b"\n", b"\r\n")
    assert replay(stream, HELLO, STOP).events == [event(fields) for fields in WHOLE]


def test_data_of_several_lines_becomes_one() -> None:
    lines = b"".join(b"data: " + line + b"\n" for line in json.dumps(ROLE, indent=1).encode().split(b"\n"))
    outcome = replay(lines + b"\n", STOP)
    assert outcome.chunks == [ROLE, STOP]
    assert outcome.events[0].count(b"\n") == 2


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "a"},
        {"reasoning_content": "a"},
        {"reasoning": "a"},
        {"refusal": "a"},
        {"audio": {"id": "a"}},
    ]
    + [
        {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f"}}]},
        {"function_call": {"name": "f"}},
    ],
)
def test_chunks_wait_for_the_first_content(delta: dict[str, Any]) -> None:
    reader = open_stream()
    assert reader.feed(event(ROLE) + event(chunk({"content": ""})) + event(chunk({"content": None}))) == []
    assert not reader.has_content
    assert len(reader.feed(event(chunk(delta)))) == 4
    assert reader.has_content


def test_finish_reason_counts_as_content() -> None:
    assert len(replay(ROLE, STOP).events) == 2


def test_what_waits_is_bounded() -> None:
    reader = open_stream()
    reader.feed(event(ROLE) + event(chunk({"content": ""}, pad="x" * 9999)) * 500)
    assert sum(map(len, reader.feed(event(HELLO)))) < 1_100_000


@pytest.mark.parametrize("bad", [None, "", "other", 0, [], True])
@pytest.mark.parametrize("name", ["id", "object", "created", "model"])
def test_frame_is_constant(name: str, bad: Any) -> None:
    first = replay({**ROLE, name: bad} if name != "object" else ROLE, HELLO, STOP)
    assert len({json.dumps({key: one[key] for key in FRAME}) for one in first.chunks}) == 1
    later = {**HELLO, name: bad}
    missing = {key: value for key, value in HELLO.items() if key != name}
    assert replay(ROLE, later, missing, STOP).chunks == [ROLE, HELLO, HELLO, STOP]


def test_created_is_an_integer_in_every_chunk() -> None:
    outcome = replay({**ROLE, "created": 7.0}, {**HELLO, "created": 7.0}, STOP)
    assert [repr(one["created"]) for one in outcome.chunks] == ["7", "7", "7"]


def test_frame_is_made_where_there_is_none() -> None:
    made = {"id": "chatcmpl-new", "object": "chat.completion.chunk", "created": 1234, "model": "asked"}
    outcome = replay({"choices": ROLE["choices"]}, {"choices": STOP["choices"]})
    assert outcome.chunks == [{**ROLE, **made}, {**STOP, **made}]
    assert outcome.reader.model is None


@pytest.mark.parametrize("choices", [None, [], {}])
def test_chunk_without_choices_is_dropped(choices: Any) -> None:
    azure = {
        "choices": choices,
        "id": "",
        "model": "",
        "object": "",
        "created": 0,
        "prompt_filter_results": [],
    }
    assert replay(azure, *WHOLE, {"a": 1}).events == [event(fields) for fields in WHOLE]


def test_role_comes_once_for_each_choice() -> None:
    assert deltas_of(chunk({"content": "a"})) == [{"role": "assistant", "content": "a"}]
    assert deltas_of(chunk({"role": "", "content": "a"})) == [{"role": "assistant", "content": "a"}]
    assert deltas_of(ROLE, ROLE, chunk({"role": "", "content": "b"}))[1:] == [
        {"content": ""},
        {"content": "b"},
    ]


@pytest.mark.parametrize("delta", [None, "", []])
def test_delta_becomes_an_object(delta: Any) -> None:
    assert deltas_of(ROLE, chunk(delta))[1] == {}


def test_missing_index_delta_and_finish_reason_are_added() -> None:
    outcome = replay(ROLE, {**FRAME, "choices": [{}]}, chunk({}, ""), STOP)
    expected = {"index": 0, "delta": {}, "finish_reason": None}
    assert [one["choices"][0] for one in outcome.chunks[1:3]] == [expected, expected]


def test_second_finish_reason_is_dropped() -> None:
    outcome = replay(*WHOLE, chunk({"content": "!"}, "length"))
    assert [one["choices"][0]["finish_reason"] for one in outcome.chunks] == [None, None, "stop", None]


def test_content_in_parts_is_flattened() -> None:
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    text = {"type": "text", "text": "Hi"}
    expected = {"role": "assistant", "content": "Hi", "reasoning_content": "hm"}
    assert deltas_of(chunk({"content": [thinking, text]})) == [expected]


def test_tool_calls_without_fault_pass_byte_for_byte() -> None:
    first = call(index=0, id="a", type="function", function={"name": "f", "arguments": ""})
    parts = [ROLE, first, call(index=0, function={"arguments": "{}"}), chunk({}, "tool_calls")]
    assert replay(*parts).events == [event(part) for part in parts]


def test_tool_calls_are_counted_from_0_by_index() -> None:
    calls = [call(index=index, id=f"i{index}", type="function", function={"name": "f"}) for index in (1, 4)]
    later = call(index=1, id="i1", function={"name": "f", "arguments": "{"})
    first, second, third = (delta["tool_calls"][0] for delta in deltas_of(*calls, later))
    assert first == {"index": 0, "id": "i1", "type": "function", "function": {"name": "f", "arguments": ""}}
    assert (second["index"], second["id"]) == (1, "i4")
    assert third == {"index": 0, "function": {"arguments": "{"}}


@pytest.mark.parametrize("repeated", [{"id": ""}, {"id": "a"}, {"id": None, "type": None}, {}])
@pytest.mark.parametrize("name", ["", "f", None])
def test_repeated_or_empty_id_and_name_are_stripped(repeated: dict[str, Any], name: str | None) -> None:
    first = call(index=0, id="a", type="function", function={"name": "f", "arguments": ""})
    later = call(index=0, **repeated, function={"name": name, "arguments": "{}"})
    assert deltas_of(first, later)[1] == {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}


def test_calls_of_mistral_get_index_and_type() -> None:
    calls = [{"id": name, "function": {"name": "f", "arguments": {"a": 1}}} for name in "ab"]
    mended = deltas_of(chunk({"tool_calls": calls}))[0]["tool_calls"]
    function = {"name": "f", "arguments": '{"a":1}'}
    assert mended == [{"index": i, "id": "ab"[i], "type": "function", "function": function} for i in (0, 1)]


def test_calls_of_gemini_that_share_the_index_0_are_told_apart() -> None:
    calls = [
        call(index=0, id=name, type="function", function={"name": "f", "arguments": "{}"}) for name in "ab"
    ]
    assert [delta["tool_calls"][0]["index"] for delta in deltas_of(*calls)] == [0, 1]


@pytest.mark.parametrize(("name", "count"), [("gemini", 2), ("ollama", 2), ("openai", 1)])
@pytest.mark.parametrize("index", [{}, {"index": 0}])
def test_calls_of_hosts_that_send_them_whole_begin_with_a_name(
    name: str, count: int, index: dict[str, Any]
) -> None:
    request = ModelRequest("chat.completions", "asked", b"", {"stream": True})
    reader = OpenAI(HOSTS[name]).open_stream(request, keep_text=True)
    for city in ("Paris", "Rome"):
        reader.feed(event(call(**index, function={"name": "f", "arguments": f'{{"city":"{city}"}}'})))
    reader.feed(event(STOP))
    message = json.loads(reader.completion())["choices"][0]["message"]
    assert len(message["tool_calls"]) == count


def test_calls_with_neither_id_nor_index_are_told_apart_by_name() -> None:
    functions = [
        {"name": "f", "arguments": "{"},
        {"name": "f", "arguments": "}"},
        {"arguments": ""},
        {"name": "g"},
    ]
    calls = [delta["tool_calls"][0] for delta in deltas_of(*[call(function=one) for one in functions])]
    assert [one["index"] for one in calls] == [0, 0, 0, 1]
    assert [one.get("id") for one in calls] == ["call_new", None, None, "call_new"]
    both = chunk({"tool_calls": [{"function": {"name": "f"}}, {"function": {"name": "f"}}]})
    assert [one["index"] for one in deltas_of(both)[0]["tool_calls"]] == [0, 1]


def test_calls_keep_members_that_we_do_not_know() -> None:
    extra = {"google": {"thought_signature": "x"}}
    given = call(id="a", type="function", function={"name": "f", "arguments": "{}"}, extra_content=extra)
    assert deltas_of(given)[0]["tool_calls"][0]["extra_content"] == extra


def test_custom_calls_are_joined_too() -> None:
    first = call(index=0, id="a", type="custom", custom={"name": "f", "input": "x"})
    outcome = replay(ROLE, first, call(index=0, custom={"input": "y"}), STOP)
    message = json.loads(outcome.reader.completion())["choices"][0]["message"]
    assert message["tool_calls"] == [{"id": "a", "type": "custom", "custom": {"name": "f", "input": "xy"}}]
    assert outcome.events[1] == event(first)


def test_choices_begin_in_the_order_of_their_index() -> None:
    second = chunk({"role": "assistant", "content": "b"}, "stop", index=1)
    outcome = replay(second, ROLE, HELLO, STOP)
    assert outcome.error is None
    assert [one["choices"][0]["index"] for one in outcome.chunks] == [0, 1, 0, 0, 0]
    assert [delta.get("role") for delta in outcome.deltas] == ["assistant", "assistant", None, None, None]


@pytest.mark.parametrize("index", [-1, 128, 10**12])
def test_impossible_index_of_a_choice_is_refused(index: int) -> None:
    assert "impossible index" in str(replay(chunk({"content": "a"}, index=index)).error)


@pytest.mark.parametrize(
    "error",
    [{"message": "boom sk-1", "code": 500}, "boom sk-1"],
)
@pytest.mark.parametrize("choices", [{}, {"choices": HELLO["choices"]}])
def test_error_is_raised_in_its_words_after_what_came_before(error: Any, choices: dict[str, Any]) -> None:
    outcome = replay(ROLE, HELLO, {"error": error, **choices}, STOP, DONE)
    assert outcome.error == "boom [redacted]"
    assert outcome.events == [event(ROLE), event(HELLO)]


@pytest.mark.parametrize("data", [b'{"message":"boom sk-1"}', b"boom sk-1", b'"boom sk-1"'])
def test_event_named_error_is_an_error(data: bytes) -> None:
    assert replay(*WHOLE, b"event: error\ndata: " + data + b"\n\n").error == "boom [redacted]"


def test_error_before_content_lets_nothing_out() -> None:
    outcome = replay(ROLE, {"error": {"message": "boom"}})
    assert (outcome.events, outcome.error) == ([], "boom")


def test_error_alone_in_its_piece_is_raised_at_once() -> None:
    reader = open_stream()
    reader.feed(event(ROLE) + event(HELLO))
    with pytest.raises(UpstreamError, match="boom"):
        reader.feed(event({"error": {"message": "boom"}}))


def test_error_after_good_events_of_its_piece_ends_the_stream_at_once() -> None:
    reader = open_stream()
    assert len(reader.feed(event(ROLE) + event(HELLO) + event({"error": {"message": "boom"}}))) == 2
    assert reader.is_done
    with pytest.raises(UpstreamError, match="boom"):
        reader.close()


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"hello",
        b"[1]",
        b"3",
        b'{"choices":[{"index":0,"delta":{"content":NaN}}]}',
        b'{"a":"\xff"}',
        b"<html>",
    ]
    + [b'{"choices":[1]}', b'{"choices":"a"}', b'{"choices":[{"delta":{"tool_calls":[1]}}]}'],
)
def test_event_that_is_no_chunk_is_refused(data: bytes) -> None:
    outcome = replay(ROLE, HELLO, b"data: " + data + b"\n\n", STOP, DONE)
    assert str(outcome.error).startswith("The upstream sent")
    assert len(outcome.events) == 2


@pytest.mark.parametrize(
    "stream", [b"", DONE, b": hi\n\n", event({**FRAME, "choices": [], "usage": USAGE}), b"data: {"]
)
def test_stream_without_an_answer_is_an_error(stream: bytes) -> None:
    outcome = replay(stream)
    assert (outcome.events, outcome.error) == ([], "The upstream's stream ended without an answer.")


@pytest.mark.parametrize("end", [b"", DONE, event(STOP)[:-9]])
def test_stream_without_its_finish_reason_is_an_error(end: bytes) -> None:
    outcome = replay(ROLE, HELLO, end)
    assert len(outcome.events) == 2
    assert outcome.error == "The upstream's stream ended before it was finished."
    assert not outcome.reader.is_finished


def test_every_choice_that_began_must_finish() -> None:
    assert "before it was finished" in str(replay(ROLE, chunk({}, "stop", index=1)).error)
    assert "before it was finished" in str(replay(*WHOLE, chunk({"content": "b"}, index=1)).error)


@pytest.mark.parametrize("cut", [1, 2])
def test_last_event_may_lack_its_blank_line(cut: int) -> None:
    assert replay(ROLE, HELLO, event(STOP)[:-cut]).events == [event(fields) for fields in WHOLE]


def test_usage_chunk_is_dropped_unless_asked_for() -> None:
    last = {**FRAME, "choices": [], "usage": USAGE}
    assert len(replay(*WHOLE, last, DONE).events) == 3
    assert replay(*WHOLE, last, DONE).reader.usage() == Usage(3, 2, 5)


def test_usage_chunk_comes_last_and_mended() -> None:
    early = {"choices": None, "usage": {"prompt_tokens": 9}, "id": ""}
    outcome = replay(early, ROLE, early | {"usage": USAGE}, HELLO, STOP, DONE, wants_usage=True)
    assert outcome.chunks == [*WHOLE, {**FRAME, "choices": [], "usage": USAGE}]


def test_usage_that_only_groq_would_find_has_a_chunk_of_its_own() -> None:
    groq = STOP | {"x_groq": {"usage": USAGE}}
    outcome = replay(ROLE, HELLO, groq, DONE, wants_usage=True)
    assert outcome.chunks == [ROLE, HELLO, groq, {**FRAME, "choices": [], "usage": USAGE}]
    assert replay(ROLE, HELLO, groq, DONE).chunks == [ROLE, HELLO, groq]
    assert outcome.reader.usage() == Usage(3, 2, 5)


@pytest.mark.parametrize("wants_usage", [True, False])
def test_usage_beside_choices_passes_and_is_read(wants_usage: bool) -> None:
    parts = [ROLE, HELLO | {"usage": None}, STOP | {"usage": USAGE}]
    outcome = replay(*parts, DONE, wants_usage=wants_usage)
    assert outcome.events == [event(part) for part in parts]
    assert outcome.reader.usage() == Usage(3, 2, 5)


@pytest.mark.parametrize("keep_text", [True, False])
def test_usage_is_estimated_where_none_came(keep_text: bool) -> None:
    thought = chunk({"reasoning_content": "1234", "reasoning": "1234"})
    tool = call(index=0, id="a", type="function", function={"name": "f", "arguments": "1234"})
    reader = replay(ROLE, thought, HELLO, tool, keep_text=keep_text).reader
    assert reader.usage() == Usage(2, 4, 6, source="estimate")


def test_completion_is_the_joined_stream() -> None:
    first = call(index=0, id="a", type="function", function={"name": "f", "arguments": "{"})
    parts = [
        ROLE,
        chunk({"reasoning": "hm"}),
        HELLO,
        HELLO,
        first,
        call(index=0, function={"arguments": "}"}),
    ]
    reader = replay(*parts, chunk({"refusal": "no"}, "tool_calls", usage=USAGE), DONE).reader
    tool_call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": "HelloHello", "reasoning_content": "hm", "refusal": "no"}
    choice = {"index": 0, "message": message | {"tool_calls": [tool_call]}, "finish_reason": "tool_calls"}
    frame = FRAME | {"object": "chat.completion"}
    assert json.loads(reader.completion()) == {**frame, "choices": [choice], "usage": USAGE}


def test_completion_keeps_half_an_emoji() -> None:
    parts = [chunk({"content": "\ud83d"}), chunk({"content": "\ude00"})]
    assert b"\\ud83d\\ude00" in replay(*parts, STOP).reader.completion()


def test_kept_text_is_bounded_and_says_so() -> None:
    reader = open_stream()
    for _ in range(200):
        reader.feed(event(chunk({"content": "x" * 5000})))
    completion = json.loads(reader.completion())
    assert completion["truncated"] is True
    assert len(completion["choices"][0]["message"]["content"]) == 512 * 1024
    assert reader.usage().completion_tokens == 250_000


def test_text_is_the_beginning_of_the_first_choice() -> None:
    other = chunk({"content": "other"}, "stop", index=1)
    assert replay(other, ROLE, HELLO, STOP).reader.text() == "Hello"
    assert replay(chunk({"content": "ab" * 150}), STOP).reader.text() == "ab" * 100
    assert replay(*WHOLE, keep_text=False).reader.text() == ""
    assert b"Hello" not in replay(*WHOLE, keep_text=False).reader.completion()


def test_data_events_do_not_count_comments() -> None:
    assert replay(b": a\n\n", ROLE, b": b\n\n", HELLO, STOP, DONE).reader.data_events == 4


def test_nothing_is_read_after_done() -> None:
    reader = open_stream()
    reader.feed(event(ROLE) + event(STOP) + DONE)
    assert reader.feed(event(HELLO) + b"data: {\n\n") == []
    assert reader.close() == []
