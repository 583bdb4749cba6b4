"""The client's body as one host takes it: fields renamed, left out or refused, the rest byte for byte.

What differs stands in the host's row (`hosts`); messages are fitted next door (`openai_history`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perpetuo.errors import InvalidRequest
from perpetuo.providers.base import ModelRequest
from perpetuo.providers.hosts import Host
from perpetuo.providers.jsonbody import replace_members
from perpetuo.providers.openai_history import fit_messages

# Fields without which the answer has another shape, and the values that ask for nothing.
_SHAPING: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "audio": (),
    "modalities": (["text"],),
}
_EMPTY: tuple[object, ...] = ({}, [], "")
_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


class _Edit:
    """What becomes of the top-level members of one body."""

    __slots__ = ("changes", "dropped", "removed")

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.changes: dict[str, Any] = {}
        self.removed: list[str] = ["models"] if "models" in fields else []
        self.dropped: list[str] = []

    def rename(self, name: str, new_name: str, value: object) -> None:
        self.removed.append(name)
        self.changes[new_name] = value

    def drop(self, name: str) -> None:
        self.removed.append(name)
        self.dropped.append(name)


def build_body(request: ModelRequest, host: Host, is_stream: bool) -> tuple[bytes, tuple[str, ...]]:
    """The body for `host`, and the names of the hints that it has no place for.

    Raises InvalidRequest (`unsupported_parameter`) where the host lacks what would shape the answer.
    """
    fields, edit = request.fields, _Edit(request.fields)
    if fields.get("model") != request.model:
        edit.changes["model"] = request.model
    if (host.lacks or host.renames) and request.endpoint != "responses":
        _fit_fields(fields, host, edit)
    if request.endpoint == "chat.completions":
        _fit_limit(fields, request.model, host, edit)
        if host.counts_unasked:
            if "stream_options" in fields:
                edit.removed.append("stream_options")
        elif is_stream:
            _ask_for_usage(request, edit)
        messages = fit_messages(request, host, edit.dropped)
        if messages is not None:
            edit.changes["messages"] = messages
    if request.output_limit is not None and request.endpoint != "embeddings":
        _set_limit(request, request.output_limit, host, edit)
    if not edit.changes and not edit.removed:
        return request.body, ()
    return replace_members(request.body, edit.changes, edit.removed), tuple(dict.fromkeys(edit.dropped))


def _fit_fields(fields: Mapping[str, Any], host: Host, edit: _Edit) -> None:
    for name, value in fields.items():
        if name in host.lacks:
            _leave_out(name, value, host, edit)
    for name, new_name in host.renames.items():
        if name not in fields:
            continue
        if fields[name] is None:
            edit.removed.append(name)
        elif name == "max_completion_tokens" or fields.get(new_name) is None:
            edit.rename(name, new_name, fields[name])
        else:  # the host's own spelling is there as well, and meant for it
            edit.drop(name)
    for name, words in host.values.items():
        value = fields.get(name)
        if isinstance(value, str) and value in words:
            edit.changes[name] = words[value]


def _leave_out(name: str, value: object, host: Host, edit: _Edit) -> None:
    if value is None or value in _EMPTY or value in _SHAPING.get(name, ()):
        edit.removed.append(name)
    elif name in _SHAPING:
        raise InvalidRequest(
            f"The provider {host.name} does not support '{name}'.", code="unsupported_parameter", param=name
        )
    else:
        edit.drop(name)


def _fit_limit(fields: Mapping[str, Any], model: str, host: Host, edit: _Edit) -> None:
    """`max_tokens` and `max_completion_tokens`: never both, and the one that the model takes."""
    limit = fields.get("max_tokens")
    if limit is None or "max_tokens" in edit.changes:
        return
    if fields.get("max_completion_tokens") is not None:
        edit.removed.append("max_tokens")
    elif model.startswith(host.new_limit_models):
        edit.rename("max_tokens", "max_completion_tokens", limit)


def _set_limit(request: ModelRequest, limit: int, host: Host, edit: _Edit) -> None:
    """Ours in place of the client's, and under no second name."""
    limit_name = _limit_name(request, host)
    edit.removed += [name for name in _LIMITS if name != limit_name]
    edit.changes[limit_name] = limit


def _limit_name(request: ModelRequest, host: Host) -> str:
    if request.endpoint == "responses":
        return "max_output_tokens"
    if "max_completion_tokens" in host.renames:
        return host.renames["max_completion_tokens"]
    if request.model.startswith(host.new_limit_models):
        return "max_completion_tokens"
    named = (name for name in _LIMITS[:2] if request.fields.get(name) is not None)
    return next(named, host.limit_name)


def _ask_for_usage(request: ModelRequest, edit: _Edit) -> None:
    options = request.fields.get("stream_options")
    # What is neither an object nor null is the client's mistake, for the upstream to name.
    if (options is None or isinstance(options, dict)) and not request.wants_usage:
        edit.changes["stream_options"] = {**(options or {}), "include_usage": True}
