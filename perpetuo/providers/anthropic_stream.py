"""A stream of Anthropic's events as a stream of OpenAI's chunks: a state machine over the events' types.

Nothing goes out before the first content, so that a stream that fails before it can still go elsewhere.
Source: https://docs.anthropic.com/en/docs/build-with-claude/streaming, version 2023-06-01.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from perpetuo.errors import UpstreamError
from perpetuo.providers.anthropic_answer import completion_body, stop_details
from perpetuo.providers.anthropic_blocks import Blocks, Delta
from perpetuo.providers.anthropic_collect import Collected
from perpetuo.providers.anthropic_errors import failure
from perpetuo.providers.anthropic_usage import billed_usage, merge_usage, openai_usage
from perpetuo.providers.base import ModelRequest, Usage
from perpetuo.providers.endings import DONE
from perpetuo.providers.jsonbody import read_json, write_json
from perpetuo.providers.openai_choice import TextRoom
from perpetuo.providers.openai_message import message_text, new_completion_id
from perpetuo.providers.sse import Event, EventSplitter

MAX_KEPT_CHARACTERS = 512 * 1024
PREVIEW_CHARACTERS = 200

_ROLE = b'{"role":"assistant","content":""}'
_MORE = b',"finish_reason":null}]}\n\n'
_TEXT_END = b"}" + _MORE


class AnthropicStream:
    """See `base.ChunkReader`. `names` and `json_tool` as for `Blocks`; `secret` is cut out of errors."""

    def __init__(
        self,
        request: ModelRequest,
        names: Mapping[str, str],
        json_tool: str | None,
        *,
        kept_characters: int,
        secret: str = "",
    ) -> None:
        self.is_done = False
        self.is_finished = False
        self.has_content = False
        self.model: str | None = None
        self.data_events = 0
        self.ending = DONE
        self._request = request
        self._secret = secret
        self._keeps_text = kept_characters >= 0
        self._room = TextRoom(kept_characters)
        self._collected = Collected(self._room)
        self._blocks = Blocks(self._collected, names, json_tool)
        self._has_plain_text = json_tool is None
        self._splitter = EventSplitter()
        self._failure: UpstreamError | None = None
        self._frame: dict[str, Any] = {}  # the members that are the same in all chunks
        self._head = self._delta_head = self._text_head = b""
        self._message_id: object = None
        self._has_started = False
        self._index = 0  # of the block that began last
        self._counts: dict[str, Any] = {}
        self._is_counted = False

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
        if not self._frame:
            raise UpstreamError("The upstream's stream ended without an answer.", upstream_status=200)
        if not self.is_finished and self._collected.stop_reason is not None:
            self._finish(out)  # all was said, only the last event is missing
        if not self.is_finished:
            raise UpstreamError("The upstream's stream ended before it was finished.", upstream_status=200)
        usage = self._final_usage()
        if usage is not None and self._request.wants_usage:
            out.append(self._head + b'[],"usage":' + write_json(usage) + b"}\n\n")
        return out

    def usage(self) -> Usage:
        """What the upstream counted, else an estimate; good at any time, after a failure too."""
        characters = self._room.characters
        return billed_usage(self._counts, self._request.fields, characters, is_final=self._is_counted)

    def text(self) -> str:
        """The first 200 characters of the answer; "" where no text is kept."""
        return message_text(self._collected.message())[:PREVIEW_CHARACTERS] if self._keeps_text else ""

    def completion(self) -> bytes:
        """The stream joined into one `chat.completion`, `"truncated": true` if its text was too long."""
        completion = completion_body(
            self._frame, self._collected, self._final_usage(), is_finished=self.is_finished
        )
        if self._keeps_text and self._room.is_exceeded:
            completion["truncated"] = True
        return write_json(completion)

    def _final_usage(self) -> dict[str, Any] | None:
        """None before the last event has counted the output: until then its count is provisional."""
        return openai_usage(self._counts) if self._is_counted else None

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
        fields = self._parse(event)
        kind = fields.get("type")
        if kind == "content_block_delta":
            self._take_delta(fields, out)
        elif kind == "content_block_start":
            self._begin_block(self._place(fields), fields.get("content_block"), out)
        elif kind == "content_block_stop":
            self._send(self._blocks.end(self._place(fields)), out)
        elif kind == "message_start":
            self._start(fields, out)
        elif kind == "message_delta":
            self._take_message_delta(fields)
        elif kind == "message_stop":
            self.is_done = True
            if self._frame:
                self._finish(out)
        # all else is a ping, or an event that is not invented yet

    def _parse(self, event: Event) -> dict[str, Any]:
        try:
            fields = read_json(event.data)
        except ValueError as exc:
            if event.data.strip() == b"[DONE]":  # some compatible servers
                return {"type": "message_stop"}
            if event.name == b"error":
                raise failure(event.data.decode("utf-8", "replace"), self._secret) from exc
            raise UpstreamError("The upstream sent an event that is not JSON.", upstream_status=200) from exc
        if not isinstance(fields, dict):
            raise UpstreamError("The upstream sent an event that is not a JSON object.", upstream_status=200)
        if event.name == b"error" or fields.get("type") == "error" or fields.get("error") is not None:
            raise failure(fields, self._secret)
        return fields

    def _start(self, fields: dict[str, Any], out: list[bytes]) -> None:
        message = fields.get("message")
        message = message if isinstance(message, dict) else {}
        if self._has_started:
            if message.get("id") != self._message_id:
                raise UpstreamError("The upstream began another answer in the middle.", upstream_status=200)
            return
        self._has_started = True
        self._message_id = message.get("id")
        self._begin(message)
        merge_usage(self._counts, message.get("usage"))
        content = message.get("content")
        for index, block in enumerate(content if isinstance(content, list) else ()):
            self._begin_block(index, block, out)  # deferred tool calls come whole
            self._send(self._blocks.end(index), out)

    def _begin(self, message: Mapping[str, Any]) -> None:
        """Fix what is the same in all chunks, unless an earlier event has done so."""
        if self._frame:
            return
        message_id, model = message.get("id"), message.get("model")
        self.model = model if isinstance(model, str) and model else None
        self._frame = {
            "id": message_id if isinstance(message_id, str) and message_id else new_completion_id(),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": self.model or self._request.model,
        }
        self._head = b"data: " + write_json(self._frame)[:-1] + b',"choices":'
        self._delta_head = self._head + b'[{"index":0,"delta":'
        self._text_head = self._delta_head + b'{"content":'

    def _begin_block(self, index: int, block: object, out: list[bytes]) -> None:
        self._index = index
        try:
            self._send(self._blocks.begin(index, block if isinstance(block, dict) else {}), out)
        except ValueError as exc:
            raise UpstreamError("The upstream sent a block nested too deeply.", upstream_status=200) from exc

    def _take_delta(self, fields: dict[str, Any], out: list[bytes]) -> None:
        delta = fields.get("delta")
        if not isinstance(delta, dict):
            return
        index = self._place(fields)
        if delta.get("type") != "text_delta" or not self._has_plain_text:
            self._send(self._blocks.add(index, delta), out)
            return
        text = delta.get("text")
        if text and isinstance(text, str) and index not in self._blocks.skipped:
            self._collected.add_text(text)
            self._open_answer(out)
            out.append(self._text_head + write_json(text) + _TEXT_END)

    def _place(self, fields: dict[str, Any]) -> int:
        index = fields.get("index")
        return index if type(index) is int else self._index

    def _take_message_delta(self, fields: dict[str, Any]) -> None:
        self._begin({})
        delta = fields.get("delta")
        if isinstance(delta, dict):
            reason = delta.get("stop_reason")
            if isinstance(reason, str):
                self._collected.stop_reason = reason
            self._collected.stop_details = stop_details(delta) or stop_details(fields)
        usage = fields.get("usage")
        merge_usage(self._counts, usage)
        if isinstance(usage, dict) and usage.get("output_tokens") is not None:
            self._is_counted = True

    def _finish(self, out: list[bytes]) -> None:
        self._send(self._blocks.end_all(), out)
        self._open_answer(out)
        self.is_finished = True
        reason = write_json(self._collected.finish_reason)
        out.append(self._delta_head + b'{},"finish_reason":' + reason + b"}]}\n\n")

    def _send(self, deltas: list[Delta], out: list[bytes]) -> None:
        for delta in deltas:
            self._open_answer(out)
            out.append(self._delta_head + write_json(delta) + _MORE)

    def _open_answer(self, out: list[bytes]) -> None:
        """Send the role before the first content, once; some servers begin without a `message_start`."""
        if not self.has_content:
            self.has_content = True
            self._begin({})
            out.append(self._delta_head + _ROLE + _MORE)
