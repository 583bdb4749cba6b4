"""What every adapter promises, whatever its upstream sends: one story told in each provider's own way.

A provider of the catalogue needs six files in `tests/streams/<name>/contract/`: `text.sse` and `answer.json`
(the text "Hello world"), `tools.sse` and `calls.json` (weather in Paris, then the time), `error.sse` (breaks
off after "Hel") and `refusals.json` (bodies, and what the client is told). All count 10 tokens in, 6 out.
"""

import json
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageFunctionToolCall

from perpetuo.errors import UpstreamError
from perpetuo.providers.base import ChunkReader, ModelRequest, Provider
from perpetuo.providers.catalog import CATALOG, adapter

SECRET = "sk-contract-1"
STREAMS = Path(__file__).parent.parent / "streams"
PROVIDERS = [name for name in CATALOG if adapter(name) is not None]
THINKERS = {
    *("anthropic", "custom", "deepseek", "fireworks", "groq", "mistral"),
    *("ollama", "openrouter", "together", "vllm", "xai"),
}
FINISH_REASONS = {"stop", "length", "tool_calls", "content_filter"}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("weather", "time")
]
CALLS = [("weather", {"city": "Paris"}), ("time", {})]
QUESTION = {"role": "user", "content": "How is the weather, and how late is it?"}

every_provider = pytest.mark.parametrize("name", PROVIDERS)


@cache
def recorded(name: str, file: str) -> bytes:
    return (STREAMS / name / "contract" / file).read_bytes()


def of(name: str) -> Provider:
    found = adapter(name)
    assert found is not None
    return found


def base_url(name: str) -> str:
    return CATALOG[name].base_url or f"https://{name}.example/v1"


def request(messages: Any = (QUESTION,), **fields: Any) -> ModelRequest:
    asked = {"model": "m-1", "messages": list(messages), "tools": TOOLS, **fields}
    return ModelRequest("chat.completions", "m-1", json.dumps(asked).encode(), asked)


def streamed(**options: Any) -> ModelRequest:
    return request(stream=True, **({"stream_options": options} if options else {}))


def ways_to_cut(stream: bytes) -> Iterator[list[bytes]]:
    yield [stream]
    yield [bytes([byte]) for byte in stream]
    for place in range(1, len(stream)):
        yield [stream[:place], stream[place:]]


def read(name: str, pieces: list[bytes], **options: Any) -> tuple[list[bytes], ChunkReader]:
    reader = of(name).open_stream(streamed(**options), keep_text=True, secret=SECRET)
    events = [event for piece in pieces for event in reader.feed(piece)]
    return events + reader.close(), reader


def chunks_of(events: list[bytes]) -> list[Any]:
    for event in events:
        assert event.startswith(b"data: {")
        assert event.endswith(b"}\n\n")
        assert event.count(b"\n") == 2
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def accumulated(chunks: list[Any]) -> ChatCompletion:
    """What the official client's own accumulator makes of it."""
    state = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    return state.get_final_completion()


def calls_of(message: Any) -> list[tuple[str, Any]]:
    calls = message.tool_calls or []
    assert all(isinstance(call, ChatCompletionMessageFunctionToolCall) for call in calls)
    assert all(call.type == "function" and call.id for call in calls)
    assert len({call.id for call in calls}) == len(calls)
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


def check_frame(chunks: list[Any]) -> None:
    frames = {json.dumps([chunk.get(n) for n in ("id", "object", "created", "model")]) for chunk in chunks}
    assert len(frames) == 1
    stream_id, kind, created, model = json.loads(frames.pop())
    assert stream_id
    assert model
    assert kind == "chat.completion.chunk"
    assert type(created) is int


def check_choices(chunks: list[Any]) -> None:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [choice["index"] for choice in choices] == [0] * len(choices)
    deltas = [choice["delta"] for choice in choices]
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "role" not in {name for delta in deltas[1:] for name in delta}
    assert all(delta.get("content") is None or isinstance(delta["content"], str) for delta in deltas)
    reasons = [choice["finish_reason"] for choice in choices]
    assert len([reason for reason in reasons if reason]) == 1
    assert {reason for reason in reasons if reason} <= FINISH_REASONS


def check_call_deltas(chunks: list[Any]) -> None:
    calls = [
        call
        for chunk in chunks
        for choice in chunk["choices"]
        for call in choice["delta"].get("tool_calls") or ()
    ]
    seen: set[int] = set()
    for call in calls:
        assert type(call["index"]) is int
        if call["index"] in seen:
            assert not call.keys() & {"id"}
            assert "name" not in call["function"]
        else:
            assert call["index"] == len(seen)
            assert call["type"] == "function"
            assert call["id"]
            assert call["function"]["name"]
            seen.add(call["index"])


def check_usage(chunks: list[Any]) -> None:
    counted = [place for place, chunk in enumerate(chunks) if chunk.get("usage")]
    assert counted == [len(chunks) - 1]
    check_counts(chunks[-1]["usage"])


def check_counts(usage: Any) -> None:
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (10, 6, 16)


@every_provider
@pytest.mark.parametrize("file", ["text.sse", "tools.sse"])
def test_a_stream_is_what_clients_read(name: str, file: str) -> None:
    events, reader = read(name, [recorded(name, file)], include_usage=True)
    chunks = chunks_of(events)
    check_frame(chunks)
    check_choices(chunks)
    check_call_deltas(chunks)
    check_usage(chunks)
    completion = accumulated(chunks)
    (choice,) = completion.choices
    assert choice.message.role == "assistant"
    if file == "text.sse":
        assert (choice.message.content, choice.finish_reason) == ("Hello world", "stop")
        assert choice.message.tool_calls is None
    else:
        assert (calls_of(choice.message), choice.finish_reason) == (CALLS, "tool_calls")
    assert completion.usage
    assert completion.usage.total_tokens == 16
    assert (reader.is_finished, reader.is_done, reader.has_content) == (True, True, True)


@every_provider
@pytest.mark.parametrize("file", ["text.sse", "tools.sse"])
def test_a_stream_may_be_cut_anywhere(name: str, file: str) -> None:
    def seen(pieces: list[bytes]) -> Any:
        events, reader = read(name, pieces, include_usage=True)
        # Ids and times that the upstream left out are made up.
        told = [_without_made(chunk) for chunk in chunks_of(events)]
        return told, reader.usage(), reader.text(), reader.model, reader.data_events

    ways = ways_to_cut(recorded(name, file))
    whole = seen(next(ways))
    for pieces in ways:
        assert seen(pieces) == whole


def _without_made(chunk: Any) -> Any:
    chunk = {member: value for member, value in chunk.items() if member not in ("id", "created")}
    for choice in chunk["choices"]:
        for call in choice["delta"].get("tool_calls") or ():
            call.pop("id", None)
    return chunk


@every_provider
def test_usage_is_read_and_kept_from_those_who_did_not_ask(name: str) -> None:
    events, reader = read(name, [recorded(name, "text.sse")])
    assert all(chunk["choices"] for chunk in chunks_of(events))
    usage = reader.usage()
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (10, 6, 16)
    assert usage.source == "provider"


@every_provider
def test_a_stream_is_joined_for_the_log(name: str) -> None:
    events, reader = read(name, [recorded(name, "text.sse")], include_usage=True)
    (choice,) = json.loads(reader.completion())["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello world", "stop")
    assert reader.text() == "Hello world"
    _, reader = read(name, [recorded(name, "tools.sse")])
    (choice,) = json.loads(reader.completion())["choices"]
    joined = [call["function"] for call in choice["message"]["tool_calls"]]
    assert [(call["name"], json.loads(call["arguments"])) for call in joined] == CALLS


@pytest.mark.parametrize("name", [name for name in PROVIDERS if name in THINKERS])
def test_thoughts_have_one_name(name: str) -> None:
    events, _ = read(name, [recorded(name, "text.sse")])
    deltas = [choice["delta"] for chunk in chunks_of(events) for choice in chunk["choices"]]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "hm"
    assert not any(delta.get("reasoning") for delta in deltas)
    message = json.loads(of(name).read_answer(request(), recorded(name, "answer.json")).body)["choices"][0]
    assert message["message"]["reasoning_content"] == "hm"
    assert "reasoning" not in message["message"]


def collect(reader: ChunkReader, pieces: list[bytes], events: list[bytes]) -> None:
    for piece in pieces:
        events += reader.feed(piece)
    events += reader.close()


@every_provider
def test_a_broken_stream_raises_after_what_came_before(name: str) -> None:
    for pieces in ways_to_cut(recorded(name, "error.sse")):
        reader = of(name).open_stream(streamed(), keep_text=True, secret=SECRET)
        events: list[bytes] = []
        with pytest.raises(UpstreamError) as caught:
            collect(reader, pieces, events)
        assert (caught.value.status, caught.value.code) == (502, "upstream_error")
        assert SECRET not in caught.value.message
        text = [choice["delta"].get("content") or "" for c in chunks_of(events) for choice in c["choices"]]
        assert "".join(text) == "Hel"
        assert not reader.is_finished


@every_provider
@pytest.mark.parametrize("file", ["text.sse", "tools.sse"])
def test_a_stream_that_ends_too_soon_raises(name: str, file: str) -> None:
    whole = recorded(name, file)
    with pytest.raises(UpstreamError, match="before it was finished|without an answer"):
        read(name, [whole[: len(whole) // 3]])


@every_provider
def test_a_whole_answer_is_what_clients_read(name: str) -> None:
    answer = of(name).read_answer(request(), recorded(name, "answer.json"), secret=SECRET)
    fields = json.loads(answer.body)
    completion = ChatCompletion.model_validate(fields)
    (choice,) = completion.choices
    assert (completion.object, choice.index, choice.finish_reason) == ("chat.completion", 0, "stop")
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello world")
    assert choice.message.refusal is None
    assert not choice.message.tool_calls
    assert completion.id
    assert (type(fields["created"]), type(fields["model"])) == (int, str)
    check_counts(fields["usage"])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.source) == (
        *(10, 6),
        "provider",
    )
    assert answer.text == "Hello world"
    assert answer.model


@every_provider
def test_tool_calls_of_a_whole_answer_are_what_clients_read(name: str) -> None:
    answer = of(name).read_answer(request(), recorded(name, "calls.json"), secret=SECRET)
    (choice,) = ChatCompletion.model_validate_json(answer.body).choices
    assert (calls_of(choice.message), choice.finish_reason) == (CALLS, "tool_calls")


@every_provider
@pytest.mark.parametrize("body", [b"", b"<html>Sign in</html>", b"[]", b"{}", b'{"error":{"message":"x"}}'])
def test_what_is_no_answer_raises(name: str, body: bytes) -> None:
    with pytest.raises(UpstreamError):
        of(name).read_answer(request(), body, secret=SECRET)


@every_provider
def test_refusals_are_told_apart_and_keep_their_words(name: str) -> None:
    refusals = json.loads(recorded(name, "refusals.json"))
    assert len(refusals) >= 3
    for refusal in refusals:
        given, expected = refusal["body"], refusal["expected"]
        body = given.encode() if isinstance(given, str) else json.dumps(given).encode()
        error = of(name).read_error(refusal["status"], refusal["headers"], body, SECRET)
        assert (error.status, error.code) == (expected["status"], expected["code"]), refusal
        assert error.message == expected.get("message", error.message)
        assert error.upstream_status == refusal["status"]
        told = json.dumps(error.body()) + json.dumps(error.headers)
        assert SECRET not in told
        assert ("[redacted]" in told) is (SECRET in json.dumps(given))


@every_provider
@pytest.mark.parametrize("fields", [{}, {"stream": True}])
def test_the_secret_is_in_the_headers_alone(name: str, fields: dict[str, Any]) -> None:
    built = of(name).build_request(request(**fields), base_url(name), SECRET)
    assert built.url.startswith(base_url(name).split("/openai")[0])
    assert SECRET not in built.url
    assert SECRET.encode() not in (built.body or b"")
    assert len([value for value in built.headers.values() if SECRET in value]) == 1
    listing = of(name).build_models_request(base_url(name), SECRET)
    assert (listing.method, listing.body) == ("GET", None)
    assert built.headers.keys() >= listing.headers.keys()


@pytest.mark.parametrize("name", [name for name in PROVIDERS if CATALOG[name].may_lack_api_key])
def test_without_a_secret_there_is_no_authorization(name: str) -> None:
    built = of(name).build_request(request(), base_url(name), "")
    assert not {"authorization", "api-key", "x-api-key"} & built.headers.keys()


# A conversation that moves.


def turn_of(name: str) -> list[dict[str, Any]]:
    """What a client adds to its messages after `name` called two tools: the answer, the results."""
    body = of(name).read_answer(request(), recorded(name, "calls.json"), secret=SECRET).body
    message = json.loads(body)["choices"][0]["message"]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": "fine"}
        for call in message["tool_calls"]
    ]
    return [message, *results]


def pairs(messages: list[Any]) -> Iterator[tuple[str, str]]:
    """The ids of calls with those of their results, in OpenAI's shape or in Anthropic's."""
    for message, *rest in (messages[place:] for place in range(len(messages))):
        if message.get("tool_calls"):
            calls = [call["id"] for call in message["tool_calls"]]
            yield from zip(calls, [answer["tool_call_id"] for answer in rest[: len(calls)]], strict=True)
        elif message["role"] == "assistant" and isinstance(message["content"], list):
            calls = [part["id"] for part in message["content"] if part["type"] == "tool_use"]
            parts = rest[0]["content"]
            results = [part["tool_use_id"] for part in parts if part["type"] == "tool_result"]
            yield from zip(calls, results, strict=True)


MESSAGE = {"role", "content"}
CALLER, RESULT = MESSAGE | {"tool_calls"}, MESSAGE | {"tool_call_id"}
STRICT = {  # what hosts that refuse unknown members allow
    "mistral": {"assistant": CALLER | {"prefix"}, "tool": RESULT | {"name"}},
    "groq": {"assistant": CALLER | {"function_call"}, "tool": RESULT},
    "openai": {"assistant": CALLER | {"refusal", "annotations"}, "tool": RESULT | {"name"}},
    "azure": {"assistant": CALLER | {"refusal", "annotations"}, "tool": RESULT | {"name"}},
}


def check_strict(name: str, messages: list[Any]) -> None:
    for message in messages:
        allowed = STRICT.get(name, {}).get(message["role"])
        given = {member for member, value in message.items() if value is not None}
        if allowed is not None and not (allowed >= given - {"prefix"}):
            raise AssertionError(f"{name} would refuse {given - allowed}")
        for call in message.get("tool_calls") or ():
            if name in STRICT:
                assert call.keys() <= {"id", "type", "function"}
            assert isinstance(call["function"]["arguments"], str)
        if name == "deepseek" and message["role"] == "assistant":
            assert isinstance(message.get("reasoning_content"), str)


@pytest.mark.parametrize(("first", "second"), list(product(PROVIDERS, PROVIDERS)))
def test_a_conversation_with_tools_goes_on_at_another_provider(first: str, second: str) -> None:
    messages = [QUESTION, *turn_of(first), {"role": "user", "content": "And tomorrow?"}, *turn_of(second)]
    built = of(second).build_request(request(messages), base_url(second), SECRET)
    again = of(second).build_request(request(messages), base_url(second), SECRET)
    assert (built.url, built.body) == (again.url, again.body)
    sent = json.loads(built.body or b"")["messages"]
    found = list(pairs(sent))
    assert len(found) == 4
    assert all(call == result for call, result in found)
    assert len({call for call, _ in found}) == len(
        {call["id"] for m in messages for call in m.get("tool_calls", ())}
    )
    if second == "mistral":
        assert all(len(call) == 9 and call.isalnum() for call, _ in found)
    if second in ("openai", "azure"):
        assert all(len(call) <= 40 for call, _ in found)
    if CATALOG[second].adapter == "openai":
        check_strict(second, sent)
