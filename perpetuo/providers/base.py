"""What a provider adapter takes and gives: plain values. No socket, no database, no Flask.

An adapter turns our request into the upstream's (`build_request`), a whole answer into ours
(`read_answer`), a refusal into an error (`read_error`) and a stream into chunks (`open_stream`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from perpetuo.errors import UpstreamError

Endpoint = Literal["chat.completions", "embeddings", "responses"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request. `cached` and `cache_write` are inside `prompt`, `reasoning` is inside
    `completion`. `source` says whether the upstream counted or we estimated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    source: Literal["provider", "estimate"] = "provider"


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """One client request on its way to one target.

    `body` is the client's own bytes, `fields` the same parsed; `model` is the name to ask the upstream for,
    `headers` what the client sent that may travel (lower-case names). `output_limit` is sent as the maximum
    of output tokens, in place of the client's; None leaves that as it is.
    """

    endpoint: Endpoint
    model: str
    body: bytes
    fields: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)
    output_limit: int | None = None

    @property
    def is_stream(self) -> bool:
        return self.fields.get("stream") is True

    @property
    def wants_usage(self) -> bool:
        options = self.fields.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """`dropped` names the client's parameters that this provider has no place for: hints, never what shapes
    the answer."""

    url: str
    headers: dict[str, str]
    body: bytes | None = None
    method: str = "POST"
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer: the bytes for the client, what they cost, and the text for the preview."""

    body: bytes
    usage: Usage
    text: str
    model: str | None


class ChunkReader(Protocol):
    """Turns the bytes of one upstream stream into the events that the client gets.

    `feed` returns complete events (`b"data: {…}\\n\\n"`), none before the first content; it raises
    UpstreamError for an error event, for an event that does not parse and for one above 16 MiB.
    `close` is called once the stream is done or its body ended; it returns the last events (never
    the `ending`) and raises UpstreamError where no finish reason came. Where good events came before an error
    in the same piece, `feed` returns them and ends the stream (`is_done`); `close` then raises the error.
    """

    is_done: bool  # the upstream said `[DONE]`, or there is nothing more to come for another reason
    is_finished: bool  # every choice that began has its finish reason
    has_content: bool  # the client's first event has been returned by `feed`
    model: str | None  # the upstream's own name for the model
    data_events: int  # events with data so far; comments do not count
    ending: bytes  # what follows the last event of a whole answer, once its row is settled

    def feed(self, data: bytes) -> list[bytes]: ...
    def close(self) -> list[bytes]: ...
    def usage(self) -> Usage: ...
    def text(self) -> str: ...
    def completion(self) -> bytes: ...


class Provider(Protocol):
    """`build_request` may raise InvalidRequest, for what this provider cannot do; it was not sent then."""

    name: str

    def build_request(self, request: ModelRequest, base_url: str, secret: str) -> UpstreamRequest: ...
    def build_models_request(self, base_url: str, secret: str) -> UpstreamRequest: ...
    def read_models(self, body: bytes) -> list[str]: ...
    def read_answer(self, request: ModelRequest, body: bytes, *, secret: str = "") -> Answer: ...
    def read_error(
        self, status: int, headers: Mapping[str, str], body: bytes, secret: str
    ) -> UpstreamError: ...
    def open_stream(self, request: ModelRequest, *, keep_text: bool, secret: str = "") -> ChunkReader: ...
