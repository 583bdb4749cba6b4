"""The answer of an upstream: its head read here, its body framed by the standard library, and unpacked here.

The library reads a head with the parser for e-mail, which takes five times as long as the rest of it. What
reads until something comes is bounded: an upstream that never stops sending would keep the event loop.
"""

from __future__ import annotations

import http.client
import socket
import zlib
from http.client import HTTPException
from typing import Any

LINE_BYTES = 65536
MOST_LINES = 100
MOST_INTERIM = 10
PACKINGS = ("gzip", "x-gzip", "deflate")


class Response(http.client.HTTPResponse):
    """An answer whose head `begin` reads, through a buffer that was there before it where there is one.

    `fields` are its headers: lower-case names, repeated ones joined by a comma.
    """

    fields: dict[str, str]

    def __init__(self, sock: socket.socket, method: str, head: Any) -> None:
        super().__init__(sock, method=method)
        if head is not None:
            self.fp.close()
            self.fp = head

    def begin(self) -> None:
        """Reads status and headers. Raises HTTPException and OSError."""
        version, status, _ = self._read_status()  # type: ignore[attr-defined]
        for _ in range(MOST_INTERIM):
            if status != 100:
                break
            _read_fields(self.fp)
            version, status, _ = self._read_status()  # type: ignore[attr-defined]
        else:
            raise HTTPException("too many interim answers")
        if not version.startswith(("HTTP/1", "HTTP/0.9")):
            raise http.client.UnknownProtocol(version)
        self.status = status
        self.fields = fields = _read_fields(self.fp)
        self.chunked = fields.get("transfer-encoding", "").lower() == "chunked"
        self.chunk_left = None
        self.length = None if self.chunked else _length(fields.get("content-length"))
        if status < 200 or status in (204, 304):
            self.length = 0
        connection = fields.get("connection", "").lower()
        is_kept = "keep-alive" in connection if version < "HTTP/1.1" else "close" not in connection
        self.will_close = not is_kept or (self.length is None and not self.chunked)

    def has_more(self) -> bool:
        """Whether a read need not wait, as far as the buffer tells; its socket must not wait either.

        Behind a chunk mostly lies its line's end, which is nothing to read yet.
        """
        there = self.fp.peek(1)
        if not self.chunked or self.chunk_left or not there:
            return bool(there)
        return there.find(b"\n", 0 if self.chunk_left is None else 2) >= 0

    def _read_and_discard_trailer(self) -> None:
        """The library's own reads lines for as long as there are any."""
        _read_fields(self.fp, may_end=True)  # some servers hang up instead of ending it


class Unpacked:
    """The body of an answer that came compressed, although nobody asked for it: gzip or zlib, one layer.

    Unlike urllib3's it never reads on and on for its next bytes: what unpacks to nothing, and what follows
    the end, is refused.
    """

    def __init__(self, response: Response) -> None:
        self._response = response
        self._inflate = zlib.decompressobj(zlib.MAX_WBITS + 32)  # both formats, by their first bytes
        self._has_begun = False

    def has_more(self) -> bool:
        """As of a Response; what is still to be unpacked, no socket announces."""
        return bool(self._inflate.unconsumed_tail) or self._response.has_more()

    def read1(self, most: int) -> bytes:
        """At most so many bytes, as they come; b"" at the end. Raises HTTPException and OSError."""
        silent = 0
        while True:
            packed = self._inflate.unconsumed_tail or self._response.read1(most)
            if not packed:
                return self._end()
            self._has_begun = True
            if self._inflate.eof or silent > LINE_BYTES:
                raise HTTPException("the compressed body has no end")
            try:
                piece = self._inflate.decompress(packed, most)
            except zlib.error as exc:
                raise HTTPException("the compressed body cannot be read") from exc
            if piece:
                return piece
            silent += len(packed)

    def _end(self) -> bytes:
        if self._has_begun and (not self._inflate.eof or self._inflate.unused_data):
            raise HTTPException("the compressed body is not whole, or not all")
        return b""

    def close(self) -> None:
        self._response.close()


def _read_fields(stream: Any, *, may_end: bool = False) -> dict[str, str]:
    fields: dict[str, str] = {}
    name = ""
    for _ in range(MOST_LINES + 1):
        line = stream.readline(LINE_BYTES + 1)
        if len(line) > LINE_BYTES:
            raise HTTPException("a header line is too long")
        if line in (b"\r\n", b"\n") or (may_end and not line):
            return fields
        if not line:
            raise HTTPException("the head was cut short")
        text = line.decode("latin-1")
        if text[0] in " \t" and name:  # the old way to go on with a line
            fields[name] += " " + text.strip()
            continue
        name, colon, value = text.partition(":")
        name = name.strip().lower()
        if colon:
            fields[name] = f"{fields[name]}, {value.strip()}" if name in fields else value.strip()
    raise HTTPException("too many header lines")


def _length(value: str | None) -> int | None:
    """The length of the body. Two that differ tell of an answer inside another's: not one to go on with."""
    if value is None:
        return None
    lengths = {length.strip() for length in value.split(",")}
    length = lengths.pop()
    if lengths or not (length.isascii() and length.isdigit()):
        raise HTTPException("the length of the answer is unclear")
    return int(length)
