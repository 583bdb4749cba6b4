"""The messages of a conversation as one host takes them, wherever they came from.

A conversation may have begun at another provider: its ids of tool calls, its thoughts and its signatures
come back with it, and strict hosts refuse what is not theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perpetuo.providers.base import ModelRequest
from perpetuo.providers.hosts import Host

# Google's documentation of thought signatures: for calls that another model made.
_NO_SIGNATURE = {"google": {"thought_signature": "skip_thought_signature_validator"}}
_ANSWERED = ("assistant", "tool")


def fit_messages(request: ModelRequest, host: Host, dropped: list[str]) -> list[Any] | None:
    """The messages where `host` needs them otherwise, else None. What was left out is added to `dropped`."""
    messages = request.fields.get("messages")
    if not isinstance(messages, list):
        return None
    if not host.has_other_messages:
        for message in messages:
            if isinstance(message, dict) and message.get("role") in _ANSWERED:
                break
        else:
            return None
    fitter = _Fitter(request.model, host, messages, dropped)
    fitted = [fitter.fit(message) if isinstance(message, dict) else message for message in messages]
    return fitted if any(new is not old for new, old in zip(fitted, messages, strict=True)) else None


class _Fitter:
    """Fits the messages of one conversation. A message that needs no change comes back as it is."""

    def __init__(self, model: str, host: Host, messages: list[Any], dropped: list[str]) -> None:
        self._host = host
        self._dropped = dropped
        unsigned = host.unsigned_models
        self._signs_calls = unsigned is not None and not unsigned.match(model)
        self._adds_thoughts = host.wants_thoughts_back and any(
            isinstance(message, dict) and message.get("tool_calls") for message in messages
        )

    def fit(self, message: dict[str, Any]) -> dict[str, Any]:
        host, role = self._host, message.get("role")
        changes: dict[str, Any] = {}
        removed: set[str] = set()
        if isinstance(role, str):
            if role in host.roles:
                changes["role"] = host.roles[role]
            if "name" in message and host.name_roles is not None and role not in host.name_roles:
                self._leave_out(message, "name", removed)
        if role == "tool":
            self._fit_id(message, "tool_call_id", changes)
        elif role == "assistant":
            self._fit_members(message, changes, removed)
            self._fit_calls(message, changes)
        if not changes and not removed:
            return message
        return {name: value for name, value in message.items() if name not in removed} | changes

    def _fit_members(self, message: dict[str, Any], changes: dict[str, Any], removed: set[str]) -> None:
        for name in message:
            if name in self._host.message_lacks:
                self._leave_out(message, name, removed)
        for name, new_name in self._host.message_renames.items():
            if name in message:
                changes[new_name] = message[name]
                removed.add(name)
        if self._adds_thoughts and not isinstance(message.get("reasoning_content"), str):
            changes["reasoning_content"] = ""

    def _leave_out(self, message: Mapping[str, Any], name: str, removed: set[str]) -> None:
        removed.add(name)
        if message[name]:
            self._dropped.append(f"messages.{name}")

    def _fit_id(self, holder: Mapping[str, Any], name: str, changes: dict[str, Any]) -> None:
        call_id = holder.get(name)
        if self._host.call_ids is None or not isinstance(call_id, str) or not call_id:
            return
        fitted = self._host.call_ids(call_id)
        if fitted != call_id:
            changes[name] = fitted

    def _fit_calls(self, message: dict[str, Any], changes: dict[str, Any]) -> None:
        calls = message.get("tool_calls")
        if not isinstance(calls, list):
            return
        fitted = [
            self._fit_call(call, place) if isinstance(call, dict) else call
            for place, call in enumerate(calls)
        ]
        if any(new is not old for new, old in zip(fitted, calls, strict=True)):
            changes["tool_calls"] = fitted

    def _fit_call(self, call: dict[str, Any], place: int) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        self._fit_id(call, "id", changes)
        if self._signs_calls and place == 0 and not call.get("extra_content"):
            changes["extra_content"] = _NO_SIGNATURE  # of calls made at once only the first is signed
        members = self._host.call_members
        if members is not None and not call.keys() <= members:
            return {name: value for name, value in call.items() if name in members} | changes
        return call | changes if changes else call
