"""The catalogue: which providers there are by name, and where a bare model name belongs.

Data only. Base URLs are those of the providers' own documentation, 2026; so is who has `/v1/responses` (its
"Responses API" page or section). How a provider's dialect differs from OpenAI's stands in `hosts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from perpetuo.providers.anthropic import Anthropic
from perpetuo.providers.base import Provider
from perpetuo.providers.hosts import HOSTS
from perpetuo.providers.openai import OpenAI


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One provider. `base_url` is the default, None where the provider key must bring one; `patterns` are
    globs of the model names that belong to it."""

    adapter: Literal["openai", "anthropic"]
    base_url: str | None
    patterns: tuple[str, ...] = ()
    may_lack_api_key: bool = False
    has_responses: bool = False

    @property
    def needs_base_url(self) -> bool:
        return self.base_url is None


CATALOG: dict[str, CatalogEntry] = {
    "openai": CatalogEntry(
        "openai",
        "https://api.openai.com/v1",
        ("gpt-*", "chatgpt-*", "o1*", "o3*", "o4*", "text-embedding-*", "codex-*", "ft:gpt-*", "ft:o*"),
        has_responses=True,
    ),
    "anthropic": CatalogEntry("anthropic", "https://api.anthropic.com", ("claude-*",)),
    "groq": CatalogEntry("openai", "https://api.groq.com/openai/v1"),
    "mistral": CatalogEntry(
        "openai",
        "https://api.mistral.ai/v1",
        (
            "mistral-*",
            "codestral-*",
            "ministral-*",
            "magistral-*",
            "devstral-*",
            "pixtral-*",
            "voxtral-*",
            "open-mi?tral-*",
            "labs-*stral-*",
        ),
    ),
    "together": CatalogEntry("openai", "https://api.together.xyz/v1"),
    "openrouter": CatalogEntry("openai", "https://openrouter.ai/api/v1", has_responses=True),
    "deepseek": CatalogEntry("openai", "https://api.deepseek.com", ("deepseek-*",)),
    "xai": CatalogEntry("openai", "https://api.x.ai/v1", ("grok-*",), has_responses=True),
    "gemini": CatalogEntry(
        "openai", "https://generativelanguage.googleapis.com/v1beta/openai", ("gemini-*", "models/gemini-*")
    ),
    "fireworks": CatalogEntry("openai", "https://api.fireworks.ai/inference/v1", ("accounts/fireworks/*",)),
    "azure": CatalogEntry("openai", None, has_responses=True),
    "ollama": CatalogEntry("openai", "http://localhost:11434/v1", may_lack_api_key=True, has_responses=True),
    "vllm": CatalogEntry("openai", None, may_lack_api_key=True, has_responses=True),
    "custom": CatalogEntry("openai", None, may_lack_api_key=True, has_responses=True),
}

_ADAPTERS: dict[str, Provider] = {
    name: OpenAI(HOSTS[name]) if entry.adapter == "openai" else Anthropic() for name, entry in CATALOG.items()
}


def adapter(name: str) -> Provider | None:
    """The shared adapter for a name of the catalogue; None for a name that is not in it."""
    return _ADAPTERS.get(name)


def provider_for_model(bare_name: str) -> str | None:
    """The provider to which a model name without prefix belongs, None if to no one."""
    for name, entry in CATALOG.items():
        if any(fnmatchcase(bare_name, pattern) for pattern in entry.patterns):
            return name
    return None
