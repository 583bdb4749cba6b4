"""Tool-call ids that travel: what one provider minted, in a form that another accepts.

Pure and without memory: the same id gives the same result in every request, so a call and its answer stay
paired, and different ids stay different. An id that is acceptable already passes unchanged.
"""

from __future__ import annotations

import re
from hashlib import sha256

_WORD = re.compile(r"[a-zA-Z0-9_-]+")
_NOT_WORD = re.compile(r"[^a-zA-Z0-9_-]")
_NINE = re.compile(r"[a-zA-Z0-9]{9}")


def word_id(given: str, most: int | None = None) -> str:
    """`given` in letters, digits, `_` and `-` (Anthropic), at most `most` characters (OpenAI: 40)."""
    if _WORD.fullmatch(given) and (most is None or len(given) <= most):
        return given
    kept = _NOT_WORD.sub("_", given)
    if most is not None:
        kept = kept[: most - 9]
    return f"{kept}_{_digest(given)[:8]}"


def short_id(given: str) -> str:
    """`given` in at most 40 characters of any kind (OpenAI)."""
    return given if len(given) <= 40 else word_id(given, 40)


def nine_character_id(given: str) -> str:
    """`given` as exactly nine letters and digits (Mistral)."""
    return given if _NINE.fullmatch(given) else _digest(given)[:9]


def _digest(given: str) -> str:
    return sha256(given.encode("utf-8", "surrogatepass")).hexdigest()
