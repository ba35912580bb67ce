"""The types of a recipe's fields, and what new and upcycled models say alike. Imports no torch."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _whole_number(value: Any) -> Any:
    """1e6 is a whole number; true and "4" are not numbers."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool | str):
        raise ValueError(f"input should be a valid integer, not {value!r}")
    return value


Count = Annotated[int, BeforeValidator(_whole_number), Field(ge=1)]
Seed = Annotated[int, BeforeValidator(_whole_number), Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Strict(BaseModel):
    """Unknown keys are errors, and a checked stage does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def numbers(value: Any) -> Any:
    """'4,4,8' (as on the command line) is a list of numbers; '8' is one number."""
    if not isinstance(value, str) or not re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", value):
        return value
    found = [int(part) for part in value.split(",")]
    return found if "," in value else found[0]


def _expert_counts(value: Any) -> Any:
    found = numbers(value)
    if isinstance(found, str) or (found == 0 and not isinstance(found, bool)):
        raise ValueError("give a number of experts, or one per layer as 0,4,8 (0 is a dense layer)")
    return found


def _layer_list(value: Any) -> Any:
    """A YAML list or a single number, as the text that `--layers` takes."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Layer = Annotated[int, Field(ge=0)]
Residual = Literal["none", "sum", "softmax2", "sigmoid_gate"]


class ExpertLayout(Strict):
    """Where experts stand and how tokens reach them, in new and in upcycled models alike."""

    experts: Annotated[Count | tuple[Layer, ...], BeforeValidator(_expert_counts)] = 8
    """Routed experts of every layer, or a list with one number per layer (0 is a dense layer)."""
    top_k: Count = 2
    layers: Annotated[str, BeforeValidator(_layer_list)] = "all"
    """all, second (2, 4, ... counted from 1), first_half, second_half, or a list like [3, 5, 7]
    or '3,5,7' (from 0)."""
    pyramid: Layer = 0
    """This many of the last MoE layers get twice as many experts (Pyramid-MoE; PR-MoE: 2)."""
    groups: Count = 1
    """Experts stand in groups; a token visits those of its best `top_groups` groups only."""
    top_groups: Count = 1
    residual: Residual = "none"
    """A fixed branch beside the experts, and how it is mixed (Residual-MoE, shared expert)."""

    @model_validator(mode="after")
    def _enough(self) -> "ExpertLayout":
        if isinstance(self.experts, int) and self.experts < self.top_k:
            raise ValueError(f"experts ({self.experts}) are fewer than top_k ({self.top_k})")
        if self.pyramid and not isinstance(self.experts, int):
            raise ValueError("pyramid contradicts a list of experts, which says it all")
        if self.top_groups != 1 and self.groups == 1:
            raise ValueError("top_groups needs groups")
        if self.top_groups > self.groups:
            raise ValueError(f"top_groups {self.top_groups} is more than groups {self.groups}")
        counts = [self.experts] if isinstance(self.experts, int) else self.experts
        for count in sorted({count for count in counts if count}):
            if count % self.groups:
                raise ValueError(f"{count} experts are not a multiple of groups {self.groups}")
            if count // self.groups * self.top_groups < self.top_k:
                raise ValueError(
                    f"{self.top_groups} of {self.groups} groups hold fewer than top_k "
                    f"({self.top_k}) of {count} experts"
                )
        return self
