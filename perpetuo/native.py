"""What keeps the event loop going: native threads, and breath. Knows whether gevent runs at all.

File locks, which native threads wait for, are here too.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import gevent
from gevent.monkey import get_original, is_module_patched
from gevent.threadpool import ThreadPool
from gevent.timeout import Timeout

T = TypeVar("T")

LOOKUPS = 64  # names looked up at a time
THREADS = {"names": LOOKUPS}  # by pool, elsewhere one


class Native:
    """Native threads for what would stop the event loop: SQLite's commits and long reads, slow hashes, zlib
    and host names.

    Under gevent each has its own threads; elsewhere the call runs where it is.
    """

    def __init__(self) -> None:
        self._pools: dict[str, ThreadPool] = {}
        self._pid = os.getpid()

    def writing(self, call: Callable[..., T], *args: Any, seconds: float | None = None) -> T:
        """Raises TimeoutError after `seconds`: the call goes on, and those behind it wait for it."""
        return self._run("writing", call, args, seconds)

    def reading(self, call: Callable[..., T], *args: Any, seconds: float) -> T:
        """Raises TimeoutError after `seconds`: the call goes on."""
        return self._run("reading", call, args, seconds)

    def packing(self, call: Callable[..., T], *args: Any) -> T:
        return self._run("packing", call, args, None)

    def slow(self, call: Callable[..., T], *args: Any) -> T:
        return self._run("slow", call, args, None)

    def look_up(self, host: str) -> list[tuple[Any, ...]]:
        """The addresses of `host`, as getaddrinfo gives them, without a port."""
        # Not gevent's own getaddrinfo: its pool of ten threads is shared with whoever else resolves.
        look_up: Callable[..., list[tuple[Any, ...]]] = get_original("socket", "getaddrinfo")
        return self._run("names", look_up, (host, None, 0, socket.SOCK_STREAM), None)

    def _run(self, name: str, call: Callable[..., T], args: tuple[Any, ...], seconds: float | None) -> T:
        if not is_patched():
            return call(*args)
        if self._pid != os.getpid():  # pools do not survive a fork
            self._pools, self._pid = {}, os.getpid()
        if name not in self._pools:
            self._pools[name] = ThreadPool(THREADS.get(name, 1))
        with Timeout(seconds, TimeoutError("the thread is held up")):  # None: for as long as it takes
            result, error = self._pools[name].apply(_caught, (call, args))
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        for pool in self._pools.values():
            pool.kill()
        self._pools = {}


def _caught(call: Callable[..., T], args: tuple[Any, ...]) -> tuple[T | None, BaseException | None]:
    """gevent prints every exception of its thread pool to stderr, so it travels as a value."""
    try:
        return call(*args), None
    except BaseException as exc:  # noqa: BLE001
        return None, exc


def is_patched() -> bool:
    """Whether this process runs on gevent."""
    return is_module_patched("socket")


def breathe() -> None:
    """Lets others run between two pieces of long work: gevent does not switch by itself."""
    if is_patched():
        gevent.sleep(0)


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file; it ends with the process, whatever kills it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
