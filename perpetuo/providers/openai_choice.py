"""One choice of a stream of chunks: what it has been sent so far, and the mends that depend on it.

Rules 59 to 67 of the notes on clients: one role, one finish reason, tool calls counted from 0 that say
their id and name once.
"""

from __future__ import annotations

from io import StringIO
from typing import Any

from perpetuo.errors import UpstreamError
from perpetuo.providers.hosts import Host
from perpetuo.providers.openai_message import (
    arguments_text,
    finish_reason,
    flatten_content,
    name_thoughts,
    new_call_id,
)

_MAX_CALLS = 1_024
_CONTENT = (
    "content",
    "reasoning_content",
    "reasoning",
    "reasoning_details",
    "refusal",
    "tool_calls",
    "function_call",
    "audio",
)


class TextRoom:
    """Counts the characters of one stream and keeps as many of them as there is room for."""

    def __init__(self, characters: int) -> None:
        self.left = characters
        self.characters = 0

    @property
    def is_exceeded(self) -> bool:
        return self.left < 0

    def keep(self, target: StringIO, text: str) -> None:
        self.characters += len(text)
        if self.left >= 0:
            target.write(text[: self.left] if len(text) > self.left else text)
            self.left -= len(text)


class ToolCall:
    """One tool call, at its place in the client's count."""

    def __init__(self, position: int) -> None:
        self.id = ""
        self._position = position
        self._type = "function"
        self.name = ""
        self._arguments = StringIO()

    def mend(self, delta: dict[str, Any], room: TextRoom) -> bool:
        """Mend one delta of this call in place, take note of it; True if anything was amiss."""
        is_mended = delta.get("index") != self._position or type(delta["index"]) is not int
        delta["index"] = self._position
        if not self.id:
            is_mended |= self._mend_first(delta)
        else:
            for name in ("id", "type"):
                if name in delta and (name == "id" or not delta[name]):
                    del delta[name]
                    is_mended = True
        return self._mend_function(delta, room) or is_mended

    def _mend_first(self, delta: dict[str, Any]) -> bool:
        given = delta.get("id")
        self.id = given if isinstance(given, str) and given else new_call_id()
        if isinstance(kind := delta.get("type"), str) and kind:
            self._type = kind
        is_mended = given != self.id or kind != self._type
        delta["id"] = self.id
        delta["type"] = self._type
        return is_mended

    def _members(self) -> tuple[str, str]:
        return ("custom", "input") if self._type == "custom" else ("function", "arguments")

    def _mend_function(self, delta: dict[str, Any], room: TextRoom) -> bool:
        member, text_member = self._members()
        function = delta.get(member)
        is_mended = not isinstance(function, dict)
        if not isinstance(function, dict):
            function = delta[member] = {}
        name = function.get("name")
        if not self.name and isinstance(name, str) and name:
            self.name = name
        elif "name" in function:
            del function["name"]
            is_mended = True
        arguments = function.get(text_member)
        if not isinstance(arguments, str):
            arguments = function[text_member] = arguments_text(arguments)
            is_mended = True
        room.keep(self._arguments, arguments)
        return is_mended

    def joined(self) -> dict[str, Any]:
        """The whole call, as far as its text was kept."""
        member, text_member = self._members()
        function = {"name": self.name, text_member: self._arguments.getvalue()}
        return {"id": self.id, "type": self._type, member: function}


class Choice:
    """One choice. `finish_reason` is None until it came; `has_role` says that the client got the role."""

    def __init__(self, room: TextRoom, host: Host) -> None:
        self.finish_reason: str | None = None
        self.has_role = False
        self._room = room
        self._host = host
        self._texts = {name: StringIO() for name in ("content", "reasoning_content", "refusal")}
        self._calls: list[ToolCall] = []
        self._calls_by_key: dict[tuple[int | None, str | None], ToolCall] = {}

    def mend(self, choice: dict[str, Any]) -> bool:
        """Mend one chunk's part of this choice in place, take note of it; True if anything was amiss."""
        delta = choice.get("delta")
        is_mended = not isinstance(delta, dict)
        if not isinstance(delta, dict):
            delta = choice["delta"] = {}
        if not self.has_role:
            self.has_role = True
            if delta.get("role") != "assistant":
                delta["role"] = "assistant"
                is_mended = True
        elif "role" in delta:
            del delta["role"]
            is_mended = True
        content = delta.get("content")
        if content is not None and not isinstance(content, str):
            flatten_content(delta)
            is_mended = True
        if "reasoning" in delta and self._host.thinks_as_reasoning:
            is_mended |= name_thoughts(delta)
        if "tool_calls" in delta:
            is_mended |= self._mend_calls(delta)
        is_mended |= self._mend_finish(choice)
        self._note_texts(delta)
        return is_mended

    def _mend_finish(self, choice: dict[str, Any]) -> bool:
        reason = choice.get("finish_reason")
        if reason is None and "finish_reason" in choice:
            return False
        if isinstance(reason, str) and reason and self.finish_reason is None:
            self.finish_reason = finish_reason(reason, bool(self._calls), self._host)
            choice["finish_reason"] = self.finish_reason
            return self.finish_reason != reason
        choice["finish_reason"] = None
        return True

    def likely_finish_reason(self) -> str:
        """What the host would have said."""
        return "tool_calls" if self._calls else "stop"

    def _note_texts(self, delta: dict[str, Any]) -> None:
        content = delta.get("content")
        if content:
            self._room.keep(self._texts["content"], content)
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        if reasoning and isinstance(reasoning, str):
            self._room.keep(self._texts["reasoning_content"], reasoning)
        refusal = delta.get("refusal")
        if refusal and isinstance(refusal, str):
            self._room.keep(self._texts["refusal"], refusal)

    def _mend_calls(self, delta: dict[str, Any]) -> bool:
        calls = delta["tool_calls"]
        if not isinstance(calls, list):
            if calls is None:
                return False
            del delta["tool_calls"]
            return True
        is_mended = False
        for place, call in enumerate(calls):
            if not isinstance(call, dict):
                raise UpstreamError("The upstream sent a tool call that is no object.", upstream_status=200)
            is_mended |= self._find_call(call, place).mend(call, self._room)
        return is_mended

    def _find_call(self, delta: dict[str, Any], place: int) -> ToolCall:
        """The call that `delta`, at `place` in its chunk, goes on with; a new one if it begins one."""
        function = delta.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        index = delta.get("index") if type(delta.get("index")) is int else None
        call_id = delta.get("id") if isinstance(delta.get("id"), str) else None
        keys = (index, call_id or None)
        if name and self._host.sends_whole_calls:
            return self._begin_call(keys)
        if keys == (None, None):
            # Neither index nor id: a name begins a call, unless it only repeats that of the last.
            last = self._calls[-1] if self._calls else None
            is_new = last is None or (name and (place > 0 or name != last.name))
            return self._begin_call(keys) if last is None or is_new else last
        call = self._calls_by_key.get(keys)
        if call is None:
            call = self._calls_by_key.get((index, None) if index is not None else (None, call_id))
            # Gemini gives each of several calls the index 0: another id with a name is another call.
            if call is not None and index is not None and name and call_id and call_id != call.id:
                call = None
        return call or self._begin_call(keys)

    def _begin_call(self, keys: tuple[int | None, str | None]) -> ToolCall:
        if len(self._calls) == _MAX_CALLS:
            raise UpstreamError(f"The upstream sent more than {_MAX_CALLS} tool calls.", upstream_status=200)
        call = ToolCall(len(self._calls))
        self._calls.append(call)
        index, call_id = keys
        self._calls_by_key |= {keys: call, (index, None): call, (None, call_id): call}
        return call

    def message(self) -> dict[str, Any]:
        """The joined message, as far as its text was kept."""
        texts = {name: text.getvalue() for name, text in self._texts.items()}
        message: dict[str, Any] = {"role": "assistant", "content": texts.pop("content") or None}
        message |= {name: text for name, text in texts.items() if text}
        if self._calls:
            message["tool_calls"] = [call.joined() for call in self._calls]
        return message


def has_content(choice: dict[str, Any]) -> bool:
    """Does a mended part of a chunk carry more than its role?"""
    delta = choice["delta"]
    return choice["finish_reason"] is not None or any(delta.get(name) for name in _CONTENT)
