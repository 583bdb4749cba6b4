"""The answer of an upstream: its head read here, its body framed by the standard library.

The library reads a head with the parser for e-mail, which takes five times as long as the rest of it.
"""

from __future__ import annotations

import http.client
import socket
from http.client import HTTPException
from typing import Any

LINE_BYTES = 65536
MOST_LINES = 100


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
        while status == 100:
            _read_fields(self.fp)
            version, status, _ = self._read_status()  # type: ignore[attr-defined]
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


def _read_fields(stream: Any) -> dict[str, str]:
    fields: dict[str, str] = {}
    name = ""
    for _ in range(MOST_LINES + 1):
        line = stream.readline(LINE_BYTES + 1)
        if len(line) > LINE_BYTES:
            raise HTTPException("a header line is too long")
        if line in (b"\r\n", b"\n", b""):
            return fields
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
