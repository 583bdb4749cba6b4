"""The kinds of field in a management request: names, money, times, lists, each with its bounds.

JSON is taken strictly; a form's strings are read as what the field is. `schemas.py` puts them together.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StringConstraints,
)
from pydantic_core import PydanticCustomError

NANO = 10**9
MOST_USD = 10**9
MOST_PRICE_USD = 10**6  # per million tokens: with nine decimals 15 digits, which a float keeps exactly
MOST_MODELS = 500
RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
LOCAL_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?", re.ASCII)
WHOLE = re.compile(r"[+-]?\d{1,18}", re.ASCII)
BOOLS = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}


def is_storable(text: str) -> bool:
    """Whether both databases take this text: no NUL, no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def load_json(text: str) -> Any:
    """JSON with exact decimals, without NaN and Infinity. Raises ValueError."""
    try:
        return json.loads(text, parse_float=Decimal, parse_constant=_refuse_constant)
    except (RecursionError, InvalidOperation) as exc:
        raise ValueError("JSON too deep, or a number too large") from exc


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def moment(text: str) -> datetime:
    """An RFC 3339 time or a date (its midnight, UTC), as aware UTC. Raises ValueError."""
    text = re.sub(r" (\d\d:\d\d)$", r"+\1", text)  # a `+` that was not escaped in a query string
    if re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
        text += "T00:00:00Z"
    if not RFC3339.fullmatch(text):
        raise ValueError("not a time of RFC 3339")
    try:
        time = datetime.fromisoformat(text.upper()).astimezone(UTC)
    except OverflowError as exc:
        raise ValueError("out of range") from exc
    if not 1970 <= time.year < 9000:  # leaves room to reckon with it
        raise ValueError("out of range")
    return time


def fault(message: str) -> PydanticCustomError:
    return PydanticCustomError("fault", "{message}", {"message": message})


def _from_form(convert: Callable[[str], Any]) -> BeforeValidator:
    """Reads a form's text as what the field is; JSON passes untouched."""

    def read(value: Any, info: Any) -> Any:
        is_form = bool(info.context and info.context.get("form"))
        return convert(value) if is_form and isinstance(value, str) else value

    return BeforeValidator(read)


def _form_whole(text: str) -> Any:
    return int(text) if WHOLE.fullmatch(text.strip()) else text


def _form_json(text: str) -> Any:
    try:
        return load_json(text)
    except ValueError:
        raise fault("This is not JSON.") from None


def _form_number(text: str) -> Any:
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        return text
    return number if number.is_finite() else text


def _form_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _form_time(text: str) -> str:
    """What `<input type=datetime-local>` sends has no zone: it is taken as UTC."""
    if not LOCAL_TIME.fullmatch(text):
        return text
    return (text if text.count(":") > 1 else f"{text}:00") + "Z"


def _line(text: str) -> str:
    if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in text):
        raise fault("Must be one line without control characters.")
    return text


def _visible(text: str) -> str:
    """What can travel in a header."""
    if not text.isascii() or not text.isprintable():
        raise fault("Must be printable ASCII characters.")
    return text


def _without_slash(text: str) -> str:
    if "/" in text:
        raise fault("Must not contain '/': the name stands before it in prefix/model.")
    return text


def _email(text: str) -> str:
    text = text.strip().lower()
    local, at, host = text.partition("@")
    if not (local and at and host) or "@" in host or re.search(r"\s", text) or len(text) > 254:
        raise fault("Must be an e-mail address.")
    return _line(text)


def exact(value: Any, most: int, digits: int = 9) -> Fraction:
    """A number from 0 to `most` with at most nine decimals. Raises a fault."""
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise fault("Must be a number.")
    number = Decimal(value)
    _, figures, exponent = number.as_tuple()
    if not number.is_finite() or not 0 <= number <= most:
        raise fault(f"Must be from 0 to {most}.")
    # The first two keep a number with a million digits from being worked out.
    if len(figures) > 40 or int(exponent) < -40 or (Fraction(number) * 10**digits).denominator != 1:
        raise fault(f"Must have at most {digits} decimals.")
    return Fraction(number)


def _nano(value: Any) -> int | None:
    return None if value is None else int(exact(value, MOST_USD) * NANO)


def _price(value: Any) -> float | int:
    number = exact(value, MOST_PRICE_USD)
    return int(number) if number.denominator == 1 else float(number)


def _expiry(value: Any) -> datetime | None:
    if value is None:
        return None
    if not isinstance(value, str) or not RFC3339.fullmatch(value):
        raise fault("Must be a time with a zone, such as 2030-01-31T00:00:00Z.")
    try:
        time = moment(value)
    except ValueError:
        raise fault("This time does not exist.") from None
    if time <= datetime.now(UTC):
        raise fault("Must be in the future.")
    return time


def or_default(default: Any) -> BeforeValidator:
    """null puts the default back."""
    return BeforeValidator(lambda value: default if value is None else value)


def _name(most: int) -> Any:
    return StringConstraints(strip_whitespace=True, min_length=1, max_length=most)


Email = Annotated[str, Field(max_length=1000), AfterValidator(_email)]
Password = Annotated[str, Field(min_length=8, max_length=256)]
LongName = Annotated[str, _name(200), AfterValidator(_line)]
ShortName = Annotated[str, _name(100), AfterValidator(_line)]
KeyName = Annotated[ShortName, AfterValidator(_without_slash)]
ModelName = Annotated[str, _name(200), AfterValidator(_line)]
Models = Annotated[list[ModelName], Field(min_length=1, max_length=MOST_MODELS), _from_form(_form_lines)]
Secret = Annotated[str, StringConstraints(strip_whitespace=True, max_length=4000), AfterValidator(_visible)]
Whole = _from_form(_form_whole)
JsonText = _from_form(_form_json)
Flag = Annotated[bool, _from_form(lambda text: BOOLS.get(text.strip().lower(), text))]
Priority = Annotated[int, Field(ge=-1_000_000, le=1_000_000), or_default(0), Whole]
Weight = Annotated[int, Field(ge=1, le=1_000_000), or_default(1), Whole]
Days = Annotated[int, Field(ge=1, le=36_500), Whole]
Limit = Annotated[int, Field(ge=1, le=10**9), Whole]
Money = Annotated[int | None, BeforeValidator(_nano), _from_form(_form_number)]  # nano-dollars
Price = Annotated[int | float, BeforeValidator(_price)]
Expiry = Annotated[datetime | None, BeforeValidator(_expiry), _from_form(_form_time)]
Period = Annotated[Literal["day", "week", "month", "total"], or_default("month")]
BaseUrl = Annotated[str, _name(2000), AfterValidator(_line)]
Provider = Annotated[str, _name(40)]
