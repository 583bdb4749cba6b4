"""What an upstream can do wrong, one reply of a fake upstream for each fault.

The groups tell when it goes wrong: without an answer, with one that is none, after the first words of a
stream, or never ending. What a gateway makes of it is the tests' business.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable

from tests.fake_upstream import (
    Exchange,
    FakeUpstream,
    Reply,
    bind_loopback,
    completion,
    drip,
    empty,
    event,
    hang,
    headers_then_hang,
    html,
    raw,
    redirect,
    status,
    stream,
)

METADATA = "http://169.254.169.254/latest/meta-data/iam"
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n"
ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
WORDS = event(
    {"id": "c", "choices": [{"index": 0, "delta": {"content": "Once upon"}, "finish_reason": None}]}
)
LAST = (
    event({"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}) + b"data: [DONE]\n\n"
)
HALF = b'{"id": "c", "object": "chat.completion", "choices": [{"index": 0, "message": {"content": "Once'
WHOLE = b'{"choices": [{"index": 0, "message": {"content": "Once"}, "finish_reason": "stop"}]}'
GZIP = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
MIB = 1024 * 1024


class FaultUpstream(FakeUpstream):
    """A fake upstream whose door can also be shut: `refuse()`."""

    def refuse(self) -> None:
        self._stop_listening()
        self._listener.close()
        self._listener = bind_loopback(self.port)  # bound without listening: the kernel refuses


class Endless:
    """Sends `head`, then `piece` as fast as it is taken, until the peer has gone."""

    def __init__(self, head: bytes, piece: bytes, *, chunked: bool = True, interval: float = 0.0) -> None:
        self.sent_bytes = 0
        self._head, self._interval = head, interval
        self._piece = chunk(piece) if chunked else piece

    def __call__(self, exchange: Exchange) -> None:
        exchange.send(self._head)
        while True:
            exchange.send(self._piece)
            self.sent_bytes += len(self._piece)
            if self._interval:
                exchange.wait(self._interval)


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def is_stream(exchange: Exchange) -> bool:
    return exchange.request.json.get("stream") is True


def opening(exchange: Exchange) -> bytes:
    """How a good answer begins, as long as it says nothing."""
    return ROLE if is_stream(exchange) else HALF


def words(_: Exchange) -> bytes:
    return WORDS


def then(end: Callable[[Exchange], object], begin: Callable[[Exchange], bytes] = opening) -> Reply:
    """A good beginning of a chunked body, then this."""

    def reply(exchange: Exchange) -> None:
        exchange.start(200, {"Content-Type": "text/event-stream"})
        exchange.write(begin(exchange))
        end(exchange)

    return reply


def sending(sent: bytes, *, closes: bool = False) -> Reply:
    """These bytes as they are, then silence, or the connection's end."""
    return lambda exchange: (exchange.send(sent), exchange.close() if closes else exchange.wait())[0]


def resetting(sent: bytes = b"") -> Reply:
    return lambda exchange: (exchange.send(sent), exchange.reset())[0]


def packed(body: bytes, encoding: str = "gzip", code: int = 200) -> Reply:
    return status(code, body, {"Content-Encoding": encoding})


def the_other_kind(exchange: Exchange) -> None:
    """A stream where none was asked for, and the other way round."""
    (completion() if is_stream(exchange) else stream())(exchange)


def of_length(length: bytes, body: bytes) -> Reply:
    return raw(OK + b"Content-Length: " + length + b"\r\n\r\n" + body)


def gzip_part(piece: bytes) -> bytes:
    """A part of a gzip body, complete in itself, that may be sent over and over."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return deflate.compress(piece) + deflate.flush(zlib.Z_FULL_FLUSH)


# Silence, each with the status that was seen before it.
SILENT: dict[str, tuple[Reply, int | None]] = {
    "hang": (hang(), None),
    "hang in the head": (sending(OK + b"Content-Ty"), None),
    "hang after the head": (headers_then_hang(), 200),
    "hang in the body": (then(Exchange.wait), 200),
    "hang in a chunk's size": (then(sending(b"4")), 200),
    "hang in an error": (sending(b"HTTP/1.1 500 Oh\r\nContent-Length: 9\r\n\r\n{"), 500),
    "hang in a redirect": (sending(b"HTTP/1.1 302 Go\r\nContent-Length: 9\r\n\r\n{"), 302),
    "drip": (Endless(CHUNKED + b"\r\n", b" ", interval=0.01), 200),
    "drip of an error": (drip(0.05, status(500, b" " * 100_000)), 500),
}
# No head that could be read. "refused" is the door's own.
UNANSWERED: dict[str, Reply] = {
    "refused": hang(),
    "cut at once": raw(b""),
    "cut in the head": raw(OK + b"Content-Ty"),
    "reset at once": resetting(),
    "reset in the head": resetting(OK + b"Content-Ty"),
    "garbage": raw(bytes(range(256)) * 64),
    "garbage without a line's end": sending(b"\xff" * 70_000),
    "SMTP": raw(b"220 smtp ready\r\n\r\n"),
    "TLS": raw(b"\x15\x03\x01\x00\x02\x02\x46"),
    "HTTP/2": raw(b"HTTP/2 200 OK\r\n\r\n"),
    "no status": raw(b"HTTP/1.1 fine\r\n\r\n"),
    "two lengths": of_length(b"2\r\nContent-Length: 3", b"{}"),
    "a length below zero": of_length(b"-1", b"{}"),
    "too many headers": raw(OK + b"a: 1\r\n" * 101 + b"\r\n"),
    "a header too long": raw(OK + b"a: " + b"x" * 65536 + b"\r\n\r\n"),
    "no end of 100s": raw(b"HTTP/1.1 100 Continue\r\n\r\n" * 50 + OK + b"Content-Length: 2\r\n\r\n{}"),
}
# A status, and then no answer, each with that status.
ANSWERED: dict[str, tuple[Reply, int]] = {
    "cut in the body": (then(Exchange.close), 200),
    "reset in the body": (then(Exchange.reset), 200),
    "shorter than its length": (of_length(b"400", WHOLE), 200),
    "a nonsense chunk": (then(sending(b"zz\r\n{}\r\n")), 200),
    "a chunk below zero": (then(sending(b"-5\r\n{}\r\n", closes=True)), 200),
    "HTML": (html(), 200),
    "HTML 502": (html(502), 502),
    "HTML 530": (html(530), 530),
    "garbage 503": (status(503, bytes(range(256))), 503),
    "packed garbage 500": (packed(b"\x8b\x02\x80\0\x03", "br", 500), 500),
    "packed 500": (packed(gzip.compress(b"<html>"), "gzip", 500), 500),
    "101": (sending(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n"), 101),
    "103": (sending(b"HTTP/1.1 103 Early Hints\r\n\r\n"), 103),
    "204": (raw(b"HTTP/1.1 204 No Content\r\n\r\n"), 204),
    "empty": (empty(), 200),
    "half of the JSON": (status(200, HALF), 200),
    "NaN": (status(200, b'{"choices": [NaN]}'), 200),
    "not UTF-8": (status(200, b'{"choices": "\xff\xfe"}'), 200),
    "a list": (status(200, b"[]"), 200),
    "null": (status(200, b"null"), 200),
    "too deep": (status(200, b'{"a":' * 100_000 + b"1" + b"}" * 100_000), 200),
    "no choices": (status(200, {"choices": []}), 200),
    "an error": (status(200, {"error": {"message": "out of oil"}}), 200),
    "an error's event": (stream([event({"error": {"message": "out of oil"}})]), 200),
    "an event that is not JSON": (stream([ROLE, b"data: {nonsense\n\n"]), 200),
    "no content": (stream([ROLE], done=False, usage=False), 200),
    "the other kind": (the_other_kind, 200),
    "bad gzip": (packed(b"\x1f\x8b nothing of the kind"), 200),
    "gzip cut short": (packed(gzip.compress(WHOLE)[:-1]), 200),
    "something behind the gzip": (packed(gzip.compress(WHOLE) + b"more"), 200),
    "another packing": (packed(b"\x8b\x02\x80{}\x03", "br"), 200),
    "packed twice": (packed(gzip.compress(gzip.compress(HALF)), "gzip, gzip"), 200),
    "a bomb of lists": (status(200, b'{"choices":[' + b"[]," * (4 * MIB) + b"[]]}"), 200),
    "a packed bomb": (packed(GZIP + gzip_part(b" " * MIB) * 65), 200),
}
REDIRECTS: dict[str, Reply] = {
    str(code): redirect(METADATA, code) for code in (300, 301, 302, 303, 305, 307, 308)
}
# After the first words of a stream.
LATE: dict[str, Reply] = {
    "cut": then(Exchange.close, words),
    "reset": then(Exchange.reset, words),
    "a nonsense chunk": then(sending(b"zz\r\n"), words),
    "another answer": then(sending(OK + b"Content-Length: 0\r\n\r\n", closes=True), words),
    "garbage": stream([WORDS, b"data: \x00\xff{]\n\n"]),
    "HTML": stream([WORDS, b"<html>502</html>\n"], done=False, usage=False),
    "an error": stream([WORDS, event({"error": {"message": "out of oil"}})]),
    "done without an end": stream([WORDS], usage=False),
    "an endless line": then(lambda exchange: Endless(b"", b"x" * 65536)(exchange), words),
    "endless comments": then(lambda exchange: Endless(b"", b": x\n\n" * 10_000)(exchange), words),
    "a bomb of lists": stream([WORDS, b'data: {"choices":[' + b"[]," * (4 * MIB) + b"[]]}\n\n"]),
    "gzip cut short": packed(GZIP + gzip_part(WORDS)),
}
LATE_SILENT: dict[str, Reply] = {
    "hang": then(Exchange.wait, words),
    "hang in a chunk's size": then(sending(b"4"), words),
    "drip of comments": then(lambda exchange: Endless(b"", b":\n", interval=0.01)(exchange), words),
}
ENDLESS: dict[str, Callable[[], Endless]] = {
    "100s": lambda: Endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, chunked=False),
    "headers": lambda: Endless(OK, b"a: b\r\n" * 1000, chunked=False),
    "header": lambda: Endless(OK + b"a: ", b"b" * 65536, chunked=False),
    "body": lambda: Endless(CHUNKED + b"\r\n" + chunk(b'{"a": "'), b"x" * 65536),
    "body without a length": lambda: Endless(OK + b"\r\n", b" " * 65536, chunked=False),
    "lists": lambda: Endless(CHUNKED + b"\r\n" + chunk(b"data: ["), b"[]," * 20_000),
    "comments": lambda: Endless(CHUNKED + b"\r\n", b": x\n\n" * 10_000),
    "events of nothing": lambda: Endless(CHUNKED + b"\r\n", b"data: {}\n\n" * 6000),
    "lines": lambda: Endless(CHUNKED + b"\r\n", b"data: x\n" * 8000),
    "chunk's extension": lambda: Endless(CHUNKED + b"\r\n1;", b"x" * 65536, chunked=False),
    "trailers": lambda: Endless(CHUNKED + b"\r\n0\r\n", b"a: b\r\n" * 1000, chunked=False),
    "error": lambda: Endless(CHUNKED.replace(b"200 OK", b"500 Oh") + b"\r\n", b"x" * 65536),
    "gzip": lambda: gzipped(gzip_part(b" " * MIB)),
    "gzip of comments": lambda: gzipped(gzip_part(b": x\n\n" * 200_000)),
    "gzip of nothing": lambda: gzipped(b"\x00\x00\x00\xff\xff" * 10_000),
    "something behind the gzip": lambda: Endless(
        CHUNKED + b"Content-Encoding: gzip\r\n\r\n" + chunk(gzip.compress(b" ")), b"x" * 65536
    ),
}


def gzipped(piece: bytes) -> Endless:
    return Endless(CHUNKED + b"Content-Encoding: gzip\r\n\r\n" + chunk(GZIP), piece)
