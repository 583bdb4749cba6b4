"""The blocks of one answer of Anthropic's, from their beginnings to their ends, as deltas in OpenAI's shape.

Feeds `Collected` and says what a stream has to tell its client. Blocks of server tools, and those that
Anthropic may invent, are skipped without losing the text around them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perpetuo.providers.anthropic_collect import Collected
from perpetuo.providers.jsonbody import write_json
from perpetuo.providers.openai_message import new_call_id

Delta = dict[str, Any]

_JSON = -1  # the number of the call whose input is the answer


class Block:
    """One block. `number` is that of its tool call, None for other blocks."""

    __slots__ = ("has_arguments", "is_whole", "kind", "number", "signature")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.number: int | None = None
        self.has_arguments = False
        self.is_whole = False
        self.signature = ""


class Blocks:
    """All blocks of one answer. `names` gives the client's own names of tools, `json_tool` is the name of
    the tool whose input is the answer, None where the text is."""

    def __init__(self, collected: Collected, names: Mapping[str, str], json_tool: str | None) -> None:
        self.collected = collected
        self._names = names
        self._json_tool = json_tool
        self._has_json = False
        self.skipped: set[int] = set()
        self._open: dict[int, Block] = {}
        self._held_texts: list[str] = []  # beside a JSON answer text would spoil it

    @property
    def is_plain(self) -> bool:
        """Text goes to the client as it comes."""
        return self._json_tool is None

    def begin(self, index: int, fields: Mapping[str, Any]) -> list[Delta]:
        kind = fields.get("type")
        block = self._open[index] = Block(kind if isinstance(kind, str) else "")
        if kind == "text":
            return self._text(fields.get("text"))
        if kind == "thinking":
            block.signature = _text(fields.get("signature"))
            return self._thought(fields.get("thinking"))
        if kind == "redacted_thinking":
            self.collected.add_redacted(_text(fields.get("data")))
        elif kind == "tool_use":
            return self._begin_call(block, index, fields)
        else:
            self.skipped.add(index)
        return []

    def add(self, index: int, delta: Mapping[str, Any]) -> list[Delta]:
        kind = delta.get("type")
        if index in self.skipped:
            return []
        if kind == "text_delta":
            return self._text(delta.get("text"))
        if kind == "thinking_delta":
            return self._thought(delta.get("thinking"))
        block = self._open.get(index)
        if block is None:
            return []
        if kind == "input_json_delta" and block.number is not None and not block.is_whole:
            return self._arguments(block, _text(delta.get("partial_json")))
        if kind == "signature_delta" and block.kind == "thinking":
            block.signature += _text(delta.get("signature"))
        return []

    def end(self, index: int) -> list[Delta]:
        self.skipped.discard(index)
        block = self._open.pop(index, None)
        if block is None:
            return []
        if block.kind == "thinking":
            self.collected.sign_thought(block.signature)
        if block.number is not None and not block.has_arguments:
            return self._arguments(block, "{}")
        return []

    def end_all(self) -> list[Delta]:
        """End what is still open, and the answer; the thoughts come last, all at once.

        Clients that join deltas put lists together by index or take the last: only whole lists suit both.
        """
        deltas = [delta for index in list(self._open) for delta in self.end(index)]
        if self._held_texts and not self._has_json and not self.collected.calls:
            text = "".join(self._held_texts)
            self.collected.add_text(text)
            deltas.append({"content": text})
        self.collected.finish()
        if self.collected.refusal:
            deltas.append({"refusal": self.collected.refusal})
        if details := self.collected.details():
            deltas.append({"reasoning_details": details})
        return deltas

    def _text(self, text: object) -> list[Delta]:
        if not isinstance(text, str) or not text:
            return []
        if self._json_tool is not None:
            self._held_texts.append(text)
            return []
        self.collected.add_text(text)
        return [{"content": text}]

    def _thought(self, text: object) -> list[Delta]:
        if not isinstance(text, str) or not text:
            return []
        self.collected.add_thought(text)
        return [{"reasoning_content": text}]

    def _begin_call(self, block: Block, index: int, fields: Mapping[str, Any]) -> list[Delta]:
        name = _text(fields.get("name"))
        deltas: list[Delta] = []
        if name == self._json_tool:
            if self._has_json:  # a second answer would spoil the first
                self.skipped.add(index)
                return []
            self._has_json = True
            block.number = _JSON
        else:
            call_id = _text(fields.get("id")) or new_call_id()
            name = self._names.get(name, name)
            block.number = self.collected.begin_call(call_id, name)
            function = {"name": name, "arguments": ""}
            call = {"index": block.number, "id": call_id, "type": "function", "function": function}
            deltas.append({"tool_calls": [call]})
        given = fields.get("input")
        if isinstance(given, dict) and given:
            deltas += self._arguments(block, write_json(given).decode())
            block.is_whole = True
        return deltas

    def _arguments(self, block: Block, text: str) -> list[Delta]:
        if not text or block.number is None:
            return []
        block.has_arguments = True
        if block.number == _JSON:
            self.collected.add_text(text)
            return [{"content": text}]
        self.collected.add_arguments(block.number, text)
        return [{"tool_calls": [{"index": block.number, "function": {"arguments": text}}]}]


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
