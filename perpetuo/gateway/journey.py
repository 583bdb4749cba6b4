"""One call on its way through the stair: what is known of it, and how its end is written down."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic
from urllib.parse import quote

from perpetuo.db import storable
from perpetuo.errors import GatewayError, InvalidRequest, Unavailable
from perpetuo.gateway import costs, intake
from perpetuo.gateway.bodies import pack_beside
from perpetuo.gateway.calls import Aborted, Call
from perpetuo.gateway.exchange import Attempt
from perpetuo.gateway.intake import Asked
from perpetuo.gateway.ledger import NO_USAGE, Ledger, error_values
from perpetuo.gateway.router import Target
from perpetuo.gateway.rows import Row
from perpetuo.gateway.statements import Values
from perpetuo.gateway.upstream import Upstream
from perpetuo.pricing import Price, cost
from perpetuo.providers.base import Usage

log = logging.getLogger(__name__)

VISIBLE = "".join(chr(code) for code in range(33, 127) if chr(code) != "%")
UNLOGGED = ("unavailable", "storage_full")  # refusals that may leave no row: there is nowhere to write it


@dataclass(slots=True)
class Answer:
    """What goes back to the client: the whole body, or the stream that yields it."""

    request_id: str
    headers: dict[str, str]
    body: bytes = b""
    stream: Iterator[bytes] | None = None


class Refused(Exception):
    """A call that ends in an error: the error, the id of its row, and what is known of its upstream."""

    def __init__(self, error: GatewayError, request_id: str | None, headers: dict[str, str]) -> None:
        super().__init__(error.message)
        self.error = error
        self.request_id = request_id
        self.headers = headers


@dataclass(slots=True)
class Journey:
    """One call on its way through the stair."""

    ledger: Ledger
    upstream: Upstream
    call: Call
    asked: Asked
    targets: Sequence[Target]
    row: Row
    keeps_bodies: bool
    began: float
    attempts: list[Attempt] = field(default_factory=list)
    first_content: float | None = None
    is_answering: bool = False  # bytes of the answer may have reached the client

    @property
    def target(self) -> Target:
        """The one that answers, as far as is known: that of the last attempt."""
        return self.attempts[-1].target if self.attempts else self.targets[0]

    def settle(self, status: str, usage: Usage | None, outcome: Values, *, waits: bool = True) -> None:
        """Writes how it ended. Raises Unavailable where nothing of it could be written."""
        latency = monotonic() - self.began
        upstream_time = sum(attempt.seconds for attempt in self.attempts)
        # That of the target which answered, as of the call's opening: it may be another than at open.
        price = costs.price_of(self.target, self.asked, self.row.opening["created_at"], self._dropped)
        values: Values = {
            "status": status,
            **target_values(self.target),
            "attempts": [attempt.as_json() for attempt in self.attempts],
            "latency_us": int(latency * 1e6),
            "overhead_us": max(0, int((latency - upstream_time) * 1e6)),
            "ttft_us": int((self.first_content - self.began) * 1e6) if self.first_content else None,
            "price": price,
            **usage_values(usage, price),
            **outcome,
        }
        if self.keeps_bodies:
            values["request_body"] = self._packed(self.asked.body)
        self.ledger.settle(self.row, values, waits=waits)

    @property
    def _dropped(self) -> tuple[str, ...]:
        return self.attempts[-1].dropped if self.attempts else ()

    def _packed(self, body: bytes) -> bytes:
        return pack_beside(self.ledger.database.native, body)

    def answered(self, usage: Usage, text: str, body: Callable[[], bytes], status: str = "ok") -> None:
        """Settles a call whose answer is there; `body` is asked for only where bodies are kept."""
        outcome: Values = {"http_status": 200}
        if self.keeps_bodies:
            outcome |= {"response_body": self._packed(body()), "preview_answer": intake.preview(text)}
        self.settle(status, usage, outcome)

    def failed(self, exc: Exception, usage: Usage | None = None) -> Refused:
        """Settles a call that went wrong, and says what the client is told."""
        error, status = error_of(exc)
        outcome = error_values(error) if status != "client_closed" else {}
        if self.is_answering:
            outcome["http_status"] = 200
        # The ledger itself has given up: what it has not written stays queued, and nobody waits again.
        is_unlogged = isinstance(exc, Unavailable) and exc.code in UNLOGGED
        try:
            self.settle(status, usage, outcome, waits=not is_unlogged)
        except Unavailable as unavailable:
            error = unavailable
        return Refused(error, self.row.id, self.headers())

    def headers(self) -> dict[str, str]:
        """Which provider and model answer, after how many attempts, and what the upstream's headers say."""
        target = self.target
        limits = self.row.verdict.headers if self.row.verdict else {}
        shrunk = {"x-perpetuo-max-tokens": str(target.output_limit)} if target.is_shrunk else {}
        dropped = {"x-perpetuo-dropped": ", ".join(self._dropped)} if self._dropped else {}
        return {
            **self._upstream_headers(bool(limits)),
            **limits,
            **shrunk,
            **dropped,
            "x-perpetuo-provider": target.key.provider,
            "x-perpetuo-model": quote(storable(target.model)[:200], safe=VISIBLE),
            "x-perpetuo-attempts": str(len(self.attempts)),
        }

    def _upstream_headers(self, has_limits: bool) -> dict[str, str]:
        """What the upstream's headers say; of its limits only where we have none."""
        headers = self.attempts[-1].headers if self.attempts else {}
        if not has_limits:
            return headers
        return {name: value for name, value in headers.items() if not name.startswith("x-ratelimit-")}


def error_of(exc: Exception) -> tuple[GatewayError, str]:
    """What the client is told, and the status of the row."""
    if isinstance(exc, InvalidRequest):  # no provider that could be asked has a place for a parameter
        return exc, "refused"
    if isinstance(exc, GatewayError):
        return exc, "error"
    if isinstance(exc, Aborted) and exc.reason == "client_closed":
        return GatewayError("The client left.", status=499, code="client_closed"), "client_closed"
    if isinstance(exc, Aborted):
        return Unavailable("This server is shutting down; try again.", code="shutting_down"), "error"
    log.error("a call failed inside the gateway", exc_info=exc)
    return GatewayError("Something went wrong inside the gateway.", code="internal_error"), "error"


def target_values(target: Target) -> Values:
    """Who answers, as it stands in a row."""
    return {
        "provider": target.key.provider,
        "provider_key_id": target.key.id,
        "served_model": storable(target.model)[:200],
    }


def usage_values(usage: Usage | None, price: Price | None) -> Values:
    """The usage columns and what they come to: nothing without usage, unknown without a price."""
    if usage is None:
        return {**NO_USAGE, "cost_nano": 0}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "cached_tokens": usage.cached_tokens,
        "cache_write_tokens": usage.cache_write_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "usage_source": usage.source,
        "cost_nano": None if price is None else cost(usage, price).nano,
    }
