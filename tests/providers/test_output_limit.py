import json
from typing import Any

import pytest

from perpetuo.errors import InvalidRequest
from perpetuo.output_limits import output_bound
from perpetuo.providers.anthropic import Anthropic
from perpetuo.providers.base import Endpoint, ModelRequest, UpstreamRequest
from perpetuo.providers.catalog import CATALOG, adapter
from perpetuo.providers.hosts import HOSTS
from tests.providers.anthropic_case import FRESH, MIDDLE

HELLO = [{"role": "user", "content": "Hello"}]
NAMES = {"max_tokens", "max_completion_tokens", "max_output_tokens"}
# What each host is told where the client named no maximum, one of the old name, and one of the new name.
SENT = {
    "openai": ("max_completion_tokens", "max_tokens", "max_completion_tokens"),
    "azure": ("max_completion_tokens", "max_tokens", "max_completion_tokens"),
    "groq": ("max_completion_tokens", "max_tokens", "max_completion_tokens"),
    "xai": ("max_completion_tokens", "max_tokens", "max_completion_tokens"),
    "mistral": ("max_tokens",) * 3,
    "together": ("max_tokens",) * 3,
    "deepseek": ("max_tokens",) * 3,
    "fireworks": ("max_tokens",) * 3,
    "ollama": ("max_tokens",) * 3,
    "anthropic": ("max_tokens",) * 3,
    "openrouter": ("max_tokens", "max_tokens", "max_completion_tokens"),
    "gemini": ("max_tokens", "max_tokens", "max_completion_tokens"),
    "vllm": ("max_tokens", "max_tokens", "max_completion_tokens"),
    "custom": ("max_tokens", "max_tokens", "max_completion_tokens"),
}
every_provider = pytest.mark.parametrize("provider", CATALOG)
THINKING = {"type": "enabled", "budget_tokens": 8_000}


def request(
    limit: int | None, model: str = "m", endpoint: Endpoint = "chat.completions", **fields: Any
) -> ModelRequest:
    fields = {"model": model, "messages": HELLO, **fields}
    return ModelRequest(endpoint, model, json.dumps(fields).encode(), fields, output_limit=limit)


def build(provider: str, asked: ModelRequest) -> UpstreamRequest:
    found = adapter(provider)
    assert found is not None
    return found.build_request(asked, "https://example.com/v1", "")


def limits(provider: str, *given: Any, **fields: Any) -> dict[str, Any]:
    body = json.loads(build(provider, request(*given, **fields)).body or b"")
    return {name: value for name, value in body.items() if name in NAMES}


def test_every_provider_stands_in_the_table() -> None:
    assert SENT.keys() == CATALOG.keys()


@every_provider
def test_a_maximum_of_ours_has_the_hosts_name(provider: str) -> None:
    unnamed, old, new = SENT[provider]
    assert limits(provider, 300) == {unnamed: 300}
    assert limits(provider, 300, max_tokens=None, max_completion_tokens=None) == {unnamed: 300}
    assert limits(provider, 300, max_tokens=9_000) == {old: 300}
    assert limits(provider, 300, max_completion_tokens=9_000) == {new: 300}
    assert limits(provider, 300, max_tokens=10, max_completion_tokens=9_000) == {new: 300}
    assert limits(provider, 300, max_completion_tokens=None, max_tokens=9_000) == {old: 300}


@pytest.mark.parametrize("provider", [name for name, entry in CATALOG.items() if entry.has_responses])
def test_a_maximum_of_ours_has_the_responses_own_name(provider: str) -> None:
    for fields in ({}, {"max_output_tokens": 9_000}, {"max_tokens": 9_000}):
        sent = limits(provider, 300, "gpt-5", "responses", input="Hello", **fields)
        assert sent == {"max_output_tokens": 300}


@pytest.mark.parametrize("provider", ["openai", "azure"])
def test_a_reasoners_maximum_has_the_newer_name(provider: str) -> None:
    assert limits(provider, 300, "o3-mini", max_tokens=9_000) == {"max_completion_tokens": 300}


@pytest.mark.parametrize("provider", HOSTS)
def test_embeddings_have_no_maximum(provider: str) -> None:
    asked = request(300, endpoint="embeddings", input="Hello")
    assert build(provider, asked).body is asked.body


@pytest.mark.parametrize("provider", HOSTS)
@pytest.mark.parametrize("named", [{}, {"max_tokens": 5}])
def test_without_a_maximum_of_ours_the_body_passes_as_it_came(provider: str, named: dict[str, Any]) -> None:
    asked = request(None, temperature=0.5, **named)
    assert build(provider, asked).body is asked.body


def test_all_bytes_but_the_maximum_stay() -> None:
    body = (
        b'{ "model":"m", "messages":[{"role":"user","content":"\\u00e9"}],\n "max_tokens" : 9000, "t":1.0 }'
    )
    asked = ModelRequest("chat.completions", "m", body, json.loads(body), output_limit=300)
    assert build("openai", asked).body == body.replace(b"9000", b"300")


@pytest.mark.parametrize("value", ["x", -1, 0, 1.5, [], True])
def test_a_maximum_that_makes_no_sense_does_not_reach_a_host(value: object) -> None:
    assert limits("ollama", 300, max_tokens=value) == {"max_tokens": 300}


def test_anthropic_still_refuses_a_maximum_that_makes_no_sense() -> None:
    with pytest.raises(InvalidRequest):
        limits("anthropic", 300, MIDDLE, max_tokens="x")


def test_anthropics_models_get_no_more_than_they_take() -> None:
    assert limits("anthropic", 10**6, MIDDLE) == {"max_tokens": 64_000}
    assert limits("anthropic", None, MIDDLE) == {"max_tokens": output_bound(MIDDLE)}


def translated(
    limit: int | None, model: str = MIDDLE, **fields: Any
) -> tuple[dict[str, Any], UpstreamRequest]:
    built = Anthropic().build_request(request(limit, model, **fields), "https://example.com", "")
    return json.loads(built.body or b""), built


@pytest.mark.parametrize(
    ("limit", "budget"), [(None, 8_000), (9_000, 8_000), (8_001, 8_000), (8_000, 7_999), (1_025, 1_024)]
)
def test_the_thoughts_fit_into_the_maximum(limit: int | None, budget: int) -> None:
    body, built = translated(limit, thinking=THINKING, max_tokens=10_000, temperature=0.5)
    assert body["thinking"] == {"type": "enabled", "budget_tokens": budget}
    assert built.dropped == ("temperature",)


def test_where_no_thoughts_fit_there_are_none_and_it_is_said() -> None:
    body, built = translated(1_024, thinking=THINKING, max_tokens=10_000, temperature=0.5)
    assert "thinking" not in body
    assert (body["max_tokens"], body["temperature"]) == (1_024, 0.5)
    assert built.dropped == ("thinking",)


def test_an_efforts_thoughts_fit_into_the_maximum_too() -> None:
    body, _ = translated(2_000, reasoning_effort="high")
    assert body["thinking"]["budget_tokens"] == 1_999
    body, built = translated(256, reasoning_effort="high")
    assert "thinking" not in body
    assert built.dropped == ("reasoning_effort",)


def test_thoughts_without_a_budget_stay() -> None:
    body, built = translated(256, FRESH, thinking={"type": "adaptive"})
    assert body["thinking"] == {"type": "adaptive"}
    assert built.dropped == ()


def test_a_short_maximum_needs_no_stream() -> None:
    assert translated(None, FRESH, max_tokens=60_000)[0]["stream"] is True
    assert "stream" not in translated(300, FRESH, max_tokens=60_000)[0]
