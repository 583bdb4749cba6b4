from typing import Any

import pytest

from perpetuo.providers.tool_ids import word_id
from tests.providers.anthropic_case import (
    FORMAT,
    OLD,
    SCHEMA,
    USER,
    body_of,
    dropped_of,
    exchange,
    refusal_of,
    tool,
)


def test_tools_are_translated() -> None:
    cache = {"cache_control": {"type": "ephemeral"}}
    tools = [
        tool(description="Does.", parameters=SCHEMA),
        {**tool("g", description=""), **cache},
        tool("h", **cache),
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 2},
        {"name": "own", "input_schema": {"type": "object"}},
    ]
    empty = {"type": "object", "properties": {}}
    assert body_of(tools=tools)["tools"] == [
        {"name": "f", "description": "Does.", "input_schema": SCHEMA},
        {"name": "g", "input_schema": empty, **cache},
        {"name": "h", "input_schema": empty, **cache},
        *tools[3:],
    ]


def test_older_functions_are_tools() -> None:
    body = body_of(functions=[{"name": "f", "parameters": SCHEMA}], function_call={"name": "f"})
    assert body["tools"] == [{"name": "f", "input_schema": SCHEMA}]
    assert body["tool_choice"] == {"type": "tool", "name": "f"}
    assert "functions" not in body
    assert "function_call" not in body


def test_strict_tools_are_strict_where_they_can_be() -> None:
    strict = tool(parameters=SCHEMA, strict=True)
    sent = body_of(tools=[strict])["tools"][0]
    assert (sent["strict"], sent["input_schema"]["additionalProperties"]) == (True, False)
    assert body_of(OLD, tools=[strict])["tools"] == [{"name": "f", "input_schema": SCHEMA}]
    assert dropped_of(OLD, tools=[strict]) == ("strict",)
    recursive = tool(parameters={"properties": {"a": {"$ref": "#"}}}, strict=True)
    assert "strict" not in body_of(tools=[recursive])["tools"][0]
    assert dropped_of(tools=[recursive, recursive]) == ("strict",)


def test_names_that_are_not_accepted_change_everywhere() -> None:
    name = "weather.of " + "x" * 80
    sent = word_id(name, 64)
    call = {"id": "a", "type": "function", "function": {"name": name, "arguments": "{}"}}
    messages = exchange(tool_calls=[call])
    chosen = {"type": "function", "function": {"name": name}}
    body = body_of(tools=[tool(name)], tool_choice=chosen, messages=messages)
    assert body["tools"][0]["name"] == body["tool_choice"]["name"] == sent
    assert body["messages"][1]["content"][0]["name"] == sent
    assert len(sent) == 64


def test_tools_of_the_past_are_defined() -> None:
    body = body_of(messages=exchange())
    assert body["tools"] == [{"name": "f", "input_schema": {"type": "object", "properties": {}}}]
    assert body["tool_choice"] == {"type": "none"}
    assert "tool_choice" not in body_of(messages=exchange(), tools=[tool()])


ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [tool("g")]}}
CHOICES: list[tuple[Any, Any]] = [
    (None, None),
    ("auto", {"type": "auto"}),
    ("none", {"type": "none"}),
    ("required", {"type": "any"}),
    (tool("g"), {"type": "tool", "name": "g"}),
    (ALLOWED, {"type": "any"}),
    ({**ALLOWED, "allowed_tools": {**ALLOWED["allowed_tools"], "mode": "auto"}}, {"type": "auto"}),
]


@pytest.mark.parametrize(("choice", "sent"), CHOICES)
@pytest.mark.parametrize("parallel", [None, True, False])
def test_choice_and_parallel_calls(choice: Any, sent: Any, parallel: Any) -> None:
    body = body_of(tools=[tool(), tool("g")], tool_choice=choice, parallel_tool_calls=parallel)
    if parallel is False and choice != "none":
        sent = {**(sent or {"type": "auto"}), "disable_parallel_tool_use": True}
    assert body.get("tool_choice") == sent
    is_restricted = isinstance(choice, dict) and choice["type"] == "allowed_tools"
    assert [each["name"] for each in body["tools"]] == (["g"] if is_restricted else ["f", "g"])


def test_a_choice_without_tools() -> None:
    assert "tool_choice" not in body_of(tool_choice="auto")
    assert "tool_choice" not in body_of(tool_choice="none", tools=[])
    assert dropped_of(parallel_tool_calls=False) == ("parallel_tool_calls",)
    assert refusal_of(tool_choice="required").param == "tool_choice"
    assert refusal_of(function_call={"name": "f"}).param == "function_call"


def test_structured_output_is_asked_for() -> None:
    body = body_of(response_format=FORMAT)
    schema = {**SCHEMA, "additionalProperties": False}
    assert body["output_config"] == {"format": {"type": "json_schema", "schema": schema}}
    assert "tools" not in body
    assert body_of(response_format={"type": "text"}) == body_of()


def test_json_without_a_schema_is_asked_for_in_words() -> None:
    words = {"type": "text", "text": "Respond with a single JSON object and nothing else."}
    assert body_of(response_format={"type": "json_object"})["system"] == [words]
    system = [{"role": "system", "content": "Be brief."}, USER]
    body = body_of(response_format={"type": "json_object"}, messages=system)
    assert body["system"] == [{"type": "text", "text": "Be brief."}, words]


@pytest.mark.parametrize(
    ("fields", "names", "choice"),
    [
        ({}, ["json_response"], {"type": "tool", "name": "json_response"}),
        ({"tools": [tool()]}, ["f", "json_response"], {"type": "any"}),
        ({"tools": [tool()], "tool_choice": "required"}, ["f", "json_response"], {"type": "any"}),
        ({"tools": [tool()], "tool_choice": tool()}, ["f", "json_response"], {"type": "tool", "name": "f"}),
        (
            {"tools": [tool()], "tool_choice": "none"},
            ["f", "json_response"],
            {"type": "tool", "name": "json_response"},
        ),
        (
            {"tools": [tool()], "parallel_tool_calls": False},
            ["f", "json_response"],
            {"type": "any", "disable_parallel_tool_use": True},
        ),
        ({"tools": [tool("json_response")]}, ["json_response", "json_response_"], {"type": "any"}),
        ({"messages": exchange()}, ["f", "json_response"], {"type": "tool", "name": "json_response"}),
    ],
)
def test_an_older_model_gives_json_by_a_tool(fields: dict[str, Any], names: list[str], choice: Any) -> None:
    body = body_of(OLD, response_format=FORMAT, **fields)
    assert [each["name"] for each in body["tools"]] == names
    assert body["tools"][-1]["input_schema"] == SCHEMA
    assert body["tool_choice"] == choice
    assert "output_config" not in body
