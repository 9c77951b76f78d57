"""What every section of a run file is made of."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Threads = Annotated[int, Field(ge=1, le=4096)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Byte = Annotated[int, Field(ge=0, le=255)]
Widths = Annotated[tuple[Count, ...], Field(min_length=1)]


class Section(BaseModel):
    """One section of a run file: unknown fields are refused, and infinity and NaN; values cannot be changed.

    Numbers may be written as text, as `${field}` gives them, but not as true or false: YAML reads those in yes and on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_no_truth_values(cls, value: Any, info: ValidationInfo) -> Any:
        several = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(one, bool) for one in several) and _is_of_numbers(cls, info.field_name or ""):
            raise ValueError("Input should be a number, not true or false")
        return value


@cache
def _is_of_numbers(section: type[BaseModel], field: str) -> bool:
    kinds = _kinds(section.model_fields[field].annotation)
    return bool not in kinds and any(kind in (int, float) or type(kind) is int for kind in kinds)


def _kinds(annotation: Any) -> set[Any]:
    inner = get_args(annotation)
    return {annotation}.union(*map(_kinds, inner)) if inner else {annotation}
