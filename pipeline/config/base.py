"""What every section of a run file is made of."""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Threads = Annotated[int, Field(ge=1, le=4096)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Byte = Annotated[int, Field(ge=0, le=255)]
Widths = Annotated[tuple[Count, ...], Field(min_length=1)]
_WORDS = "words"
Words = Annotated[str, _WORDS]
"""Text for people or models: an address in it is none to go to."""

LOGIN = "login"
"""The type of the error of an address that holds one."""
_ADDRESS = re.compile(r"\s*([a-z][a-z0-9+.-]*)://(.*)", re.IGNORECASE | re.DOTALL)


class Section(BaseModel):
    """One section of a run file: unknown fields are refused, and infinity and NaN; values cannot be changed.

    Numbers may be written as text, as `${field}` gives them, but not as true or false: YAML reads those in yes and on.
    Addresses hold no user, password or token, since run files are logged, and kept with what they made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_no_truth_values(cls, value: Any, info: ValidationInfo) -> Any:
        several = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(one, bool) for one in several) and _is_of_numbers(cls, info.field_name or ""):
            raise ValueError("Input should be a number, not true or false")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _addresses_hold_no_login(cls, value: Any, info: ValidationInfo) -> Any:
        several = value if isinstance(value, list | tuple) else (value,)
        is_found = any(isinstance(one, str) and _holds_login(one) for one in several)
        if is_found and _WORDS not in _kinds_of(cls, info.field_name or ""):
            raise PydanticCustomError(LOGIN, "an address with a user, a password or a query in it")
        return value

    def with_changes(self, *changes: Self) -> Self:
        """These settings, but for the fields that are set in `changes`; later ones win."""
        return self.model_copy(update={name: getattr(one, name) for one in changes for name in one.model_fields_set})


def _holds_login(text: str) -> bool:
    found = _ADDRESS.match(text)
    if found is None:
        return False
    scheme, rest = found.groups()
    if scheme.lower() == "s3":  # in names of objects anything may be
        return bool(re.search("[@:]", rest.partition("/")[0]))
    return "@" in rest or "?" in rest


@cache
def _kinds_of(section: type[BaseModel], field: str) -> set[Any]:
    known = section.model_fields[field]
    return _kinds(known.annotation).union(one for one in known.metadata if isinstance(one, str))


@cache
def _is_of_numbers(section: type[BaseModel], field: str) -> bool:
    kinds = _kinds_of(section, field)
    return bool not in kinds and any(kind in (int, float) or type(kind) is int for kind in kinds)


def _kinds(annotation: Any) -> set[Any]:
    inner = get_args(annotation)
    return {annotation}.union(*map(_kinds, inner)) if inner else {annotation}
