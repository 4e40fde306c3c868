"""What all settings share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["LARGEST_INTEGER", "EpisodeLimit", "Numbers", "Probability", "Seed", "Spec", "Table", "Tables"]

LARGEST_INTEGER = 2**53 - 1  # the largest integer that every JSON reader keeps exact


class Spec(BaseModel):
    """Base of all settings: frozen, strict, finite, no unknown fields."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=False,
        serialize_by_alias=True,
        validate_by_alias=True,
        validate_by_name=True,
    )


EpisodeLimit = Annotated[int, Field(ge=1, le=1_000_000)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]

# one fault is enough to refuse a table; listing millions of them would take minutes and gigabytes
Numbers = Annotated[list[float], Field(fail_fast=True)]
Table = Annotated[list[Numbers], Field(fail_fast=True)]
Tables = Annotated[list[Table], Field(fail_fast=True)]
