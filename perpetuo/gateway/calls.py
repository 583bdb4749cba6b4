"""The calls in flight: how many there may be, and the one way in which each can be ended from outside.

The client left, a deadline passed, the server stops: all three fire the call. Under gevent that throws into
the call's greenlet, but only while it waits for its upstream, never inside a commit. Elsewhere (tests,
commands) the waits themselves keep the deadlines, and nothing watches the client.
"""

from __future__ import annotations

import errno
import select
import socket
import threading
from collections import Counter
from collections.abc import Callable
from time import monotonic, sleep
from types import TracebackType
from typing import Any

import gevent
from gevent import get_hub
from gevent.socket import wait_read

from perpetuo.errors import Unavailable
from perpetuo.native import is_patched

LOOK_SECONDS = 0.5  # between two looks after a client that has sent its next request already
TCP_INFO = getattr(socket, "TCP_INFO", None)  # Linux's; its first byte is the state
LEFT = (b"\x07", b"\x08")  # TCP_CLOSE, TCP_CLOSE_WAIT: netinet/tcp.h
FINAL = ("client_closed", "draining", "total")  # other deadlines end an attempt; the next one has its own
FAIR_SECONDS = 0.001  # a stream that never waits lets others run after this long


class Aborted(Exception):
    """The call was ended from outside: `client_closed`, `draining`, or the name of a deadline."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Quiet(Exception):
    """Wakes a call that has waited for its upstream for as long as it wanted to."""


class Calls:
    """All calls of one process."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.is_draining = False
        self._live: set[Call] = set()
        self._by_workspace: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def __len__(self) -> int:
        return len(self._live)

    def begin(self, workspace_id: str, total_seconds: float) -> Call:
        """A call in flight, to be closed by whoever ends it. Raises Unavailable."""
        with self._lock:
            if len(self._live) >= self.most or self._by_workspace[workspace_id] * 2 >= max(self.most, 2):
                raise Unavailable("Too many requests are in flight; try again.", code="overloaded")
            if self.is_draining:
                raise Unavailable("This server is shutting down; try again.", code="shutting_down")
            call = Call(self, workspace_id, total_seconds)
            self._live.add(call)
            self._by_workspace[workspace_id] += 1
        return call

    def end(self, call: Call) -> None:
        with self._lock:
            if call in self._live:
                self._live.remove(call)
                self._by_workspace[call.workspace_id] -= 1
                if not self._by_workspace[call.workspace_id]:
                    del self._by_workspace[call.workspace_id]

    def drain_after(self, is_serving: Callable[[], bool], seconds: float) -> None:
        """Once `is_serving` is false: takes no new calls, and ends those that last longer than `seconds`."""

        def watch() -> None:
            while is_serving():
                if self._ended.wait(0.2):
                    return
            self.is_draining = True
            if not self._ended.wait(seconds):
                self.fire_all("draining")

        threading.Thread(target=watch, name="drain", daemon=True).start()

    def close(self) -> None:
        self._ended.set()

    def fire_all(self, reason: str) -> None:
        """Ends every call, from any greenlet."""
        for call in list(self._live):
            call.fire_soon(reason)


class Call:
    """One call in flight. `with call:` stands around every wait for the upstream, and only there."""

    def __init__(self, calls: Calls, workspace_id: str, total_seconds: float) -> None:
        self.workspace_id = workspace_id
        self.reason: str | None = None
        self.total_until = monotonic() + total_seconds
        self._until, self._name = self.total_until, "total"
        self._rings_at = self.total_until
        self._wakes_at = float("inf")
        self._resumed = (self._until, self._name)
        self._calls = calls
        self._inside = False
        self._writing = False
        self._fair_until = monotonic() + FAIR_SECONDS
        self._greenlet: Any = None
        self._io: Any = None
        self._timer: Any = None
        if is_patched():
            self._greenlet = gevent.getcurrent()
            self._timer = get_hub().loop.timer(max(total_seconds, 0.001))
            self._timer.start(self._on_time)

    def __enter__(self) -> Call:
        if self.reason is not None:
            raise Aborted(self.reason)
        self._inside = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside = False

    def allow(self, seconds: float, name: str) -> None:
        """From now on the call is fired as `name` after `seconds`, or as `total` where that comes first."""
        until = monotonic() + seconds
        if until >= self.total_until:
            until, name = self.total_until, "total"
        self._until, self._name = until, name
        if until < self._rings_at:  # a later deadline is met when the timer rings too soon
            self._arm()

    def remaining(self) -> float:
        """Seconds until the nearest deadline, at least a millisecond."""
        return max(self._until - monotonic(), 0.001)

    def patience(self) -> float | None:
        """What a socket of this call is given as its time-out: none where the call's own timer ends waits."""
        return self.remaining() if self._greenlet is None else None

    def wait_readable(self, connection: socket.socket, seconds: float) -> bool:
        """Whether there is something to read within `seconds`. Raises Aborted."""
        with self:
            if self._greenlet is not None:
                is_ready = self._wait_gevent(connection.fileno(), seconds)
            else:
                poll = select.poll()
                poll.register(connection, select.POLLIN)
                is_ready = bool(poll.poll(min(seconds, self.remaining()) * 1000))
        if not is_ready and monotonic() >= self._until:
            raise Aborted(self._name)
        return is_ready

    def _wait_gevent(self, handle: int, seconds: float) -> bool:
        """The call's own timer wakes it too: a time-out for each wait would cost 15 µs."""
        self._wakes_at = monotonic() + seconds
        if self._wakes_at < self._rings_at:
            self._arm()
        try:
            wait_read(handle)
        except _Quiet:
            return False
        finally:
            self._wakes_at = float("inf")
        return True

    def pause(self, seconds: float) -> None:
        """Waits, unless the call ends before. Raises Aborted."""
        with self:
            if seconds > 0:
                sleep(seconds)

    def wait(self, event: threading.Event, seconds: float) -> None:
        """Until `event` is set, for so long at most. Raises Aborted."""
        with self:
            event.wait(seconds)

    def begin_write(self) -> None:
        """The client is being written to: its socket has a deadline of its own, the upstream's rests."""
        self._resumed = (self._until, self._name)
        self._until, self._name = self.total_until, "total"
        self._writing = True

    def end_write(self) -> None:
        """The upstream's own deadline counts on."""
        self._writing = False
        self._until, self._name = self._resumed
        if self._until < self._rings_at:
            self._arm()

    def breathe(self) -> None:
        """Lets others run where this call has not waited for a while: gevent does not switch by itself.
        Where an upstream never pauses, no wait ends in time: then this does. Raises Aborted."""
        now = monotonic()
        if now >= self._until:
            raise Aborted(self._name)
        if self._greenlet is not None and now > self._fair_until:
            gevent.sleep(0)
            self._fair_until = monotonic() + FAIR_SECONDS

    def fire(self, reason: str) -> None:
        """Ends the call. Only from the hub, or without gevent."""
        if reason in FINAL:
            self.reason = self.reason or reason
        if self._greenlet is None:
            return
        if self._inside:
            self._greenlet.throw(Aborted(reason))
        elif self._writing:  # it waits for a client that does not read: the server takes this for its leaving
            self._writing = False
            self._greenlet.throw(BrokenPipeError(errno.EPIPE, "the client does not read"))

    def fire_soon(self, reason: str) -> None:
        """The same from any greenlet."""
        if self._greenlet is not None:
            get_hub().loop.run_callback(self.fire, reason)
        else:
            self.fire(reason)

    def close(self) -> None:
        """The call is over. May be called twice."""
        for watcher in (self._io, self._timer):
            if watcher is not None:
                watcher.stop()
                watcher.close()
        self._io = self._timer = None
        self._calls.end(self)

    def watch(self, client: socket.socket | None) -> None:
        """From now on the client's leaving ends the call. Only once its body is read: bytes hide an end."""
        raw = getattr(client, "_sock", None)  # gevent's name for the socket that does not switch
        if client is not None and raw is not None and self._greenlet is not None:
            self._client = raw
            self._io = get_hub().loop.io(client.fileno(), 1)
            self._io.start(self._on_readable)

    def _on_readable(self) -> None:
        """In the hub: the client's socket has bytes, or its end. Must not block."""
        try:
            is_gone = self._client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return
        except OSError:
            is_gone = True
        if self._io is not None:
            self._io.stop()  # bytes: a pipelined request, which would wake us for ever
        if is_gone:
            self.fire("client_closed")
        elif self._io is not None and TCP_INFO is not None:
            self._io.close()
            self._io = get_hub().loop.timer(LOOK_SECONDS, LOOK_SECONDS)
            self._io.start(self._on_look)

    def _on_look(self) -> None:
        """In the hub: an end that stands behind unread bytes makes nothing readable, but TCP knows of it."""
        try:
            is_gone = self._client.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 1) in LEFT
        except OSError:
            is_gone = True
        if is_gone and self._io is not None:
            self._io.stop()
            self.fire("client_closed")

    def _on_time(self) -> None:
        """In the hub: the timer rang. Deadlines move with every event, so it may have rung too soon."""
        if self._timer is None:
            return
        self._rings_at = float("inf")
        now, wakes_at = monotonic(), self._wakes_at
        if now < self._until:
            self._wakes_at = float("inf") if now >= wakes_at else wakes_at
            self._arm()
            if now >= wakes_at:
                self._greenlet.throw(_Quiet())
        elif self._inside or self._writing or self._name == "total":
            self.fire(self._name)
        # Else between two waits: the next one says what it allows.

    def _arm(self) -> None:
        if self._timer is None:
            return
        self._timer.stop()
        self._timer.close()
        self._rings_at = min(self._until, self._wakes_at)
        self._timer = get_hub().loop.timer(max(self._rings_at - monotonic(), 0.001))
        self._timer.start(self._on_time)
