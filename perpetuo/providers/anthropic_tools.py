"""Tools and the choice between them, as Anthropic wants them; the way back for names that had to change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from perpetuo.errors import InvalidRequest
from perpetuo.providers.anthropic_history import tool_name
from perpetuo.providers.anthropic_models import Capabilities
from perpetuo.providers.anthropic_parts import marked
from perpetuo.providers.anthropic_schema import enforceable_or_none, tool_schema

_ANTHROPICS_OWN = re.compile(r"[a-z_]+_\d{8}")  # web_search_20250305, computer_20250124

Tool = dict[str, Any]


def read_tools(fields: Mapping[str, Any], able: Capabilities, dropped: list[str]) -> list[Tool]:
    """The definitions in `tools`, or in the older `functions`. Raises InvalidRequest."""
    tools = fields.get("tools")
    if tools is None and isinstance(fields.get("functions"), list):
        functions = enumerate(fields["functions"])
        return [_function_tool(f, {}, able, f"functions[{n}]", dropped) for n, f in functions]
    if not isinstance(tools, list | None):
        raise InvalidRequest("'tools' must be a list.", param="tools")
    chosen = _allowed_names(fields.get("tool_choice"))
    read = [_tool(tool, able, f"tools[{number}]", dropped) for number, tool in enumerate(tools or ())]
    return [tool for tool in read if chosen is None or tool.get("name") in chosen]


def _tool(tool: object, able: Capabilities, place: str, dropped: list[str]) -> Tool:
    if not isinstance(tool, dict):
        raise InvalidRequest(f"'{place}' must be an object.", param=place)
    kind = tool.get("type", "function")
    if "input_schema" in tool or (isinstance(kind, str) and _ANTHROPICS_OWN.fullmatch(kind)):
        return tool
    if kind != "function":
        raise InvalidRequest(f"Anthropic's models have no tools of type {kind!r}.", param=f"{place}.type")
    return _function_tool(tool.get("function"), tool, able, f"{place}.function", dropped)


def _function_tool(
    function: object, tool: dict[str, Any], able: Capabilities, place: str, dropped: list[str]
) -> Tool:
    if not isinstance(function, dict):
        raise InvalidRequest(f"'{place}' must be an object.", param=place)
    read: Tool = {"name": tool_name(function.get("name"), f"{place}.name")}
    if isinstance(function.get("description"), str) and function["description"]:
        read["description"] = function["description"]
    read["input_schema"] = tool_schema(function.get("parameters"), f"{place}.parameters")
    if function.get("strict") is True:
        cleaned = enforceable_or_none(read["input_schema"]) if able.has_structured_output else None
        if cleaned is None:
            dropped.append("strict")
        else:
            read |= {"input_schema": cleaned, "strict": True}
    return marked(marked(read, function), tool)


def _allowed_names(choice: object) -> set[str] | None:
    if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
        return None
    place = "tool_choice.allowed_tools"
    allowed = choice.get("allowed_tools")
    tools = allowed.get("tools") if isinstance(allowed, dict) else None
    if not isinstance(tools, list) or not tools:
        raise InvalidRequest(f"'{place}.tools' must be a list of tools.", param=f"{place}.tools")
    return {_named(tool, f"{place}.tools[{number}]") for number, tool in enumerate(tools)}


def _named(tool: object, place: str) -> str:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return tool_name(name, f"{place}.function.name")


def read_choice(fields: Mapping[str, Any], has_tools: bool, dropped: list[str]) -> dict[str, Any] | None:
    """Anthropic's `tool_choice`, None where nothing has to be said. Raises InvalidRequest."""
    name = "tool_choice" if fields.get("tool_choice") is not None else "function_call"
    choice = _choice(fields.get(name), name)
    is_single = fields.get("parallel_tool_calls") is False
    if not has_tools:
        if choice and choice["type"] in ("any", "tool"):
            raise InvalidRequest(f"'{name}' asks for a tool, but there are no tools.", param=name)
        if is_single:
            dropped.append("parallel_tool_calls")
        return None
    if is_single and (choice is None or choice["type"] != "none"):
        return {**(choice or {"type": "auto"}), "disable_parallel_tool_use": True}
    return choice


def _choice(choice: object, name: str) -> dict[str, Any] | None:
    if choice is None:
        return None
    words = {"auto": "auto", "none": "none", "required": "any"}
    if isinstance(choice, str) and choice in words:
        return {"type": words[choice]}
    if isinstance(choice, dict):
        if choice.get("type") == "allowed_tools":
            allowed = choice.get("allowed_tools")
            is_forced = isinstance(allowed, dict) and allowed.get("mode") == "required"
            return {"type": "any" if is_forced else "auto"}
        if choice.get("type", "function") == "function":
            return {"type": "tool", "name": _named(choice, name)}
    raise InvalidRequest(f"'{name}' is not a choice that Anthropic's models know.", param=name)


def tools_of_the_past(names: list[str]) -> list[Tool]:
    """Bare definitions of the tools that a conversation used: without any, Anthropic refuses it."""
    empty = {"type": "object", "properties": {}}
    return [{"name": name, "input_schema": empty} for name in dict.fromkeys(names)]


def changed_names(fields: Mapping[str, Any]) -> dict[str, str]:
    """The client's own names of the tools whose names had to change for Anthropic."""
    return {sent: name for name in _given_names(fields) if (sent := tool_name(name, "tools")) != name}


def _given_names(fields: Mapping[str, Any]) -> list[str]:
    tools, functions = fields.get("tools"), fields.get("functions")
    wrapped = tools if isinstance(tools, list) else []
    named = [tool.get("function", tool) for tool in wrapped if isinstance(tool, dict)]
    named += functions if isinstance(functions, list) else []
    names = [function.get("name") for function in named if isinstance(function, dict)]
    return [name for name in names if isinstance(name, str) and name]


def json_tool_name(fields: Mapping[str, Any]) -> str:
    """The name of the tool whose input is the answer; not one that the client uses itself."""
    name = "json_response"
    while name in _given_names(fields):
        name += "_"
    return name


def json_tool(name: str, schema: object, place: str) -> Tool:
    """That tool, for a model that knows no structured output."""
    description = "Gives the answer to the user. Its input is the whole answer."
    return {"name": name, "description": description, "input_schema": tool_schema(schema, place)}
