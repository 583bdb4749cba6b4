"""Which target a call tries next, and when: retries, fallbacks, and keys that rest because they keep failing.

Decides only; knows no socket and does not wait. Rests are those of this process: another process learns of
a failing key with its own first calls, which costs it an attempt each and no write to the database.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from time import monotonic, time

from perpetuo.errors import GatewayError, InvalidRequest, UpstreamError
from perpetuo.gateway.router import Key, Target

RETRIES = 2  # on the only target that there is
FIRST_PAUSE_SECONDS = 0.25  # doubled for the next one, less up to half by chance
LONGEST_PAUSE_SECONDS = 5.0  # a longer `retry-after` is the client's to wait
FAILURES = 3  # in a row, until a key rests
REST_SECONDS = 15.0
LONGEST_REST_SECONDS = 60.0
KEPT = 10_000

# What another key may do better, and for good: nothing that a second try at this one would change.
FIRM = frozenset({"upstream_auth", "upstream_quota", "provider_key_unreadable", "destination_blocked"})
FIRM |= {"upstream_redirect"}
PASSING = frozenset({"upstream_error", "upstream_timeout", "upstream_rate_limited"})


class Rests:
    """The keys that keep failing, each with the time until which it goes to the end of the order."""

    def __init__(self) -> None:
        self._failures: dict[str, int] = {}
        self._until: dict[str, float] = {}

    def ordered(self, targets: Sequence[Target]) -> list[Target]:
        """The targets in their order, those of resting keys behind all others."""
        if not self._until:
            return list(targets)
        return sorted(targets, key=lambda target: self.is_resting(target.key))

    def is_resting(self, key: Key) -> bool:
        return self._until.get(key.id, 0.0) > monotonic()

    def worked(self, key: Key) -> None:
        if key.id in self._failures:
            del self._failures[key.id]
            self._until.pop(key.id, None)

    def failed(self, key: Key, error: GatewayError) -> None:
        """One more failure; a refused key or an empty account rests at once."""
        if len(self._failures) >= KEPT:
            self._failures.clear()
            self._until.clear()
        failures = self._failures[key.id] = self._failures.get(key.id, 0) + 1
        if error.code in FIRM or failures >= FAILURES:
            rest = REST_SECONDS * 2 ** min(max(failures - FAILURES, 0), 10)
            asked = seconds_asked(error) or 0.0
            self._until[key.id] = monotonic() + min(max(rest, asked), LONGEST_REST_SECONDS)


class Plan:
    """The targets of one call, in turn. `target` is the one to try now."""

    def __init__(self, targets: Sequence[Target], rests: Rests) -> None:
        self._left = rests.ordered(targets)
        self._rests = rests
        self._retries = RETRIES if len(self._left) == 1 else 0
        self._tried = 0

    @property
    def target(self) -> Target:
        return self._left[0]

    def worked(self) -> None:
        self._rests.worked(self.target.key)

    def after(self, error: GatewayError) -> float:
        """The target failed: chooses the next one, and returns how many seconds to wait for it.

        Raises `error` where it is the answer: the request's own fault, or nothing is left to try.
        """
        if not _is_movable(error):
            raise error
        failed = self.target
        if isinstance(error, UpstreamError) or error.code in FIRM:
            self._rests.failed(failed.key, error)
        if self._may_retry(error):
            self._retries -= 1
            self._tried += 1
            return pause(self._tried, error)
        # A key that is refused is refused for each of its models.
        is_key = error.code in FIRM
        self._left = [t for t in self._left[1:] if not (is_key and t.key.id == failed.key.id)]
        if not self._left:
            raise error
        return 0.0

    def _may_retry(self, error: GatewayError) -> bool:
        asked = seconds_asked(error)
        is_soon = asked is None or asked <= LONGEST_PAUSE_SECONDS
        return self._retries > 0 and error.code in PASSING and is_soon


def _is_movable(error: GatewayError) -> bool:
    # A parameter that this provider has no place for, another one may know.
    return error.code in PASSING or error.code in FIRM or isinstance(error, InvalidRequest)


def pause(number: int, error: GatewayError) -> float:
    """Seconds before the `number`th retry: what the upstream asked for, else doubling, with jitter."""
    asked = seconds_asked(error)
    if asked is not None:
        return asked
    longest = min(FIRST_PAUSE_SECONDS * 2 ** (number - 1), LONGEST_PAUSE_SECONDS)
    return longest * random.uniform(0.5, 1.0)  # noqa: S311


def seconds_asked(error: GatewayError) -> float | None:
    """What the upstream's `retry-after` says in seconds, None without one."""
    exact, value = error.headers.get("retry-after-ms"), error.headers.get("retry-after")
    if not isinstance(error, UpstreamError) or value is None:
        return None
    try:
        if exact is not None:
            return float(exact) / 1000
        return float(value)
    except ValueError:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
