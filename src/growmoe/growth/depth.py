"""Deeper models: identity blocks (exact), stacked, interpolated, up-scaled or chosen layers."""

import torch
from torch import Tensor

from growmoe.models.checkpoint import Source
from growmoe.models.config import tensor_shapes
from growmoe.models.safetensors_io import DTYPES
from growmoe.models.shapes import DepthMap, deepened_config


class Deepened:
    """`source` with its layers rearranged by a DepthMap.

    With `halve_branches`, o and down of a layer that occurs c times are divided by c, which makes
    a duplicated residual step two half steps (an Euler half-step): far less loss, still not exact.
    """

    def __init__(self, source: Source, depth: DepthMap, *, halve_branches: bool = False) -> None:
        self.source, self.depth, self.halve_branches = source, depth, halve_branches
        self.config = deepened_config(source.config, depth.source)
        self.dtype = source.dtype
        self._shapes = tensor_shapes(self.config)

    def load(self, name: str) -> Tensor:
        """The tensor of the layer that is copied; zeros for what a silent layer would add."""
        if self.depth.is_silent(name):
            return torch.zeros(self._shapes[name], dtype=DTYPES[self.dtype])
        tensor = self.source.load(self.depth.origin(name))
        if not name.startswith("layers.") or name.split(".")[-2] not in ("o", "down"):
            return tensor
        copies = self.depth.source.count(self.depth.source[int(name.split(".")[1])])
        return tensor / copies if self.halve_branches and copies > 1 else tensor
