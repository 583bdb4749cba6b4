"""OpenAI's `reasoning_effort` as Anthropic's thinking: adaptive where the model decides, else a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perpetuo.errors import InvalidRequest
from perpetuo.providers.anthropic_models import Capabilities

_MIN_BUDGET = 1_024
_BUDGETS = {
    "minimal": 1_024,
    "low": 2_048,
    "medium": 10_000,
    "high": 16_384,
    "xhigh": 32_768,
    "max": 32_768,
}


@dataclass(frozen=True, slots=True)
class Effort:
    """`thinking` and `output_config.effort` for Anthropic, None for neither of it."""

    thinking: dict[str, Any] | None = None
    effort: str | None = None
    is_dropped: bool = False


def read_effort(
    fields: Mapping[str, Any], able: Capabilities, max_tokens: int, *, may_think_manually: bool
) -> Effort:
    """What `reasoning_effort` means for a model. Raises InvalidRequest for a word that is none."""
    asked = fields.get("reasoning_effort")
    if asked is None:
        return Effort()
    if not isinstance(asked, str) or (asked != "none" and asked not in _BUDGETS):
        raise InvalidRequest("'reasoning_effort' is not a value that is known.", param="reasoning_effort")
    if able.thinking == "adaptive":
        return _adaptive(asked, able)
    if asked == "none":
        return Effort()
    # The budget is part of max_tokens, and must leave room for an answer.
    budget = min(_BUDGETS[asked], max_tokens - 1)
    if able.thinking == "none" or not may_think_manually or budget < _MIN_BUDGET:
        return Effort(is_dropped=True)
    return Effort({"type": "enabled", "budget_tokens": budget})


def _adaptive(asked: str, able: Capabilities) -> Effort:
    if asked == "none":
        if able.thinking_off is None:
            return Effort(effort="low")
        return Effort({"type": able.thinking_off})
    wanted = "low" if asked == "minimal" else asked
    if wanted not in able.efforts:
        wanted = "max" if "max" in able.efforts else "high"
    # The newer models leave the text of their thoughts out unless it is asked for.
    return Effort({"type": "adaptive", "display": "summarized"}, wanted)


def is_thinking(thinking: object) -> bool:
    """Does a request with this `thinking` think?"""
    return isinstance(thinking, dict) and thinking.get("type") in ("enabled", "adaptive")


def fit_thinking(body: dict[str, Any]) -> bool:
    """Make the client's own budget of thoughts fit into a maximum that it did not choose; False where there
    is no room for thoughts, so that there are none."""
    thinking, most = body.get("thinking"), body["max_tokens"] - 1
    budget = thinking.get("budget_tokens") if isinstance(thinking, dict) else None
    if type(budget) is not int or budget <= most:
        return True
    if most < _MIN_BUDGET:
        del body["thinking"]
        return False
    body["thinking"] = {**body["thinking"], "budget_tokens": most}
    return True
