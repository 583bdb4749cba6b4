"""JSON schemas as Anthropic accepts them: for structured output, and at the top of a tool's input.

What structured output cannot enforce is written into the description, where the model still sees it.
Source: Anthropic's documentation of structured outputs and the texts of its refusals, 2026.
"""

from __future__ import annotations

from typing import Any

from perpetuo.errors import InvalidRequest
from perpetuo.providers.jsonbody import write_json

_MOST_LEVELS = 100

_UNENFORCED = frozenset(
    (
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        *("minLength", "maxLength", "pattern"),
        *("maxItems", "uniqueItems", "contains", "minContains", "maxContains", "prefixItems"),
        *("minProperties", "maxProperties", "patternProperties", "propertyNames"),
        *("dependentRequired", "dependentSchemas", "dependencies"),
        *("if", "then", "else", "not"),
    )
)
_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid")
_COMBINATIONS = ("anyOf", "oneOf", "allOf")
_NAMED_SCHEMAS = ("properties", "$defs", "definitions")

Schema = dict[str, Any]


class _Unusable(Exception):
    """Why a schema cannot be enforced, a clause that goes on from 'the schema'."""


def enforceable(schema: object, place: str) -> Schema:
    """`schema` cleaned for structured output. Raises InvalidRequest for one that recurses or is none."""
    try:
        return _enforceable(schema)
    except _Unusable as exc:
        raise InvalidRequest(f"'{place}' cannot be enforced: the schema {exc}.", param=place) from exc


def enforceable_or_none(schema: object) -> Schema | None:
    """The same, None where it cannot be had."""
    try:
        return _enforceable(schema)
    except _Unusable:
        return None


def _enforceable(schema: object) -> Schema:
    if not isinstance(schema, dict):
        raise _Unusable("is no object")
    try:
        cleaned = _clean(schema, 0)
    except ValueError as exc:
        raise _Unusable("is nested too deeply") from exc
    _check_references(cleaned)
    return cleaned


def _clean(schema: Schema, level: int) -> Schema:
    if level > _MOST_LEVELS:
        raise _Unusable("is nested too deeply")
    cleaned: Schema = {}
    lost: list[str] = []
    for name, value in schema.items():
        if _is_enforced(name, value) and not (name == "oneOf" and "anyOf" in schema):
            target = "anyOf" if name == "oneOf" else name
            cleaned[target] = _clean_member(name, value, level + 1)
        else:
            lost.append(f"{name}: {write_json(value).decode()}")
    if lost:
        described = cleaned.get("description")
        words = [described] if isinstance(described, str) and described else []
        cleaned["description"] = " ".join([*words, "(" + ", ".join(lost) + ")"])
    if _is_object(cleaned):
        cleaned["additionalProperties"] = False
    return cleaned


def _is_enforced(name: str, value: object) -> bool:
    if name == "minItems":
        return value in (0, 1)
    if name == "format":
        return value in _FORMATS
    return name not in _UNENFORCED


def _clean_member(name: str, value: Any, level: int) -> Any:
    if name in _NAMED_SCHEMAS and isinstance(value, dict):
        return {key: _clean_any(inner, level) for key, inner in value.items()}
    if name in _COMBINATIONS and isinstance(value, list):
        return [_clean_any(inner, level) for inner in value]
    return _clean_any(value, level) if name == "items" else value


def _clean_any(schema: Any, level: int) -> Any:
    return _clean(schema, level) if isinstance(schema, dict) else schema


def _is_object(schema: Schema) -> bool:
    kind = schema.get("type")
    return kind == "object" or (isinstance(kind, list) and "object" in kind) or "properties" in schema


def _check_references(root: Schema) -> None:
    """Refuse references that lead out of the schema, to nothing, or round in a circle."""
    done: set[str] = set()

    def follow(reference: str, path: tuple[str, ...]) -> None:
        if reference in path:
            raise _Unusable("is recursive")
        if reference not in done:
            for inner in _references(_resolve(root, reference)):
                follow(inner, (*path, reference))
            done.add(reference)

    for reference in _references(root):
        follow(reference, ())


def _references(value: object) -> list[str]:
    """All `$ref`s in `value`, those in its definitions left out: they count where they are used."""
    found: list[str] = []
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending += item
        elif isinstance(item, dict):
            if isinstance(item.get("$ref"), str):
                found.append(item["$ref"])
            pending += [inner for name, inner in item.items() if name not in ("$defs", "definitions")]
    return found


def _resolve(root: Schema, reference: str) -> object:
    if not reference.startswith("#"):
        raise _Unusable(f"refers to {reference!r}, outside of itself")
    value: Any = root
    for step in reference[1:].split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(value, dict) or step not in value:
            raise _Unusable(f"refers to {reference!r}, which it does not have")
        value = value[step]
    return value


def tool_schema(parameters: object, place: str) -> Schema:
    """A tool's parameters as an `input_schema`: an object, without a choice of branches at its top."""
    if parameters is None:
        return {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"'{place}' must be a JSON schema.", param=place)
    schema = dict(parameters)
    for name in _COMBINATIONS:
        branches = schema.pop(name, None)
        if isinstance(branches, list):
            _merge(schema, [_branch(branch, parameters) for branch in branches], all_hold=name == "allOf")
    if schema.get("type") != "object":
        schema["type"] = "object"
    if "$ref" not in schema:
        schema.setdefault("properties", {})
    return schema


def _branch(branch: object, root: Schema) -> Schema:
    if isinstance(branch, dict) and isinstance(branch.get("$ref"), str):
        try:
            branch = _resolve(root, branch["$ref"])
        except _Unusable:
            return {}
    return branch if isinstance(branch, dict) else {}


def _merge(schema: Schema, branches: list[Schema], *, all_hold: bool) -> None:
    """Put the branches' properties into `schema`; required is what is so whichever branch holds."""
    if not any(map(_properties, branches)):
        return
    merged = dict(_properties(schema))
    for branch in branches:
        for name, value in _properties(branch).items():
            merged[name] = value if merged.get(name, value) == value else _either(merged[name], value)
    schema["properties"] = merged
    needs = [set(_required(branch)) for branch in branches]
    needed = set.union(*needs) if all_hold else set.intersection(*needs)
    required = _required(schema)
    schema["required"] = required + sorted(needed - set(required))


def _properties(schema: Schema) -> dict[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def _required(schema: Schema) -> list[str]:
    required = schema.get("required")
    return [name for name in required if isinstance(name, str)] if isinstance(required, list) else []


def _either(first: Any, second: Any) -> Schema:
    """A property that differs between branches; several differences end up side by side."""
    known = first["anyOf"] if isinstance(first, dict) and set(first) == {"anyOf"} else [first]
    return {"anyOf": known if second in known else [*known, second]}
