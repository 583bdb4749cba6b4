"""What a client sent: its body read as JSON, and the few fields that the gateway itself looks at.

The rest of the body is the client's business and its upstream's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perpetuo.db import storable
from perpetuo.errors import InvalidRequest
from perpetuo.native import breathe
from perpetuo.providers.base import Endpoint, ModelRequest
from perpetuo.providers.jsonbody import read_json, top_level_keys

PREVIEW_CHARACTERS = 200
# Shapes that would take the parser seconds, in which nobody else is served; no client's are near them.
MOST_PARTS = 500_000
MOST_MEMBERS = 1_000
LONG = 1024 * 1024  # a body whose parts are read with a breath between them
# The client's headers that travel; all others stay here.
PASSED = ("openai-beta", "idempotency-key")
# What the gateway decides by must not be there twice: the upstream might take the other one.
DECISIVE = frozenset(
    (
        *("model", "models", "stream", "stream_options", "messages", "input"),
        *("n", "best_of", "max_tokens", "max_completion_tokens", "max_output_tokens", "prediction"),
        # What a budget cannot bound, or has another price.
        *("tools", "web_search_options", "search_parameters", "search_settings", "compound_custom"),
        *("mcp_servers", "container", "data_sources", "previous_response_id", "conversation", "prompt"),
        *("plugins", "preset", "cached_content", "google", "extra_body", "background", "deferred"),
        *("context_management", "chat_template", "mm_processor_kwargs"),
        *("service_tier", "speed", "inference_geo"),
    )
)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, read: `names` are the models to try in turn."""

    endpoint: Endpoint
    body: bytes
    fields: Mapping[str, Any]
    names: tuple[str, ...]
    headers: Mapping[str, str]

    @property
    def is_stream(self) -> bool:
        return self.fields.get("stream") is True and self.endpoint != "embeddings"

    def to(self, model: str, output_limit: int | None = None) -> ModelRequest:
        """The request as one target gets it, with a maximum of output tokens in place of the client's."""
        return ModelRequest(self.endpoint, model, self.body, self.fields, self.headers, output_limit)


def parse(body: bytes) -> dict[str, Any]:
    """The body's fields. Raises InvalidRequest (`invalid_json`)."""
    _breathe_after(body)
    if len(body) > MOST_PARTS and body.count(b"{") + body.count(b"[") > MOST_PARTS:
        raise InvalidRequest(f"The body has more than {MOST_PARTS} parts.", code="invalid_json")
    try:
        fields = read_json(body)
    except ValueError as exc:
        raise InvalidRequest(f"The body is not valid JSON: {exc}.", code="invalid_json") from exc
    if not isinstance(fields, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    if len(fields) > MOST_MEMBERS:
        raise InvalidRequest(f"The body has more than {MOST_MEMBERS} members.", code="invalid_json")
    _breathe_after(body)
    twice = _named_twice(body)
    _breathe_after(body)
    if twice:
        raise InvalidRequest(f"'{twice}' stands twice in the body.", code="invalid_json", param=twice)
    return fields


def legible(fields: Mapping[str, Any], endpoint: Endpoint, *, keeps_bodies: bool) -> dict[str, Any]:
    """The first columns of the row, as far as they can be read: what is refused shall say what it asked."""
    models = fields.get("models")
    named = [fields.get("model"), *(models if isinstance(models, list) else ())]
    return {
        "stream": fields.get("stream") is True and endpoint != "embeddings",
        "model": next((storable(name)[:200] for name in named if isinstance(name, str)), ""),
        "end_user": _end_user(fields),
        "preview_prompt": preview_of_prompt(fields) if keeps_bodies else None,
    }


def check(endpoint: Endpoint, body: bytes, fields: Mapping[str, Any], headers: Mapping[str, str]) -> Asked:
    """What was asked. Raises InvalidRequest with the `param` at fault."""
    names = _names(fields)
    _check(fields, endpoint)
    passed = {name: headers[name] for name in PASSED if name in headers}
    return Asked(endpoint, body, fields, names, passed)


def _breathe_after(body: bytes) -> None:
    """A look at 20 MiB takes 20 to 60 ms, in a native thread too: the parsers keep Python's lock."""
    if len(body) > LONG:
        breathe()


def _named_twice(body: bytes) -> str | None:
    keys = top_level_keys(body)
    if len(set(keys)) == len(keys):
        return None
    return next((key for key in keys if key in DECISIVE and keys.count(key) > 1), None)


def _names(fields: Mapping[str, Any]) -> tuple[str, ...]:
    model, others = fields.get("model"), fields.get("models")
    if model is not None and not (isinstance(model, str) and model.strip()):
        raise InvalidRequest("'model' must be the name of a model.", param="model")
    if others is None:
        others = []
    if not isinstance(others, list) or not all(isinstance(name, str) and name.strip() for name in others):
        raise InvalidRequest("'models' must be a list of model names.", param="models")
    names = tuple(dict.fromkeys([model, *others] if model is not None else others))
    if not names:
        raise InvalidRequest("You must name a 'model'.", param="model")
    return names


def _check(fields: Mapping[str, Any], endpoint: Endpoint) -> None:
    if endpoint == "chat.completions":
        if not isinstance(fields.get("messages"), list) or not fields["messages"]:
            raise InvalidRequest("'messages' must be a list of at least one message.", param="messages")
    elif not isinstance(fields.get("input"), str | list) and (endpoint == "embeddings" or "input" in fields):
        raise InvalidRequest("'input' must be a text or a list.", param="input")
    if not isinstance(fields.get("stream"), bool | None):
        raise InvalidRequest("'stream' must be true or false.", param="stream")


def _end_user(fields: Mapping[str, Any]) -> str | None:
    for name in ("safety_identifier", "user"):
        value = fields.get(name)
        if isinstance(value, str) and value:
            return storable(value)[:100]
    return None


def preview_of_prompt(fields: Mapping[str, Any]) -> str:
    """The first 200 characters of the last user message, or of what is to be embedded."""
    texts = fields["messages"] if isinstance(fields.get("messages"), list) else fields.get("input")
    if isinstance(texts, list) and any(isinstance(message, dict) and "role" in message for message in texts):
        said = [m for m in texts if isinstance(m, dict) and m.get("role") == "user"]
        texts = said[-1].get("content") if said else None
    return preview(_first_text(texts))


def preview(text: str) -> str:
    """As much of a text as a list shows."""
    return storable(text[:PREVIEW_CHARACTERS])[:PREVIEW_CHARACTERS]


def _first_text(texts: Any) -> str:
    if isinstance(texts, str):
        return texts
    for part in texts if isinstance(texts, list) else ():
        if isinstance(part, str):
            return part
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            return part["text"]
    return ""
