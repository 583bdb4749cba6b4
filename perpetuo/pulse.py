"""How long this process's event loop stood still: a timer that notices how late it is called.

What stands between a ring and the next is work that let nobody else run. Knows nothing of what the work was.
"""

from __future__ import annotations

import weakref
from collections import deque
from time import monotonic
from typing import Any

import gevent
from gevent import get_hub

from perpetuo.native import is_patched

TICK_SECONDS = 0.01  # shorter pauses are not seen, longer ones may be told shorter by as much
SLOT_SECONDS = 10.0
SLOTS = 6  # a minute of them, and the one that is filling


class Pulse:
    """`start()` in the process that serves; without gevent there is no loop, and nothing is told."""

    def __init__(self) -> None:
        self.longest = 0.0  # seconds, since the start
        self._slots: deque[tuple[int, float]] = deque(maxlen=SLOTS + 1)
        self._last = 0.0
        self._timer: Any = None
        self._greenlets: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def greenlets(self) -> int:
        """How many live: of connections, and of threads."""
        return len(self._greenlets)

    def start(self) -> None:
        if self._timer is None and is_patched():
            self._last = monotonic()
            self._timer = get_hub().loop.timer(TICK_SECONDS, TICK_SECONDS, ref=False)
            self._timer.start(self._beat)
            gevent.Greenlet.add_spawn_callback(self._greenlets.add)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None
            gevent.Greenlet.remove_spawn_callback(self._greenlets.add)

    def longest_of_late(self) -> float:
        """The longest pause of the last minute, in seconds."""
        since = monotonic() // SLOT_SECONDS - SLOTS
        return max((pause for slot, pause in self._slots if slot >= since), default=0.0)

    def _beat(self) -> None:
        """In the hub. A repeated timer rings once for all the rings that it missed."""
        now = monotonic()
        pause, self._last = now - self._last - TICK_SECONDS, now
        self.longest = max(self.longest, pause)
        slot = int(now // SLOT_SECONDS)
        if self._slots and self._slots[-1][0] == slot:
            if pause > self._slots[-1][1]:
                self._slots[-1] = slot, pause
        else:
            self._slots.append((slot, max(pause, 0.0)))
