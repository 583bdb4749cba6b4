"""What a management request may say: one pydantic model per action, for JSON and forms alike.

All problems come back together. What needs the catalogue or the database is checked by the views.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from perpetuo.errors import InvalidRequest
from perpetuo.fields import (
    MOST_MODELS,
    BaseUrl,
    Days,
    Email,
    Expiry,
    Flag,
    JsonText,
    KeyName,
    Limit,
    LongName,
    ModelName,
    Models,
    Money,
    Password,
    Period,
    Price,
    Priority,
    Provider,
    Secret,
    ShortName,
    Weight,
    is_storable,
    or_default,
)

SECRETS = ("api_key", "password", "current_password")  # empty in a form means unchanged
ABSENT: Any = None  # the default of what may be left out but not be null

Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], value: Any, *, form: bool = False) -> Model:
    """`value` as `model`. Raises InvalidRequest with every problem, each with its field."""
    if not isinstance(value, dict):
        raise invalid(None, "The body must be an object.")
    problems = [{"param": path or None, "message": message} for path, message in _unstorable(value)]
    if problems:
        raise _invalid(problems)
    try:
        return model.model_validate(value, context={"form": form})
    except ValidationError as exc:
        raise _invalid([_problem(dict(error)) for error in exc.errors(include_url=False)]) from None


def invalid(param: str | None, message: str) -> InvalidRequest:
    """The same error for one problem that was found elsewhere."""
    return _invalid([{"param": param, "message": message}])


def _invalid(problems: list[dict[str, str | None]]) -> InvalidRequest:
    first = problems[0]
    message = f"{first['param']}: {first['message']}" if first["param"] else str(first["message"])
    return InvalidRequest(message, code="invalid", param=first["param"], details=problems)


def _problem(error: dict[str, Any]) -> dict[str, str | None]:
    known = {"missing": "This field is required.", "extra_forbidden": "This field is not known."}
    message = known.get(error["type"]) or f"{error['msg'].rstrip('.')}."
    return {"param": ".".join(str(part) for part in error["loc"]) or None, "message": message}


def _unstorable(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Strings that a database refuses, with their place. A field name at fault is not repeated."""
    if isinstance(value, str) and not is_storable(value):
        yield path, "This text has a character that cannot be stored."
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not is_storable(key):
                yield path, "A name in here has a character that cannot be stored."
            else:
                yield from _unstorable(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _unstorable(inner, f"{path}.{index}")


class Action(BaseModel):
    """What one request may change. `changes` has the fields that were sent, nothing else."""

    model_config = ConfigDict(extra="forbid", strict=True)

    def changes(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)


class Signup(Action):
    email: Email
    password: Password
    name: LongName | None = None


class Login(Action):
    email: Email
    password: Annotated[str, Field(min_length=1, max_length=256)]
    next: Annotated[str, Field(max_length=2000)] | None = None


class ChangeMe(Action):
    name: LongName | None = None
    password: Password = ABSENT
    current_password: Annotated[str, Field(max_length=256)] | None = None


class CreateWorkspace(Action):
    name: LongName


class Target(Action):
    model: ModelName
    priority: Annotated[int, Field(ge=-1_000_000, le=1_000_000)] = ABSENT
    weight: Annotated[int, Field(ge=1, le=1_000_000)] = ABSENT


Targets = Annotated[list[Target], Field(min_length=1, max_length=100)]
Routes = Annotated[dict[ModelName, Targets], Field(max_length=MOST_MODELS), or_default({}), JsonText]


class ChangeWorkspace(Action):
    name: LongName = ABSENT
    log_bodies: Flag = ABSENT
    retention_days: Days | None = None
    monthly_budget_usd: Money = None
    routes: Routes = ABSENT


class Prices(Action):
    input: Price
    cached_input: Price = ABSENT
    cache_write: Price = ABSENT
    output: Price


PriceTable = Annotated[dict[ModelName, Prices], Field(max_length=MOST_MODELS), JsonText]


class CreateProviderKey(Action):
    provider: Provider
    api_key: Secret | None = None
    name: KeyName | None = None
    base_url: BaseUrl | None = None
    models: Models | None = None
    priority: Priority = 0
    weight: Weight = 1
    prices: PriceTable | None = None
    enabled: Flag = True


class ChangeProviderKey(Action):
    provider: Provider = ABSENT
    api_key: Secret = ABSENT
    name: KeyName | None = None
    base_url: BaseUrl | None = None
    models: Models | None = None
    priority: Priority = 0
    weight: Weight = 1
    prices: PriceTable | None = None
    enabled: Flag = ABSENT


class CreateApiKey(Action):
    name: ShortName
    expires_at: Expiry = None
    models: Models | None = None
    rpm_limit: Limit | None = None
    tpm_limit: Limit | None = None
    budget_usd: Money = None
    budget_period: Period = "month"


class ChangeApiKey(CreateApiKey):
    name: ShortName = ABSENT
