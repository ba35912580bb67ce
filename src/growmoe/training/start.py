"""An optimizer that does not begin at zero: inherited moments, and new elements at their own rate.

AdamW counts steps per parameter, but a grown parameter holds old elements with moments and new ones
without. The count goes on from the old one, so old elements continue as if nothing had happened;
the update of elements without moments is corrected to what a fresh AdamW would do (`bias_ratio`).
Left alone it would be 0.45 of that at the first step for betas 0.9/0.95, and 3.2 times it, rising
to 6.5, for 0.9/0.999.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from growmoe.recipe import OptimizerModel

_NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class Start:
    """By parameter name; what is not named starts as usual, and holds nothing new."""

    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """AdamW's `step`, `exp_avg` and `exp_avg_sq`."""
    new: dict[str, Tensor] = field(default_factory=dict)
    """True where an element was made by a growth."""
    blank: dict[str, Tensor] = field(default_factory=dict)
    """True where an element of a parameter in `state` has no moments."""


def new_rate(step: int, steps: int, spec: OptimizerModel) -> float:
    """The learning rate of new elements relative to the others', in step `step` (from 0).

    It rises linearly to `new_lr_ratio` over the warm-up and falls back to 1 over as many steps.
    """
    length = warmup_steps(steps, spec)
    if step < length:
        return spec.new_lr_ratio * (step + 1) / length
    if step < 2 * length:
        return spec.new_lr_ratio + (1.0 - spec.new_lr_ratio) * (step + 1 - length) / length
    return 1.0


def warmup_steps(steps: int, spec: OptimizerModel) -> int:
    """Steps of the warm-up of new elements; 0 when there is none."""
    asked = spec.new_warmup
    return round(asked if asked >= 1 else asked * steps)


def bias_ratio(step: int, before: float, beta1: float, beta2: float) -> float:
    """Fresh AdamW's bias correction after `step` + 1 steps over that of a count that began at
    `before`."""

    def correction(count: float) -> float:
        return float((1 - beta2**count) ** 0.5 / (1 - beta1**count))

    return correction(step + 1) / correction(before + step + 1)


class Newcomers:
    """Scales the updates of new elements, weight decay included, after the optimizer has stepped.

    Costs nothing in steps where they move like the others.
    """

    def __init__(self, model: nn.Module, start: Start, spec: OptimizerModel, steps: int) -> None:
        self.masks, self.spec, self.steps = (start.new, start.blank), spec, steps
        self.parameters = {
            name: parameter for name, parameter in model.named_parameters()
            if name in start.new or name in start.blank
        }  # fmt: skip
        # read now: the optimizer counts on in the same tensors
        self.counts = {name: float(state["step"]) for name, state in start.state.items()}

    def factors(self, name: str, step: int) -> tuple[float, float]:
        """Of new elements, and of elements without moments; one element may need both."""
        rate = new_rate(step, self.steps, self.spec) if name in self.masks[0] else 1.0
        if name not in self.masks[1]:
            return rate, 1.0
        ratio = bias_ratio(step, self.counts[name], self.spec.beta1, self.spec.beta2)
        return rate, 1.0 if abs(ratio - 1.0) < _NEGLIGIBLE else ratio

    @contextmanager
    def paced(self, step: int) -> Iterator[None]:
        """The optimizer steps inside; then new elements go a part of their way, or further."""
        factors = {name: self.factors(name, step) for name in self.parameters}
        with torch.no_grad():
            before = {
                name: self.parameters[name].clone()
                for name, found in factors.items() if found != (1.0, 1.0)
            }  # fmt: skip
            yield
            for name, old in before.items():
                parameter = self.parameters[name]
                for masks, factor in zip(self.masks, factors[name]):
                    if factor != 1.0:
                        scaled = old + factor * (parameter - old)
                        parameter.copy_(torch.where(masks[name], scaled, parameter))
