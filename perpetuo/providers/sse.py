"""Splits the bytes of a server-sent event stream into its events.

Knows framing only: nothing of chunks, of JSON no more than whether a cut last line is whole.
Format: https://html.spec.whatwg.org/multipage/server-sent-events.html, section 9.2.6.
"""

from __future__ import annotations

from typing import NamedTuple

import orjson

from perpetuo.errors import UpstreamError
from perpetuo.providers.jsonbody import is_bomb

MAX_EVENT_BYTES = 16 * 1024 * 1024

_BOM = b"\xef\xbb\xbf"
_CR = 0x0D
_LINE_ENDS = b"\r\n"


class Event(NamedTuple):
    """`name` is what `event:` said, None without it; `data` is never empty, its lines joined by LF."""

    name: bytes | None
    data: bytes


class EventSplitter:
    """Feed it a stream in pieces of any size, get whole events; at most one event is kept in memory."""

    def __init__(self) -> None:
        self._tail = bytearray()  # the line that has not ended
        self._data: list[bytes] = []  # the lines of the event that has not ended
        self._name: bytes | None = None
        self._event_bytes = 0  # what `_data` and `_name` hold
        self._skips_lf = False  # the last piece ended in CR, whose LF may still come
        self._is_start = True

    def feed(self, piece: bytes) -> list[Event]:
        """Return the events that `piece` completes. UpstreamError above 16 MiB for one event."""
        if self._is_whole_event(piece):
            return [Event(None, piece[6:-2])]
        if self._skips_lf and piece:
            self._skips_lf = False
            piece = piece.removeprefix(b"\n")
        if not piece:
            return []
        lines = piece.splitlines()  # of bytes: at LF, CR and CRLF only, never at U+2028 or U+0085
        last_byte = piece[-1]
        rest = b"" if last_byte in _LINE_ENDS else lines.pop()
        self._skips_lf = last_byte == _CR
        if lines and self._tail:
            lines[0] = bytes(self._tail + lines[0])
            self._tail.clear()
        events: list[Event] = []
        for line in lines:
            self._take_line(line, events)
        self._tail += rest
        self._check_size()
        return events

    def close(self) -> list[Event]:
        """Return the last event if only its blank line is missing.

        Where its last line is cut too, it counts only if its data is whole JSON or `[DONE]`: half an
        event must neither reach a client nor fail as malformed, the stream just ended early.
        """
        events: list[Event] = []
        tail = bytes(self._tail)
        self._tail.clear()
        if tail:
            self._take_line(tail, events)
        self._take_line(b"", events)
        return [event for event in events if not tail or _is_whole(event.data)]

    def _is_whole_event(self, piece: bytes) -> bool:
        """The common case, one unnamed event a piece, found without looking at lines."""
        size = len(piece)
        return (
            8 < size <= MAX_EVENT_BYTES
            and piece.startswith(b"data: ")
            and piece.find(b"\n") == size - 2
            and piece.endswith(b"\n")
            and b"\r" not in piece
            and not self._event_bytes
            and not self._tail
            and not self._skips_lf
            and not self._is_start
            and not piece.startswith(b" ", 6)
        )

    def _take_line(self, line: bytes, events: list[Event]) -> None:
        if self._is_start:
            self._is_start = False
            line = line.removeprefix(_BOM)
        if not line:
            self._end_event(events)
        elif line.startswith(b"data:") or line == b"data":
            self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
            self._event_bytes += len(line)
            self._check_size()
        elif line.startswith(b"event:"):
            self._name = line[7:] if line.startswith(b"event: ") else line[6:]
            self._event_bytes += len(line)

    def _end_event(self, events: list[Event]) -> None:
        data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
        if is_bomb(data):
            raise UpstreamError("The upstream sent an event with too many parts.")
        if data and not data.isspace():
            events.append(Event(self._name, data))
        self._data = []
        self._name = None
        self._event_bytes = 0

    def _check_size(self) -> None:
        if self._event_bytes + len(self._tail) > MAX_EVENT_BYTES:
            raise UpstreamError("The upstream sent an event of more than 16 MiB.")


def _is_whole(data: bytes) -> bool:
    if data.strip() == b"[DONE]":
        return True
    try:
        orjson.loads(data)
    except orjson.JSONDecodeError:
        return False
    return True
