"""A stream of `/v1/responses`: events with names, passed as they are and read for their usage.

There is no `[DONE]`: `response.completed` or `response.incomplete` is the last event, kept as `ending` until
the row is settled. As in a chat's stream nothing goes out before the first content.
Source: OpenAI's OpenAPI document 2.3.0, `ResponseStreamEvent`.
"""

from __future__ import annotations

from io import StringIO
from typing import Any

from perpetuo.errors import UpstreamError
from perpetuo.providers.base import ModelRequest, Usage
from perpetuo.providers.jsonbody import read_json, write_json
from perpetuo.providers.openai_choice import TextRoom
from perpetuo.providers.openai_errors import failure
from perpetuo.providers.openai_stream import MAX_KEPT_CHARACTERS, PREVIEW_CHARACTERS
from perpetuo.providers.responses_answer import read_response_usage, response_text
from perpetuo.providers.sse import Event, EventSplitter

_MAX_HELD_BYTES = 1024 * 1024
# They say that work begins, not what comes of it.
_OPENINGS = frozenset(
    {
        "response.created",
        "response.queued",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_summary_part.added",
    }
)
_ENDINGS = frozenset({"response.completed", "response.incomplete"})


class ResponsesStream:
    """See `base.ChunkReader`. `secret` is cut out of the words of an error."""

    def __init__(self, request: ModelRequest, *, keep_text: bool, secret: str = "") -> None:
        self.is_done = False
        self.is_finished = False
        self.has_content = False
        self.model: str | None = None
        self.data_events = 0
        self.ending = b""
        self._request = request
        self._secret = secret
        self._keeps_text = keep_text
        self._room = TextRoom(MAX_KEPT_CHARACTERS if keep_text else -1)
        self._text = StringIO()
        self._splitter = EventSplitter()
        self._failure: UpstreamError | None = None
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._response: dict[str, Any] = {}  # the last that was told of it as a whole

    def feed(self, data: bytes) -> list[bytes]:
        """The client's events that `data` completes. Raises as `base.ChunkReader` says."""
        return [] if self.is_done else self._take_all(self._splitter.feed(data))

    def close(self) -> list[bytes]:
        """The last events. Raises if no end was reached."""
        out = [] if self.is_done else self._take_all(self._splitter.close())
        if self._failure is not None:
            raise self._failure
        if not self.data_events:
            raise UpstreamError("The upstream's stream ended without an answer.", upstream_status=200)
        if not self.is_finished:
            raise UpstreamError("The upstream's stream ended before it was finished.", upstream_status=200)
        return out

    def usage(self) -> Usage:
        """What the upstream counted, else an estimate; good at any time, after a failure too."""
        return read_response_usage(self._response.get("usage"), self._request.fields, self._room.characters)

    def text(self) -> str:
        """The first 200 characters of the answer; "" where no text is kept."""
        if not self._keeps_text:
            return ""
        return (self._text.getvalue() or response_text(self._response))[:PREVIEW_CHARACTERS]

    def completion(self) -> bytes:
        """The response as its last event has it; of one that broke off, what was said so far."""
        if not self._keeps_text:
            return write_json({"object": "response", "output": []})
        text = {"type": "output_text", "text": self._text.getvalue()}
        said = {"type": "message", "role": "assistant", "content": [text]}
        whole = self._response if self.is_finished else {**self._response, "output": [said]}
        try:
            return write_json(whole)
        except ValueError:  # read, but nested too deeply to write
            return write_json({"object": "response", "truncated": True, "output": [said]})

    def _take_all(self, events: list[Event]) -> list[bytes]:
        out: list[bytes] = []
        for event in events:
            if self.is_done:
                break
            try:
                self._take(event, out)
            except UpstreamError as exc:
                if not out:
                    raise
                # What came before the error in the same piece must still go out: close() raises it.
                self._failure = exc
                self.is_done = True
        return out

    def _take(self, event: Event, out: list[bytes]) -> None:
        self.data_events += 1
        if event.data.strip() == b"[DONE]":  # of a server that knows chats only
            self.is_done = True
            return
        fields = self._parse(event)
        kind = fields.get("type")
        if not isinstance(kind, str) or not kind:
            raise UpstreamError("The upstream sent an event without a type.", upstream_status=200)
        self._note(kind, fields)
        # No line end stands inside a string of JSON: what came in several lines is the same in one.
        data = event.data.replace(b"\n", b" ")
        name = kind.encode("utf-8", "replace").replace(b"\n", b" ").replace(b"\r", b" ")
        told = b"event: " + name + b"\ndata: " + data + b"\n\n"
        if kind in _ENDINGS:
            told, self.ending = b"", told
        self._release(told, kind not in _OPENINGS, out)

    def _parse(self, event: Event) -> dict[str, Any]:
        try:
            fields = read_json(event.data)
        except ValueError as exc:
            raise UpstreamError("The upstream sent an event that is not JSON.", upstream_status=200) from exc
        if not isinstance(fields, dict):
            raise UpstreamError("The upstream sent an event that is not a JSON object.", upstream_status=200)
        if "type" not in fields and event.name:
            fields["type"] = event.name.decode("utf-8", "replace")
        if fields.get("type") == "error" or fields.get("error") is not None:
            raise failure(fields, self._secret)
        return fields

    def _note(self, kind: str, fields: dict[str, Any]) -> None:
        response = fields.get("response")
        if isinstance(response, dict):
            self._response = response
            if isinstance(response.get("model"), str) and response["model"]:
                self.model = response["model"]
        if kind == "response.failed":
            raise failure(self._response, self._secret)
        if kind in _ENDINGS:
            self.is_finished = self.is_done = True
        delta = fields.get("delta")
        if isinstance(delta, str):
            is_said = kind in ("response.output_text.delta", "response.refusal.delta")
            self._room.keep(self._text if is_said else StringIO(), delta)

    def _release(self, event: bytes, is_content: bool, out: list[bytes]) -> None:
        told = [event] if event else []
        if self.has_content:
            out += told
            return
        self._held_bytes += len(event)
        self._held += told
        if is_content or self._held_bytes > _MAX_HELD_BYTES:
            self.has_content = True
            out += self._held
            self._held.clear()
