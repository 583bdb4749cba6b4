"""How a stream to the client ends: well, or with an error. Each API has its own way.

A chat's stream ends with `[DONE]`, or with an event that has `error` and nothing else. One of `/v1/responses`
ends with its last event, or with one named `error` (OpenAI's `ResponseErrorEvent`).
"""

from __future__ import annotations

from perpetuo.errors import GatewayError
from perpetuo.providers.base import Endpoint
from perpetuo.providers.jsonbody import write_json

DONE = b"data: [DONE]\n\n"


def error_event(endpoint: Endpoint, error: GatewayError, data_events: int) -> bytes:
    """The event that ends a broken answer; `data_events` is how many events came from the upstream."""
    body = error.body()
    if endpoint != "responses":
        return b"data: " + write_json(body) + b"\n\n"
    # The schema has the words at the top, OpenAI's servers send them in `error`: clients look for either.
    words = body["error"]
    told = {name: words[name] for name in ("code", "message", "param")}
    event = {"type": "error", "sequence_number": data_events, **told, "error": words}
    return b"event: error\ndata: " + write_json(event) + b"\n\n"
