"""Sends a call to upstreams, until one answers or none is left: its answer whole, or as a stream.

Which target comes next, and when, the plan decides; nothing moves on once the client has content.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic

from perpetuo.config import Settings
from perpetuo.crypto import KeyRing, Unreadable
from perpetuo.errors import GatewayError, Unavailable, UpstreamError
from perpetuo.gateway.calls import Aborted, Call, Calls
from perpetuo.gateway.exchange import Attempt, Exchange, translated
from perpetuo.gateway.intake import Asked
from perpetuo.gateway.network import Pool
from perpetuo.gateway.plan import Plan, Rests
from perpetuo.gateway.router import Key, Target
from perpetuo.providers import catalog
from perpetuo.providers.base import Answer, ChunkReader, ModelRequest, Provider
from perpetuo.providers.jsonbody import is_bomb
from perpetuo.providers.sse import MAX_EVENT_BYTES

MAX_ANSWER_BYTES = 64 * 1024 * 1024
MAX_ERROR_BYTES = 1024 * 1024
MAX_LIST_BYTES = 8 * 1024 * 1024
MAX_SILENT_BYTES = MAX_EVENT_BYTES + 1024 * 1024  # of a stream, with nothing in them for the client
KEEP_ALIVE_SECONDS = 15.0  # reverse proxies cut what is silent for a minute
LIST_SECONDS = 10.0

TIMED_OUT = {
    "connect": "The upstream did not accept the connection in time.",
    "first_byte": "The upstream did not begin its answer in time.",
    "idle": "The upstream fell silent in the middle of its answer.",
    "total": "The call took longer than this gateway allows.",
}


@dataclass(frozen=True, slots=True)
class Probe:
    """What a look at an upstream's model list showed. `error` is a sentence, None where all is well."""

    ok: bool
    http_status: int | None
    latency_ms: float
    models: list[str] | None
    error: str | None


class Upstream:
    """Sends requests for one process."""

    def __init__(self, settings: Settings, ring: KeyRing) -> None:
        self._settings = settings
        self._ring = ring
        self._pool = Pool(settings)
        self._rests = Rests()

    @property
    def idle_connections(self) -> int:
        return self._pool.idle

    def close_expired(self) -> None:
        """Lets go of idle connections whose time is over; called now and then."""
        self._pool.close_expired()

    def close(self) -> None:
        self._pool.close()

    def send(self, call: Call, targets: Sequence[Target], asked: Asked, attempts: list[Attempt]) -> Answer:
        """The whole answer of the first target that gives one; every try is told in `attempts`.

        Raises the last one's error: UpstreamError, Unavailable (`provider_key_unreadable`) or
        InvalidRequest (no place for a parameter there); and Aborted.
        """
        plan = Plan(targets, self._rests)
        call.allow(self._settings.total_timeout, "total")
        while True:
            try:
                answer = self._send(call, plan.target, _request(asked, plan.target), attempts)
            except GatewayError as exc:
                _move_on(call, plan, exc)
            else:
                plan.worked()
                return answer

    def _send(self, call: Call, target: Target, request: ModelRequest, attempts: list[Attempt]) -> Answer:
        with self._attempt(call, target, request, attempts) as (exchange, adapter, secret):
            exchange.await_head(None)
            self._refuse_errors(exchange, adapter, secret)
            body = exchange.read_all(MAX_ANSWER_BYTES)
            exchange.finish()
            if is_bomb(body):
                raise UpstreamError("The upstream's answer has too many parts.")
            return adapter.read_answer(request, body, secret=secret)

    def stream(
        self,
        call: Call,
        targets: Sequence[Target],
        asked: Asked,
        attempts: list[Attempt],
        *,
        keep_text: bool,
    ) -> Stream:
        """A stream whose request goes out when its events are asked for."""
        return Stream(self, call, targets, asked, attempts, keep_text)

    def probe(self, provider: str, base_url: str, secret: str) -> Probe:
        """One cheap call, the upstream's list of models, within ten seconds. An error is in the answer."""
        adapter = catalog.adapter(provider)
        if adapter is None:
            return Probe(False, None, 0.0, None, f"The provider {provider} cannot be tested yet.")
        began = monotonic()
        call = Calls(1).begin("", LIST_SECONDS)
        exchange = Exchange(call, self._pool, self._settings, adapter.build_models_request(base_url, secret))
        models, error = None, None
        try:
            with translated():
                exchange.send()
                exchange.await_head(None)
                self._refuse_errors(exchange, adapter, secret)
                models = adapter.read_models(exchange.read_all(MAX_LIST_BYTES))
                exchange.finish()
        except UpstreamError as exc:
            error = exc.message
            if exchange.status == 404:
                error = f"There is no list of models at {base_url}: most base URLs end in /v1."
        except Aborted as exc:
            error = TIMED_OUT[exc.reason]
        finally:
            exchange.close()
            call.close()
        took = round((monotonic() - began) * 1000, 1)
        return Probe(error is None, exchange.status, took, models, error)

    def open_secret(self, key: Key) -> str:
        """A provider key's secret. Raises Unavailable (`provider_key_unreadable`)."""
        try:
            return self._ring.open(key.sealed, "provider_key", key.workspace_id, key.id, key.base_url)
        except Unreadable as exc:
            unavailable = Unavailable(
                "The provider key of this model cannot be opened; its owner must enter it again.",
                code="provider_key_unreadable",
                retry_after=60,
            )
            # Clients would sleep that minute, twice, for a fault that only a person can mend.
            unavailable.headers["x-should-retry"] = "false"
            raise unavailable from exc

    @contextmanager
    def _attempt(
        self, call: Call, target: Target, request: ModelRequest, attempts: list[Attempt]
    ) -> Iterator[tuple[Exchange, Provider, str]]:
        """One attempt, sent; whatever happens, it is told in `attempts` and its connection is dealt with."""
        attempts.append(Attempt(target))
        exchange: Exchange | None = None
        try:
            adapter, secret = _adapter(target), self.open_secret(target.key)
            built = adapter.build_request(request, target.key.base_url, secret)
            attempts[-1].dropped = built.dropped
            exchange = Exchange(call, self._pool, self._settings, built, attempts)
            with translated():
                try:
                    exchange.send()
                    yield exchange, adapter, secret
                except Aborted as exc:
                    if exc.reason not in TIMED_OUT:  # the client left, or the server stops
                        raise
                    raise UpstreamError(TIMED_OUT[exc.reason], status=504, code="upstream_timeout") from exc
        except GatewayError as exc:
            attempts[-1].error = exc
            raise
        finally:
            attempts[-1].ended = monotonic()
            if exchange is not None:
                exchange.close()

    def _refuse_errors(self, exchange: Exchange, adapter: Provider, secret: str) -> None:
        status = exchange.status or 0
        if not 200 <= status < 300:
            body = exchange.read_all(MAX_ERROR_BYTES, is_cut=True)
            exchange.finish()
            raise adapter.read_error(status, exchange.headers, body, secret)


class Stream:
    """One streamed answer, not yet sent for. `reader` is that of the attempt that goes on."""

    def __init__(
        self,
        upstream: Upstream,
        call: Call,
        targets: Sequence[Target],
        asked: Asked,
        attempts: list[Attempt],
        keep_text: bool,
    ) -> None:
        self.reader: ChunkReader | None = None
        self._upstream = upstream
        self._call = call
        self._targets = targets
        self._asked = asked
        self._attempts = attempts
        self._keep_text = keep_text
        self._quiet_until = 0.0

    def events(self) -> Generator[bytes | None]:
        """The client's bytes, and None after 15 s without any.

        Ends when the answer is whole; raises the last attempt's error where it is not (as `send` does), and
        Aborted.
        """
        plan = Plan(self._targets, self._upstream._rests)
        self._spoke()
        while True:
            self.reader = None
            try:
                yield from self._attempt(plan.target)
            except GatewayError as exc:
                if self.reader is not None and self.reader.has_content:
                    raise
                _move_on(self._call, plan, exc)
            else:
                plan.worked()
                return

    def _spoke(self) -> None:
        self._quiet_until = monotonic() + KEEP_ALIVE_SECONDS

    def _attempt(self, target: Target) -> Generator[bytes | None]:
        settings, call = self._upstream._settings, self._call
        request = _request(self._asked, target)
        with self._upstream._attempt(call, target, request, self._attempts) as (exchange, adapter, secret):
            self.reader = reader = adapter.open_stream(request, keep_text=self._keep_text, secret=secret)
            exchange.allow(settings.first_byte_timeout, "first_byte")
            while not exchange.await_head(self._quiet_until - monotonic()):
                yield None
                self._spoke()
            self._upstream._refuse_errors(exchange, adapter, secret)
            seen = silent_bytes = 0
            while not reader.is_done:
                if exchange.wait(self._quiet_until - monotonic()):
                    piece = exchange.read()
                    if not piece:
                        break
                    events = reader.feed(piece)
                    if reader.data_events != seen:  # comments do not count as activity
                        seen = reader.data_events
                        call.allow(settings.idle_timeout, "idle")
                    if events:
                        yield b"".join(events)
                        # The time that the client took to read is not the upstream's silence.
                        call.allow(settings.idle_timeout, "idle")
                        self._spoke()
                        silent_bytes = 0
                        call.breathe()
                        continue
                    silent_bytes += len(piece)
                    if silent_bytes > MAX_SILENT_BYTES:
                        raise UpstreamError("The upstream talked on and on without an answer.")
                    call.breathe()
                if monotonic() >= self._quiet_until:
                    yield None
                    self._spoke()
            last = reader.close()
            exchange.finish()
            if last:
                yield b"".join(last)


def _move_on(call: Call, plan: Plan, error: GatewayError) -> None:
    """Waits for the next target's turn. Raises `error` where there is none, or no time for it."""
    seconds = plan.after(error)
    if call.total_until - monotonic() <= seconds:
        raise error
    # It stays among the attempts, and its frames would keep the answer that was none: up to 64 MiB each.
    error.__traceback__ = error.__cause__ = error.__context__ = None
    call.pause(seconds)


def _request(asked: Asked, target: Target) -> ModelRequest:
    return asked.to(target.model, target.output_limit)


def _adapter(target: Target) -> Provider:
    adapter = catalog.adapter(target.key.provider)
    assert adapter is not None  # the router offers no key without one
    return adapter
