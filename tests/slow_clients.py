"""Clients that hang, by the thousand: each crowd is of one kind, and counts those that the server let go."""

from __future__ import annotations

import json
import re
import resource
import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import requests

from tests.house import CHAT, House
from tests.tenants import Tenant

DRIP_SECONDS = 0.5
TOGETHER = 50  # of a crowd that come at once: they are to hang, not to storm
HASTY = {"GUNICORN_CMD_ARGS": "--config tests/hasty.conf.py"}  # with HASTY_SECONDS in the environment


def allow_descriptors(wanted: int) -> int:
    """How many descriptors this process may have now, at most `wanted`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    return max(soft, most)


def head(path: str, key: str = "", **headers: object) -> bytes:
    """The head of a POST."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Authorization: Bearer {key}"] if key else []
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def chat(tenant: Tenant, **fields: object) -> bytes:
    """A whole request for a chat completion."""
    body = json.dumps({**CHAT, **fields}).encode()
    return head("/v1/chat/completions", tenant.key, Content_Length=len(body)) + body


def gauge(house: House, name: str) -> float:
    """A number that the server tells of its one worker."""
    text = requests.get(f"{house.server.url}/metrics", timeout=60).text
    found = re.search(rf"^perpetuo_{name}{{.*}} (.*)$", text, re.MULTILINE)
    assert found, name
    return float(found[1])


def complaints(house: House) -> list[str]:
    """Lines of the server's log that tell of a fault: a client's leaving is none."""
    marks = ("Traceback", '"level": "error"', '"level": "critical"')
    return [line for line in house.server.log.splitlines() if any(mark in line for mark in marks)]


class Crowd:
    """So many connections that have sent `opening`. Their windows are small: writes to them soon block.

    With `is_answered` each has also read the first bytes of its answer, and reads no more.
    """

    def __init__(self, port: int, count: int, opening: bytes, *, is_answered: bool = False) -> None:
        self.sockets: list[socket.socket] = []
        for first in range(0, count, TOGETHER):
            some = [self._connect(port, opening) for _ in range(min(TOGETHER, count - first))]
            self.sockets += some
            for connection in some if is_answered else ():
                assert connection.recv(100).startswith(b"HTTP/1.1 200 ")

    def _connect(self, port: int, opening: bytes) -> socket.socket:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", port))
        connection.sendall(opening)
        return connection

    def count_gone(self) -> int:
        """How many the server has closed or reset; nothing is read."""
        return len(self._seen(select.POLLRDHUP))

    def answered(self) -> list[socket.socket]:
        """Those that have something to read, be it their end."""
        return self._seen(select.POLLIN)

    def _seen(self, events: int) -> list[socket.socket]:
        by_number = {connection.fileno(): connection for connection in self.sockets}
        poller = select.poll()
        for number in by_number:
            poller.register(number, events)
        return [by_number[number] for number, _ in poller.poll(0)]

    def are_gone(self) -> bool:
        return self.count_gone() == len(self.sockets)

    def drip(self) -> None:
        for connection in self.sockets:
            with suppress(OSError):
                connection.send(b"x")

    def close_half(self) -> None:
        for connection in self.sockets:
            connection.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        for connection in self.sockets:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        for connection in self.sockets:
            connection.close()


@contextmanager
def dripping(*crowds: Crowd) -> Iterator[None]:
    """Meanwhile each of them sends one byte more every half second."""
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(DRIP_SECONDS):
            for crowd in crowds:
                crowd.drip()

    thread = threading.Thread(target=drip, name="dripping")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
