"""Budget periods: UTC calendar days, weeks (from Monday) and months, half-open; `total` never ends. Pure."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)  # where `total` starts: before any row


def period_start(period: str, moment: datetime) -> datetime:
    """The start of the period that `moment` is in."""
    day = moment.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        return day
    if period == "week":
        return day - timedelta(days=day.weekday())
    if period == "month":
        return day.replace(day=1)
    return BEGINNING


def period_end(period: str, moment: datetime) -> datetime | None:
    """The start of the next period, None where there is none."""
    start = period_start(period, moment)
    if period == "day":
        return start + timedelta(days=1)
    if period == "week":
        return start + timedelta(days=7)
    if period == "month":
        return (start + timedelta(days=32)).replace(day=1)
    return None
