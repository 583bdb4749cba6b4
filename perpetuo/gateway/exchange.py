"""One HTTP request to one upstream and its answer, on a connection of the pool.

Waits for the upstream stand inside `with call:`, where the client's leaving, a deadline or a shutdown may
end them. Every foreign exception becomes an UpstreamError in `translated`.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException, RemoteDisconnected
from time import monotonic
from typing import Any

from perpetuo.config import Settings
from perpetuo.db import storable
from perpetuo.errors import GatewayError, UpstreamError
from perpetuo.gateway.calls import Aborted, Call
from perpetuo.gateway.network import Pool, origin_of
from perpetuo.gateway.response import PACKINGS, Response, Unpacked
from perpetuo.gateway.router import Target
from perpetuo.providers.base import UpstreamRequest

READ_BYTES = 65536
END_SECONDS = 0.005  # after [DONE] the end of the body mostly comes in the next packet
# What of an upstream's headers the client may see; all else stays here.
PASSED = ("openai-processing-ms", "openai-version")
RATE_LIMIT = re.compile(r"x-ratelimit-[a-z0-9-]{1,60}")
SECRET_HEADERS = ("authorization", "api-key", "x-api-key")  # of a request, one of them
BODILESS = (204, 205, 304)  # some servers send a body all the same


@dataclass(slots=True)
class Attempt:
    """One try at one target, as the log tells it."""

    target: Target
    http_status: int | None = None
    error: GatewayError | None = None
    began: float = field(default_factory=monotonic)
    ended: float | None = None
    headers: dict[str, str] = field(default_factory=dict)  # for the client
    dropped: tuple[str, ...] = ()  # parameters that this provider has no place for

    @property
    def seconds(self) -> float:
        return (self.ended or monotonic()) - self.began

    def as_json(self) -> dict[str, Any]:
        error = self.error
        return {
            "provider": self.target.key.provider,
            "provider_key_id": self.target.key.id,
            "model": storable(self.target.model),
            "http_status": self.http_status,
            "error": error
            and {
                "type": storable(error.type),
                "code": storable(error.code) if error.code else None,
                "message": storable(error.message),
            },
            "duration_ms": round(self.seconds * 1000, 1),
        }


class Exchange:
    """One HTTP request and its answer, on a connection of the pool."""

    def __init__(
        self,
        call: Call,
        pool: Pool,
        settings: Settings,
        request: UpstreamRequest,
        attempts: list[Attempt] | None = None,
    ) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self._attempts = attempts  # the last of them is this one
        self._call = call
        self._pool = pool
        self._settings = settings
        self._request = request
        self._origin, self._path = origin_of(request.url)
        self._connection: Any = None
        self._response: Response | None = None
        self._body: Any = None  # the same, or what decodes it
        self._is_reused = False
        self._is_whole = False
        self._head: Any = None  # the buffer that the answer is read through, where it had to be made early
        self._patience = (settings.total_timeout, "total")  # between the request and its answer's head

    def allow(self, seconds: float, name: str) -> None:
        """How long the head may take, also if the request has to be sent again."""
        self._patience = (seconds, name)
        self._call.allow(seconds, name)

    def send(self, *, fresh: bool = False) -> None:
        """Connects and sends the request."""
        self._call.allow(self._settings.connect_timeout, "connect")
        self._connection, self._is_reused = self._pool.take(self._origin, fresh=fresh)
        request = self._request
        with self._call:
            if self._connection.sock is None:
                self._connection.connect(self._call.remaining())
        self._call.allow(*self._patience)
        self._connection.sock.settimeout(self._call.patience())
        try:
            with self._call:
                self._connection.send(request.method, self._path, request.headers, request.body)
        except (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError):
            # A server that will not read on may have said why: the head tells, or its absence.
            if self._is_reused:
                self._send_again()

    def await_head(self, seconds: float | None) -> bool:
        """Whether status and headers are there within `seconds` (None: before the deadline)."""
        if self._response is not None:
            return True
        if not self._is_answered(1e6 if seconds is None else max(seconds, 0.0)):
            return False
        self._connection.sock.settimeout(self._call.patience())
        self._body = response = Response(self._connection.sock, self._request.method, self._head)
        try:
            with self._call:
                response.begin()
        except (RemoteDisconnected, ConnectionResetError):
            # The server closed an idle connection just as we used it: nothing of an answer came, and the
            # request goes once more, on a connection that was never used.
            if not self._is_reused:
                raise
            self._send_again()
            return self.await_head(seconds)
        self._response, self.status = response, response.status
        self.headers = response.fields
        self._body = self._decoded(response)
        if self._attempts:
            self._attempts[-1].http_status = self.status
            self._attempts[-1].headers = self._client_headers()
        return True

    def _is_answered(self, seconds: float) -> bool:
        """Whether the answer has begun. Under TLS a readable socket may hold no more than session tickets."""
        connection, until = self._connection, monotonic() + seconds
        while self._call.wait_readable(connection.sock, max(until - monotonic(), 0.0)):
            if self._origin[0] != "https":
                return True
            if self._head is None:
                self._head = connection.sock.makefile("rb")
            connection.sock.settimeout(0.0)
            try:
                self._head.peek(1)
                return True
            except ssl.SSLWantReadError:
                pass
            finally:
                connection.sock.settimeout(self._call.patience())
        return False

    def _decoded(self, response: Response) -> Any:
        """What the body is read from."""
        if "content-encoding" not in self.headers:
            return response
        # Another one, never asked for, stays as it came: no adapter takes it for an answer.
        return Unpacked(response) if self.headers["content-encoding"].lower() in PACKINGS else response

    def wait(self, seconds: float) -> bool:
        """Whether there is something to read within `seconds`, be it the end."""
        assert self._response is not None
        if self._response.fp is None or self._response.length == 0:
            return True  # no socket announces the end of a length
        connection = self._connection.sock
        connection.settimeout(0.0)
        try:
            if self._body.has_more():
                return True
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        finally:
            connection.settimeout(self._call.patience())
        if self._origin[0] == "https" and connection.pending():
            return True  # out of a record that its socket has given already
        return self._call.wait_readable(connection, max(seconds, 0.0))

    def read(self) -> bytes:
        """The next bytes of the body as they come, b"" at its end. Raises where it was cut short."""
        assert self._response is not None
        with self._call:
            piece: bytes = self._body.read1(READ_BYTES)
        if not piece:
            if self._response.length:
                raise UpstreamError("The upstream closed the connection in the middle of its answer.")
            self._is_whole = True
        return piece

    def read_all(self, most: int, *, is_cut: bool = False) -> bytes:
        """The whole body. Beyond `most` bytes it is cut, or refused."""
        pieces, size = [], 0
        while piece := self.read():
            pieces.append(piece)
            size += len(piece)
            if size > most:
                if is_cut:
                    break
                raise UpstreamError("The upstream's answer is too large.")
            self._call.breathe()
        return b"".join(pieces)

    def finish(self) -> None:
        """Gives the connection back if its answer is at its end by now, or in the next milliseconds."""
        try:
            while not self._is_whole and self.wait(END_SECONDS):
                self._connection.sock.settimeout(0.05)
                if len(self.read()) > 0:
                    break  # something follows the end: not a connection to use again
        except (Aborted, UpstreamError, HTTPException, OSError):
            pass
        if not self._is_whole or self._response is None or self._response.will_close:
            return
        # Behind an interim answer (103) the real one follows, on this connection: it is nobody else's.
        if self.status is not None and self.status >= 200 and self.status not in BODILESS:
            self._body.close()  # it would keep the socket open beyond the pool's own close
            self._pool.give(self._origin, self._connection)
            self._connection = None

    def close(self) -> None:
        """Closes the connection unless it was given back."""
        if self._connection is not None:
            self._hang_up()
            self._connection = None

    def _hang_up(self) -> None:
        """The socket is open for as long as something reads from it."""
        for reader in (self._body, self._head):
            if reader is not None:
                reader.close()
        self._body = self._head = None
        self._connection.close()

    def _client_headers(self) -> dict[str, str]:
        """The upstream's headers that the client gets; none that gives our own authorization back."""
        sent = self._request.headers
        secret = next((sent[name].removeprefix("Bearer ") for name in SECRET_HEADERS if name in sent), "")
        passed = {name: value for name, value in self.headers.items() if _is_passed(name)}
        upstream_id = self.headers.get("x-request-id")
        if upstream_id:
            passed["x-upstream-request-id"] = upstream_id
        return {
            name: value
            for name, value in passed.items()
            if _is_plain(value) and not (secret and secret in value)
        }

    def _send_again(self) -> None:
        """The upstream may have worked for the request that was lost, so it stays an attempt of its own."""
        self._hang_up()
        if self._attempts:
            lost = self._attempts[-1]
            lost.ended = monotonic()
            lost.error = UpstreamError(
                "The upstream had closed this idle connection; the request was sent again."
            )
            self._attempts.append(Attempt(lost.target))
        self.send(fresh=True)


def _is_passed(name: str) -> bool:
    return name in PASSED or RATE_LIMIT.fullmatch(name) is not None


def _is_plain(value: str) -> bool:
    return len(value) <= 1000 and value.isascii() and value.isprintable()


@contextmanager
def translated() -> Iterator[None]:
    """The one place where the exceptions of sockets, TLS and HTTP become ours."""
    try:
        yield
    except socket.gaierror as exc:
        raise UpstreamError("The upstream's host name cannot be resolved.") from exc
    except TimeoutError as exc:
        raise UpstreamError(
            "The upstream did not answer in time.", status=504, code="upstream_timeout"
        ) from exc
    except ssl.SSLError as exc:
        raise UpstreamError(f"The upstream's TLS failed: {exc.reason or 'handshake'}.") from exc
    except ConnectionRefusedError as exc:
        raise UpstreamError("The upstream refused the connection.") from exc
    except (HTTPException, OSError) as exc:
        raise UpstreamError("The connection to the upstream failed.") from exc
