"""What the metrics of a training stage say about its routers and experts, in order for plotting.

Runs made by older versions lack some or all of it; what is missing is left out.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

COSINES = ("cosine_min", "cosine_mean", "cosine_max")


@dataclass
class Lines:
    """Numbers over training steps: one list per line, as long as `steps`."""

    steps: list[int] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)

    def add(self, step: int, numbers: list[float]) -> None:
        """Append one number to every line; a record of another shape is passed over."""
        if not self.values:
            self.values = [[] for _ in numbers]
        if len(numbers) != len(self.values) or not all(map(math.isfinite, numbers)):
            return
        self.steps.append(step)
        for line, number in zip(self.values, numbers):
            line.append(number)

    @property
    def window(self) -> int:
        """How many steps a smoothed value is the mean of."""
        return max(1, len(self.steps) // 40)

    def any(self) -> bool:
        """Whether anything but zeros was seen."""
        return any(number for line in self.values for number in line)


@dataclass
class RoutingHistory:
    """One training stage with experts. Lines are MoE layers, but for `norms`: one each."""

    name: str
    measures: dict[str, Lines] = field(default_factory=dict)
    """By the names of `training.observing`: max_vio, load_entropy, ..."""
    cosines: dict[str, Lines] = field(default_factory=dict)
    norms: dict[str, Lines] = field(default_factory=dict)
    """Gradient norm by group of parameters."""
    load: list[list[float]] = field(default_factory=list)
    """[layer][expert] share of the routed choices on the validation text, at the end."""
    ranks: list[list[float]] = field(default_factory=list)
    """[layer][expert] rank by credit at the end; the number of experts is the best."""

    def __bool__(self) -> bool:
        return bool(self.measures or self.cosines or self.load)

    @property
    def averaged(self) -> int:
        """Steps that the numbers of `table` are means of."""
        return max((lines.window for lines in self.measures.values()), default=1)

    def table(self) -> list[dict[str, float]]:
        """One row per MoE layer: every measure where the curves end."""
        layers = [*self.measures.values(), *self.cosines.values()]
        rows = []
        for layer in range(max((len(lines.values) for lines in layers), default=0)):
            row = {name: _end(lines, layer) for name, lines in self.measures.items()}
            if "dead" in self.measures:  # of the recent load: a mean already
                row["dead"] = self.measures["dead"].values[layer][-1]
            for name, lines in self.cosines.items():
                row[name] = lines.values[layer][-1]
            rows.append(row)
        return rows


def _end(lines: Lines, layer: int) -> float:
    last = lines.values[layer][-lines.window :]
    return sum(last) / len(last)


def routing_history(name: str, records: Iterable[dict[str, Any]]) -> RoutingHistory:
    """Collect the records of a metrics.jsonl. Of a dense model the result is false."""
    history = RoutingHistory(name)
    for record in records:
        step = record["step"]
        for measure, numbers in record.get("routing", {}).items():
            history.measures.setdefault(measure, Lines()).add(step, numbers)
        for group, norm in record.get("grad_norms", {}).items():
            history.norms.setdefault(group, Lines()).add(step, [norm])
        experts = record.get("experts", {})
        for cosine in COSINES:
            if cosine in experts:
                history.cosines.setdefault(cosine, Lines()).add(step, experts[cosine])
        history.ranks = experts.get("rank") or history.ranks
        history.load = record.get("expert_load") or history.load
    for found in (history.measures, history.cosines, history.norms):
        for key in [key for key, lines in found.items() if not lines.steps or not lines.values]:
            del found[key]
    return history
