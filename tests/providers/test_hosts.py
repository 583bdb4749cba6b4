import json
import re
from typing import Any

import pytest

from perpetuo.errors import InvalidRequest
from perpetuo.providers.base import ModelRequest, UpstreamRequest
from perpetuo.providers.catalog import CATALOG
from perpetuo.providers.hosts import HOSTS
from perpetuo.providers.openai import OpenAI
from perpetuo.providers.tool_ids import short_id

HELLO = [{"role": "user", "content": "Hello"}]
TURN = [
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": f"call_{place}" * 9, "type": "function", "function": {"name": "f", "arguments": "{}"}}
            for place in (1, 2)
        ],
    },
    {"role": "tool", "tool_call_id": "call_1" * 9, "content": "one"},
    {"role": "tool", "tool_call_id": "call_2" * 9, "content": "two"},
]
every_host = pytest.mark.parametrize("name", HOSTS)


def request(model: str = "m", endpoint: Any = "chat.completions", **fields: Any) -> ModelRequest:
    fields = {"model": model} | ({"messages": HELLO} if endpoint == "chat.completions" else {}) | fields
    return ModelRequest(endpoint, model, json.dumps(fields).encode(), fields)


def build(name: str, *given: Any, base_url: str | None = None, **fields: Any) -> UpstreamRequest:
    base_url = base_url or CATALOG[name].base_url or "https://example.com/v1"
    return OpenAI(HOSTS[name]).build_request(request(*given, **fields), base_url, "sk-1")


def sent(name: str, *given: Any, **fields: Any) -> dict[str, Any]:
    """The body, without what was not asked about."""
    body = json.loads(build(name, *given, **fields).body or b"")
    del body["model"]
    if body.get("messages") == HELLO:
        del body["messages"]
    return body


def sent_messages(name: str, messages: list[Any], model: str = "m") -> list[dict[str, Any]]:
    return json.loads(build(name, model, messages=messages).body or b"")["messages"]


# Fields.


@every_host
def test_a_plain_request_passes_byte_for_byte(name: str) -> None:
    asked = request(temperature=0.5, top_p=1, max_tokens=9, stop=["x"], tools=[], a_new_field={"a": 1.0})
    assert OpenAI(HOSTS[name]).build_request(asked, "https://example.com/v1", "").body is asked.body


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-5", "o3"])
def test_a_conversation_of_openais_own_passes_byte_for_byte(model: str) -> None:
    turn = json.loads(json.dumps(TURN).replace("call_1" * 9, "call_1").replace("call_2" * 9, "f:0"))
    asked = request(
        model, messages=[{"role": "developer", "content": "x", "name": "n"}, *turn], n=2, logprobs=True
    )
    assert OpenAI().build_request(asked, "https://example.com/v1", "").body is asked.body


@pytest.mark.parametrize("name", ["mistral", "together", "deepseek", "fireworks", "ollama"])
def test_the_limit_has_its_old_name_where_hosts_know_no_other(name: str) -> None:
    assert sent(name, max_completion_tokens=9) == {"max_tokens": 9}
    assert sent(name, max_completion_tokens=9, max_tokens=8) == {"max_tokens": 9}
    assert sent(name, max_completion_tokens=None, max_tokens=8) == {"max_tokens": 8}
    assert build(name, max_completion_tokens=9).dropped == ()


@pytest.mark.parametrize("name", ["openai", "azure"])
@pytest.mark.parametrize("model", ["gpt-5-mini", "o3", "o4-mini", "codex-mini-latest"])
def test_the_limit_has_its_new_name_where_models_refuse_the_old(name: str, model: str) -> None:
    assert sent(name, model, max_tokens=9) == {"max_completion_tokens": 9}
    assert sent(name, "gpt-4o", max_tokens=9) == {"max_tokens": 9}
    assert sent(name, model, max_tokens=None) == {"max_tokens": None}


@every_host
def test_only_one_limit_is_sent(name: str) -> None:
    body = sent(name, max_tokens=8, max_completion_tokens=9)
    assert list(body.values()) == [9]


@every_host
def test_a_hint_that_a_host_lacks_is_dropped_and_named(name: str) -> None:
    shaping = {"n", "logprobs", "top_logprobs", "audio", "modalities"}
    for field in HOSTS[name].lacks - shaping:
        built = build(name, **{field: "x"})
        assert (field not in json.loads(built.body or b""), built.dropped) == (True, (field,))


@every_host
@pytest.mark.parametrize("value", [None, {}, [], ""])
def test_a_field_that_asks_for_nothing_is_dropped_in_silence(name: str, value: Any) -> None:
    fields = dict.fromkeys(HOSTS[name].lacks, value)
    built = build(name, **fields)
    assert (json.loads(built.body or b"").keys(), built.dropped) == ({"model", "messages"}, ())


@pytest.mark.parametrize(
    ("field", "value", "neutral", "names"),
    [
        ("n", 2, 1, {"groq", "deepseek", "ollama"}),
        ("logprobs", True, False, {"groq", "mistral", "gemini"}),
        ("top_logprobs", 3, 0, {"groq", "mistral", "gemini"}),
        ("modalities", ["text", "audio"], ["text"], {"groq", "mistral", "deepseek", "gemini", "ollama"}),
        ("audio", {"voice": "x"}, None, {"groq", "mistral", "deepseek", "gemini", "ollama"}),
    ],
)
def test_what_shapes_the_answer_is_refused_by_name(
    field: str, value: Any, neutral: Any, names: set[str]
) -> None:
    for name in HOSTS:
        if name not in names:
            assert field in sent(name, **{field: value})
            continue
        assert sent(name, **{field: neutral}) == {}
        with pytest.raises(InvalidRequest, match=f"{name} does not support '{field}'") as caught:
            build(name, **{field: value})
        error = caught.value
        assert (error.status, error.param, error.code) == (400, field, "unsupported_parameter")


def test_mistral_has_its_own_words() -> None:
    assert sent("mistral", seed=1, tool_choice="required") == {"random_seed": 1, "tool_choice": "any"}
    assert sent("mistral", tool_choice={"type": "function"}) == {"tool_choice": {"type": "function"}}
    built = build("mistral", seed=1, random_seed=2)
    assert (json.loads(built.body or b"")["random_seed"], built.dropped) == (2, ("seed",))
    body = sent("mistral", "m", "embeddings", input="x", dimensions=8, user="u", encoding_format="base64")
    assert body == {"input": "x", "output_dimension": 8, "encoding_format": "base64"}


def test_groq_has_its_own_word_for_the_default_tier() -> None:
    assert sent("groq", service_tier="default") == {"service_tier": "on_demand"}
    assert sent("groq", service_tier="flex") == {"service_tier": "flex"}


@every_host
def test_streams_are_asked_for_their_usage_but_where_it_comes_unasked(name: str) -> None:
    for options in ({}, {"stream_options": None}, {"stream_options": {"include_usage": False}}):
        body = sent(name, stream=True, **options)
        assert body == {"stream": True} | (
            {} if name == "mistral" else {"stream_options": {"include_usage": True}}
        )
    unstreamed = sent(name, stream=False, stream_options=None)
    assert ("stream_options" in unstreamed) is (name != "mistral")
    assert build(name, stream=True).headers["accept"] == "text/event-stream"
    assert build(name, stream=True, stream_options={"include_usage": True}).dropped == ()


@every_host
def test_the_gateways_own_field_stays_here(name: str) -> None:
    assert sent(name, models=["a"]) == {}


# Messages.


@pytest.mark.parametrize("name", HOSTS)
def test_the_developer_is_the_system_where_there_is_none(name: str) -> None:
    role = sent_messages(name, [{"role": "developer", "content": "x"}, *HELLO])[0]["role"]
    knows_it = name in {"openai", "azure", "groq", "openrouter", "xai", "vllm", "custom"}
    assert role == ("developer" if knows_it else "system")


@pytest.mark.parametrize(
    ("name", "roles"),
    [("groq", set()), ("mistral", {"tool"}), ("xai", {"user"}), ("openai", {"system", "user", "tool"})],
)
def test_names_are_sent_where_they_may_stand(name: str, roles: set[str]) -> None:
    messages = [{"role": role, "content": "x", "name": "n"} for role in ("system", "user", "tool")]
    assert {message["role"] for message in sent_messages(name, messages) if "name" in message} == roles
    dropped = build(name, messages=messages).dropped
    assert dropped == (() if name == "openai" else ("messages.name",))


def test_ids_of_tool_calls_are_put_into_the_hosts_form() -> None:
    for name, form in (("mistral", "[a-zA-Z0-9]{9}"), ("openai", ".{1,40}"), ("azure", ".{1,40}")):
        call, first, second = sent_messages(name, [*HELLO, *TURN])[1:]
        ids = [one["id"] for one in call["tool_calls"]]
        assert ids == [first["tool_call_id"], second["tool_call_id"]]
        assert len(set(ids)) == 2
        assert all(re.fullmatch(form, one) for one in ids)
        assert sent_messages(name, [call, first, second]) == [call, first, second]
    assert sent_messages("vllm", TURN) == TURN


@pytest.mark.parametrize("name", HOSTS)
def test_a_calls_other_members_go_to_those_who_know_them(name: str) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    odd = call | {"index": 0, "extra_content": {"google": {"thought_signature": "x"}}}
    (message,) = sent_messages(name, [{"role": "assistant", "content": None, "tool_calls": [odd]}])
    lost = {"index"} if name == "gemini" else {"index", "extra_content"}
    assert odd.keys() - message["tool_calls"][0].keys() == (
        set() if name in ("openrouter", "vllm", "custom") else lost
    )


@pytest.mark.parametrize("given", ["call_1", "functions.get_weather:0", "é" * 40, ""])
def test_a_short_id_stays(given: str) -> None:
    assert short_id(given) == given


THOUGHT = {"reasoning_content": "hm", "reasoning": "hm", "reasoning_details": [{"text": "hm"}]}


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        *((name, set()) for name in ("openai", "azure", "groq", "mistral", "gemini")),
        *((name, {"reasoning_content"}) for name in ("deepseek", "fireworks")),
        *((name, set(THOUGHT)) for name in ("openrouter", "vllm", "custom", "together", "xai")),
        ("ollama", {"reasoning", "reasoning_details"}),
    ],
)
def test_thoughts_go_back_to_those_who_take_them(name: str, kept: set[str]) -> None:
    message = {"role": "assistant", "content": "x", **THOUGHT}
    built = build(name, messages=[*HELLO, message])
    (found,) = json.loads(built.body or b"")["messages"][1:]
    assert found.keys() & THOUGHT.keys() == kept
    renamed = {"reasoning_content"} if name == "ollama" else set()
    lost = [f"messages.{member}" for member in THOUGHT if member not in kept | renamed]
    assert list(built.dropped) == lost


def test_deepseek_gets_thoughts_for_every_answer_of_a_talk_with_tools() -> None:
    answer = {"role": "assistant", "content": "x"}
    found = sent_messages("deepseek", [*HELLO, answer, *TURN, answer | {"reasoning_content": "hm"}])
    assert [message.get("reasoning_content") for message in found] == [None, "", "", None, None, "hm"]
    assert sent_messages("deepseek", [*HELLO, answer]) == [*HELLO, answer]


def test_gemini_gets_a_signature_for_calls_of_others() -> None:
    for model, is_signed in (("gemini-3-pro-preview", True), ("models/gemini-flash-latest", True)):
        call = sent_messages("gemini", [*HELLO, *TURN], model)[1]["tool_calls"]
        signature = {"google": {"thought_signature": "skip_thought_signature_validator"}}
        assert ([one.get("extra_content") for one in call] == [signature, None]) is is_signed
    for model in ("gemini-2.5-flash", "gemma-3-27b-it"):
        assert sent_messages("gemini", [*HELLO, *TURN], model)[1:] == TURN
    own = {"google": {"thought_signature": "own"}}
    calls = [TURN[0]["tool_calls"][0] | {"extra_content": own}]  # type: ignore[index]
    assert (
        sent_messages("gemini", [TURN[0] | {"tool_calls": calls}], "gemini-3-pro")[0]["tool_calls"] == calls
    )


@every_host
def test_odd_messages_are_the_upstreams_to_refuse(name: str) -> None:
    odd = [
        None,
        1,
        {"role": ["x"]},
        {"role": "assistant", "tool_calls": "x"},
        {"role": "tool", "tool_call_id": 1},
    ]
    odd += [{"role": "assistant", "tool_calls": [None, {"id": 1}]}]
    assert len(sent_messages(name, odd)) == len(odd)
    assert sent(name, messages="x")["messages"] == "x"


# Where and with what.

CLASSIC = "https://r.openai.azure.com/openai/deployments"
DATED = "?api-version=2024-10-21"


@pytest.mark.parametrize(
    ("base_url", "chat", "models"),
    [
        *(
            (base_url, "https://r.openai.azure.com/openai/v1/chat/completions", "/openai/v1/models")
            for base_url in (
                "https://r.openai.azure.com",
                "https://r.openai.azure.com/openai",
                "https://r.openai.azure.com/openai/v1/",
            )
        ),
        (CLASSIC, f"{CLASSIC}/a%2Fb/chat/completions{DATED}", f"/openai/models{DATED}"),
        (f"{CLASSIC}/mine", f"{CLASSIC}/mine/chat/completions{DATED}", f"/openai/models{DATED}"),
        (
            f"{CLASSIC}/mine?api-version=2025-04-01-preview",
            f"{CLASSIC}/mine/chat/completions?api-version=2025-04-01-preview",
            "/openai/models?api-version=2025-04-01-preview",
        ),
        ("https://gate.example/azure/", "https://gate.example/azure/chat/completions", "/azure/models"),
    ],
)
def test_azure_has_urls_of_two_shapes(base_url: str, chat: str, models: str) -> None:
    assert build("azure", "a/b", base_url=base_url).url == chat
    assert OpenAI(HOSTS["azure"]).build_models_request(base_url, "").url.endswith(models)
    if base_url.startswith("https://r."):
        url = build("azure", "a/b", "responses", base_url=base_url).url
        assert url == "https://r.openai.azure.com/openai/v1/responses"


def test_azure_takes_its_key_in_a_header_of_its_own() -> None:
    headers = build("azure").headers
    assert (headers["api-key"], "authorization" in headers) == ("sk-1", False)


@pytest.mark.parametrize("name", [name for name in HOSTS if name != "azure"])
@pytest.mark.parametrize("base_url", ["https://example.com/v1", "https://example.com/v1/"])
def test_the_others_have_one_url_and_a_bearer(name: str, base_url: str) -> None:
    built = build(name, base_url=base_url)
    assert (built.url, built.headers["authorization"]) == (
        "https://example.com/v1/chat/completions",
        "Bearer sk-1",
    )
    assert build(name, "m", "embeddings", base_url=base_url).url == "https://example.com/v1/embeddings"


def test_models_have_the_names_to_ask_for_them_by() -> None:
    body = b'{"data":[{"id":"models/gemini-3-pro"},{"id":"x"}]}'
    assert OpenAI(HOSTS["gemini"]).read_models(body) == ["gemini-3-pro", "x"]
    assert OpenAI(HOSTS["together"]).read_models(b'[{"id":"meta/llama"}]') == ["meta/llama"]


# Refusals.


def test_a_wait_that_gemini_names_in_its_details_is_passed_on() -> None:
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "33.2s"}]
    body = json.dumps(
        [{"error": {"code": 429, "message": "exceeded your current quota", "details": details}}]
    )
    error = OpenAI(HOSTS["gemini"]).read_error(429, {}, body.encode(), "")
    assert (error.code, error.headers) == ("upstream_rate_limited", {"retry-after": "34"})


def test_a_wrong_key_that_comes_as_a_400_is_no_fault_of_the_clients() -> None:
    body = b'{"code":"x","error":"Incorrect API key provided: sk-1."}'
    assert OpenAI(HOSTS["xai"]).read_error(400, {}, body, "sk-1").code == "upstream_auth"
    assert OpenAI(HOSTS["custom"]).read_error(400, {}, body, "sk-1").status == 400
