"""JSON bodies at the border: read strictly, written compactly, edited without touching the rest.

A client's body goes upstream byte for byte but for the members that have to change, so numbers, escapes
and member order stay as the client wrote them. Format: RFC 8259. Knows no API.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, NoReturn

import orjson

# A negated single byte is the only repeat that `re` runs at memory speed, so a string runs from quote to
# quote: over a quote after a lone backslash, to one after none. Only where backslashes stand in a row does
# the second branch count them. All atomic or possessive: no byte is tried twice but in that branch.
_STRING = rb'(?>"[^"]*+(?:(?<=[^\\]\\)"[^"]*+)*+(?<!\\)"|"[^"\\]*+(?:\\.[^"\\]*+)*+")'
_SPACE = rb"[ \t\r\n]*+"
_FLAT = rb'[^"\[\]{}]*+(?:' + _STRING + rb'[^"\[\]{}]*+)*+'
# `re` knows no recursion; what is nested deeper than this is left to `_closing`, three times as slow.
_NESTED_LEVELS = 8


def _nested(levels: int) -> bytes:
    if levels == 0:
        return _FLAT
    inner = rb"(?:" + _STRING + rb"|[\[{]" + _nested(levels - 1) + rb"[\]}])"
    return rb'[^"\[\]{}]*+(?:' + inner + rb'[^"\[\]{}]*+)*+'


# An answer with 20 logprobs a token reaches the first after 24,000 tokens, 2,600 embeddings the second.
LONG = 1024 * 1024
MOST_BRACKETS = 1_000_000
MOST_COMMAS = 4_000_000

_OPENING = re.compile(_SPACE + rb"\{" + _SPACE)
_KEY_PATTERN = _SPACE + rb"(" + _STRING + rb")" + _SPACE + rb":" + _SPACE
_KEY = re.compile(_KEY_PATTERN + rb"[\[{]", re.DOTALL)
_VALUE_PATTERN = _STRING + rb"|[^ \t\r\n,{}\[\]\"]++|[\[{]" + _nested(_NESTED_LEVELS) + rb"[\]}]"
_END_PATTERN = _SPACE + rb"([,}])"
_END = re.compile(_END_PATTERN)
_MEMBER = re.compile(_KEY_PATTERN + rb"(" + _VALUE_PATTERN + rb")" + _END_PATTERN, re.DOTALL)
_BRACKET = re.compile(_FLAT + rb"([\[\]{}])", re.DOTALL)


class _Member(NamedTuple):
    key: str
    start: int
    value_start: int
    end: int


def read_json(body: bytes) -> Any:
    """Parse UTF-8 JSON. ValueError for anything else: NaN, numbers above all floats, a BOM, deep nesting."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    # orjson refuses lone surrogate escapes, which upstreams do send: half an emoji in a delta.
    try:
        return json.loads(body.decode(), parse_constant=_refuse, parse_float=_finite_float)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc


def is_bomb(body: bytes) -> bool:
    """Whether parsing an upstream's `body` would take gigabytes, and seconds in which nobody else is served:
    64 MiB may hold twenty million empty lists."""
    if len(body) <= LONG:
        return False
    return body.count(b"[") + body.count(b"{") > MOST_BRACKETS or body.count(b",") > MOST_COMMAS


def _refuse(number: str) -> NoReturn:
    raise ValueError(f"{number} is not a finite number")


def _finite_float(number: str) -> float:
    value = float(number)
    return value if math.isfinite(value) else _refuse(number)


def write_json(value: object) -> bytes:
    """Compact JSON of what `read_json` gives; lone surrogates are escaped. ValueError for other values."""
    try:
        return orjson.dumps(value)
    except TypeError:  # a lone surrogate, an integer above 64 bits
        try:
            return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
        except (TypeError, RecursionError) as exc:
            raise ValueError("not writable as JSON") from exc


def top_level_keys(body: bytes) -> list[str]:
    """The decoded keys of the object in `body`, in order, duplicates kept. ValueError if it is none."""
    return [member.key for member in _scan(body)]


def replace_members(body: bytes, changes: Mapping[str, object], remove: Collection[str] = ()) -> bytes:
    """Set and remove top-level members of the JSON object in `body`; all other bytes stay.

    A changed member keeps its first place, its duplicates go; one that was not there goes to the front.
    Without anything to change the same bytes object comes back. `body` must be valid JSON; ValueError if
    it is not an object.
    """
    members = _scan(body)
    dropped = {member.key for member in members if member.key in remove}
    if not changes and not dropped:
        return body
    present = {member.key for member in members}
    inserted = [write_json(key) + b":" + write_json(changes[key]) for key in changes if key not in present]
    parts = [b",".join(inserted)] if inserted else []
    position = members[0].start if members else 0
    for member in members:
        gap = body[position : member.start] or b","  # before the first member stands no comma
        position = member.end
        if member.key in dropped:
            continue
        value = body[member.value_start : member.end]
        if member.key in changes:
            dropped.add(member.key)
            value = write_json(changes[member.key])
        parts += (gap if parts else b"", body[member.start : member.value_start], value)
    opening, closing = _edges(body, members)
    return b"".join((opening, *parts, closing))


def _edges(body: bytes, members: list[_Member]) -> tuple[bytes, bytes]:
    """What stands before the first member and after the last; of an empty object, its two halves."""
    if members:
        return body[: members[0].start], body[members[-1].end :]
    middle = body.index(b"{") + 1
    return body[:middle], body[middle:]


def _scan(body: bytes) -> list[_Member]:
    opening = _OPENING.match(body)
    if opening is None:
        raise ValueError("not a JSON object")
    members: list[_Member] = []
    position = opening.end()
    if body.startswith(b"}", position):
        return members
    while True:
        found = _MEMBER.match(body, position)
        if found is None:
            member, end = _scan_deep_member(body, position)
        else:
            member = _Member(_decode_key(found[1]), found.start(1), found.start(2), found.end(2))
            end = found
        members.append(member)
        if end[end.re.groups] == b"}":
            return members
        position = end.end()


def _scan_deep_member(body: bytes, position: int) -> tuple[_Member, re.Match[bytes]]:
    key = _KEY.match(body, position)
    if key is None:
        raise ValueError("not a JSON object")
    value_end = _closing(body, key.end())
    end = _END.match(body, value_end)
    if end is None:
        raise ValueError("not a JSON object")
    return _Member(_decode_key(key[1]), key.start(1), key.end() - 1, value_end), end


def _closing(body: bytes, position: int) -> int:
    """Where the array or object ends whose opening bracket is before `position`."""
    depth = 1
    while depth:
        found = _BRACKET.match(body, position)
        if found is None:
            raise ValueError("not a JSON object")
        depth += 1 if found[1] in b"[{" else -1
        position = found.end()
    return position


def _decode_key(key: bytes) -> str:
    return json.loads(key) if b"\\" in key else key[1:-1].decode()
