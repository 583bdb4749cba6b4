"""Plain calls in a closed loop: by wrk, or by a small loop of our own where wrk is missing."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bench.upstream import LENGTH

WRK = shutil.which("wrk")
STATUS = re.compile(rb"HTTP/1\.1 2\d\d ")
DONE = """
function done(summary, latency, requests)
  local e = summary.errors
  local failed = e.connect + e.read + e.write + e.status + e.timeout
  io.write(string.format('\\n[%d, %f, %f, %f, %d]\\n', summary.requests, summary.duration / 1e6,
                         latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, failed))
end
"""


@dataclass(frozen=True)
class Calls:
    """What one burst of load saw; `failed` are answers other than 2xx, and calls without an answer."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    failed: int


def request_bytes(url: str, headers: dict[str, str], body: bytes) -> bytes:
    """The whole request as it goes over the wire."""
    parts = urlsplit(url)
    lines = [f"POST {parts.path} HTTP/1.1", f"Host: {parts.netloc}", "Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def drive(
    url: str, headers: dict[str, str], body: bytes, connections: int, seconds: int, folder: Path
) -> Calls:
    """So many connections, each sending the next call when it has the last one's answer."""
    if WRK:
        return _wrk(url, headers, body, connections, seconds, folder)
    return asyncio.run(_loop(url, request_bytes(url, headers, body), connections, seconds))


def _wrk(
    url: str, headers: dict[str, str], body: bytes, connections: int, seconds: int, folder: Path
) -> Calls:
    script = folder / "wrk.lua"
    lines = ['wrk.method = "POST"', f"wrk.body = {json.dumps(body.decode())}"]
    all_headers = {"Content-Type": "application/json", **headers}
    lines += [f'wrk.headers["{name}"] = "{value}"' for name, value in all_headers.items()]
    script.write_text("\n".join(lines) + DONE)
    command = [WRK, "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", str(script), url]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Calls(*json.loads(done.stdout.splitlines()[-1]))


async def _loop(url: str, request: bytes, connections: int, seconds: int) -> Calls:
    parts, latencies, begun_at = urlsplit(url), [], time.monotonic()

    async def call_on(until: float) -> None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            while (sent_at := time.monotonic()) < until:
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                length = LENGTH.search(head)
                await reader.readexactly(int(length[1] if length else 0))
                if not STATUS.match(head):
                    raise ConnectionError(head.decode("latin-1"))
                latencies.append(1000 * (time.monotonic() - sent_at))
        finally:
            writer.close()
            await writer.wait_closed()

    callers = (call_on(begun_at + seconds) for _ in range(connections))
    ended = await asyncio.gather(*callers, return_exceptions=True)
    ordered = sorted(latencies) or [0.0]
    p50, p99 = (ordered[len(ordered) * percent // 100] for percent in (50, 99))
    failed = sum(error is not None for error in ended)  # each ended its connection
    return Calls(len(latencies), time.monotonic() - begun_at, p50, p99, failed)
