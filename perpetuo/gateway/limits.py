"""What budgets and limits allow, and what a settled call gives back. Pure: it reads and writes nothing.

Money is held as an upper bound before a call and settled once after it; how the limits per minute count is
rates.py's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Literal

from perpetuo.errors import GatewayError, RateLimited
from perpetuo.gateway import rates
from perpetuo.periods import period_end, period_start
from perpetuo.wire import rfc3339, usd

Values = dict[str, Any]
Kind = Literal["api_key", "workspace"]

PERIODS: dict[Kind, str] = {"api_key": "key_period", "workspace": "workspace_period"}
RECOUNT_SECONDS = 15.0  # longer than any process can go on without knowing of a new budget


@dataclass(frozen=True, slots=True)
class Ask:
    """What one call asks for: nano-dollars at most and at the least, and tokens at most.

    `is_patient` calls wait while money is held that others may give back; the others take what there is.
    """

    most_nano: int
    least_nano: int
    tokens: int
    is_patient: bool = True

    def impatient(self) -> Ask:
        return replace(self, is_patient=False)


@dataclass(slots=True)
class Account:
    """An API key or a workspace as it stands under its lock."""

    kind: Kind
    id: str
    name: str
    page: str  # where its budget and limits are changed
    budget_nano: int | None
    period: str
    spent_nano: int
    held_nano: int
    period_start: datetime | None
    recount_until: datetime | None
    rpm_limit: int | None = None
    tpm_limit: int | None = None
    rpm_full_at: datetime | None = None
    tpm_full_at: datetime | None = None

    def state(self) -> tuple[object, ...]:
        """All of it that a transaction may change."""
        return (
            self.spent_nano,
            self.held_nano,
            self.period_start,
            self.recount_until,
            self.rpm_full_at,
            self.tpm_full_at,
        )

    @property
    def free_nano(self) -> int:
        """What calls in flight could still spend: their holds included."""
        return (self.budget_nano or 0) - self.spent_nano

    @property
    def available_nano(self) -> int:
        return self.free_nano - self.held_nano

    def turn(self, now: datetime) -> None:
        """Begins the period that `now` is in; a clock that went back turns nothing."""
        start = period_start(self.period, now)
        if self.budget_nano is not None and (self.period_start is None or self.period_start < start):
            self.period_start, self.spent_nano, self.held_nano = start, 0, 0

    def counts(self, created_at: datetime) -> bool:
        """Whether a call of that time belongs to the present period of a budget."""
        return (
            self.budget_nano is not None and self.period_start is not None and created_at >= self.period_start
        )


@dataclass(slots=True)
class Verdict:
    """What became of one ask: admitted with these columns of its row, or an error.

    `is_held`: only money that others hold is in the way; ask again. `headers` tell of the limits.
    """

    values: Values = field(default_factory=dict)
    error: GatewayError | None = None
    is_held: bool = False
    checks: list[dict[str, Any]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def is_admitted(self) -> bool:
        return self.error is None and not self.is_held

    @property
    def hold_nano(self) -> int | None:
        hold: int | None = self.values.get("hold_nano")
        return hold


def decide(key: Account, workspace: Account | None, ask: Ask, now: datetime) -> Verdict:
    """All checks of one call in their order, and what it takes where all let it pass; else nothing is taken.

    `workspace` is None where it has no budget.
    """
    accounts = [account for account in (key, workspace) if account is not None]
    for account in accounts:
        account.turn(now)
    budgets = [account for account in accounts if account.budget_nano is not None]
    verdict, moment = Verdict(), rates.us(now)
    buckets = rates.buckets(
        key.rpm_limit, key.rpm_full_at, key.tpm_limit, key.tpm_full_at, ask.tokens, moment
    )
    verdict.checks = [bucket.check(moment) for bucket in buckets]
    full = next((bucket for bucket in buckets if not bucket.passes(moment)), None)
    hold = None
    if full is not None:
        verdict.error = _too_fast(key, full, moment)
    else:
        hold = _hold(budgets, ask, now, verdict)
    if verdict.is_admitted:
        _take(key, budgets, hold, buckets, verdict, now)
    for bucket in buckets:
        verdict.headers |= bucket.headers(moment)
    return verdict


def _take(
    key: Account,
    budgets: list[Account],
    hold: int | None,
    buckets: list[rates.Bucket],
    verdict: Verdict,
    now: datetime,
) -> None:
    values = verdict.values
    values |= {"created_at": now, "checks": verdict.checks}
    for bucket in buckets:
        bucket.full_at_us += bucket.advance_us
        full_at = rates.moment_of(bucket.full_at_us)
        if bucket.name == "requests":
            key.rpm_full_at = full_at
        else:
            key.tpm_full_at, values["token_advance_us"] = full_at, bucket.advance_us
    if hold is None:
        return
    values["hold_nano"] = hold
    for account in budgets:
        account.held_nano += hold
        values[PERIODS[account.kind]] = account.period_start


def _too_fast(key: Account, bucket: rates.Bucket, moment: int) -> GatewayError:
    seconds = max(1, -(-(bucket.passes_at_us - moment) // 1_000_000))
    return RateLimited(
        f"The API key '{key.name}' may use {bucket.limit} {bucket.name} per minute; "
        f"{bucket.remaining(moment)} are left, and this call asks for {bucket.count}. Try again in "
        f"{seconds} s, or raise the limit at {key.page}.",
        code="rate_limit_exceeded",
        headers={"retry-after": str(seconds)},
    )


def _hold(accounts: list[Account], ask: Ask, now: datetime, verdict: Verdict) -> int | None:
    """How much to hold; None where no budget applies, or where the verdict says why not."""
    if not accounts:
        return None
    free = min(account.free_nano for account in accounts)
    available = min(account.available_nano for account in accounts)
    # An answer is cut short for money that is spent; for what others only hold, the call waits first.
    wanted = max(ask.least_nano, min(ask.most_nano, free if ask.is_patient else available))
    verdict.checks += [_check(account, wanted) for account in accounts]
    if wanted <= available:
        return wanted
    spent = next((account for account in accounts if ask.least_nano > account.free_nano), None)
    if spent is not None:
        verdict.error = _exceeded(spent, ask, now)
    elif ask.is_patient:
        verdict.is_held = True
    else:
        verdict.error = _held(min(accounts, key=lambda account: account.available_nano), ask)
    return None


@lru_cache(64)
def _reset_of(period: str, start: datetime) -> str | None:
    ends_at = period_end(period, start)
    return rfc3339(ends_at) if ends_at else None


def _check(account: Account, this: int) -> dict[str, Any]:
    assert account.period_start is not None  # a budget that has taken its turn
    return {
        "limit": f"{account.kind}_budget",
        "spent": account.spent_nano,
        "held": account.held_nano,
        "this": this,
        "allowed": account.budget_nano,
        "resets_at": _reset_of(account.period, account.period_start),
        "ok": this <= account.available_nano,
    }


def _end(account: Account) -> datetime | None:
    return period_end(account.period, account.period_start) if account.period_start else None


def _exceeded(account: Account, ask: Ask, now: datetime) -> GatewayError:
    ends_at = _end(account)
    headers = {"x-should-retry": "false"}
    reset = "It does not reset."
    if ends_at is not None:
        headers["retry-after"] = str(max(1, -((now - ends_at) // timedelta(seconds=1))))
        reset = f"It resets at {ends_at:%Y-%m-%d %H:%M} UTC."
    return RateLimited(
        f"{_state(account, ask)} {reset} Change it at {account.page}.",
        type="insufficient_quota",
        code="budget_exceeded",
        headers=headers,
    )


def _held(account: Account, ask: Ask) -> GatewayError:
    return RateLimited(
        f"{_state(account, ask)} What is held comes back as those calls end: try again, or raise the "
        f"budget at {account.page}.",
        code="budget_held",
        headers={"retry-after": "1"},
    )


def _state(account: Account, ask: Ask) -> str:
    owner = f"API key '{account.name}'" if account.kind == "api_key" else f"workspace '{account.name}'"
    period = {"day": "daily ", "week": "weekly ", "month": "monthly "}.get(account.period, "")
    return (
        f"The {period}budget of the {owner} is ${usd(account.budget_nano)}: ${usd(account.spent_nano)} "
        f"spent, ${usd(account.held_nano)} held by calls in flight, and this call may cost "
        f"${usd(ask.least_nano)} at the least."
    )


@dataclass(frozen=True, slots=True)
class Settled:
    """What one row's end changes, as the database had the row before (`was_open`).

    `cost_nano` is the difference to what the row had cost; `tokens` None where its usage is not known.
    """

    created_at: datetime
    was_open: bool
    hold_nano: int
    holds: tuple[Kind, ...]
    cost_nano: int
    tokens: int | None
    token_advance_us: int | None


def settle(account: Account, row: Settled, now: datetime) -> None:
    """Moves what one settled row changes in its key's or its workspace's account."""
    account.turn(now)
    if account.counts(row.created_at):
        account.spent_nano += row.cost_nano
        if row.was_open and account.kind in row.holds:
            account.held_nano -= row.hold_nano
    held_us, tokens = row.token_advance_us, row.tokens
    limit, full_at = account.tpm_limit, account.tpm_full_at
    if row.was_open and held_us is not None and tokens is not None and limit and full_at is not None:
        account.tpm_full_at = rates.trued_up(limit, full_at, held_us, tokens, row.created_at, now)
