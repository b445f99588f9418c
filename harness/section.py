"""What the sections of a config have in common: the base class and the kinds of values. The sections: `config.py`."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _keep_rule(value: object) -> object:
    from harness.checkpoint.rules import keep_rule

    text = f"last {value}" if type(value) is int else value
    if isinstance(text, str):
        keep_rule(text)
    return text


def _task(value: str) -> str:
    from harness.named import check_name
    from harness.task import BUILT_IN

    return check_name(value, BUILT_IN)


def _optimizer(value: str) -> str:
    from harness.named import check_name
    from harness.optim import BUILT_IN

    return check_name(value, BUILT_IN)


KeepRule = Annotated[str, BeforeValidator(_keep_rule)]
"""Checked where it is written; a number n is `last n`."""
TaskName = Annotated[str, AfterValidator(_task)]
OptimizerName = Annotated[str, AfterValidator(_optimizer)]


class Section(BaseModel):
    """Common to all sections: unknown keys refused, values immutable, no silent conversions (`"5"` is not a number)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)
