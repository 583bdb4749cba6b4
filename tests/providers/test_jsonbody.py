import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpetuo.providers.jsonbody import read_json, replace_members, top_level_keys, write_json

keys = st.sampled_from(["model", "models", "stream_options", "mod\\el", 'q"', "é", ""])
texts = st.text(st.characters(codec="utf-8") | st.sampled_from('"\\\x00{}[],:\u2028'), max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
values: st.SearchStrategy[Any] = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts | keys, inner, max_size=4)
)
objects = st.dictionaries(keys | texts, values, max_size=6)


@st.composite
def written_objects(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    members = draw(objects)
    text = json.dumps(
        members,
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 0, 2, "\t"])),
        separators=draw(st.sampled_from([(",", ":"), (", ", ": "), (" , ", " : ")])),
    )
    return members, draw(st.sampled_from(["", " ", "\r\n"])).join(["", text, ""]).encode()


@given(written_objects(), st.dictionaries(keys, values, max_size=3), st.sets(keys, max_size=2))
def test_result_is_what_editing_the_parsed_object_gives(
    written: tuple[dict[str, Any], bytes], changes: dict[str, Any], remove: set[str]
) -> None:
    members, body = written
    remove -= changes.keys()
    expected = {key: value for key, value in members.items() if key not in remove} | changes
    assert json.loads(replace_members(body, changes, remove)) == expected


@given(written_objects())
def test_keys_are_those_of_the_parsed_object(written: tuple[dict[str, Any], bytes]) -> None:
    members, body = written
    assert top_level_keys(body) == list(members)


@given(written_objects(), values)
def test_taking_an_inserted_member_out_gives_the_bytes_back(
    written: tuple[dict[str, Any], bytes], value: Any
) -> None:
    members, body = written
    if members and "new" not in members:
        assert replace_members(replace_members(body, {"new": value}), {}, ["new"]).split() == body.split()


def test_every_other_byte_stays() -> None:
    body = b' {\n "a" : 1.50 , "model":"x"\t, "n":1e2,"s":"\\u0000\\ud800\\/" }\n'
    assert replace_members(body, {"model": "gpt"}) == body.replace(b'"x"', b'"gpt"')


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{}", b'{"m":1}'),
        (b"{ \n}", b'{"m":1 \n}'),
        (b'{"a":2}', b'{"m":1,"a":2}'),
        (b'{ "a":2 }', b'{ "m":1,"a":2 }'),
        (b'{"\\u006d":2,"a":{"m":3},"m":[4]}', b'{"\\u006d":1,"a":{"m":3}}'),
    ],
)
def test_member_is_set(body: bytes, expected: bytes) -> None:
    assert replace_members(body, {"m": 1}) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"m":1}', b"{}"),
        (b'{"m":1, "a":2}', b'{"a":2}'),
        (b'{"a":2, "m":{}}', b'{"a":2}'),
        (b'{"a":2 , "m":[1] , "b":3}', b'{"a":2 , "b":3}'),
        (b'{"m":1,"m":2}', b"{}"),
    ],
)
def test_member_is_removed(body: bytes, expected: bytes) -> None:
    assert replace_members(body, {}, ["m"]) == expected


def test_unchanged_body_is_the_same_object() -> None:
    body = b'{"model":"x"}'
    assert replace_members(body, {}, ["models"]) is body


@pytest.mark.parametrize("depth", [1, 8, 9, 10, 11, 900])
def test_nesting_of_any_depth_is_skipped(depth: int) -> None:
    body = b'{"a":' + b'[{"m":"]}\\""},' * depth + b"0" + b"]" * depth + b',"m":1}'
    assert top_level_keys(body) == ["a", "m"]
    assert replace_members(body, {"m": 2}) == body[:-2] + b"2}"


@pytest.mark.parametrize("backslashes", range(8))
def test_backslashes_before_a_quote_are_counted(backslashes: int) -> None:
    text = "\\" * backslashes + '"' + "\\" * backslashes
    body = json.dumps({text: [text, {"m": text}], "m": text}).encode()
    assert top_level_keys(body) == [text, "m"]
    assert json.loads(replace_members(body, {"m": 1})) == {text: [text, {"m": text}], "m": 1}


@pytest.mark.parametrize("body", [b"", b"[]", b'"a"', b'{"a"', b'{"a":[', b'{"a":1', b'{"a":{} 1}'])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match="not a JSON object"):
        top_level_keys(body)


@pytest.mark.parametrize(
    "body", [b"NaN", b"1e999", b"[Infinity]", b"\xff", b"\xef\xbb\xbf{}", b"", b"[" * 100_000]
)
def test_what_is_not_strict_json_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError):
        read_json(body)


@pytest.mark.parametrize("value", [{"a": "\ud83d\x00"}, 2**70, "é"])
def test_unusual_values_are_written_and_read(value: Any) -> None:
    assert json.loads(write_json(value)) == value


def test_what_json_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError):
        write_json({1, 2})
