"""The stair of one call, a line a step: asked, routed, written down, sent, settled.

`/v1` and the playground walk it. Knows no Flask; nothing below calls back up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from datetime import UTC, datetime
from socket import socket
from time import monotonic

from perpetuo import log_lines
from perpetuo.config import Settings
from perpetuo.crypto import KeyRing
from perpetuo.db import Database
from perpetuo.db_errors import UNMIGRATED
from perpetuo.errors import GatewayError, InvalidRequest, NotFound, Unavailable
from perpetuo.gateway import costs, intake
from perpetuo.gateway.access import Access, Caller
from perpetuo.gateway.admission import open_row
from perpetuo.gateway.calls import Aborted, Call, Calls
from perpetuo.gateway.intake import Asked
from perpetuo.gateway.journey import UNLOGGED, Answer, Journey, Refused, error_of, target_values
from perpetuo.gateway.ledger import Ledger, Refusal
from perpetuo.gateway.offers import Offers
from perpetuo.gateway.router import Router, Target
from perpetuo.gateway.statements import Values
from perpetuo.gateway.sweep import Sweep
from perpetuo.gateway.upstream import Upstream
from perpetuo.providers.base import ChunkReader, Endpoint
from perpetuo.providers.catalog import CATALOG
from perpetuo.providers.endings import error_event
from perpetuo.pulse import Pulse

log = logging.getLogger(__name__)

BODY_SECONDS = 60.0
KEEP_ALIVE = b": keep-alive\n\n"
NO_RESPONSES = (
    "The provider of this model has no /v1/responses. Choose your client's chat setting: `.chat(model)` in "
    "the AI SDK, `openai-chat:<model>` in Pydantic AI, `client.chat.completions` in the OpenAI clients."
)


class Gateway:
    """Everything that one process serves with. Opens nothing before its first use."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.database = Database(settings.database_url)
        self.ring = KeyRing(settings.encryption_keys)
        self.access = Access(self.database)
        self.router = Router(self.database)
        self.ledger = Ledger(self.database, self.access.limits_of, settings.public_url)
        self.upstream = Upstream(settings, self.ring)
        self.sweep = Sweep(self.ledger, settings.orphan_grace, self.upstream.close_expired)
        self.calls = Calls(settings.max_in_flight)
        self.offers = Offers(self.router, self.upstream)
        self.pulse = Pulse()

    def start(self, is_serving: Callable[[], bool]) -> None:
        """Begins what runs beside the requests: the sweep, and the drain once `is_serving` turns false."""
        self.pulse.start()
        self.sweep.start()
        self.calls.drain_after(is_serving, self.settings.drain_timeout)

    def close(self) -> None:
        """Ends every thread and connection of this process."""
        self.pulse.close()
        self.calls.close()
        self.sweep.close()
        self.ledger.close()
        self.upstream.close()
        self.database.close()

    def readiness(self) -> str | None:
        """Why this process should get no requests now, None where it is ready. One short read."""
        if self.calls.is_draining:
            return "The server is shutting down."
        try:
            revision = self.database.revision()
        except Unavailable as exc:
            return exc.message
        return None if revision else UNMIGRATED


def walk(
    gateway: Gateway,
    caller: Caller,
    endpoint: Endpoint,
    client: socket | None,
    read_body: Callable[[], bytes],
    headers: Mapping[str, str],
) -> Answer:
    """Serves one call. Raises Refused, with everything that the answer needs.

    `client` is the client's socket, watched for its leaving; `read_body` reads the body and may refuse it;
    `headers` have lower-case names.
    """
    began = monotonic()
    keeps_bodies = caller.log_bodies and headers.get("x-perpetuo-log", "").strip().lower() != "metadata"
    values: Values = {"endpoint": endpoint, "stream": False}
    call, kept = None, None
    try:
        call = gateway.calls.begin(caller.workspace_id, gateway.settings.total_timeout)
        body = _read(call, read_body)
        fields = intake.parse(body)
        values |= intake.legible(fields, endpoint, keeps_bodies=keeps_bodies)
        kept = body if keeps_bodies else None
        asked = intake.check(endpoint, body, fields, headers)
        targets: Sequence[Target] = _able(endpoint, gateway.router.route(caller, asked.names))
        call.watch(client)
        opening = values | _opening(targets[0], asked)
        patience = gateway.settings.budget_wait
        row, targets = open_row(gateway.ledger, call, caller, asked, targets, opening, patience)
        log_lines.request_id.set(row.id)
    except BaseException as exc:
        if call is not None:
            call.close()
        if isinstance(exc, Aborted):
            exc = error_of(exc)[0]
        if isinstance(exc, GatewayError):
            raise Refused(exc, _refuse(gateway, caller, exc, values, kept), {}) from exc
        raise
    journey = Journey(gateway.ledger, gateway.upstream, call, asked, targets, row, keeps_bodies, began)
    return _stream(journey) if asked.is_stream else _send(journey)


def _read(call: Call, read_body: Callable[[], bytes]) -> bytes:
    """The client's body, within a minute: a stalled upload must not keep its place for ever."""
    call.allow(BODY_SECONDS, "body")
    try:
        with call:
            return read_body()
    except Aborted as exc:
        if exc.reason not in ("body", "total"):
            raise error_of(exc)[0] from exc
        raise InvalidRequest(
            "The body did not arrive in time.",
            status=408,
            code="request_timeout",
            headers={"connection": "close"},
        ) from exc


def _able(endpoint: Endpoint, targets: list[Target]) -> list[Target]:
    """The targets that have this endpoint. Raises NotFound (`endpoint_not_supported`)."""
    if endpoint != "responses":
        return targets
    able = [target for target in targets if CATALOG[target.key.provider].has_responses]
    if not able:
        raise NotFound(NO_RESPONSES, code="endpoint_not_supported")
    return able


def _opening(target: Target, asked: Asked) -> Values:
    """What the row says while the call is in flight, and if its process dies."""
    estimate = len(asked.body) // 4  # four bytes a token; only a sweep ever shows it
    created_at = datetime.now(UTC)
    return {
        "created_at": created_at,
        **target_values(target),
        "price": costs.price_of(target, asked, created_at),
        "prompt_tokens": estimate,
        "completion_tokens": 0,
        "total_tokens": estimate,
        "usage_source": "estimate",
    }


def _refuse(
    gateway: Gateway, caller: Caller, error: GatewayError, values: Values, body: bytes | None
) -> str | None:
    if error.code in UNLOGGED:
        return None
    if isinstance(error, Refusal):
        values["checks"] = error.checks
    try:
        return gateway.ledger.refuse(caller, error, values, body)
    except Unavailable:
        return None


def _send(journey: Journey) -> Answer:
    """A whole answer: settled before its first byte."""
    call = journey.call
    try:
        answer = journey.upstream.send(call, journey.targets, journey.asked, journey.attempts)
    except Exception as exc:
        raise journey.failed(exc) from exc
    finally:
        call.close()
    try:
        journey.answered(answer.usage, answer.text, lambda: answer.body)
    except Unavailable as exc:
        raise Refused(exc, journey.row.id, journey.headers()) from exc
    return Answer(journey.row.id, journey.headers(), body=answer.body)


def _stream(journey: Journey) -> Answer:
    """A stream: its headers wait for the first content, so that an early failure keeps its real status."""
    pieces = _pieces(journey)
    first = next(pieces)
    return Answer(journey.row.id, journey.headers(), stream=_Resumed(first, pieces))


def _pieces(journey: Journey) -> Generator[bytes]:
    """The client's bytes. Raises Refused before the first of them; later a failure is an error event.

    The row is committed before the first byte, and settled before its ending. A client that leaves after the
    finish reason had its answer.
    """
    stream = journey.upstream.stream(
        journey.call, journey.targets, journey.asked, journey.attempts, keep_text=journey.keeps_bodies
    )
    events = stream.events()
    try:
        for piece in events:
            if not journey.is_answering:
                journey.ledger.ensure_open(journey.row)
                journey.is_answering = True
            if piece is not None:
                journey.first_content = journey.first_content or monotonic()
            journey.call.begin_write()
            yield KEEP_ALIVE if piece is None else piece
            journey.call.end_write()
        reader = stream.reader
        assert reader is not None  # its events have ended well
        journey.answered(reader.usage(), reader.text(), reader.completion)
        yield reader.ending
    except GeneratorExit:
        events.close()  # first of all: the upstream must not talk on while we wait for the database
        if not journey.row.is_ending:
            _client_left(journey, stream.reader)
        raise
    except Exception as exc:
        reader = stream.reader
        if isinstance(exc, Aborted) and exc.reason == "client_closed" and reader and reader.has_content:
            _client_left(journey, reader)
            return
        usage = reader.usage() if reader is not None and reader.has_content else None
        refused = journey.failed(exc, usage) if not journey.row.is_ending else _unsettled(journey, exc)
        if not journey.is_answering:
            raise refused from exc
        yield error_event(journey.asked.endpoint, refused.error, reader.data_events if reader else 0)
    finally:
        events.close()  # its connection goes back or away
        journey.call.close()


def _client_left(journey: Journey, reader: ChunkReader | None) -> None:
    try:
        if reader is None or not reader.has_content:
            journey.failed(Aborted("client_closed"))
        else:
            status = "ok" if reader.is_finished else "client_closed"
            journey.answered(reader.usage(), reader.text(), reader.completion, status)
    except Unavailable:
        log.warning("the settle of %s waits for the database", journey.row.id)


def _unsettled(journey: Journey, exc: Exception) -> Refused:
    """The answer is whole, but its row could not be settled: the client must not take it for one."""
    return Refused(error_of(exc)[0], journey.row.id, journey.headers())


class _Resumed:
    """An iterator that goes on from its first item, and whose end closes the rest."""

    def __init__(self, first: bytes, rest: Generator[bytes]) -> None:
        self._first: bytes | None = first
        self._rest = rest

    def __iter__(self) -> _Resumed:
        return self

    def __next__(self) -> bytes:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        return next(self._rest)

    def close(self) -> None:
        self._rest.close()
