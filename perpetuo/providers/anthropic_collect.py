"""What an answer of Anthropic's says, collected block by block into one message in OpenAI's shape.

Whole answers and streams are collected alike, so that both end in the same words.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from typing import Any

from perpetuo.providers.anthropic_history import THOUGHT_FORMAT
from perpetuo.providers.openai_choice import TextRoom

_REFUSED = "The model refused to answer."
_MAX_THOUGHT_CHARACTERS = 2 * 1024 * 1024

_FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
}


class Call:
    """One tool call; its arguments as far as there is room."""

    def __init__(self, call_id: str, name: str) -> None:
        self.id = call_id
        self.name = name
        self.arguments = StringIO()

    def joined(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments.getvalue()}
        return {"id": self.id, "type": "function", "function": function}


class Collected:
    """The message so far. `room` bounds the text that is kept; thoughts with a signature are kept whole, the
    client needs them unaltered."""

    def __init__(self, room: TextRoom) -> None:
        self.room = room
        self.calls: list[Call] = []
        self.has_text = False
        self.refusal: str | None = None
        self.stop_reason: str | None = None
        self.stop_details: Mapping[str, Any] = {}
        self._content = StringIO()
        self._reasoning = StringIO()
        self._thought: list[str] = []
        self._thought_left = _MAX_THOUGHT_CHARACTERS
        self._details: list[dict[str, Any]] = []

    def add_text(self, text: str) -> None:
        self.has_text = True
        self.room.keep(self._content, text)

    def add_thought(self, text: str) -> None:
        self.room.keep(self._reasoning, text)
        self._thought_left -= len(text)
        if self._thought_left >= 0:
            self._thought.append(text)

    def sign_thought(self, signature: str) -> None:
        """End a thought with its signature, "" for none: without, or cut, it could never go back."""
        if signature and self._thought_left >= 0:
            self._add_detail(type="reasoning.text", text="".join(self._thought), signature=signature)
        self._thought = []

    def add_redacted(self, data: str) -> None:
        self._thought_left -= len(data)
        if self._thought_left >= 0:
            self._add_detail(type="reasoning.encrypted", data=data)

    def _add_detail(self, **members: str) -> None:
        self._details.append({**members, "format": THOUGHT_FORMAT, "index": len(self._details)})

    def begin_call(self, call_id: str, name: str) -> int:
        """The number of the new call."""
        self.calls.append(Call(call_id, name))
        return len(self.calls) - 1

    def add_arguments(self, number: int, text: str) -> None:
        self.room.keep(self.calls[number].arguments, text)

    def details(self) -> list[dict[str, Any]]:
        """The thoughts that may go back to the upstream, none where one of them could not be kept."""
        return self._details if self._thought_left >= 0 else []

    def finish(self) -> None:
        """Settle what depends on the whole: why a model that said nothing refused."""
        if self.stop_reason == "refusal" and not self.has_text and not self.calls:
            explanation = self.stop_details.get("explanation")
            self.refusal = explanation if isinstance(explanation, str) and explanation else _REFUSED

    @property
    def finish_reason(self) -> str:
        return _FINISH_REASONS.get(self.stop_reason or "", "tool_calls" if self.calls else "stop")

    def message(self) -> dict[str, Any]:
        """OpenAI's message."""
        is_silent = not self.has_text and bool(self.calls or self.refusal)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if is_silent else self._content.getvalue(),
            "refusal": self.refusal,
        }
        if self._reasoning.tell():
            message["reasoning_content"] = self._reasoning.getvalue()
        if self.details():
            message["reasoning_details"] = self.details()
        if self.calls:
            message["tool_calls"] = [call.joined() for call in self.calls]
        return message
