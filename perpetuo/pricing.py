"""Usage to cost in whole nano-dollars, with its arithmetic. Pure, and exact: no float anywhere.

A price is in USD per million tokens, fixed at open and stored with the row; a cost is worked out from the
usage and the price in the row alone, so that it can be worked out again. Where prices come from is
price_list.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Context, Decimal, Inexact
from functools import lru_cache
from typing import Any, NamedTuple

import orjson

from perpetuo.providers.base import Usage
from perpetuo.wire import usd

# More than any model takes. At fields.py's highest price the classes' sum still fits a BIGINT.
MOST_TOKENS = 10**9
_EXACT = Context(prec=80, traps=[Inexact])  # a product that does not fit is a bug, not a rounding
_NANO_PER_TOKEN = 1000  # for one USD per million tokens


class Rates(NamedTuple):
    """USD per million tokens of each disjoint class. The names are those of the log detail."""

    input: Decimal  # neither read from a cache nor written to one
    cached_input: Decimal
    cache_write: Decimal
    output: Decimal  # reasoning included


@dataclass(frozen=True, slots=True)
class Tier:
    """Rates of the whole call, every token of it, once its input is above this many tokens."""

    above: int
    rates: Rates


@dataclass(frozen=True, slots=True)
class Price:
    """One model's price at one moment. `tiers` ascend; `source` says whose price it is."""

    rates: Rates
    source: str
    tiers: tuple[Tier, ...] = ()
    text: str = field(init=False, compare=False, repr=False)  # as it stands in a row, written once

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", orjson.dumps(self.to_json()).decode())

    def rates_for(self, input_tokens: int) -> Rates:
        rates = self.rates
        for tier in self.tiers:
            if input_tokens > tier.above:
                rates = tier.rates
        return rates

    def to_json(self) -> dict[str, Any]:
        """For the row. Decimals are strings: JSON's numbers would come back as floats."""
        tiers = [{"above": tier.above, **_strings(tier.rates)} for tier in self.tiers]
        return {"source": self.source, **_strings(self.rates), **({"tiers": tiers} if tiers else {})}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Price:
        tiers = tuple(Tier(tier["above"], _rates(tier)) for tier in stored.get("tiers", ()))
        return cls(_rates(stored), stored["source"], tiers)


@lru_cache(4096)
def read_price(text: str) -> Price:
    """A row's price, from how it stands there: many rows have the same."""
    return Price.from_json(orjson.loads(text))


def _strings(rates: Rates) -> dict[str, str]:
    return {name: f"{rate:f}" for name, rate in rates._asdict().items()}


def _rates(stored: Mapping[str, Any]) -> Rates:
    return Rates(*(Decimal(stored[name]) for name in Rates._fields))


class Line(NamedTuple):
    """One class of tokens and what it came to."""

    name: str
    tokens: int
    usd_per_million: Decimal
    nano: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call came to. `clamped` names the token counts that made no sense and were cut."""

    lines: tuple[Line, ...]
    clamped: tuple[str, ...] = ()

    @property
    def nano(self) -> int:
        return sum(line.nano for line in self.lines)

    def arithmetic(self) -> list[dict[str, Any]]:
        """The log detail's `cost`; classes without tokens are left out."""
        return [
            {
                "class": line.name,
                "tokens": line.tokens,
                "usd_per_million": line.usd_per_million,
                "usd": usd(line.nano),
            }
            for line in self.lines
            if line.tokens
        ]


def cost(usage: Usage, price: Price) -> Cost:
    """The cost of `usage`: each class rounded half up to whole nano-dollars, the cost their sum.

    Counts below nothing, above MOST_TOKENS, or parts above their whole are cut to what makes sense.
    """
    prompt = _within(usage.prompt_tokens, MOST_TOKENS)
    cached = _within(usage.cached_tokens, prompt)
    cache_write = _within(usage.cache_write_tokens, prompt - cached)
    completion = _within(usage.completion_tokens, MOST_TOKENS)
    counts = (prompt - cached - cache_write, cached, cache_write, completion)
    lines = tuple(map(_line, Rates._fields, counts, price.rates_for(prompt)))
    return Cost(lines, _clamped(usage, (prompt, cached, cache_write, completion)))


def _line(name: str, tokens: int, rate: Decimal) -> Line:
    return Line(name, tokens, rate, _nano(tokens, rate) if tokens else 0)


def _clamped(usage: Usage, priced: tuple[int, ...]) -> tuple[str, ...]:
    if priced == (
        usage.prompt_tokens,
        usage.cached_tokens,
        usage.cache_write_tokens,
        usage.completion_tokens,
    ):
        return ()
    names = ("prompt_tokens", "cached_tokens", "cache_write_tokens", "completion_tokens")
    return tuple(name for name, tokens in zip(names, priced, strict=True) if getattr(usage, name) != tokens)


def bound(price: Price, input_tokens: int, output_tokens: int) -> int:
    """Nano-dollars that no usage within these counts can pass."""
    input_nano, output_nano = dearest(price, input_tokens)
    return _within(input_tokens, MOST_TOKENS) * input_nano + _within(output_tokens, MOST_TOKENS) * output_nano


def dearest(price: Price, input_tokens: int) -> tuple[int, int]:
    """Nano-dollars for a token of input and of output: the dearest input class, the dearest tier within
    reach, each rounded up, so that no class's rounding can pass it either."""
    input_tokens = _within(input_tokens, MOST_TOKENS)
    reachable = [price.rates, *(tier.rates for tier in price.tiers if tier.above < input_tokens)]
    dearest_input = max(max(rates[:3]) for rates in reachable)
    return _nano_up(dearest_input), _nano_up(max(rates.output for rates in reachable))


def _within(count: int, most: int) -> int:
    return max(0, min(count, most))


def _nano(tokens: int, rate: Decimal) -> int:
    """Half up, in whole numbers: a third of the time that decimals take, and it runs for each row."""
    numerator, denominator = rate.as_integer_ratio()
    return (2 * tokens * _NANO_PER_TOKEN * numerator + denominator) // (2 * denominator)


def _nano_up(rate: Decimal) -> int:
    """Nano-dollars for one token, rounded up."""
    return int(_EXACT.multiply(rate, _NANO_PER_TOKEN).to_integral_value(ROUND_CEILING))
