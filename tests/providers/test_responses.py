import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from perpetuo.errors import UpstreamError
from perpetuo.providers.base import ModelRequest, Usage
from perpetuo.providers.catalog import CATALOG, adapter
from perpetuo.providers.endings import error_event
from perpetuo.providers.openai import OpenAI
from perpetuo.providers.responses_stream import ResponsesStream
from tests.fake_upstream import FakeUpstream, stream

FOLDER = Path(__file__).parent.parent / "streams" / "openai" / "responses"
SECRET = "sk-contract-1"
USAGE = Usage(10, 6, 16, cached_tokens=4, reasoning_tokens=2)
WHOLE = ["text", "tools", "incomplete"]
BROKEN = ["failed", "error", "error_nested"]


def recorded(name: str) -> bytes:
    return (FOLDER / name).read_bytes()


def request(**fields: Any) -> ModelRequest:
    fields = {"model": "m-1", "input": "12345678", "instructions": "1234", **fields}
    return ModelRequest("responses", "m-1", json.dumps(fields).encode(), fields)


def open_stream(keep_text: bool = True) -> ResponsesStream:
    reader = OpenAI().open_stream(request(stream=True), keep_text=keep_text, secret=SECRET)
    assert isinstance(reader, ResponsesStream)
    return reader


class Outcome:
    def __init__(self, pieces: list[bytes], keep_text: bool = True) -> None:
        self.reader = open_stream(keep_text)
        self.sent = b""
        self.error: UpstreamError | None = None
        try:
            for piece in pieces:
                self.sent += b"".join(self.reader.feed(piece))
                assert self.reader.has_content is bool(self.sent or self.reader.ending)
            self.sent += b"".join(self.reader.close()) + self.reader.ending
        except UpstreamError as exc:
            self.error = exc

    def seen(self) -> Any:
        reader = self.reader
        flags = (reader.is_finished, reader.has_content, reader.model, reader.data_events)
        error = self.error and (self.error.status, self.error.code, self.error.message)
        return self.sent, error, flags, reader.usage(), reader.text(), reader.completion()


def replay(whole: bytes) -> Outcome:
    """The outcome of a stream, the same whole, cut at any one place, and byte by byte."""
    outcome = Outcome([whole])
    for pieces in ways_to_cut(whole):
        assert Outcome(pieces).seen() == outcome.seen()
    return outcome


def ways_to_cut(whole: bytes) -> Iterator[list[bytes]]:
    yield [bytes([byte]) for byte in whole]
    for place in range(1, len(whole), 7):  # every byte is cut at in the line above
        yield [whole[:place], whole[place:]]


# Requests.


@pytest.mark.parametrize("name", [name for name, entry in CATALOG.items() if entry.has_responses])
def test_a_request_passes_byte_for_byte_to_those_who_have_it(name: str) -> None:
    found = adapter(name)
    assert found
    asked = request(stream=True, max_output_tokens=9, n=2, user="u", previous_response_id="x")
    built = found.build_request(asked, CATALOG[name].base_url or "https://example.com/v1", "sk")
    assert built.url.endswith("/v1/responses")
    assert (built.body, built.dropped) == (asked.body, ())
    assert built.body is asked.body
    assert built.headers["accept"] == "text/event-stream"


def test_only_the_model_and_our_own_field_change() -> None:
    fields = {"model": "alias", "models": ["b"], "input": []}
    asked = ModelRequest("responses", "m-1", json.dumps(fields).encode(), fields)
    built = OpenAI().build_request(asked, "https://example.com/v1", "sk")
    assert json.loads(built.body or b"") == {"model": "m-1", "input": []}
    assert built.headers["accept"] == "application/json"


# Answers.


def test_an_answer_passes_byte_for_byte_and_is_read() -> None:
    body = recorded("answer.json")
    answer = OpenAI().read_answer(request(), body)
    assert answer.body is body
    assert (answer.usage, answer.text, answer.model) == (USAGE, "Hello world", "m-1")
    assert (
        OpenAI().read_answer(request(), recorded("calls.json")).text == 'weather({"city":"Paris"})\ntime({})'
    )


def test_usage_is_estimated_where_none_came() -> None:
    fields = json.loads(recorded("answer.json")) | {"usage": None}
    answer = OpenAI().read_answer(request(), json.dumps(fields).encode())
    assert answer.usage == Usage(3, 3, 6, source="estimate")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"error": {"code": "server_error", "message": "boom sk-contract-1"}}, r"boom \[redacted\]"),
        ({"status": "failed"}, "failed to answer"),
        ({"output": None}, "no output"),
    ],
)
def test_what_is_no_answer_raises(fields: dict[str, Any], message: str) -> None:
    body = json.dumps(json.loads(recorded("answer.json")) | fields).encode()
    with pytest.raises(UpstreamError, match=message):
        OpenAI().read_answer(request(), body, secret=SECRET)


# Streams.


@pytest.mark.parametrize("name", WHOLE)
def test_a_stream_passes_byte_for_byte_wherever_it_is_cut(name: str) -> None:
    whole = recorded(f"{name}.sse")
    outcome = replay(whole)
    assert outcome.error is None
    assert outcome.sent == whole
    reader = outcome.reader
    assert (reader.usage(), reader.model, reader.is_finished, reader.is_done) == (USAGE, "m-1", True, True)
    last = json.loads(whole.rstrip().rpartition(b"data: ")[2])
    assert json.loads(reader.completion()) == last["response"]
    texts = {"text": "Hello world", "tools": 'weather({"city":"Paris"})\ntime({})', "incomplete": "Hel"}
    assert reader.text() == texts[name]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_stream_raises_after_what_came_before(name: str) -> None:
    whole = recorded(f"{name}.sse")
    outcome = replay(whole)
    assert outcome.error
    assert (outcome.error.status, outcome.error.code) == (502, "upstream_error")
    assert outcome.error.message == "It broke, [redacted]"
    assert outcome.sent == whole[: len(outcome.sent)]
    assert b'"delta":"Hel"' in outcome.sent
    assert not outcome.reader.is_finished
    (said,) = json.loads(outcome.reader.completion())["output"]
    assert said["content"][0]["text"] == "Hel"
    if name == "failed":
        assert outcome.reader.usage() == USAGE
    else:
        assert outcome.reader.usage().source == "estimate"


def test_an_error_before_content_lets_nothing_out() -> None:
    outcome = replay(recorded("error_first.sse"))
    assert (outcome.sent, outcome.error and outcome.error.message) == (b"", "It broke, [redacted]")


@pytest.mark.parametrize("end", [b"", b"data: [DONE]\n\n"])
def test_a_stream_that_ends_too_soon_raises(end: bytes) -> None:
    whole = recorded("text.sse")
    cut = whole[: whole.index(b"event: response.completed")]
    outcome = Outcome([cut + end])
    assert outcome.sent == cut
    assert "before it was finished" in str(outcome.error)
    assert "without an answer" in str(Outcome([b": hi\n\n"]).error)


def test_an_opening_that_is_very_long_is_not_held_for_ever() -> None:
    reader = open_stream()
    opening = b'event: response.created\ndata: {"type":"response.created","pad":"' + b"x" * 2**21 + b'"}\n\n'
    assert reader.feed(opening) == [opening]


def test_framing_is_put_right() -> None:
    whole = recorded("text.sse")
    for odd in (
        whole.replace(b"\n", b"\r\n"),
        b": hi\n\n" + whole.replace(b"event: ", b"id: 1\nevent: "),
        b"".join(line + b"\n" for line in whole.split(b"\n") if not line.startswith(b"event:")),
        whole + b"data: [DONE]\n\n",
        whole[:-1],
    ):
        assert Outcome([odd]).sent == whole


def test_data_of_several_lines_becomes_one() -> None:
    event = b'event: x\ndata: {"type":\ndata: "x"}\n\n'
    assert Outcome([event]).sent == b'event: x\ndata: {"type": "x"}\n\n'
    odd = b'data: {"type":"x\\ndata: y"}\n\n'
    assert Outcome([odd]).sent == b"event: x data: y\n" + odd


def test_a_response_too_deep_to_write_is_told_as_such() -> None:
    ending = b'data: {"type":"response.completed","response":{"a":' + b"[" * 1010 + b"]" * 1010 + b"}}\n\n"
    outcome = Outcome([ending])
    assert outcome.sent.endswith(ending)
    assert json.loads(outcome.reader.completion())["truncated"] is True


@pytest.mark.parametrize("data", [b"{", b"[]", b"{}", b'"x"'])
def test_what_is_no_event_raises(data: bytes) -> None:
    assert str(Outcome([b"data: " + data + b"\n\n"]).error).startswith("The upstream sent")


def test_no_text_is_kept_where_none_may_be() -> None:
    reader = Outcome([recorded("text.sse")], keep_text=False).reader
    assert reader.text() == ""
    assert b"Hello" not in reader.completion()


# What the official client makes of it.


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as upstream:
        yield upstream


def ask(upstream: FakeUpstream, sent: bytes) -> Any:
    upstream.reply = stream(pieces=[sent])
    client = openai.OpenAI(base_url=upstream.base_url, api_key="-", max_retries=0)
    with client, client.responses.stream(model="m-1", input="x") as events:
        return events.get_final_response()


def test_the_official_client_reads_what_went_through(upstream: FakeUpstream) -> None:
    response = ask(upstream, Outcome([recorded("text.sse")]).sent)
    assert (response.output_text, response.usage.total_tokens) == ("Hello world", 16)
    response = ask(upstream, Outcome([recorded("tools.sse")]).sent)
    assert [(call.name, call.arguments) for call in response.output] == [
        ("weather", '{"city":"Paris"}'),
        ("time", "{}"),
    ]


@pytest.mark.parametrize("name", BROKEN)
def test_the_official_client_raises_the_error_that_ends_a_stream(upstream: FakeUpstream, name: str) -> None:
    outcome = Outcome([recorded(f"{name}.sse")])
    assert outcome.error
    event = error_event("responses", outcome.error, outcome.reader.data_events)
    with pytest.raises(openai.APIError, match="It broke") as caught:
        ask(upstream, outcome.sent + event)
    assert (caught.value.code, caught.value.type) == ("upstream_error", "upstream_error")


def test_each_api_has_its_own_ending() -> None:
    error = UpstreamError("no")
    chat = OpenAI().open_stream(ModelRequest("chat.completions", "m", b"{}", {}), keep_text=False)
    assert (chat.ending, open_stream().ending) == (b"data: [DONE]\n\n", b"")
    assert error_event("chat.completions", error, 3).startswith(b'data: {"error":{"message":"no"')
    name, data = error_event("responses", error, 3).rstrip().split(b"\n")
    fields = json.loads(data.removeprefix(b"data: "))
    assert name == b"event: error"
    assert (fields["type"], fields["sequence_number"], fields["message"], fields["code"]) == (
        *("error", 3, "no"),
        "upstream_error",
    )
