"""The most that a call can cost, before it is sent: what a budget holds, and what a token limit counts.

Upper bounds, never estimates: a call's cost stays within its bound, whatever its target answers. What cannot
be bounded is refused by name. Pure: no socket, no database.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from math import ceil

from perpetuo.errors import Forbidden
from perpetuo.gateway import boundable
from perpetuo.gateway.costs import price_of
from perpetuo.gateway.intake import Asked
from perpetuo.gateway.media import Media, media_of
from perpetuo.gateway.router import Target
from perpetuo.output_limits import most_output_tokens, output_bound
from perpetuo.price_list import CONTEXT_FIELDS, context_window
from perpetuo.pricing import MOST_TOKENS, Price, Rates, dearest

LEAST_OUTPUT_TOKENS = 256  # a budget near its end shrinks no answer below this

_FREE = Price(Rates(*[Decimal(0)] * len(Rates._fields)), "none")
# Words for the price that a request has without them, or for a lower one.
_USUAL_TIERS = frozenset({"auto", "default", "standard", "standard_only", "on_demand", "flex"})
# Anthropic's own multiple of the input price for what the cache keeps an hour (docs.anthropic.com,
# "Prompt caching", 2026); the price of a write is that for five minutes.
_HOUR = b'"1h"'
_HOUR_RATE = 2


@dataclass(frozen=True, slots=True)
class Bound:
    """The most that one target can bill for one call.

    `output_tokens` are for each choice: the client's maximum, else the model's, else 32,768; 0 for
    embeddings. `is_guess`: the client named no maximum, so ours has to be sent as the maximum.
    `least_output_tokens` is how far the output may shrink. `predicted_tokens` are billed as output beside the
    choices.
    """

    price: Price
    input_tokens: int
    output_tokens: int
    choices: int
    is_guess: bool
    least_output_tokens: int
    predicted_tokens: int = 0
    _fixed: int = field(init=False, repr=False, compare=False)
    _per_token: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        input_nano, output_nano = dearest(self.price, self.input_tokens)
        fixed = min(self.input_tokens, MOST_TOKENS) * input_nano + self.predicted_tokens * output_nano
        object.__setattr__(self, "_fixed", fixed)
        object.__setattr__(self, "_per_token", output_nano * self.choices)

    def nano(self, output_tokens: int | None = None) -> int:
        """What to hold for that many output tokens a choice; by default for all."""
        return self._fixed + self._per_token * (
            self.output_tokens if output_tokens is None else output_tokens
        )

    def least_nano(self) -> int:
        return self.nano(self.least_output_tokens)

    def output_within(self, nano: int) -> int:
        """The most output tokens a choice whose bound fits into `nano`: at most all, perhaps none."""
        if not self._per_token:
            return self.output_tokens if nano >= self._fixed else 0
        return max(0, min(self.output_tokens, (nano - self._fixed) // self._per_token))

    @property
    def tokens(self) -> int:
        """Input and output together: what a token limit holds."""
        return self.input_tokens + self.predicted_tokens + self.choices * self.output_tokens


@dataclass(frozen=True, slots=True)
class Demand:
    """What one call may cost, over all its targets. `kept` are the places of those that can be used, `bounds`
    stand beside them."""

    bounds: tuple[Bound, ...]
    kept: tuple[int, ...]

    def nano(self) -> int:
        """The hold: that of the dearest target."""
        return max(each.nano() for each in self.bounds)

    def least_nano(self) -> int:
        """The least hold that will do, with every target at its least output."""
        return max(each.least_nano() for each in self.bounds)

    def tokens(self) -> int:
        return max(each.tokens for each in self.bounds)

    def limits(self, hold_nano: int) -> tuple[int | None, ...]:
        """For each kept target the maximum of output tokens to be sent, so that its bound fits into the hold;
        None where the client's own stands and fits. `hold_nano` is at least `least_nano`."""
        return tuple(_limit(each, hold_nano) for each in self.bounds)


def _limit(target: Bound, hold_nano: int) -> int | None:
    fitting = target.output_within(hold_nano)
    if fitting >= target.output_tokens:
        return target.output_tokens if target.is_guess else None
    return fitting


def demand_of(asked: Asked, targets: Sequence[Target], at: datetime, *, needs_price: bool) -> Demand:
    """What a call opened `at` may cost. Targets behind the first that have no price or cannot be bounded are
    left out; raises Forbidden (`model_not_priced`, `request_not_boundable`) where the first is one.

    Without `needs_price` (a limit of tokens alone) neither is a fault: prices count as 0, and a request that
    cannot be bounded as about what its bytes come to.
    """
    media, kept, bounds = media_of(asked), [], []
    for place, target in enumerate(targets):
        try:
            bounds.append(_bound_of(asked, target, at, media, needs_price))
        except Forbidden:
            if not place:
                raise
        else:
            kept.append(place)
    return Demand(tuple(bounds), tuple(kept))


def bound_of(asked: Asked, target: Target, at: datetime) -> Bound:
    """The bound of a call opened `at` and answered by `target`.

    Raises Forbidden (`model_not_priced`, `request_not_boundable`).
    """
    return _bound_of(asked, target, at, media_of(asked), needs_price=True)


def _bound_of(asked: Asked, target: Target, at: datetime, media: Media, needs_price: bool) -> Bound:
    provider, model = target.key.provider, target.model
    price = _price(asked, target, at)
    if price is None and needs_price:
        raise _unpriced(target)
    fault = boundable.fault_of(asked, provider, model, media)
    if fault is not None and needs_price:
        raise _unboundable(*fault)
    if fault is None:
        input_tokens = boundable.input_tokens(asked, provider, model, media)
    else:
        input_tokens = len(asked.body) // boundable.ESTIMATED_BYTES_PER_TOKEN
    return _with_output(asked, target, price or _FREE, input_tokens)


def _with_output(asked: Asked, target: Target, price: Price, input_tokens: int) -> Bound:
    if asked.endpoint == "embeddings":
        return Bound(price, input_tokens, 0, 1, is_guess=False, least_output_tokens=0)
    own, predicted = _own_maximum(asked), boundable.prediction_tokens(asked, target.key.provider)
    if predicted and own is None:
        # OpenAI refuses a maximum beside a prediction (its guide, "Predicted Outputs"): the model's own.
        own = most_output_tokens(target.model)
    output_tokens = _guess(target, input_tokens) if own is None else own
    return Bound(
        price,
        input_tokens,
        output_tokens,
        _choices(asked),
        is_guess=own is None,
        least_output_tokens=min(output_tokens, LEAST_OUTPUT_TOKENS),
        predicted_tokens=predicted,
    )


def _guess(target: Target, input_tokens: int) -> int:
    """The model's maximum, as far as its window has room beside the input: hosts refuse a larger one (gpt-4's
    two are the same). Nobody's text comes to more than a token for three bytes."""
    most, window = output_bound(target.model), context_window(target.key.provider, target.model)
    if window is None:
        return most
    return min(most, max(LEAST_OUTPUT_TOKENS, window - input_tokens // 3 - boundable.SLACK_TOKENS))


def _own_maximum(asked: Asked) -> int | None:
    """The client's maximum; None where it named none that makes sense, so that ours takes its place."""
    if asked.endpoint == "responses":
        asks = asked.fields.get("max_output_tokens")
    else:
        asks = asked.fields.get("max_completion_tokens")
        asks = asked.fields.get("max_tokens") if asks is None else asks
    return asks if type(asks) is int and asks > 0 else None


def _choices(asked: Asked) -> int:
    """`n`, and vLLM's `best_of`. Hosts read "3" and 3.0 as 3 as well."""
    return max(_number(asked.fields.get(name)) for name in ("n", "best_of"))


def _number(value: object) -> int:
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return 1
    return ceil(min(number, MOST_TOKENS)) if isinstance(number, int | float) and number > 1 else 1


def _price(asked: Asked, target: Target, at: datetime) -> Price | None:
    """The target's price, None also where the request asks for a dearer one that is not known."""
    provider = target.key.provider
    dropped = tuple(name for name in CONTEXT_FIELDS if not _is_context_sent(asked, provider, name))
    price = price_of(target, asked, at, dropped)
    if price is None or price.source == "override":
        return price
    for name in CONTEXT_FIELDS:
        value = asked.fields.get(name)
        is_special = isinstance(value, str) and value not in _USUAL_TIERS and name not in dropped
        if is_special and f"{name}={value}" not in price.source:
            return None
    if asked.fields.get("inference_geo") not in (None, "global"):  # Anthropic's, at 1.1 times the price
        return None
    if "claude" in target.model and _HOUR in asked.body:
        return _with_hours(price)
    return price


def _is_context_sent(asked: Asked, provider: str, name: str) -> bool:
    if name == "service_tier" and provider == "anthropic":
        return asked.fields.get(name) in ("auto", "default")
    return boundable.is_sent(asked, provider, name)


@lru_cache(1024)
def _with_hours(price: Price) -> Price:
    """The price with cache writes at what an hour costs, for the hold."""
    return replace(
        price,
        rates=_hour_rates(price.rates),
        tiers=tuple(replace(tier, rates=_hour_rates(tier.rates)) for tier in price.tiers),
    )


def _hour_rates(rates: Rates) -> Rates:
    return rates._replace(cache_write=max(rates.cache_write, rates.input * _HOUR_RATE))


def _unpriced(target: Target) -> Forbidden:
    return Forbidden(
        f"A budget applies, and the model '{target.model}' has no known price at {target.key.provider} for "
        "what this request asks. Enter it in the `prices` of the provider key.",
        code="model_not_priced",
        param="model",
    )


def _unboundable(place: str, why: str) -> Forbidden:
    return Forbidden(
        f"A budget applies, and what '{place}' may cost cannot be bounded beforehand: {why}. Leave it out, "
        "or call with a key and a workspace that have no budget.",
        code="request_not_boundable",
        param=place,
    )
