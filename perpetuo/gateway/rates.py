"""Limits per minute: a bucket of one minute's worth, refilled evenly. Pure.

Kept as GCRA (ITU-T I.371): one moment for each limit, at which its bucket is full again. Times are whole
microseconds since 1970.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from perpetuo.wire import rfc3339

MINUTE_US = 60_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


@dataclass(slots=True)
class Bucket:
    """One limit per minute and what a call takes from it. Times in microseconds since 1970.

    `unit_us` is what one request or token takes to come back, `size_us` what a whole bucket takes.
    """

    name: Literal["requests", "tokens"]
    limit: int
    count: int
    unit_us: float
    size_us: int
    advance_us: int
    full_at_us: int

    def passes(self, moment: int) -> bool:
        return self.passes_at_us <= moment

    @property
    def passes_at_us(self) -> int:
        return self.full_at_us + self.advance_us - self.size_us

    def remaining(self, moment: int) -> int:
        return max(0, int((self.size_us - (self.full_at_us - moment)) / self.unit_us))

    def check(self, moment: int) -> dict[str, Any]:
        """The arithmetic, before anything is taken."""
        return {
            "limit": "rpm" if self.name == "requests" else "tpm",
            "spent": self.limit - self.remaining(moment),
            "held": 0,
            "this": self.count,
            "allowed": self.limit,
            "resets_at": rfc3339(moment_of(self.full_at_us)),
            "ok": self.passes(moment),
        }

    def headers(self, moment: int) -> dict[str, str]:
        """OpenAI's names and formats."""
        return {
            f"x-ratelimit-limit-{self.name}": str(self.limit),
            f"x-ratelimit-remaining-{self.name}": str(self.remaining(moment)),
            f"x-ratelimit-reset-{self.name}": duration(self.full_at_us - moment),
        }


def buckets(
    rpm: int | None,
    rpm_full_at: datetime | None,
    tpm: int | None,
    tpm_full_at: datetime | None,
    tokens: int,
    moment: int,
) -> list[Bucket]:
    """The buckets of a key's limits (None: no such limit), and what a call of so many tokens takes."""
    found = []
    if rpm:
        unit = -(-MINUTE_US // rpm)  # rounded up, so that no minute ever has one too many
        full_at = max(us(rpm_full_at), moment)
        found.append(Bucket("requests", rpm, 1, unit, unit * rpm, unit, full_at))
    if tpm:
        count = min(tokens, tpm)  # a call above a minute's worth waits for a full bucket
        advance = min(advance_us(count, tpm), MINUTE_US)
        full_at = max(us(tpm_full_at), moment)
        found.append(Bucket("tokens", tpm, count, MINUTE_US / tpm, MINUTE_US, advance, full_at))
    return found


def trued_up(
    limit: int, full_at: datetime, held_us: int, tokens: int, taken_at: datetime, now: datetime
) -> datetime:
    """When the token bucket would be full, had a call of `taken_at` taken what it used and not `held_us`.

    What has come back since by time alone is not given back a second time.
    """
    used_us, elapsed = advance_us(tokens, limit), max(0, us(now) - us(taken_at))
    if used_us > held_us:
        return moment_of(max(us(full_at), us(now)) + used_us - held_us)
    return moment_of(us(full_at) - (max(0, held_us - elapsed) - max(0, used_us - elapsed)))


def advance_us(tokens: int, limit: int) -> int:
    """In how many microseconds so many tokens come back, rounded up."""
    return -(-tokens * MINUTE_US // limit)


def us(moment: datetime | None) -> int:
    return (moment - EPOCH) // MICROSECOND if moment is not None else 0


def moment_of(us: int) -> datetime:
    return EPOCH + us * MICROSECOND


def duration(microseconds: int) -> str:
    """As OpenAI writes it: `1s`, `6m0s`, `120ms`; nothing left is `0s`."""
    milliseconds = -(-max(0, microseconds) // 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    seconds = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
