"""A real HTTP/1.1 server on a loopback thread that answers as an OpenAI-shaped upstream, or badly on purpose.

It knows nothing of the gateway. A test sets `upstream.reply` or `upstream.script([…])` and reads
`upstream.requests`. `python -m tests.fake_upstream --port N` runs it as a process of its own, echoing the
last user message. Shapes: the OpenAI API reference for chat completions, embeddings and models.
"""

from __future__ import annotations

import argparse
import base64
import json
import select
import signal
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
MODELS = ("gpt-4o-mini", "text-embedding-3-small")
CREATED = 1790000000
DEFAULT_MODEL = "gpt-4o-mini"


@dataclass
class RecordedRequest:
    """What the upstream was asked. Header names are lower-case, times are `time.monotonic()`."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection_id: int
    received_at: float = field(default_factory=time.monotonic)
    closed_at: float | None = None  # when the peer was seen to be gone before the reply was over

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class ConnectionOver(Exception):
    """Ends a connection from inside a reply: the peer has gone, or the reply wants it closed."""


class LoopbackServer:
    """Listens on 127.0.0.1 and runs `serve(connection, number)` in a daemon thread for each connection.

    `close()` shuts every connection, which wakes whatever thread waits on it, and joins them all.
    """

    def __init__(self, port: int = 0) -> None:
        self.is_closing = False
        self.connections = 0  # accepted so far
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._listener = bind_loopback(port)
        self.host, self.port = self._listener.getsockname()
        self._start_listening()

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.port

    def serve(self, connection: socket.socket, number: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Leaves no thread and no socket. A second call does nothing."""
        with self._lock:
            if self.is_closing:
                return
            self.is_closing = True
        self._stop_listening()
        self.close_connections()
        for thread in self._threads:
            thread.join(timeout=10)
            if thread.is_alive():
                raise RuntimeError(f"{thread.name} did not end")
        for resource in (self._listener, self._wake_reader, self._wake_writer):
            resource.close()

    def close_connections(self) -> None:
        with self._lock:
            for connection in self._open:
                shut(connection)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_listening(self) -> None:
        self._listener.listen(1024)
        self._accepting = threading.Thread(
            target=self._accept_connections, name=f"{type(self).__name__} accepting", daemon=True
        )
        self._accepting.start()

    def _stop_listening(self) -> None:
        if self._accepting.is_alive():
            self._wake_writer.send(b"x")
            self._accepting.join()

    def _accept_connections(self) -> None:
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        poller.register(self._wake_reader, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poller.poll()}
            if self._wake_reader.fileno() in ready:
                self._wake_reader.recv(1)
                return
            connection, _ = self._listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._start_thread(connection)

    def _start_thread(self, connection: socket.socket) -> None:
        with self._lock:
            self.connections += 1
            self._open.add(connection)
            name = f"{type(self).__name__} connection {self.connections}"
            arguments = (connection, self.connections)
            thread = threading.Thread(target=self._run, args=arguments, name=name, daemon=True)
            self._threads = [known for known in self._threads if known.is_alive()] + [thread]
            thread.start()

    def _run(self, connection: socket.socket, number: int) -> None:
        try:
            self.serve(connection, number)
        except (OSError, ConnectionOver):
            pass  # the peer went away, or close() shut the socket to end this thread
        finally:
            with self._lock:
                self._open.discard(connection)
                connection.close()


def bind_loopback(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    return listener


def shut(connection: socket.socket) -> None:
    """Ends both directions; unlike close(), it wakes a thread that waits on the socket."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class FakeUpstream(LoopbackServer):
    """An upstream whose behaviour a test sets and which records what it was asked.

    `reply` answers every call that the script does not; it starts as `auto()`.
    """

    def __init__(self, port: int = 0, reply: Reply | None = None) -> None:
        self.reply: Reply = reply or auto()
        self.requests: list[RecordedRequest] = []
        self.stale_closes = 0  # connections that `stale()` closed in the face of a request
        self._script: deque[Reply] = deque()
        self._changed = threading.Condition()
        super().__init__(port)

    @property
    def base_url(self) -> str:
        return f"http://{self.host}:{self.port}/v1"

    def script(self, replies: Iterable[Reply]) -> None:
        """One reply for each of the next calls, then `reply` again."""
        with self._changed:
            self._script = deque(replies)

    def wait_for_requests(self, count: int, timeout_seconds: float = 10.0) -> list[RecordedRequest]:
        """Waits until `count` requests were received; returns all so far."""
        self.wait_until(lambda: len(self.requests) >= count, timeout_seconds)
        return self.requests

    def wait_for_close(self, request: RecordedRequest, timeout_seconds: float = 10.0) -> float:
        """Waits until the peer of this request was seen to be gone; returns when that was."""
        self.wait_until(lambda: request.closed_at is not None, timeout_seconds)
        assert request.closed_at is not None
        return request.closed_at

    def wait_until(self, condition: Callable[[], bool], timeout_seconds: float = 10.0) -> None:
        """Waits for a condition on what was recorded; looked at again whenever something is recorded."""
        with self._changed:
            if not self._changed.wait_for(condition, timeout_seconds):
                raise AssertionError(f"not within {timeout_seconds} s; recorded: {self.requests}")

    def serve(self, connection: socket.socket, number: int) -> None:
        reader = _RequestReader(connection, number)
        while (request := reader.read()) is not None:
            with self._changed:
                self.requests.append(request)
                reply = self._script.popleft() if self._script else self.reply
                self._changed.notify_all()
            exchange = Exchange(self, connection, request)
            reply(exchange)
            if exchange.is_last:
                return
            if exchange.goes_stale:
                self._close_at_next_request(connection)
                return

    def _close_at_next_request(self, connection: socket.socket) -> None:
        # Closing with the request still unread makes the kernel answer with a reset, which is what a caller
        # meets that reuses a connection at the moment the server gives it up.
        if connection.recv(1, socket.MSG_PEEK):
            with self._changed:
                self.stale_closes += 1
                self._changed.notify_all()

    def note_closed(self, request: RecordedRequest) -> None:
        with self._changed:
            if not self.is_closing and request.closed_at is None:
                request.closed_at = time.monotonic()
                self._changed.notify_all()


class _RequestReader:
    """Reads one request after the other from a connection; bodies by length or chunked."""

    def __init__(self, connection: socket.socket, connection_id: int) -> None:
        self._connection = connection
        self._connection_id = connection_id
        self._buffer = b""

    def read(self) -> RecordedRequest | None:
        """None where the peer closed between two requests."""
        if not self._buffer and not self._receive():
            return None
        request_line, *lines = self._read_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        method, path, _ = request_line.split(" ", 2)
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            name, value = name.strip().lower(), value.strip()
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        if headers.get("expect", "").lower() == "100-continue":
            self._connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return RecordedRequest(method, path, headers, self._read_body(headers), self._connection_id)

    def _read_body(self, headers: Mapping[str, str]) -> bytes:
        if "chunked" not in headers.get("transfer-encoding", "").lower():
            return self._read_exactly(int(headers.get("content-length", 0)))
        body = b""
        while size := int(self._read_until(b"\r\n").split(b";")[0], 16):
            body += self._read_exactly(size)
            self._read_exactly(2)
        while self._read_until(b"\r\n"):
            pass  # trailers
        return body

    def _read_until(self, mark: bytes) -> bytes:
        while mark not in self._buffer:
            self._receive_or_end()
        found, _, self._buffer = self._buffer.partition(mark)
        return found

    def _read_exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._receive_or_end()
        found, self._buffer = self._buffer[:size], self._buffer[size:]
        return found

    def _receive_or_end(self) -> None:
        if not self._receive():
            raise ConnectionOver

    def _receive(self) -> bool:
        received = self._connection.recv(262144)
        self._buffer += received
        return bool(received)


class Exchange:
    """One request being answered: what a reply reads from and writes to.

    `send` is raw; `start`, `write` and `finish` make an HTTP answer. Every one of them and `wait` notice a
    peer that has gone, record it and end the reply.
    """

    def __init__(self, upstream: FakeUpstream, connection: socket.socket, request: RecordedRequest) -> None:
        self.request = request
        self.is_last = request.headers.get("connection", "").lower() == "close"
        self.goes_stale = False
        self.stall_after_writes: int | None = None
        self.limit_bytes: int | None = None
        self.at_limit: Callable[[], None] = self.close
        self.drip_seconds: float | None = None
        self._upstream = upstream
        self._connection = connection
        self._is_chunked = False
        self._writes = 0
        self._written_bytes = 0
        self._poller = select.poll()
        self._poller.register(connection, select.POLLIN)

    def start(
        self, status: int = 200, headers: Mapping[str, str] | None = None, *, length: int | None = None
    ) -> None:
        """Sends status line and headers; without a length the body is chunked."""
        self._is_chunked = length is None
        framing = {"Transfer-Encoding": "chunked"} if length is None else {"Content-Length": str(length)}
        if self.is_last:
            framing["Connection"] = "close"
        phrase = HTTPStatus(status).phrase if status in HTTPStatus.__members__.values() else "Status"
        lines = [f"HTTP/1.1 {status} {phrase}"]
        lines += [f"{name}: {value}" for name, value in {**framing, **(headers or {})}.items()]
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1"))
        self._obey_limits()

    def write(self, body: bytes, *, last: bool = False) -> None:
        """Sends a part of the body. `last` puts the end of a chunked body into the same packet, so that a
        peer that hangs up once it has what it needs does not look like one that hung up in the middle."""
        pieces = [body] if self.drip_seconds is None else [body[i : i + 1] for i in range(len(body))]
        self._writes += 1
        for position, piece in enumerate(pieces, 1):
            if self.drip_seconds is not None:
                self.wait(self.drip_seconds)
            if self.limit_bytes is not None:
                piece = piece[: self.limit_bytes - self._written_bytes]
            self._written_bytes += len(piece)
            framed = self._frame(piece)
            if last and position == len(pieces) and not self._is_at_limit():
                framed += self._end()
            self.send(framed)
            self._obey_limits(within_write=position < len(pieces))

    def finish(self) -> None:
        """Ends a body whose last part was not written with `last`."""
        self.send(self._end())

    def send(self, raw: bytes) -> None:
        """Sends bytes as they are."""
        self.wait(0)
        try:
            self._connection.sendall(raw)
        except OSError as exc:
            self._upstream.note_closed(self.request)
            raise ConnectionOver from exc

    def wait(self, seconds: float | None = None) -> None:
        """Is silent for that time, or until the peer closes or the upstream is closed."""
        ends_at = None if seconds is None else time.monotonic() + seconds
        while True:
            remaining = None if ends_at is None else max(0.0, ends_at - time.monotonic()) * 1000
            if self._poller.poll(remaining):
                self._end_if_peer_is_gone()
                time.sleep(0.005)  # bytes of a next request lie there: poll would return at once, again
            if ends_at is not None and time.monotonic() >= ends_at:
                return

    def close(self) -> None:
        """Closes the connection now, in the proper way (FIN)."""
        raise ConnectionOver

    def reset(self) -> None:
        """Closes the connection now with a reset (RST)."""
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._connection.close()
        raise ConnectionOver

    def _frame(self, body: bytes) -> bytes:
        if not self._is_chunked or not body:
            return body
        return b"%x\r\n%b\r\n" % (len(body), body)

    def _end(self) -> bytes:
        return b"0\r\n\r\n" if self._is_chunked else b""

    def _is_at_limit(self) -> bool:
        return self._is_stalled() or self._is_cut()

    def _is_stalled(self) -> bool:
        return self.stall_after_writes is not None and self._writes >= self.stall_after_writes

    def _is_cut(self) -> bool:
        return self.limit_bytes is not None and self._written_bytes >= self.limit_bytes

    def _obey_limits(self, within_write: bool = False) -> None:
        if self._is_cut():
            self.at_limit()
        if self._is_stalled() and not within_write:
            self.wait()

    def _end_if_peer_is_gone(self) -> None:
        try:
            is_gone = not self._connection.recv(1, socket.MSG_PEEK)
        except OSError:
            is_gone = True
        if is_gone:
            self._upstream.note_closed(self.request)
            raise ConnectionOver


Reply = Callable[[Exchange], None]


# Proper answers.


def auto(*, echo: bool = False, delay: float = 0.0) -> Reply:
    """Behaves as a proper server: by path, `stream`, `n`, `tools`, `response_format`.

    `echo` answers with the last user message; `delay` (seconds) is before a plain answer and between events.
    """

    def reply(exchange: Exchange) -> None:
        request = exchange.request
        path = request.path.partition("?")[0]
        if request.method == "GET" and path.endswith("/models"):
            return models(MODELS)(exchange)
        if request.method == "POST" and path.endswith("/embeddings"):
            return embedding(delay=delay)(exchange)
        if request.method != "POST" or not path.endswith("/chat/completions"):
            return status(404)(exchange)
        body = request.json
        text = _last_user_text(body) if echo else "Hello world"
        if body.get("stream"):
            return stream(text=_content(body, text), tool_calls=_tool_calls(body), delay=delay)(exchange)
        return completion(_content(body, text), tool_calls=_tool_calls(body), delay=delay)(exchange)

    return reply


def completion(
    text: str | None = "Hello",
    *,
    usage: Mapping[str, Any] | None = USAGE,
    finish: str = "stop",
    tool_calls: Sequence[Mapping[str, Any]] = (),
    headers: Mapping[str, str] | None = None,
    delay: float = 0.0,
    **fields: Any,
) -> Reply:
    """A plain chat completion with as many choices as `n` asks for. `fields` replace or add top-level ones;
    `usage=None` leaves usage out; `delay` is before the headers."""
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if tool_calls:
        message |= {"content": None, "tool_calls": list(tool_calls)}
        finish = "tool_calls"

    def reply(exchange: Exchange) -> None:
        asked = _json_or_empty(exchange.request)
        answer = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": CREATED,
            "model": asked.get("model", DEFAULT_MODEL),
            "choices": [
                {"index": index, "message": message, "logprobs": None, "finish_reason": finish}
                for index in range(asked.get("n") or 1)
            ],
        }
        if usage is not None:
            answer["usage"] = dict(usage)
        exchange.wait(delay)
        _send_whole(exchange, 200, _json_bytes(answer | fields), headers)

    return reply


def embedding(
    vector: Sequence[float] = (0.25, -0.5, 1.0),
    *,
    usage: Mapping[str, Any] | None = None,
    delay: float = 0.0,
) -> Reply:
    """The same vector for every input, as floats or, where asked for, base64 of little-endian float32."""

    def reply(exchange: Exchange) -> None:
        asked = _json_or_empty(exchange.request)
        given = asked.get("input", "")
        count = len(given) if isinstance(given, list) and given and not isinstance(given[0], int) else 1
        value: Any = list(vector)
        if asked.get("encoding_format") == "base64":
            value = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        answer = {
            "object": "list",
            "model": asked.get("model", "text-embedding-3-small"),
            "data": [{"object": "embedding", "index": i, "embedding": value} for i in range(count)],
            "usage": dict(usage or {"prompt_tokens": 5 * count, "total_tokens": 5 * count}),
        }
        exchange.wait(delay)
        _send_whole(exchange, 200, _json_bytes(answer))

    return reply


def models(names: Sequence[str]) -> Reply:
    listed = [{"id": name, "object": "model", "created": CREATED, "owned_by": "fake"} for name in names]
    return lambda exchange: _send_whole(exchange, 200, _json_bytes({"object": "list", "data": listed}))


def stream(
    chunks: Iterable[Mapping[str, Any] | bytes] | None = None,
    text: str | None = "Hello world",
    *,
    usage: Mapping[str, Any] | bool = True,
    done: bool = True,
    finish: str | None = "stop",
    tool_calls: Sequence[Mapping[str, Any]] = (),
    delay: float = 0.0,
    first_delay: float = 0.0,
    pieces: Iterable[bytes] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """A stream of server-sent events: role, words of `text`, finish reason, usage, `[DONE]`.

    `chunks` replaces all that comes before the usage chunk: objects become events, bytes are sent as they
    are. `pieces` replaces the whole body and is written piece by piece. `usage` is sent only where the
    request asks for it with `stream_options.include_usage`; a mapping replaces the counts, False never sends
    it. `finish=None` leaves the finish reason out. `first_delay` is between headers and first event.
    """
    message = {"text": text, "finish": finish, "tool_calls": tool_calls}

    def body(asked: Mapping[str, Any]) -> list[bytes]:
        if pieces is not None:
            return list(pieces)
        events = list(chunks) if chunks is not None else _chunks_of(asked, **message)
        if usage and (asked.get("stream_options") or {}).get("include_usage"):
            counts = USAGE if usage is True else usage
            events.append(_chunk(asked, usage=dict(counts)))
        if done:
            events.append(b"data: [DONE]\n\n")
        return [item if isinstance(item, bytes) else event(item) for item in events]

    def reply(exchange: Exchange) -> None:
        written = body(_json_or_empty(exchange.request))
        exchange.start(200, {"Content-Type": "text/event-stream; charset=utf-8", **(headers or {})})
        exchange.wait(first_delay)
        for position, piece in enumerate(written, 1):
            exchange.write(piece, last=position == len(written))
            if position < len(written):
                exchange.wait(delay)
        if not written:
            exchange.finish()

    return reply


def event(chunk: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + _json_bytes(chunk) + b"\n\n"


# Refusals and nonsense.


def status(
    code: int, body: bytes | Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
) -> Reply:
    """A whole answer with this status; without a body an error in OpenAI's form."""
    if body is None:
        body = {"error": {"message": f"fake {code}", "type": "fake_error", "param": None, "code": None}}
    sent = body if isinstance(body, bytes) else _json_bytes(body)
    return lambda exchange: _send_whole(exchange, code, sent, headers)


def html(code: int = 200) -> Reply:
    page = b"<!DOCTYPE html><html><title>Sign in</title><h1>Sign in</h1></html>"
    return status(code, page, {"Content-Type": "text/html; charset=utf-8"})


def redirect(url: str, code: int = 302) -> Reply:
    return status(code, b"", {"Location": url})


def empty() -> Reply:
    """200 with a body of no bytes."""
    return status(200, b"")


def raw(sent: bytes) -> Reply:
    """These bytes on the socket instead of an HTTP answer, then close."""

    def reply(exchange: Exchange) -> None:
        exchange.send(sent)
        exchange.close()

    return reply


# Silence and broken connections.


def hang() -> Reply:
    """Never sends a byte."""
    return lambda exchange: exchange.wait()


def headers_then_hang(code: int = 200, content_type: str = "text/event-stream") -> Reply:
    def reply(exchange: Exchange) -> None:
        exchange.start(code, {"Content-Type": content_type})
        exchange.wait()

    return reply


def stall_after(events: int, reply: Reply | None = None) -> Reply:
    """Silence after that many events (or pieces) of a stream; after its last one, before the body's end."""
    return _shaped(reply or stream(), stall_after_writes=events)


def cut_after(size_bytes: int, reply: Reply | None = None) -> Reply:
    """A clean close after that many bytes of the body: a length not reached, or no terminating chunk."""
    return _shaped(reply or auto(), limit_bytes=size_bytes)


def reset_after(size_bytes: int, reply: Reply | None = None) -> Reply:
    """A reset (RST) after that many bytes of the body; 0 is right after the headers."""

    def resetting(exchange: Exchange) -> None:
        exchange.at_limit = exchange.reset
        cut_after(size_bytes, reply)(exchange)

    return resetting


def drip(delay: float = 0.001, reply: Reply | None = None) -> Reply:
    """The body one byte at a time, each in a packet (and, where chunked, a chunk) of its own."""
    return _shaped(reply or auto(), drip_seconds=delay)


def stale(reply: Reply | None = None) -> Reply:
    """Answers well, keeps the connection, and closes it right when the next request arrives on it. That next
    request is counted in `upstream.stale_closes`, not recorded, and takes nothing from the script."""
    return _shaped(reply or auto(), goes_stale=True)


def comments_forever(interval: float = 0.05) -> Reply:
    """An event stream of nothing but keep-alive comments."""

    def reply(exchange: Exchange) -> None:
        exchange.start(200, {"Content-Type": "text/event-stream"})
        while True:
            exchange.write(b": keep-alive\n\n")
            exchange.wait(interval)

    return reply


def _shaped(reply: Reply, **shape: Any) -> Reply:
    def shaped(exchange: Exchange) -> None:
        for name, value in shape.items():
            setattr(exchange, name, value)
        reply(exchange)

    return shaped


def _send_whole(exchange: Exchange, code: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
    exchange.start(code, {"Content-Type": "application/json", **(headers or {})}, length=len(body))
    if body:
        exchange.write(body, last=True)


def _json_or_empty(request: RecordedRequest) -> dict[str, Any]:
    try:
        asked = request.json
    except ValueError:
        return {}
    return asked if isinstance(asked, dict) else {}


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _chunk(asked: Mapping[str, Any], *choices: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": asked.get("model", DEFAULT_MODEL),
        "choices": list(choices),
        **fields,
    }


def _chunks_of(
    asked: Mapping[str, Any],
    *,
    text: str | None,
    finish: str | None,
    tool_calls: Sequence[Mapping[str, Any]],
) -> list[Any]:
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": None if tool_calls else ""}]
    for index, call in enumerate(tool_calls):
        function = call["function"]
        opening = {"name": function["name"], "arguments": ""}
        deltas.append({"tool_calls": [{**call, "index": index, "function": opening}]})
        middle = len(function["arguments"]) // 2
        for part in (function["arguments"][:middle], function["arguments"][middle:]):
            deltas.append({"tool_calls": [{"index": index, "function": {"arguments": part}}]})
    if not tool_calls:
        deltas += [{"content": word} for word in _words(text or "")]
    chunks = []
    for delta in deltas:
        for choice in range(asked.get("n") or 1):
            chunks.append(_chunk(asked, {"index": choice, "delta": delta, "finish_reason": None}))
    if finish is not None:
        reason = "tool_calls" if tool_calls else finish
        for choice in range(asked.get("n") or 1):
            chunks.append(_chunk(asked, {"index": choice, "delta": {}, "finish_reason": reason}))
    return chunks


def _words(text: str) -> list[str]:
    first, *rest = text.split(" ")
    return [word for word in [first, *(f" {word}" for word in rest)] if word]


def _last_user_text(body: Mapping[str, Any]) -> str:
    for message in reversed(body.get("messages", [])):
        if message.get("role") == "user":
            content = message.get("content") or ""
            if isinstance(content, str):
                return content
            return "".join(part.get("text", "") for part in content)
    return ""


def _content(body: Mapping[str, Any], text: str) -> str:
    wanted = body.get("response_format") or {}
    if wanted.get("type") == "json_schema":
        schema = wanted["json_schema"].get("schema", {})
        return json.dumps(_example(schema, schema))
    return json.dumps({"answer": text}) if wanted.get("type") == "json_object" else text


def _tool_calls(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One call where the request demands one: of the function named, or of the first."""
    choice, tools = body.get("tool_choice"), body.get("tools")
    if not tools or not (choice == "required" or isinstance(choice, dict)):
        return []
    functions = [tool["function"] for tool in tools]
    if isinstance(choice, dict):
        functions = [item for item in functions if item["name"] == choice["function"]["name"]]
    schema = functions[0].get("parameters") or {}
    arguments = json.dumps(_example(schema, schema))
    function = {"name": functions[0]["name"], "arguments": arguments}
    return [{"id": "call_1", "type": "function", "function": function}]


def _example(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """A small value that fits a JSON schema of the kind that clients send."""
    if "$ref" in schema:
        return _example(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    for union in ("anyOf", "oneOf", "allOf"):
        if union in schema:
            return _example(schema[union][0], root)
    kind = schema.get("type", "object")
    if kind == "object":
        return {name: _example(inner, root) for name, inner in schema.get("properties", {}).items()}
    if kind == "array":
        return [_example(schema.get("items", {"type": "string"}), root)]
    values = {"string": "text", "integer": 1, "number": 1.5, "boolean": True, "null": None}
    return values[kind[0] if isinstance(kind, list) else kind]


def main() -> None:
    parser = argparse.ArgumentParser(description="A fake upstream that echoes the last user message.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds between events")
    arguments = parser.parse_args()
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with FakeUpstream(arguments.port, auto(echo=True, delay=arguments.delay)) as upstream:
        print(f"listening on {upstream.base_url}", flush=True)
        stopping.wait()


if __name__ == "__main__":
    main()
