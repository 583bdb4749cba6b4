"""Sends requests to upstreams: one to one target, its answer whole or as a stream."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic

from perpetuo.config import Settings
from perpetuo.crypto import KeyRing, Unreadable
from perpetuo.errors import Unavailable, UpstreamError
from perpetuo.gateway.calls import Aborted, Call, Calls
from perpetuo.gateway.exchange import Attempt, Exchange, translated
from perpetuo.gateway.network import Pool
from perpetuo.gateway.router import Key, Target
from perpetuo.providers import catalog
from perpetuo.providers.base import Answer, ChunkReader, ModelRequest, Provider

MAX_ANSWER_BYTES = 64 * 1024 * 1024
MAX_ERROR_BYTES = 1024 * 1024
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

    def close_expired(self) -> None:
        """Lets go of idle connections whose time is over; called now and then."""
        self._pool.close_expired()

    def close(self) -> None:
        self._pool.close()

    def send(self, call: Call, target: Target, request: ModelRequest, attempts: list[Attempt]) -> Answer:
        """The whole answer. Raises UpstreamError, Unavailable (`provider_key_unreadable`) and Aborted."""
        secret = self.open_secret(target.key)
        adapter = _adapter(target)
        call.allow(self._settings.total_timeout, "total")
        with self._exchange(call, target, request, secret, attempts) as exchange:
            exchange.await_head(None)
            self._refuse_errors(exchange, adapter, secret)
            body = exchange.read_all(MAX_ANSWER_BYTES)
            exchange.finish()
            return adapter.read_answer(request, body, secret=secret)

    def stream(
        self, call: Call, target: Target, request: ModelRequest, attempts: list[Attempt], *, keep_text: bool
    ) -> Stream:
        """A stream whose request goes out when its events are asked for. Raises Unavailable."""
        secret = self.open_secret(target.key)
        reader = _adapter(target).open_stream(request, keep_text=keep_text, secret=secret)
        return Stream(self, call, target, request, attempts, reader, secret)

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
                models = adapter.read_models(exchange.read_all(MAX_ANSWER_BYTES))
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
    def _exchange(
        self, call: Call, target: Target, request: ModelRequest, secret: str, attempts: list[Attempt]
    ) -> Iterator[Exchange]:
        """One attempt, sent; whatever happens, it is told in `attempts` and its connection is dealt with."""
        built = _adapter(target).build_request(request, target.key.base_url, secret)
        attempts.append(Attempt(target))
        exchange = Exchange(call, self._pool, self._settings, built, attempts)
        try:
            with translated():
                try:
                    exchange.send()
                    yield exchange
                except Aborted as exc:
                    if exc.reason not in TIMED_OUT:  # the client left, or the server stops
                        raise
                    raise UpstreamError(TIMED_OUT[exc.reason], status=504, code="upstream_timeout") from exc
        except UpstreamError as exc:
            attempts[-1].error = exc
            raise
        finally:
            attempts[-1].ended = monotonic()
            exchange.close()

    def _refuse_errors(self, exchange: Exchange, adapter: Provider, secret: str) -> None:
        status = exchange.status or 0
        if not 200 <= status < 300:
            body = exchange.read_all(MAX_ERROR_BYTES, is_cut=True)
            exchange.finish()
            raise adapter.read_error(status, exchange.headers, body, secret)


class Stream:
    """One streamed answer, not yet sent for."""

    def __init__(
        self,
        upstream: Upstream,
        call: Call,
        target: Target,
        request: ModelRequest,
        attempts: list[Attempt],
        reader: ChunkReader,
        secret: str,
    ) -> None:
        self.reader = reader
        self._upstream = upstream
        self._call = call
        self._target = target
        self._request = request
        self._attempts = attempts
        self._secret = secret

    def events(self) -> Generator[bytes | None]:
        """The client's bytes, and None after 15 s without any.

        Ends when the answer is whole; raises UpstreamError where it is not, and Aborted.
        """
        settings, call, reader = self._upstream._settings, self._call, self.reader
        quiet_until = monotonic() + KEEP_ALIVE_SECONDS
        context = self._upstream._exchange(call, self._target, self._request, self._secret, self._attempts)
        with context as exchange:
            exchange.allow(settings.first_byte_timeout, "first_byte")
            while not exchange.await_head(quiet_until - monotonic()):
                yield None
                quiet_until = monotonic() + KEEP_ALIVE_SECONDS
            self._upstream._refuse_errors(exchange, _adapter(self._target), self._secret)
            seen = 0
            while not reader.is_done:
                if exchange.wait(quiet_until - monotonic()):
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
                        quiet_until = monotonic() + KEEP_ALIVE_SECONDS
                        call.breathe()
                        continue
                if monotonic() >= quiet_until:
                    yield None
                    quiet_until = monotonic() + KEEP_ALIVE_SECONDS
            last = reader.close()
            exchange.finish()
            if last:
                yield b"".join(last)


def _adapter(target: Target) -> Provider:
    adapter = catalog.adapter(target.key.provider)
    assert adapter is not None  # the router offers no key without one
    return adapter
