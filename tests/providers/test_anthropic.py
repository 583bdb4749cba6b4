from typing import Any

import pytest

from perpetuo.errors import InvalidRequest, UpstreamError
from perpetuo.providers.anthropic import Anthropic
from perpetuo.providers.anthropic_models import capabilities
from perpetuo.providers.base import ModelRequest
from tests.providers.anthropic_case import BASE, MIDDLE, asking, body_of, built


def test_headers_are_anthropics() -> None:
    request = built(stream=True)
    assert (request.method, request.url) == ("POST", f"{BASE}/v1/messages")
    assert request.headers == {
        "accept": "text/event-stream",
        "accept-encoding": "identity",
        "anthropic-version": "2023-06-01",
        "content-type": "application/json",
        "user-agent": "perpetuo/0.1",
        "x-api-key": "sk-ant-1",
    }
    assert built(max_tokens=9).headers["accept"] == "application/json"
    assert "x-api-key" not in Anthropic().build_request(asking(), BASE, "").headers


@pytest.mark.parametrize("base", ["https://x/anthropic", "https://x/anthropic/", "https://x/anthropic/v1/"])
def test_a_base_url_is_understood_with_and_without_its_v1(base: str) -> None:
    assert Anthropic().build_request(asking(), base, "").url == "https://x/anthropic/v1/messages"
    assert Anthropic().build_models_request(base, "").url == "https://x/anthropic/v1/models?limit=1000"


def test_headers_that_travel_are_anthropics_own() -> None:
    sent = {"anthropic-beta": "x-1", "idempotency-key": "k", "openai-beta": "no"}
    file = {"role": "user", "content": [{"type": "file", "file": {"file_id": "file_011"}}]}
    request = ModelRequest("chat.completions", MIDDLE, b"", {"messages": [file]}, sent)
    headers = Anthropic().build_request(request, BASE, "").headers
    assert headers["anthropic-beta"] == "x-1,files-api-2025-04-14"
    assert headers["idempotency-key"] == "k"
    assert "openai-beta" not in headers
    assert "anthropic-beta" not in built().headers
    assert built(messages=[file]).headers["anthropic-beta"] == "files-api-2025-04-14"


@pytest.mark.parametrize("endpoint", ["embeddings", "responses"])
def test_what_anthropic_does_not_have_is_refused(endpoint: Any) -> None:
    request = ModelRequest(endpoint, MIDDLE, b"", {"input": "x"})
    with pytest.raises(InvalidRequest) as caught:
        Anthropic().build_request(request, BASE, "")
    assert (caught.value.status, caught.value.code) == (404, "endpoint_not_supported")


def test_models_are_listed() -> None:
    adapter = Anthropic()
    request = adapter.build_models_request(BASE, "sk-ant-1")
    assert (request.method, request.headers["x-api-key"]) == ("GET", "sk-ant-1")
    assert request.headers["anthropic-version"] == "2023-06-01"
    assert adapter.read_models(b'{"data":[{"type":"model","id":"claude-a"}],"has_more":false}') == [
        "claude-a"
    ]
    with pytest.raises(UpstreamError):
        adapter.read_models(b"{}")


def test_version_is_the_adapters() -> None:
    assert built(version="2026-10-21").headers["anthropic-version"] == "2026-10-21"


def test_what_may_take_long_is_streamed_and_put_together() -> None:
    assert body_of(max_tokens=21_334)["stream"] is True
    assert "stream" not in body_of(max_tokens=21_333)
    assert body_of(max_tokens=9, stream=True)["stream"] is True
    assert "stream" not in body_of(max_tokens=9, stream=False, stream_options=None)


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("claude-opus-4-20250514", "opus-4"),
        ("claude-opus-4-1-20250805", "opus-4-1"),
        ("claude-sonnet-4@20250514", "sonnet-4"),
        ("claude-sonnet-4-5-20250929", "sonnet-4-5"),
        ("anthropic/claude-sonnet-4.5", "sonnet-4-5"),
        ("claude-haiku-4-5-latest", "haiku-4-5"),
        ("claude-opus-4-5-thinking", "opus-4-5"),
        ("claude-3-5-sonnet-20241022", "3-5"),
        ("claude-3-haiku-20240307", "3"),
        ("claude-opus-5-5", "opus-5-5"),
        ("Claude-Opus-5", "opus-5"),
    ],
)
def test_a_family_is_found_by_its_name(model: str, family: str) -> None:
    assert capabilities(model) is capabilities(f"claude-{family}")


@pytest.mark.parametrize("model", ["claude-opus-4-9", "claude-opus-6", "claude-novel-1", "claude-opus-4-12"])
def test_a_claude_that_is_not_known_is_taken_for_a_recent_one(model: str) -> None:
    able = capabilities(model)
    assert (able.max_output, able.has_sampling) == (128_000, False)
    assert capabilities("claude-fable-5-2") is capabilities("claude-fable-5")
    assert capabilities("claude-fable-5").thinking_off == "between_tools"
