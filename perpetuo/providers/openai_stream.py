"""A stream of chunks from an OpenAI-compatible upstream, made into one that every client reads.

A well-formed chunk passes byte for byte; the others are mended. Nothing goes out before the first content,
so that a stream that fails before it can still go elsewhere. Rules 39 to 73 of the notes on clients.
"""

from __future__ import annotations

from typing import Any

from perpetuo.errors import UpstreamError
from perpetuo.providers.base import ModelRequest, Usage
from perpetuo.providers.endings import DONE
from perpetuo.providers.hosts import OPENAI, Host
from perpetuo.providers.jsonbody import read_json, write_json
from perpetuo.providers.openai_answer import created_at
from perpetuo.providers.openai_choice import Choice, TextRoom, has_content
from perpetuo.providers.openai_errors import failure, read_words, redact
from perpetuo.providers.openai_message import message_text, new_completion_id
from perpetuo.providers.openai_usage import mend_usage, read_usage
from perpetuo.providers.sse import Event, EventSplitter

MAX_KEPT_CHARACTERS = 512 * 1024
PREVIEW_CHARACTERS = 200

_OBJECT = "chat.completion.chunk"
_MAX_CHOICES = 128  # OpenAI's own bound of `n`
_MAX_HELD_BYTES = 1024 * 1024


class OpenAIStream:
    """See `base.ChunkReader`. `secret` is cut out of the words of an error."""

    def __init__(
        self, request: ModelRequest, *, keep_text: bool, secret: str = "", host: Host = OPENAI
    ) -> None:
        self.is_done = False
        self.is_finished = False
        self.has_content = False
        self.model: str | None = None
        self.data_events = 0
        self.ending = DONE
        self._request = request
        self._secret = secret
        self._host = host
        self._keeps_text = keep_text
        self._room = TextRoom(MAX_KEPT_CHARACTERS if keep_text else -1)
        self._splitter = EventSplitter()
        self._failure: UpstreamError | None = None
        self._frame: dict[str, Any] = {}  # the members that are the same in all chunks
        self._choices: dict[int, Choice] = {}
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._usage: dict[str, Any] | None = None
        self._usage_chunk: dict[str, Any] | None = None
        self._has_sent_usage = False
        options = request.fields.get("stream_options")
        # vLLM's option for usage in every chunk; who asks for it knows not to add it up.
        self._repeats_usage = isinstance(options, dict) and options.get("continuous_usage_stats") is True

    def feed(self, data: bytes) -> list[bytes]:
        """The client's events that `data` completes. Raises as `base.ChunkReader` says."""
        if self.is_done:
            return []
        return self._take_all(self._splitter.feed(data))

    def close(self) -> list[bytes]:
        """The last events, the usage chunk among them if it was asked for. Raises if no end was reached."""
        out = [] if self.is_done else self._take_all(self._splitter.close())
        if self._failure is not None:
            raise self._failure
        if not self._choices:
            raise UpstreamError("The upstream's stream ended without an answer.", upstream_status=200)
        if not self.is_finished:
            raise UpstreamError("The upstream's stream ended before it was finished.", upstream_status=200)
        if self._usage_chunk is not None and self._request.wants_usage and not self._has_sent_usage:
            out.append(_event(self._write(self._usage_chunk | self._frame)))
        return out

    def usage(self) -> Usage:
        """What the upstream counted, else an estimate; good at any time, after a failure too."""
        return read_usage(self._usage, self._request.fields, self._room.characters)

    def text(self) -> str:
        """The first 200 characters of the first choice; "" where no text is kept."""
        if not self._keeps_text or not self._choices:
            return ""
        return message_text(self._choices[min(self._choices)].message())[:PREVIEW_CHARACTERS]

    def completion(self) -> bytes:
        """The stream joined into one `chat.completion`, `"truncated": true` if its text was too long."""
        completion: dict[str, Any] = {**self._frame, "object": "chat.completion"}
        completion["choices"] = [
            {"index": index, "message": choice.message(), "finish_reason": choice.finish_reason}
            for index, choice in sorted(self._choices.items())
        ]
        if self._usage is not None:
            completion["usage"] = self._usage
        if self._keeps_text and self._room.is_exceeded:
            completion["truncated"] = True
        return write_json(completion)

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
        data = event.data
        self.data_events += 1
        if data[:1] != b"{" and data.strip() == b"[DONE]":
            self.is_done = True
            if self._host.done_finishes:
                self._finish_choices(out)
            return
        fields = self._parse(event)
        is_mended = (fields.get("usage") is not None or "x_groq" in fields) and self._note_usage(fields)
        choices = fields.get("choices")
        if not choices:
            if isinstance(fields.get("usage"), dict):
                self._usage_chunk = fields | {"choices": []}
            return  # otherwise Azure's prompt_filter_results, a keep-alive
        if not isinstance(choices, list):
            raise UpstreamError("The upstream sent a chunk whose choices are no list.", upstream_status=200)
        is_mended |= self._mend_frame(fields)
        is_mended |= self._mend_choices(choices, out)
        is_mended |= self._mend_usage(fields)
        if is_mended or b"\n" in data:
            data = self._write(fields)
        self._release(_event(data), choices, out)

    def _note_usage(self, fields: dict[str, Any]) -> bool:
        usage = fields.get("usage")
        if isinstance(usage, dict):
            self._usage = usage
            return mend_usage(usage, self._host)
        if "x_groq" in fields and isinstance(fields["x_groq"], dict):
            usage = fields["x_groq"].get("usage")
            if isinstance(usage, dict):
                self._usage = usage
                self._usage_chunk = {"choices": [], "usage": usage}  # clients look for it there only
        return False

    def _finish_choices(self, out: list[bytes]) -> None:
        """Say the finish reasons that the host left out."""
        for index, choice in self._choices.items():
            if choice.finish_reason is None:
                last = {"index": index, "delta": {}, "finish_reason": choice.likely_finish_reason()}
                choice.mend(last)
                self._release(_event(self._write({**self._frame, "choices": [last]})), [last], out)
        self.is_finished = bool(self._choices)

    def _parse(self, event: Event) -> dict[str, Any]:
        try:
            fields = read_json(event.data)
        except ValueError as exc:
            if event.name == b"error":
                words = redact(read_words(event.data.decode("utf-8", "replace")), self._secret)
                raise UpstreamError(
                    words.message or "The upstream reported an error.", upstream_status=200
                ) from exc
            raise UpstreamError("The upstream sent an event that is not JSON.", upstream_status=200) from exc
        if isinstance(fields, list) and len(fields) == 1:  # Gemini wraps its errors
            fields = fields[0]
        if event.name == b"error" or (isinstance(fields, dict) and fields.get("error") is not None):
            raise failure(fields, self._secret)
        if not isinstance(fields, dict):
            raise UpstreamError("The upstream sent an event that is not a JSON object.", upstream_status=200)
        return fields

    def _mend_frame(self, fields: dict[str, Any]) -> bool:
        frame = self._frame or self._begin_frame(fields)
        if (
            fields.get("id") == frame["id"]
            and fields.get("model") == frame["model"]
            and fields.get("created") == frame["created"]
            and type(fields["created"]) is int
            and fields.get("object") == _OBJECT
        ):
            return False
        fields.update(frame)
        return True

    def _begin_frame(self, fields: dict[str, Any]) -> dict[str, Any]:
        stream_id, created, model = fields.get("id"), fields.get("created"), fields.get("model")
        if isinstance(model, str) and model:
            self.model = model
        self._frame = {
            "id": stream_id if isinstance(stream_id, str) and stream_id else new_completion_id(),
            "object": _OBJECT,
            "created": created if type(created) is int and created > 0 else created_at(created),
            "model": self.model or self._request.model,
        }
        return self._frame

    def _mend_choices(self, choices: list[Any], out: list[bytes]) -> bool:
        is_mended = False
        for position, choice in enumerate(choices):
            if not isinstance(choice, dict):
                raise UpstreamError("The upstream sent a choice that is no object.", upstream_status=200)
            if choice.get("error"):  # OpenRouter
                raise failure(choice, self._secret)
            index = choice.get("index")
            if type(index) is not int:
                index = choice["index"] = position
                is_mended = True
            state = self._choices.get(index) or self._begin_choice(index, out)
            is_mended |= state.mend(choice)
            if choice["finish_reason"] is not None:
                self.is_finished = all(begun.finish_reason for begun in self._choices.values())
        return is_mended

    def _mend_usage(self, fields: dict[str, Any]) -> bool:
        """Let usage out once, with the last finish reason or after it.

        LangChain and Pydantic AI add up what the chunks say, OpenAI's accumulator reads the last chunk only;
        Perplexity counts in every chunk.
        """
        if self._repeats_usage or not isinstance(fields.get("usage"), dict):
            return False
        if self.is_finished and not self._has_sent_usage:
            self._has_sent_usage = True
            return False
        self._usage_chunk = {"choices": [], "usage": fields.pop("usage")}
        return True

    def _begin_choice(self, index: int, out: list[bytes]) -> Choice:
        """Begin a choice, and before it those of lower index: some clients count on the order."""
        if not 0 <= index < _MAX_CHOICES:
            raise UpstreamError("The upstream sent a choice with an impossible index.", upstream_status=200)
        for lower in range(index):
            if lower not in self._choices:
                self._choices[lower] = Choice(self._room, self._host)
                delta: dict[str, Any] = {"index": lower, "delta": {}, "finish_reason": None}
                self._choices[lower].mend(delta)
                self._release(_event(self._write({**self._frame, "choices": [delta]})), [delta], out)
        self.is_finished = False
        self._choices[index] = Choice(self._room, self._host)
        return self._choices[index]

    def _release(self, event: bytes, choices: list[Any], out: list[bytes]) -> None:
        if self.has_content:
            out.append(event)
        elif any(has_content(choice) for choice in choices):
            self.has_content = True
            out += (*self._held, event)
            self._held.clear()
        elif self._held_bytes + len(event) <= _MAX_HELD_BYTES:  # beyond, what says nothing is dropped
            self._held_bytes += len(event)
            self._held.append(event)

    def _write(self, fields: dict[str, Any]) -> bytes:
        try:
            return write_json(fields)
        except ValueError as exc:
            raise UpstreamError("The upstream sent a chunk nested too deeply.", upstream_status=200) from exc


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
