"""The pictures, sounds and files of a request, and how many tokens of input they can be billed as.

Pictures are counted by a table, a PDF by the model's window; sounds and texts by their bytes, which are more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from perpetuo.gateway.intake import Asked
from perpetuo.price_list import context_window

Fault = tuple[str, str]  # where it stands that nobody can bound, and why

_TEXT_PARTS = frozenset(
    (
        *("text", "input_text", "output_text", "refusal", "summary_text", "reasoning_text"),
        *("thinking", "redacted_thinking", "reasoning", "reference"),
    )
)
_PLAIN_MEMBERS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"})
# Items of /v1/responses that bring all that they are billed as: those of tools that the client runs.
_WHOLE_ITEMS = frozenset(
    (
        *("message", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output"),
        *("computer_call", "computer_call_output", "local_shell_call", "local_shell_call_output"),
        *("shell_call", "shell_call_output", "apply_patch_call", "apply_patch_call_output"),
    )
)
_SEALED_ITEMS = frozenset({"reasoning", "compaction"})  # whole with their `encrypted_content`, else by an id
_IMAGE_PARTS = frozenset({"image_url", "input_image", "computer_screenshot"})
_FILE_PARTS = frozenset({"file", "input_file"})

# The most tokens that one picture is billed as, by the model's bare name, the first that matches counts.
# Upper bounds from the makers' pages on vision, November 2026. OpenAI: 8 tiles at most (2048 x 768), or 1,536
# patches of 32 x 32 times the model's factor, since GPT-5.2 up to 10,000 ("original") times at most 2.46.
# Anthropic: 1,568 px a side and some 1,600 tokens; since Opus 4.7 2,576 px and 4,784. Gemini: 16 tiles of
# 258, doubled. xAI: 7 tiles of 256. Mistral: 4,096 and a mark a row. Llama 3.2: 4 tiles of 1,601.
_IMAGE_TOKENS: Mapping[str, int] = {
    "gpt-4o-mini*": 2_833 + 8 * 5_667,
    "gpt-4.1-mini*": 2_489,
    "gpt-4.1-nano*": 3_779,
    "gpt-4*": 85 + 8 * 170,
    "chatgpt-4o*": 85 + 8 * 170,
    "o4-mini*": 2_642,
    "o[13]*": 75 + 8 * 150,
    "gpt-*": 24_600,
    "codex-*": 24_600,
    "claude-*": 4_784,
    "gemini-*": 8_256,
    "grok-*": 1_792,
    "pixtral-*": 4_160,
    "mistral-*": 4_160,
    "magistral-*": 4_160,
    "ministral-*": 4_160,
    "llama-3.2-*": 4 * 1_601,
}
_MOST_IMAGE_TOKENS = 16_400  # of open models as their servers set them: Qwen's 16,384, and its marks


@dataclass(frozen=True, slots=True)
class Media:
    """What a request has beside text. `data_characters` are of the pictures' own bytes, in data URLs; `fault`
    is the first thing that nobody can bound: where it stands, and why."""

    images: int = 0
    data_characters: int = 0
    pdfs: int = 0
    fault: Fault | None = None

    def tokens(self, provider: str, model: str) -> int:
        """The most tokens that they are billed as here, less the bytes that are counted as text already."""
        known, tokens = image_tokens(model), 0
        if self.images:
            tokens += self.images * (known or _MOST_IMAGE_TOKENS)
        if known is not None and provider != "custom":  # who else may take a picture's bytes for text?
            tokens -= self.data_characters
        return tokens + ((context_window(provider, model) or 0) if self.pdfs else 0)

    def fault_at(self, provider: str, model: str) -> Fault | None:
        """What of them nobody can bound at this target."""
        return self.fault or (_pdf_fault(provider, model) if self.pdfs else None)


def media_of(asked: Asked) -> Media:
    """The pictures, sounds and files of a request: one look, for all targets."""
    images = characters = pdfs = 0
    for place, part in _parts(asked):
        fault = _part_fault(part)
        if fault is not None:
            return Media(fault=(place, fault))
        kind = part.get("type")
        if kind in _IMAGE_PARTS:
            images, characters = images + 1, characters + _own_characters(part)
        elif kind in _FILE_PARTS and not _is_text(part):
            pdfs += 1
    return Media(images, characters, pdfs)


@lru_cache(1024)
def image_tokens(model: str) -> int | None:
    """The most tokens of one picture; None where the model's maker is not in the table."""
    name = model.rpartition("/")[2].lower()
    return next((most for glob, most in _IMAGE_TOKENS.items() if fnmatchcase(name, glob)), None)


def _pdf_fault(provider: str, model: str) -> Fault | None:
    """A PDF's pages are billed as text and as pictures, and packed so well that its bytes say nothing; the
    model's window bounds both. Not where pictures are billed at a multiple of their tokens, and not at
    OpenRouter, which may bill reading it page by page (openrouter.ai/docs/features/multimodal/pdfs)."""
    is_multiplied = model.rpartition("/")[2].lower().startswith("gpt-4o-mini")
    if provider == "openrouter" or is_multiplied or context_window(provider, model) is None:
        return "file", "nobody knows how many pages a PDF has, nor how many this model would take"
    return None


def _parts(asked: Asked) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every part of a message, of a tool's output or of what is to be embedded, with its place; and what is
    none: an item that refers to something at the host."""
    name = "messages" if asked.endpoint == "chat.completions" else "input"
    messages = asked.fields.get(name)
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        if not isinstance(message, dict) or _is_plain(message):
            continue
        place = f"{name}[{number}]"
        if asked.endpoint == "embeddings":
            yield place, message
        elif asked.endpoint == "responses" and not _is_whole(message):
            yield place, {"type": f"stored {message.get('type')}"}
        if message.get("audio"):  # an answer of before, by its id
            yield f"{place}.audio", {"type": "stored audio"}
        for member in ("content", "output"):
            value = message.get(member)
            for part in value if isinstance(value, list) else (value,):
                if isinstance(part, dict):
                    yield f"{place}.{member}", part


def _is_plain(message: Mapping[str, Any]) -> bool:
    """Nothing but a text, as most messages are."""
    return type(message.get("content")) is str and message.keys() <= _PLAIN_MEMBERS


def _is_whole(item: Mapping[str, Any]) -> bool:
    kind = item.get("type")
    if kind is None:
        return "role" in item
    return str(kind) in _WHOLE_ITEMS or (str(kind) in _SEALED_ITEMS and bool(item.get("encrypted_content")))


def _part_fault(part: Mapping[str, Any]) -> str | None:
    kind = str(part.get("type"))
    if kind in _IMAGE_PARTS:
        return None if _is_image(_image_url(part)) else "nobody knows what picture this is"
    if kind in _FILE_PARTS:
        return None if _has_file(part) else "nobody knows what a file that is not in the request comes to"
    if kind == "input_audio" and _has_sound(part):
        return None
    return None if kind in _TEXT_PARTS else f"nobody knows what the type {kind!r} comes to"


def _image_url(part: Mapping[str, Any]) -> object:
    url = part.get("image_url")
    return url.get("url") if isinstance(url, dict) else url


def _is_image(url: object) -> bool:
    """Whether it can be a picture; some hosts take any file as one. One that lies at the host has no URL."""
    if not isinstance(url, str):
        return False
    start = url[:11].lower()
    return start == "data:image/" or not start.startswith("data:")


def _own_characters(part: Mapping[str, Any]) -> int:
    """How many characters of a picture stand in the body: none of one that the host fetches."""
    url = _image_url(part)
    return len(url) if isinstance(url, str) and url[:5].lower() == "data:" else 0


def _has_sound(part: Mapping[str, Any]) -> bool:
    """A second of sound is at most 32 tokens and at least some hundred bytes: its bytes cover it."""
    sound = part.get("input_audio")
    data = sound.get("data") if isinstance(sound, dict) else None
    return isinstance(data, str) and data[:4].lower() != "http"


def _file(part: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = part.get("file")
    return inner if isinstance(inner, dict) else part


def _has_file(part: Mapping[str, Any]) -> bool:
    file = _file(part)
    data = file.get("file_data")
    is_elsewhere = bool(file.get("file_id") or file.get("file_url"))
    return isinstance(data, str) and data[:4].lower() != "http" and not is_elsewhere


def _is_text(part: Mapping[str, Any]) -> bool:
    return str(_file(part).get("file_data"))[:10].lower() == "data:text/"
