import pytest

from perpetuo.providers.catalog import CATALOG, adapter, provider_for_model
from perpetuo.providers.hosts import HOSTS
from perpetuo.providers.openai import OpenAI


@pytest.mark.parametrize(
    ("model", "provider"),
    [
        ("gpt-5", "openai"),
        ("o3-mini", "openai"),
        ("chatgpt-4o-latest", "openai"),
        ("text-embedding-3-small", "openai"),
        ("claude-sonnet-4-5", "anthropic"),
        ("gemini-2.5-pro", "gemini"),
        ("grok-4", "xai"),
        ("mistral-large-latest", "mistral"),
        ("open-mixtral-8x7b", "mistral"),
        ("codestral-latest", "mistral"),
        ("labs-devstral-small-2512", "mistral"),
        ("deepseek-chat", "deepseek"),
        ("llama3", None),
        ("my-gpt-5", None),
        ("", None),
    ],
)
def test_bare_name_belongs_to_its_provider(model: str, provider: str | None) -> None:
    assert provider_for_model(model) == provider


def test_who_needs_a_base_url_and_who_may_lack_a_key() -> None:
    assert {name for name, entry in CATALOG.items() if entry.needs_base_url} == {"azure", "vllm", "custom"}
    assert {name for name, entry in CATALOG.items() if entry.may_lack_api_key} == {"ollama", "vllm", "custom"}


def test_base_urls_end_without_a_slash() -> None:
    assert not any((entry.base_url or "").endswith("/") for entry in CATALOG.values())


def test_each_provider_has_its_own_adapter() -> None:
    adapters = {name: adapter(name) for name in CATALOG}
    assert {name for name, found in adapters.items() if found and found.name != name} == set()
    assert adapters["custom"] is adapter("custom")
    assert all(isinstance(adapters[name], OpenAI) for name in HOSTS)
    assert HOSTS.keys() == {name for name, entry in CATALOG.items() if entry.adapter == "openai"}


def test_who_has_the_responses_api() -> None:
    have = {name for name, entry in CATALOG.items() if entry.has_responses}
    assert have == {"openai", "azure", "openrouter", "xai", "ollama", "vllm", "custom"}
