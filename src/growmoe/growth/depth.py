"""Deeper models: identity blocks (exact), stacked or interpolated layers (lossy)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from growmoe.errors import UsageError
from growmoe.models.checkpoint import Source
from growmoe.models.shapes import deepened_config

Method = Literal["identity", "stack", "interpolate"]


@dataclass(frozen=True)
class DepthMap:
    """For every new layer the old layer it copies, and whether its branches start at zero."""

    source: tuple[int, ...]
    silent: frozenset[int] = frozenset()


def depth_map(old: int, new: int, method: Method, guard: tuple[int, int] = (0, 0)) -> DepthMap:
    """The map from `old` to `new` layers; `guard` keeps that many first and last layers single.

    - identity: copies with silent branches, spread evenly (LLaMA-Pro);
    - stack: layer l copies l mod L (StackBERT);
    - interpolate: layer l copies floor(l L / L'), the formula of AquilaMoE's eq. (3) with the
      printed fraction turned over (as printed it indexes past the source).
    """
    if new < old:
        raise UsageError(f"{new} layers are fewer than the source's {old}")
    first, last = guard
    middle, grown = old - first - last, new - first - last
    if min(first, last) < 0 or middle < 1:
        raise UsageError(f"guard {first}+{last} leaves none of {old} layers to duplicate")
    if method == "identity":
        return _identity_map(old, new)
    if method == "stack":
        inner = [layer % middle for layer in range(grown)]
    else:
        inner = [layer * middle // grown for layer in range(grown)]
    layers = [*range(first), *(first + layer for layer in inner), *range(old - last, old)]
    return DepthMap(tuple(layers))


def _identity_map(old: int, new: int) -> DepthMap:
    extra = new - old
    after = [(copy + 1) * old // extra - 1 for copy in range(extra)] if extra else []
    layers: list[int] = []
    silent = set()
    for layer in range(old):
        layers.append(layer)
        for _ in range(sum(1 for place in after if max(place, 0) == layer)):
            silent.add(len(layers))
            layers.append(layer)
    return DepthMap(tuple(layers), frozenset(silent))


class Deepened:
    """`source` with its layers rearranged by a DepthMap.

    With `halve_branches`, o and down of a layer that occurs c times are divided by c, which makes
    a duplicated residual step two half steps (an Euler half-step): far less loss, still not exact.
    """

    def __init__(self, source: Source, depth: DepthMap, *, halve_branches: bool = False) -> None:
        self.source, self.depth, self.halve_branches = source, depth, halve_branches
        self.config = deepened_config(source.config, depth.source)
        self.dtype = source.dtype

    def load(self, name: str) -> Tensor:
        """The tensor of the layer that is copied; zeros for what a silent layer would add."""
        if not name.startswith("layers."):
            return self.source.load(name)
        _, layer, rest = name.split(".", 2)
        old = self.depth.source[int(layer)]
        tensor = self.source.load(f"layers.{old}.{rest}")
        if rest.split(".")[-2] not in ("o", "down"):
            return tensor
        if int(layer) in self.depth.silent:
            return torch.zeros_like(tensor)
        copies = self.depth.source.count(old)
        return tensor / copies if self.halve_branches and copies > 1 else tensor
