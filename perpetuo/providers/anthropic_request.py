"""An OpenAI chat completion request as the body of Anthropic's Messages API.

What would change the shape of the answer and has no counterpart is refused; hints are left out and named.
Members that OpenAI does not know pass: clients send Anthropic's own (`thinking`, `cache_control`) that way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from perpetuo.errors import InvalidRequest
from perpetuo.output_limits import output_bound
from perpetuo.providers.anthropic_messages import read_messages
from perpetuo.providers.anthropic_models import Capabilities, capabilities
from perpetuo.providers.anthropic_reasoning import fit_thinking, is_thinking, read_effort
from perpetuo.providers.anthropic_schema import enforceable
from perpetuo.providers.anthropic_tools import (
    json_tool,
    json_tool_name,
    read_choice,
    read_tools,
    tools_of_the_past,
)
from perpetuo.providers.base import ModelRequest

# OpenAI's parameters that are only hints, and two of vLLM's that clients send everywhere.
_HINTS = frozenset(
    (
        *("metadata", "store", "seed", "logit_bias", "presence_penalty", "frequency_penalty"),
        *("prediction", "verbosity", "moderation", "web_search_options"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
        *("min_p", "repetition_penalty"),
    )
)
_READ = frozenset(
    (
        *("model", "models", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens"),
        *("temperature", "top_p", "top_k", "stop", "n", "logprobs", "top_logprobs", "modalities", "audio"),
        *("tools", "functions", "tool_choice", "function_call", "parallel_tool_calls", "response_format"),
        *("reasoning_effort", "safety_identifier", "user", "service_tier"),
    )
)
_SERVICE_TIERS = {"auto": "auto", "default": "standard_only"}
_JSON_PLEASE = {"type": "text", "text": "Respond with a single JSON object and nothing else."}
_PHONE_NUMBER = re.compile(r"\+?[\d\s().-]{7,}")


class Translation:
    """One request on its way to Anthropic: `body` and the names of what was `dropped`."""

    def __init__(self, request: ModelRequest, *, version_has_sampling: bool) -> None:
        self.fields = request.fields
        self._is_limited = request.output_limit is not None
        self.able = capabilities(request.model)
        self.dropped: list[str] = []
        self.body: dict[str, Any] = {"model": request.model}
        _refuse_other_shapes(self.fields)
        self.conversation = read_messages(self.fields["messages"])
        self.body |= self._members_that_pass()
        self.body["max_tokens"] = max_tokens(request, self.able)
        self._set_tools()
        self._set_format()
        self._set_reasoning()
        self._set_sampling(version_has_sampling)
        self._set_rest()
        if self.conversation.system:
            self.body["system"] = self.conversation.system
        self.body["messages"] = self.conversation.turns

    def _members_that_pass(self) -> dict[str, Any]:
        passing = {}
        for name, value in self.fields.items():
            if name in _HINTS:
                if value or (name == "seed" and value is not None):
                    self.dropped.append(name)
            elif name not in _READ and value is not None:
                passing[name] = value
        return passing

    def _set_tools(self) -> None:
        tools = read_tools(self.fields, self.able, self.dropped)
        choice = read_choice(self.fields, bool(tools), self.dropped)
        if not tools and self.conversation.tool_names:
            tools, choice = tools_of_the_past(self.conversation.tool_names), {"type": "none"}
        if tools:
            self.body["tools"] = tools
        if choice:
            self.body["tool_choice"] = choice

    def _set_format(self) -> None:
        schema = _asked_schema(self.fields)
        place = "response_format.json_schema.schema"
        if schema is not None and self.able.has_structured_output:
            self._add_output_config(format={"type": "json_schema", "schema": enforceable(schema, place)})
        elif schema is not None:
            self._add_json_tool(schema, place)
        elif _asked_format(self.fields) == "json_object":
            self.conversation.system.append(_JSON_PLEASE)

    def _add_json_tool(self, schema: object, place: str) -> None:
        """Have the model answer by calling a tool; where it has the client's tools too, by any of them."""
        name = json_tool_name(self.fields)
        may_use_others = self.body.get("tool_choice", {}).get("type") != "none"
        others = [] if self.body.get("tools") is None else self.body["tools"]
        self.body["tools"] = [*others, json_tool(name, schema, place)]
        if not others or not may_use_others:
            self.body["tool_choice"] = {"type": "tool", "name": name}
        elif self.body.get("tool_choice", {}).get("type") != "tool":
            self.body["tool_choice"] = {**self.body.get("tool_choice", {}), "type": "any"}

    def _set_reasoning(self) -> None:
        choice = self.body.get("tool_choice", {}).get("type")
        effort = read_effort(
            self.fields,
            self.able,
            self.body["max_tokens"],
            may_think_manually=choice not in ("any", "tool")
            and not self.conversation.ends_in_unthought_calls,
        )
        if effort.is_dropped:
            self.dropped.append("reasoning_effort")
        if effort.thinking is not None and "thinking" not in self.body:
            self.body["thinking"] = effort.thinking
        if effort.effort is not None:
            self._add_output_config(effort=effort.effort)
        if self._is_limited and not fit_thinking(self.body):
            self.dropped.append("thinking")

    def _add_output_config(self, **members: Any) -> None:
        """The client's own `output_config` counts before what is made of OpenAI's parameters."""
        own = self.body.get("output_config")
        if own is None or isinstance(own, dict):
            self.body["output_config"] = {**members, **(own or {})}

    def _set_sampling(self, version_has_sampling: bool) -> None:
        given = {name: self.fields.get(name) for name in ("temperature", "top_p", "top_k")}
        sent = {name: value for name, value in given.items() if value is not None}
        for name, value in sent.items():
            if not isinstance(value, int if name == "top_k" else int | float) or isinstance(value, bool):
                raise InvalidRequest(f"'{name}' must be a number.", param=name)
        kept = dict(sent)
        if not (self.able.has_sampling and version_has_sampling):
            kept = {}
        elif is_thinking(self.body.get("thinking")):
            kept = {name: value for name, value in sent.items() if name == "top_p" and 0.95 <= value <= 1}
        elif not self.able.has_sampling_pair and "temperature" in kept:
            kept.pop("top_p", None)
        if "temperature" in kept:
            kept["temperature"] = min(kept["temperature"], 1)
        # The default of both is 1, so that nothing is lost with it.
        self.dropped += [name for name, value in sent.items() if name not in kept and value != 1]
        self.body |= kept

    def _set_rest(self) -> None:
        if self.fields.get("stream") is True:
            self.body["stream"] = True
        stops = _stop_sequences(self.fields.get("stop"))
        if stops:
            self.body["stop_sequences"] = stops
        user = self.fields.get("safety_identifier") or self.fields.get("user")
        if isinstance(user, str) and user:
            self.body["metadata"] = {"user_id": _user_id(user)}
        tier = self.fields.get("service_tier")
        if isinstance(tier, str) and tier in _SERVICE_TIERS:
            self.body["service_tier"] = _SERVICE_TIERS[tier]
        elif tier is not None:
            self.dropped.append("service_tier")


def _refuse_other_shapes(fields: Mapping[str, Any]) -> None:
    modalities = fields.get("modalities")
    has_other = {
        "n": fields.get("n") not in (None, 1),
        "logprobs": bool(fields.get("logprobs")),
        "top_logprobs": bool(fields.get("top_logprobs")),
        "modalities": modalities is not None and modalities != ["text"],
        "audio": fields.get("audio") is not None,
    }
    for name, is_other in has_other.items():
        if is_other:
            raise InvalidRequest(
                f"Anthropic's models do not support this value of '{name}'.",
                code="unsupported_parameter",
                param=name,
            )


def max_tokens(request: ModelRequest, able: Capabilities) -> int:
    """The bound of the output: ours, else the client's, else the one that a hold assumes; at most the
    model's."""
    most = output_bound(request.model)
    for name in ("max_tokens", "max_completion_tokens"):
        asked = request.fields.get(name)
        if asked is None:
            continue
        if type(asked) is not int or asked < 1:
            raise InvalidRequest(f"'{name}' must be a whole number above 0.", param=name)
        most = asked
    if request.output_limit is not None:
        most = request.output_limit
    return min(most, able.max_output) if able.max_output else most


def _asked_format(fields: Mapping[str, Any]) -> str:
    """The type of `response_format`. Raises InvalidRequest for one that is unknown."""
    given = fields.get("response_format")
    if given is None:
        return "text"
    kind = given.get("type") if isinstance(given, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise InvalidRequest("'response_format.type' is not known.", param="response_format.type")
    return str(kind)


def _asked_schema(fields: Mapping[str, Any]) -> object:
    if _asked_format(fields) != "json_schema":
        return None
    given = fields["response_format"].get("json_schema")
    schema = given.get("schema") if isinstance(given, dict) else None
    if not isinstance(schema, dict):
        place = "response_format.json_schema.schema"
        raise InvalidRequest(f"'{place}' must be a JSON schema.", param=place)
    return schema


def _stop_sequences(stop: object) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop if stop is not None else []
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise InvalidRequest("'stop' must be a text or a list of texts.", param="stop")
    return [each for each in stops if each.strip()]  # blank ones are rejected


def _user_id(user: str) -> str:
    """`user`, or a hash of it where it may be an address or a phone number, which Anthropic rejects."""
    if "@" not in user and not _PHONE_NUMBER.fullmatch(user) and len(user) <= 256:
        return user
    return sha256(user.encode("utf-8", "surrogatepass")).hexdigest()
