from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpetuo.errors import InvalidRequest
from perpetuo.providers.anthropic_schema import enforceable, enforceable_or_none, tool_schema

TEXT = {"type": "string"}
NUMBER = {"type": "number"}


def thing(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def closed(**properties: Any) -> dict[str, Any]:
    return {**thing(**properties), "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "cleaned"),
    [
        (thing(a=TEXT), closed(a=TEXT)),
        ({**thing(a=thing(b=TEXT)), "additionalProperties": True}, closed(a=closed(b=TEXT))),
        ({"properties": {"a": TEXT}}, {"properties": {"a": TEXT}, "additionalProperties": False}),
        ({"type": ["object", "null"]}, {"type": ["object", "null"], "additionalProperties": False}),
        ({"type": "array", "items": thing()}, {"type": "array", "items": closed()}),
        ({"anyOf": [thing(), TEXT]}, {"anyOf": [closed(), TEXT]}),
        ({"oneOf": [TEXT, NUMBER]}, {"anyOf": [TEXT, NUMBER]}),
        (
            {"oneOf": [TEXT], "anyOf": [NUMBER]},
            {"anyOf": [NUMBER], "description": '(oneOf: [{"type":"string"}])'},
        ),
        ({"type": "array", "minItems": 1}, {"type": "array", "minItems": 1}),
        ({"type": "array", "minItems": 2}, {"type": "array", "description": "(minItems: 2)"}),
        ({**TEXT, "format": "date"}, {**TEXT, "format": "date"}),
        ({**TEXT, "format": "regex"}, {**TEXT, "description": '(format: "regex")'}),
        ({**TEXT, "pattern": "^a"}, {**TEXT, "description": '(pattern: "^a")'}),
        (
            {**NUMBER, "description": "Age.", "minimum": 0, "maximum": 9},
            {**NUMBER, "description": "Age. (minimum: 0, maximum: 9)"},
        ),
        (thing(pattern=TEXT, minimum=NUMBER), closed(pattern=TEXT, minimum=NUMBER)),
        (
            {"$ref": "#/$defs/a", "$defs": {"a": thing()}},
            {"$ref": "#/$defs/a", "$defs": {"a": closed()}},
        ),
        ({"enum": [{"type": "object"}], "const": 1}, {"enum": [{"type": "object"}], "const": 1}),
    ],
)
def test_a_schema_is_cleaned_for_structured_output(schema: Any, cleaned: Any) -> None:
    before = repr(schema)
    assert enforceable(schema, "s") == cleaned
    assert repr(schema) == before


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ([], "no object"),
        ({"$ref": "https://x/y"}, "outside of itself"),
        ({"$ref": "#/$defs/a"}, "does not have"),
        (thing(child={"$ref": "#"}), "recursive"),
        ({"$ref": "#/$defs/a", "$defs": {"a": thing(b={"$ref": "#/$defs/a"})}}, "recursive"),
        (
            {
                "$ref": "#/$defs/a",
                "$defs": {"a": thing(b={"$ref": "#/$defs/b"}), "b": {"items": {"$ref": "#/$defs/a"}}},
            },
            "recursive",
        ),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(schema: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        enforceable(schema, "s")
    assert caught.value.param == "s"
    assert enforceable_or_none(schema) is None


def test_a_schema_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = TEXT
    for _ in range(900):
        schema = {"items": schema}
    assert enforceable_or_none(schema) is None
    assert enforceable_or_none({"not": schema, "pattern": "a"})
    for _ in range(120):
        schema = {"items": schema}
    assert enforceable_or_none({"not": schema}) is None


def test_a_definition_used_twice_is_no_recursion() -> None:
    used = {"$ref": "#/$defs/a~1b"}
    schema = {**thing(x=used, y=used), "$defs": {"a/b": TEXT, "unused": {"$ref": "#/$defs/unused"}}}
    assert enforceable(schema, "s")["properties"] == {"x": used, "y": used}


@pytest.mark.parametrize(
    ("parameters", "schema"),
    [
        (None, thing()),
        ({}, thing()),
        ({"properties": {"a": TEXT}}, thing(a=TEXT)),
        ({**thing(a=TEXT), "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, thing(a=TEXT)),
        (
            {
                "oneOf": [
                    {**thing(a=TEXT, b=TEXT), "required": ["a", "b"]},
                    {**thing(a=TEXT, b=NUMBER), "required": ["a"]},
                ]
            },
            {**thing(a=TEXT, b={"anyOf": [TEXT, NUMBER]}), "required": ["a"]},
        ),
        (
            {
                **thing(z=TEXT),
                "required": ["z"],
                "allOf": [{**thing(a=TEXT), "required": ["a"]}, {"required": ["z"]}],
            },
            {**thing(z=TEXT, a=TEXT), "required": ["z", "a"]},
        ),
        (
            {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/none"}], "$defs": {"a": thing(a=TEXT)}},
            {"$defs": {"a": thing(a=TEXT)}, "required": [], **thing(a=TEXT)},
        ),
        (
            {"anyOf": [thing(a=TEXT), thing(a=NUMBER), thing(a={"const": 1}), thing(a=TEXT)]},
            {**thing(a={"anyOf": [TEXT, NUMBER, {"const": 1}]}), "required": []},
        ),
        ({"anyOf": "odd", "properties": {"a": TEXT}}, thing(a=TEXT)),
        ({**thing(a=TEXT), "anyOf": [1, {"properties": 1, "required": 1}]}, thing(a=TEXT)),
    ],
)
def test_a_tools_parameters_become_an_object_without_branches(parameters: Any, schema: Any) -> None:
    before = repr(parameters)
    assert tool_schema(parameters, "p") == schema
    assert repr(parameters) == before


def test_parameters_that_are_no_schema_are_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        tool_schema("odd", "p")
    assert caught.value.param == "p"


NAMES = [
    "type",
    "properties",
    "items",
    "anyOf",
    "oneOf",
    "allOf",
    "$ref",
    "$defs",
    "required",
    "minimum",
    "enum",
]
SCHEMAS = st.recursive(
    st.none() | st.integers() | st.sampled_from(["object", "string", "#", "#/$defs/type", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(NAMES), SCHEMAS, max_size=5))
def test_any_schema_is_cleaned_or_refused(schema: dict[str, Any]) -> None:
    top = tool_schema(schema, "p")
    assert top["type"] == "object"
    assert not top.keys() & {"anyOf", "oneOf", "allOf"}
    cleaned = enforceable_or_none(schema)
    if cleaned is not None:
        assert enforceable(cleaned, "s") == cleaned
