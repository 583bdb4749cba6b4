import json
from typing import Any

import pytest

from perpetuo.errors import UpstreamError
from perpetuo.providers.base import Answer, ModelRequest, Usage
from perpetuo.providers.openai import OpenAI

BASE = "http://upstream/v1/"


def chat(**fields: Any) -> ModelRequest:
    fields = {"model": "m", "messages": [{"role": "user", "content": "12345"}], **fields}
    return ModelRequest("chat.completions", "m", json.dumps(fields).encode(), fields)


def embeddings(**fields: Any) -> ModelRequest:
    fields = {"model": "m", "input": "12345", **fields}
    return ModelRequest("embeddings", "m", json.dumps(fields).encode(), fields)


def completion(message: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "Hello"} | (message or {})
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "up",
        "choices": [choice],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    } | fields


def read(fields: Any, request: ModelRequest | None = None) -> Answer:
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return OpenAI().read_answer(request or chat(), body)


def read_message(message: dict[str, Any]) -> Any:
    return json.loads(read(completion(message)).body)["choices"][0]["message"]


def usage_of(**counts: Any) -> Usage:
    return read(completion(usage=counts)).usage


def sent(request: ModelRequest) -> Any:
    body = OpenAI().build_request(request, BASE, "sk").body
    assert body is not None
    return json.loads(body)


@pytest.mark.parametrize("request_", [chat(), embeddings(), chat(stream=False), embeddings(stream=True)])
@pytest.mark.parametrize("options", [{}, {"seed": 1}])
def test_body_passes_as_the_very_same_object(request_: ModelRequest, options: dict[str, Any]) -> None:
    assert OpenAI().build_request(request_, BASE, "sk").body is request_.body


def test_stream_that_asks_for_usage_passes_as_the_very_same_object() -> None:
    request = chat(stream=True, stream_options={"include_usage": True})
    assert OpenAI().build_request(request, BASE, "sk").body is request.body


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"include_usage": True}),
        ({"stream_options": None}, {"include_usage": True}),
        ({"stream_options": {"include_usage": False}}, {"include_usage": True}),
        ({"stream_options": {"a": [1]}}, {"a": [1], "include_usage": True}),
        ({"stream_options": "wrong"}, "wrong"),
    ],
)
def test_usage_is_asked_of_every_stream(options: dict[str, Any], expected: Any) -> None:
    assert sent(chat(stream=True, **options))["stream_options"] == expected


def test_model_is_spliced_and_our_fallbacks_are_taken_out() -> None:
    body = b'{"temperature":1.0, "model":"smart", "models":["a"], "messages":[]}'
    request = ModelRequest("chat.completions", "gpt", body, json.loads(body))
    assert (
        OpenAI().build_request(request, BASE, "").body == b'{"temperature":1.0, "model":"gpt", "messages":[]}'
    )


def test_url_and_headers() -> None:
    request = ModelRequest(
        "embeddings", "m", b"{}", {"model": "m"}, {"openai-beta": "x", "accept": "text/html"}
    )
    built = OpenAI().build_request(request, BASE, "sk")
    assert (built.method, built.url) == ("POST", "http://upstream/v1/embeddings")
    assert built.headers == {
        "openai-beta": "x", "accept": "application/json", "accept-encoding": "identity",
        "user-agent": "perpetuo/0.1", "authorization": "Bearer sk", "content-type": "application/json",
    }  # fmt: skip


def test_stream_accepts_events_and_an_empty_secret_sends_no_authorization() -> None:
    built = OpenAI().build_request(chat(stream=True), BASE, "")
    assert built.url == "http://upstream/v1/chat/completions"
    assert built.headers["accept"] == "text/event-stream"
    assert "authorization" not in built.headers


def test_models_are_asked_for_and_read() -> None:
    built = OpenAI().build_models_request(BASE, "sk")
    assert (built.method, built.url, built.body) == ("GET", "http://upstream/v1/models", None)
    assert OpenAI().read_models(b'{"data":[{"id":"a"},{"id":"b/c"}]}') == ["a", "b/c"]
    assert OpenAI().read_models(b'[{"id":"a"}]') == ["a"]


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"{}", b"3", b'{"data":{}}', b'{"data":null}', b'{"data":["a"]}', b'{"data":[{"id":1}]}']
    + [b'{"error":{"message":"x"}}', b'{"data":"ab"}'],
)
def test_what_is_no_list_of_models_is_refused(body: bytes) -> None:
    with pytest.raises(UpstreamError):
        OpenAI().read_models(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"  ",
        b"<html>login</html>",
        b'{"choices":[NaN]}',
        b"[]",
        b"null",
        b"\xff",
        b"{}",
        b'{"choices":null}',
    ]
    + [b'{"choices":[]}', b'{"choices":{}}', b'{"choices":[1]}', b'{"choices":[{"text":"a"}]}'],
)
def test_what_is_no_answer_is_an_upstream_error(body: bytes) -> None:
    with pytest.raises(UpstreamError) as caught:
        read(body)
    assert (caught.value.status, caught.value.code) == (502, "upstream_error")
    assert caught.value.upstream_status == 200
    assert caught.value.message.startswith("The upstream")


@pytest.mark.parametrize("body", [b"{}", b'{"data":{}}', b'{"choices":[]}', b""])
def test_what_is_no_list_of_embeddings_is_an_upstream_error(body: bytes) -> None:
    with pytest.raises(UpstreamError):
        read(body, embeddings())


def test_error_with_status_200_is_told_in_its_words_without_the_secret() -> None:
    body = json.dumps(completion(error={"message": "bad sk-1", "code": 502})).encode()
    with pytest.raises(UpstreamError, match=r"^bad \[redacted\]$"):
        OpenAI().read_answer(chat(), body, secret="sk-1")


def test_answer_without_fault_passes_byte_for_byte() -> None:
    body = b"\n\n " + json.dumps(completion(x=1, error=None), indent=1).encode() + b"\n"
    answer = read(body)
    assert answer == Answer(body, Usage(3, 2, 5), "Hello", "up")


def test_lone_surrogates_and_nul_pass() -> None:
    body = json.dumps(completion({"content": "\ud83d\x00"})).encode()
    assert read(body).body == body


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"refusal": ""}, {"refusal": None}),
        ({"role": "model"}, {"role": "assistant"}),
        (
            {"content": [{"type": "thinking", "thinking": [{"text": "hm"}]}, {"type": "text", "text": "Hi"}]},
            {"content": "Hi", "reasoning_content": "hm"},
        ),
        ({"tool_calls": {}}, {}),
    ],
)
def test_message_is_mended(message: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read_message(message) == {"role": "assistant", "content": "Hello"} | expected


@pytest.mark.parametrize(
    ("given", "expected"), [({"a": 1}, '{"a":1}'), ("", "{}"), (None, "{}"), ("{ }", "{ }")]
)
def test_arguments_become_a_json_string(given: Any, expected: str) -> None:
    calls = [{"id": "c", "function": {"name": "f", "arguments": given}, "extra_content": 1}]
    call = read_message({"content": None, "tool_calls": calls})["tool_calls"][0]
    assert call == {
        "id": "c", "type": "function", "function": {"name": "f", "arguments": expected}, "extra_content": 1
    }  # fmt: skip


def test_frame_is_mended() -> None:
    answer = json.loads(read(completion(id="", object="x", created=1.7e9, model=None)).body)
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["created"], answer["model"]) == ("chat.completion", 1_700_000_000, "m")


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None, "refusal": "No."}, "No."),
        ({"content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, "f({})"),
        ({"content": None}, ""),
    ],
)
def test_text_for_the_preview(message: dict[str, Any], text: str) -> None:
    assert read(completion(message)).text == text


def test_counts_are_read_with_their_details() -> None:
    details = {"prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 5}}
    more = {"completion_tokens_details": {"reasoning_tokens": 6}}
    usage = usage_of(prompt_tokens=10, completion_tokens=7, total_tokens=17, **details, **more)
    assert usage == Usage(10, 7, 17, cached_tokens=4, cache_write_tokens=5, reasoning_tokens=6)


def test_deepseeks_hits_are_cached_tokens() -> None:
    assert usage_of(prompt_tokens=10, completion_tokens=0, prompt_cache_hit_tokens=8) == Usage(10, 0, 10, 8)
    details = {"prompt_tokens_details": {"cached_tokens": 0}, "prompt_cache_hit_tokens": 8}
    assert usage_of(prompt_tokens=10, completion_tokens=0, **details).cached_tokens == 0


def test_xais_reasoning_is_added_where_the_total_says_so() -> None:
    details = {"completion_tokens_details": {"reasoning_tokens": 290}}
    usage = usage_of(prompt_tokens=12, completion_tokens=1, total_tokens=303, **details)
    assert usage == Usage(12, 291, 303, reasoning_tokens=290)


def test_details_never_exceed_what_they_are_part_of() -> None:
    details = {"prompt_tokens_details": {"cached_tokens": 90, "cache_write_tokens": 90}}
    more = {"completion_tokens_details": {"reasoning_tokens": 90}}
    usage = usage_of(prompt_tokens=10, completion_tokens=7, **details, **more)
    assert (usage.cached_tokens, usage.cache_write_tokens, usage.reasoning_tokens) == (10, 0, 7)


@pytest.mark.parametrize("bad", [None, -1, 1.0, True, "7", 2**53 + 1, [], {}])
def test_count_that_makes_no_sense_is_absent(bad: Any) -> None:
    assert usage_of(prompt_tokens=bad, completion_tokens=7) == Usage(2, 7, 9, source="estimate")
    assert usage_of(prompt_tokens=bad, completion_tokens=7, total_tokens=9) == Usage(2, 7, 9)
    assert usage_of(prompt_tokens=2, completion_tokens=7, total_tokens=bad) == Usage(2, 7, 9)
    details = {"prompt_tokens_details": {"cached_tokens": bad}, "completion_tokens_details": bad}
    assert usage_of(prompt_tokens=2, completion_tokens=7, **details) == Usage(2, 7, 9)


def test_explicit_zero_is_zero() -> None:
    assert usage_of(prompt_tokens=0, completion_tokens=0, total_tokens=0) == Usage(0, 0, 0)


@pytest.mark.parametrize(
    ("messages", "tokens"),
    [
        ("12345678", 2),
        ([{"content": "é" * 4}], 2),
        ([{"content": [{"text": "1234"}, {"image_url": {"url": "x" * 999}}, 5, None]}], 2),
        ([{"content": None, "tool_calls": [{"function": {"name": "1234", "arguments": "5678"}}]}], 2),
        (None, 0),
        ([{"content": "\ud800"}], 1),
    ],
)
def test_estimate_of_the_prompt_takes_any_shape(messages: Any, tokens: int) -> None:
    usage = read(completion(usage=None), chat(messages=messages)).usage
    assert usage == Usage(tokens, 2, tokens + 2, source="estimate")


@pytest.mark.parametrize(
    ("given", "tokens"), [("12345", 2), (["1234", "5"], 2), ([1, 2, 3], 3), ([[1], [2, 3]], 3)]
)
def test_estimate_of_embeddings(given: Any, tokens: int) -> None:
    assert read({"data": []}, embeddings(input=given)).usage == Usage(tokens, 0, tokens, source="estimate")


def test_embeddings_pass_with_their_usage() -> None:
    body = b'{"data": [{"embedding":[0.1]}], "model":"e", "usage":{"prompt_tokens":4,"total_tokens":4}}'
    assert read(body, embeddings()) == Answer(body, Usage(4, 0, 4), "", "e")
