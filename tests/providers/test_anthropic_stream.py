import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from perpetuo.errors import UpstreamError
from perpetuo.providers.anthropic import Anthropic
from perpetuo.providers.base import Usage
from tests.providers.anthropic_case import SECRET, STREAMS, asking, load, sse

FAILING = [name for name in STREAMS if "error" in load(name)["expected"]]
WHOLE = [name for name in STREAMS if name not in FAILING]


class Outcome:
    """What came of a stream: the client's events, the error in the end, the reader."""

    def __init__(self, name: str, pieces: list[bytes], wants_usage: bool = True, keep_text: bool = True):
        case = load(name)
        options = {"stream_options": {"include_usage": wants_usage}, "stream": True}
        request = asking(case["model"], **case["request"], **options)
        self.reader = Anthropic().open_stream(request, keep_text=keep_text, secret=SECRET)
        self.events: list[bytes] = []
        self.error: UpstreamError | None = None
        try:
            for piece in pieces:
                self.events += self.reader.feed(piece)
                assert self.reader.has_content is bool(self.events)
            self.events += self.reader.close()
        except UpstreamError as exc:
            self.error = exc

    @property
    def chunks(self) -> list[Any]:
        assert all(
            event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2 for event in self.events
        )
        return [json.loads(event.removeprefix(b"data: ")) for event in self.events]

    @property
    def deltas(self) -> list[Any]:
        return [choice["delta"] for chunk in self.chunks for choice in chunk["choices"]]

    def seen(self) -> Any:
        reader = self.reader
        flags = (reader.is_finished, reader.has_content, reader.model, reader.data_events)
        error = self.error and (self.error.message, self.error.body(), self.error.upstream_status)
        return self.events, error, flags, reader.usage(), reader.text(), reader.completion()


def ways_to_cut(stream: bytes) -> Iterator[list[bytes]]:
    yield [bytes([byte]) for byte in stream]
    for place in range(1, len(stream)):
        yield [stream[:place], stream[place:]]


@pytest.fixture(autouse=True)
def same_made_up_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perpetuo.providers.anthropic_stream.new_completion_id", lambda: "chatcmpl-new")
    monkeypatch.setattr("perpetuo.providers.anthropic_blocks.new_call_id", lambda: "call_new")
    monkeypatch.setattr("perpetuo.providers.anthropic_stream.time.time", lambda: 1234.5)


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_the_same_wherever_it_is_cut(name: str) -> None:
    stream = sse(name)
    whole = Outcome(name, [stream])
    for pieces in ways_to_cut(stream):
        assert Outcome(name, pieces).seen() == whole.seen()


def joined_by_the_client(chunks: list[Any]) -> Any:
    """What the official client's accumulator makes of the chunks, before it judges the finish reason."""
    state = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    return state.current_completion_snapshot.to_dict(mode="json")


@pytest.mark.parametrize("name", WHOLE)
def test_the_official_client_joins_it_to_what_is_expected(name: str) -> None:
    outcome, expected = Outcome(name, [sse(name)]), load(name)["expected"]
    assert outcome.error is None
    joined = joined_by_the_client(outcome.chunks)
    (choice,) = joined["choices"]
    message = {key: value for key, value in choice["message"].items() if key not in ("role", "parsed")}
    for call in message.get("tool_calls") or ():
        call.pop("index")
        call["function"].pop("parsed_arguments", None)
    # What is null in a message is the empty text of the role's chunk in a stream.
    wanted = {**expected["message"], "content": expected["message"]["content"] or ""}
    assert {key: value for key, value in message.items() if value is not None} == wanted
    assert choice["finish_reason"] == expected["finish_reason"]
    assert joined.get("usage") == expected["usage"]


@pytest.mark.parametrize("name", WHOLE)
def test_the_joined_completion_is_what_is_expected(name: str) -> None:
    outcome, expected = Outcome(name, [sse(name)]), load(name)["expected"]
    completion = json.loads(outcome.reader.completion())
    (choice,) = completion["choices"]
    assert choice["message"] == {"role": "assistant", "refusal": None, **expected["message"]}
    assert (choice["index"], choice["finish_reason"]) == (0, expected["finish_reason"])
    assert completion.get("usage") == expected["usage"]
    assert completion["object"] == "chat.completion"
    assert "truncated" not in completion


@pytest.mark.parametrize("name", WHOLE)
def test_every_stream_obeys_what_clients_need(name: str) -> None:
    outcome = Outcome(name, [sse(name)])
    chunks = [chunk for chunk in outcome.chunks if chunk["choices"]]
    frames = {(c["id"], c["object"], c["created"], c["model"]) for c in outcome.chunks}
    assert len(frames) == 1
    assert {type(value) for value in frames.pop()} == {str, int}
    assert outcome.chunks[0]["object"] == "chat.completion.chunk"
    assert ["role" in delta for delta in outcome.deltas] == [True] + [False] * (len(chunks) - 1)
    finishes = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert finishes[:-1] == [None] * (len(chunks) - 1)
    assert finishes[-1]
    assert all(chunk["choices"][0]["index"] == 0 for chunk in chunks)
    seen = 0
    for call in [call for delta in outcome.deltas for call in delta.get("tool_calls", ())]:
        if "id" in call:
            assert call["index"] == seen
            assert call["type"] == "function"
            seen += 1
        else:
            assert call.keys() == {"index", "function"}
            assert call["function"].keys() == {"arguments"}
            assert call["index"] < seen


@pytest.mark.parametrize("name", WHOLE)
def test_usage_comes_last_and_only_if_it_was_asked_for(name: str) -> None:
    asked, unasked = Outcome(name, [sse(name)]), Outcome(name, [sse(name)], wants_usage=False)
    expected = load(name)["expected"]["usage"]
    assert asked.events[: len(unasked.events)] == unasked.events
    extra = asked.chunks[len(unasked.chunks) :]
    assert [(chunk["choices"], chunk["usage"]) for chunk in extra] == ([([], expected)] if expected else [])
    assert not any("usage" in chunk for chunk in unasked.chunks)


@pytest.mark.parametrize("name", FAILING)
def test_a_stream_that_fails_raises_what_is_expected(name: str) -> None:
    outcome, expected = Outcome(name, [sse(name)]), load(name)["expected"]["error"]
    error = outcome.error
    assert error is not None
    found = {name: getattr(error, name) for name in expected}
    assert found == expected
    assert not outcome.reader.is_finished
    assert not any(chunk["choices"][0]["finish_reason"] for chunk in outcome.chunks)


@pytest.mark.parametrize("name", ["error_before_content", "error_of_the_rate", "cut_before_anything"])
def test_nothing_has_gone_out_before_an_early_error(name: str) -> None:
    outcome = Outcome(name, [sse(name)])
    assert outcome.events == []
    assert not outcome.reader.has_content


def test_what_came_before_an_error_goes_out_first() -> None:
    outcome = Outcome("error_after_content", [sse("error_after_content")])
    assert outcome.deltas == [{"role": "assistant", "content": ""}, {"content": "Hel"}]
    assert outcome.reader.is_done


def test_the_example_of_the_specification() -> None:
    outcome = Outcome("text_and_two_tools", [sse("text_and_two_tools")])
    function = {"name": "get_weather", "arguments": ""}
    assert outcome.deltas[:5] == [
        {"role": "assistant", "content": ""},
        {"content": "Let me look."},
        {"tool_calls": [{"index": 0, "id": "toolu_1", "type": "function", "function": function}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Oslo"}'}}]},
    ]


def test_frame_is_the_upstreams() -> None:
    outcome = Outcome("text", [sse("text")])
    first = outcome.chunks[0]
    assert (first["id"], first["created"]) == ("msg_01A", 1234)
    assert first["model"] == outcome.reader.model == "claude-sonnet-4-5-20250929"
    made = Outcome("without_message_start", [sse("without_message_start")])
    assert (made.chunks[0]["id"], made.chunks[0]["model"]) == ("chatcmpl-new", "claude-sonnet-4-5")
    assert made.reader.model is None


def test_half_an_emoji_in_a_delta_passes() -> None:
    stream = sse("text").replace("🌍".encode(), b"\\ud83c")
    (odd,) = [event for event in Outcome("text", [stream]).events if b"ud83c" in event]
    assert json.loads(odd[6:])["choices"][0]["delta"]["content"].endswith("\ud83c")


def test_usage_is_known_at_any_time() -> None:
    name = "cache_counts"
    stream = sse(name)
    assert Outcome(name, [stream]).reader.usage() == Usage(119, 40, 159, 100, 7)
    early = Outcome(name, [stream[: stream.index(b"event: message_delta")]]).reader.usage()
    assert (early.prompt_tokens, early.completion_tokens, early.source) == (119, 1, "estimate")
    assert Outcome(name, []).reader.usage().source == "estimate"


def test_several_passes_are_billed_by_their_sum() -> None:
    passes = [{"type": "message", "input_tokens": 20, "output_tokens": 30, "cache_read_input_tokens": 4}]
    passes += [{"type": "compaction", "input_tokens": 5, "output_tokens": 6}]
    passes += [{"type": "advisor_message", "input_tokens": 1000, "output_tokens": 1000}]
    more = b'"usage":{"iterations":' + json.dumps(passes).encode() + b","
    outcome = Outcome(
        "text", [sse("text").replace(b'"usage":{"output_tokens":30', more + b'"output_tokens":30')]
    )
    assert outcome.reader.usage() == Usage(29, 36, 65, cached_tokens=4)
    assert outcome.chunks[-1]["usage"]["total_tokens"] == 50


def test_text_is_counted_but_not_kept_where_none_shall_be() -> None:
    name = "cut_in_the_middle"
    outcome = Outcome(name, [sse(name)], keep_text=False)
    assert outcome.reader.text() == ""
    assert json.loads(outcome.reader.completion())["choices"][0]["message"]["content"] == ""
    assert outcome.reader.usage().completion_tokens == 1


def test_long_text_is_kept_in_part_and_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perpetuo.providers.anthropic.MAX_KEPT_CHARACTERS", 3)
    completion = json.loads(Outcome("text", [sse("text")]).reader.completion())
    assert completion["choices"][0]["message"]["content"] == "Hel"
    assert completion["truncated"] is True


def test_a_ping_counts_as_activity_and_a_comment_does_not() -> None:
    reader = Anthropic().open_stream(asking(), keep_text=True)
    assert reader.feed(b": hi\n\n") == []
    assert reader.data_events == 0
    assert reader.feed(b'event: ping\ndata: {"type":"ping"}\n\n') == []
    assert reader.data_events == 1


def test_input_nested_too_deeply_is_an_error() -> None:
    deep = b'{"a":' * 1010 + b"1" + b"}" * 1010
    block = b'{"type":"content_block_start","index":0,"content_block":{"type":"tool_use","name":"f","input":'
    reader = Anthropic().open_stream(asking(), keep_text=True)
    with pytest.raises(UpstreamError, match="too deeply"):
        reader.feed(b"data: " + block + deep + b"}}\n\n")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.sampled_from(["", "x", "text", "tool_use", "{}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "index", "delta", "text", "content_block", "message", "id", "input", "usage"]
            )
            | st.sampled_from(
                ["content", "name", "stop_reason", "partial_json", "thinking", "output_tokens"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=6,
)
KINDS = ["message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta"]
DELTAS = ["text_delta", "thinking_delta", "signature_delta", "input_json_delta", "citations_delta"]
EVENTS = st.fixed_dictionaries(
    {"type": st.sampled_from([*KINDS, "message_stop"])},
    optional={
        "index": st.integers(0, 2) | JSON,
        "content_block": st.fixed_dictionaries(
            {"type": st.sampled_from(["text", "tool_use", "thinking", "server_tool_use"])},
            optional={"id": JSON, "name": JSON, "input": JSON, "text": JSON, "thinking": JSON},
        )
        | JSON,
        "delta": st.fixed_dictionaries(
            {"type": st.sampled_from(DELTAS)},
            optional=dict.fromkeys(("text", "thinking", "partial_json", "signature"), JSON),
        )
        | JSON,
        "message": JSON,
        "usage": JSON,
    },
)


@given(st.lists(EVENTS, max_size=12))
def test_any_events_give_chunks_that_clients_can_join_or_an_error(events: list[Any]) -> None:
    stream = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    outcome = Outcome("text", [stream])
    if outcome.chunks:
        joined = joined_by_the_client(outcome.chunks)
        assert joined["choices"][0]["message"]["role"] == "assistant"
    assert outcome.error is not None or outcome.reader.is_finished
