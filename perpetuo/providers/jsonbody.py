"""JSON bodies at the border: read strictly, written compactly, edited without touching the rest.

A client's body goes upstream byte for byte but for the members that have to change, so numbers, escapes
and member order stay as the client wrote them. Format: RFC 8259. Knows no API.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, NoReturn

import orjson

# Most strings hold no escaped quote: the first branch runs to the next quote, several times as fast as the
# second, which steps over escapes. Possessive throughout, so a string is never tried twice.
_STRING = rb'(?>"[^"]*+(?<!\\)"|"[^"\\]*+(?:\\.[^"\\]*+)*+")'
_SPACE = rb"[ \t\r\n]*+"
_MEMBER = re.compile(
    rb"%(space)s(%(string)s)%(space)s:%(space)s(?:(%(string)s|[^ \t\r\n,{}\[\]]++)|[\[{])"
    % {b"string": _STRING, b"space": _SPACE},
    re.DOTALL,
)
_BRACKET = re.compile(
    rb'[^"\[\]{}]*+(?:%(string)s[^"\[\]{}]*+)*+([\[\]{}])' % {b"string": _STRING}, re.DOTALL
)
_COMMA_OR_END = re.compile(_SPACE + rb"([,}])")
_OPENING = re.compile(_SPACE + rb"\{" + _SPACE)


class _Member(NamedTuple):
    key: str
    start: int
    value_start: int
    end: int


def read_json(body: bytes) -> Any:
    """Parse UTF-8 JSON. ValueError for anything else: NaN, Infinity, a BOM, nesting that is too deep."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    # orjson refuses lone surrogate escapes, which upstreams do send: half an emoji in a delta.
    try:
        return json.loads(body.decode(), parse_constant=_refuse_constant)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def write_json(value: object) -> bytes:
    """Compact JSON. ValueError for NaN, Infinity and what JSON cannot say; lone surrogates are escaped."""
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
    if not changes and not any(member.key in remove for member in members):
        return body
    present = {member.key for member in members}
    kept: list[bytes] = [
        write_json(key) + b":" + write_json(value) for key, value in changes.items() if key not in present
    ]
    opening = _OPENING.match(body)
    assert opening is not None
    if kept:
        kept = [b",".join(kept)]
    written: set[str] = set()
    parts: list[bytes] = []
    previous_end = opening.end()
    for member in members:
        gap = body[previous_end : member.start]
        previous_end = member.end
        if member.key in remove or member.key in written:
            continue
        if kept or parts:
            parts.append(gap if b"," in gap else b",")
        if member.key in changes:
            written.add(member.key)
            parts += (body[member.start : member.value_start], write_json(changes[member.key]))
        else:
            parts.append(body[member.start : member.end])
    return b"".join((body[: opening.end()], *kept, *parts, body[previous_end:]))


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
            raise ValueError("not a JSON object")
        if found.start(2) >= 0:
            value_start, end = found.span(2)
        else:
            end = _closing(body, found.end())
            value_start = found.end() - 1
        members.append(_Member(_decode_key(found[1]), found.start(1), value_start, end))
        after = _COMMA_OR_END.match(body, end)
        if after is None:
            raise ValueError("not a JSON object")
        if after[1] == b"}":
            return members
        position = after.end()


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
