"""The upstream as a process of its own: streams with the time in each chunk, and plain completions at once.

`python -m bench.upstream` listens on a free port of 127.0.0.1 and prints it. A streamed answer has as many
chunks as the request's `max_tokens`, one every INTERVAL_SECONDS from the first, which goes out at once; each
holds the monotonic clock's nanoseconds when it was written. Shapes: OpenAI's chat completions.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import resource
import time

INTERVAL_SECONDS = 0.1
COMPLETION_BYTES = 699
IS_STREAM = re.compile(rb'"stream":\s*true')
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
MAX_TOKENS = re.compile(rb'"max_tokens":\s*(\d+)')
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
MODEL = "gpt-4o-mini"


def completion() -> str:
    """A whole answer of exactly COMPLETION_BYTES, without the quotes and dollars that nginx would read."""
    message = {"role": "assistant", "content": "", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    usage = {"prompt_tokens": 130, "completion_tokens": 60, "total_tokens": 190}
    answer = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1790000000, "model": "gpt-4o"}
    answer |= {"choices": [choice], "usage": usage}
    message["content"] = ("Hello " * 100)[: COMPLETION_BYTES - len(json.dumps(answer))]
    return json.dumps(answer)


def event(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
    """One event of a stream, framed as an HTTP chunk."""
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1790000000, "model": MODEL}
    chunk["choices"] = [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    return framed(b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n")


def framed(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(content), content)


def now_text() -> bytes:
    return b"%019d" % time.monotonic_ns()


WHOLE = completion().encode()
PLAIN = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(WHOLE) + WHOLE
)
CHUNK_HEAD, CHUNK_TAIL = event({"content": "t=" + "0" * 19}).split(b"0" * 19)
STREAM_END = event({}, "stop") + framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Connection(asyncio.Protocol):
    """One client; one request after the other, as HTTP/1.1 without pipelining has it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.received = b""
        self.timer: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, found, body = self.received.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if not found or len(body) < int(length[1] if length else 0):
            return
        self.received = b""
        if IS_STREAM.search(body):
            self.transport.write(STREAM_HEAD)
            count = MAX_TOKENS.search(body)
            self.send_chunk(asyncio.get_running_loop().time(), int(count[1]) if count else 10)
        else:
            self.transport.write(PLAIN)

    def send_chunk(self, due: float, left: int) -> None:
        if not left:
            self.transport.write(STREAM_END)
            return
        self.transport.write(CHUNK_HEAD + now_text() + CHUNK_TAIL)
        due += INTERVAL_SECONDS
        self.timer = asyncio.get_running_loop().call_at(due, self.send_chunk, due, left - 1)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()


def allow_many_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    allow_many_files()
    gc.disable()  # nothing here makes cycles that matter in a run, and a collection would delay chunks
    asyncio.run(serve())
