"""How a request's and an answer's body are kept in their row: compressed, and capped at 256 KiB each.

One byte says the form: `j` JSON as it was, `z` JSON compressed, `t` head and tail of a longer one.
"""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import orjson

from perpetuo.native import Native

CAP = 256 * 1024
WORTH_COMPRESSING = 512  # below it zlib's own header eats what it saves
LEVEL = 1  # 30 µs for a usual prompt; level 6 takes three times as long for a tenth less
LONG = 32 * 1024  # half a millisecond; the way to a native thread and back takes a tenth of that


def pack(body: bytes) -> bytes:
    """The stored form of a JSON body."""
    if len(body) <= WORTH_COMPRESSING:
        return b"j" + body
    if len(body) <= CAP:
        return b"z" + zlib.compress(body, LEVEL)
    half = CAP // 2
    return b"t" + struct.pack(">Q", len(body)) + zlib.compress(body[:half] + body[-half:], LEVEL)


def pack_beside(native: Native, body: bytes) -> bytes:
    """The same without holding up the event loop: a body of the full 256 KiB takes 4 ms."""
    return pack(body) if len(body) <= LONG else native.packing(pack, body)


def unpack(stored: bytes | None) -> Any:
    """The JSON value, `{"truncated": true, "bytes", "head", "tail"}` for a capped one, None for none."""
    if stored is None:
        return None
    form, rest = stored[:1], stored[1:]
    if form == b"t":
        kept, half = zlib.decompress(rest[8:]), CAP // 2
        return {
            "truncated": True,
            "bytes": struct.unpack(">Q", rest[:8])[0],
            "head": kept[:half].decode(errors="replace"),
            "tail": kept[half:].decode(errors="replace"),
        }
    body = zlib.decompress(rest) if form == b"z" else rest
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:  # lone surrogates, which json takes
        return json.loads(body)
