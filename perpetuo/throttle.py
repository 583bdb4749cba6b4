"""A growing delay for those who guess: free attempts first, then a wait that doubles, never a lock-out.

Pure: names and the clock are passed in. Kept per process and bounded, so that guessing cannot fill memory.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass

FORGET_SECONDS = 3600.0  # without an attempt
SIZE = 10_000  # names remembered; the one that was quiet longest goes first


@dataclass(slots=True)
class _Record:
    failures: int
    since: float
    until: float


class Throttle:
    """Delays attempts per name: `free` failures cost nothing, then 1 s, 2 s, 4 s … up to a minute."""

    def __init__(self, free: int, first: float = 1.0, most: float = 60.0, size: int = SIZE) -> None:
        self.free, self.first, self.most, self.size = free, first, most, size
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def wait(self, name: str, now: float) -> float:
        """Seconds until `name` may try again, 0 for now. Records nothing."""
        record = self._records.get(name)
        return max(record.until - now, 0.0) if record else 0.0

    def fail(self, name: str, now: float) -> None:
        """One more failure, and a longer delay after it."""
        record = self._records.get(name)
        if record is None or now - record.since > FORGET_SECONDS:
            record = self._records[name] = _Record(0, now, now)
        record.failures += 1
        record.since, record.until = now, now + self._delay(record.failures)
        self._records.move_to_end(name)
        while len(self._records) > self.size:
            self._records.popitem(last=False)

    def succeed(self, name: str) -> None:
        """Forgets all failures of `name`."""
        self._records.pop(name, None)

    def _delay(self, failures: int) -> float:
        if failures <= self.free:
            return 0.0
        return float(min(self.first * 2 ** min(failures - self.free - 1, 30), self.most))


def network_of(address: str | None) -> str:
    """What one visitor surely holds: an IPv4 address, or the /64 around an IPv6 address."""
    try:
        ip = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return ""
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)
