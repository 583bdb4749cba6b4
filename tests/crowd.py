"""A crowd of clients at once, cheap enough to be many: raw HTTP over asyncio, an answer a connection."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

CHAT = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Say hello"}]}


@dataclass(frozen=True)
class Got:
    """One answer; status 0 where the connection ended without one."""

    status: int
    code: str | None
    body: str
    headers: dict[str, str]


def rush(url: str, key: str, count: int, **fields: Any) -> list[Got]:
    """`count` chat completions, all at the same moment."""

    async def all_at_once() -> list[Got]:
        return await asyncio.gather(*(ask(url, key, **fields) for _ in range(count)))

    return asyncio.run(all_at_once())


async def ask(url: str, key: str, **fields: Any) -> Got:
    """One chat completion over a connection of its own."""
    body = json.dumps({**CHAT, **fields}).encode()
    host = urlsplit(url).netloc
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    raw = b""
    try:
        reader, writer = await asyncio.open_connection(*host.split(":"))
        writer.write(head.encode() + body)
        raw = await reader.read()
        writer.close()
    except OSError:
        pass
    return _read(raw)


def _read(raw: bytes) -> Got:
    head, _, body = raw.decode(errors="replace").partition("\r\n\r\n")
    first, *lines = head.split("\r\n")
    if not first.startswith("HTTP/1.1 "):
        return Got(0, None, "", {})
    status = int(first.split()[1])
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    code = None
    if status >= 400 and '"error"' in body:
        code = json.loads(body[body.index("{") : body.rindex("}") + 1])["error"]["code"]
    return Got(status, code, body, headers)
