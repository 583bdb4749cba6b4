"""Many streams at once, read by client processes that compare each chunk's time with their own clock.

The upstream writes the monotonic clock into every chunk, and on one machine all processes share that clock;
so a chunk's delay is known without asking anybody.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from bench.load import STATUS
from bench.upstream import INTERVAL_SECONDS, allow_many_files

CLIENT_PROCESSES = 2
RAMP_SECONDS = 1.0  # in which the streams begin, evenly
MARGIN_SECONDS = 0.2  # at either end of the time in which all of them run
LEAST_CHUNKS = 20  # the last of them must come well after the ramp
PATIENCE_SECONDS = 30.0
SENT_AT = re.compile(rb'"t=(\d{19})"')


@dataclass(frozen=True)
class Job:
    """One client process's share. Times are of the monotonic clock; offsets count from `starts_at`."""

    url: str
    request: bytes
    offsets: list[float]
    chunks: int
    starts_at: float

    @property
    def steady(self) -> tuple[float, float]:
        """The time in which every stream has begun and none has ended."""
        end = self.starts_at + (self.chunks - 1) * INTERVAL_SECONDS
        return self.starts_at + RAMP_SECONDS + MARGIN_SECONDS, end - MARGIN_SECONDS


@dataclass
class Seen:
    """What clients saw. `steady_chunks` arrived in the job's steady time; `busy` is a share of one core."""

    complete: int = 0
    delays_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    steady_chunks: int = 0
    busy: float = 0.0
    problem: str = ""


class _Stream(asyncio.Protocol):
    def __init__(self, job: Job, seen: Seen) -> None:
        self.job, self.seen, self.steady = job, seen, job.steady
        self.received, self.chunks = b"", 0
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.asked_at = time.monotonic_ns()
        transport.write(self.job.request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        self.received += data
        if not self.chunks and not STATUS.match(self.received):
            self.seen.problem = self.seen.problem or self.received[:300].decode("latin-1")
            self.transport.close()
        end = 0
        for found in SENT_AT.finditer(self.received):
            end = found.end()
            self.count(int(found[1]), now)
        self.received = self.received[end:]
        if self.received.endswith(b"0\r\n\r\n") and b"data: [DONE]" in self.received:
            self.seen.complete += self.chunks == self.job.chunks
            self.transport.close()

    def count(self, sent_at: int, now: int) -> None:
        if not self.chunks:
            self.seen.first_ms.append((now - self.asked_at) / 1e6)
        self.chunks += 1
        self.seen.delays_ms.append((now - sent_at) / 1e6)
        begin, end = self.steady
        self.seen.steady_chunks += begin <= now / 1e9 < end

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)


def follow(job: Job) -> Seen:
    """Opens this process's streams and reads them to their ends."""
    seen, cpu, begun = Seen(), time.process_time(), time.monotonic()
    gc.disable()
    asyncio.run(_follow(job, seen))
    gc.enable()
    seen.busy = (time.process_time() - cpu) / (time.monotonic() - begun)
    return seen


async def _follow(job: Job, seen: Seen) -> None:
    parts = urlsplit(job.url)
    loop = asyncio.get_running_loop()

    async def one(offset: float) -> None:
        await asyncio.sleep(job.starts_at + offset - time.monotonic())
        _, stream = await loop.create_connection(lambda: _Stream(job, seen), parts.hostname, parts.port)
        await stream.over

    patience = RAMP_SECONDS + job.chunks * INTERVAL_SECONDS + PATIENCE_SECONDS
    tasks = [asyncio.create_task(one(offset)) for offset in job.offsets]
    _, pending = await asyncio.wait(tasks, timeout=patience)
    for task in pending:
        task.cancel()
    errors = [error for error in await asyncio.gather(*tasks, return_exceptions=True) if error]
    seen.problem = seen.problem or (repr(errors[0]) if errors else "")


@contextmanager
def clients() -> Iterator[ProcessPoolExecutor]:
    """The client processes, started and idle."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(CLIENT_PROCESSES, context, allow_many_files) as pool:
        list(pool.map(time.sleep, [0.5] * CLIENT_PROCESSES))
        yield pool


def jobs(url: str, request: bytes, streams: int, chunks: int) -> list[Job]:
    """The streams dealt out to the client processes, beginning shortly."""
    offsets = [RAMP_SECONDS * number / streams for number in range(streams)]
    starts_at = time.monotonic() + 0.3
    return [
        Job(url, request, offsets[share::CLIENT_PROCESSES], chunks, starts_at)
        for share in range(CLIENT_PROCESSES)
    ]


def together(parts: Iterable[Seen]) -> Seen:
    """What all the client processes saw; `busy` is that of the busiest."""
    whole = Seen()
    for part in parts:
        whole.complete += part.complete
        whole.steady_chunks += part.steady_chunks
        whole.delays_ms += part.delays_ms
        whole.first_ms += part.first_ms
        whole.busy = max(whole.busy, part.busy)
        whole.problem = whole.problem or part.problem
    return whole
