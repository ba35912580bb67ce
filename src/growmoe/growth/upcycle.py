"""Sparse upcycling: every expert a copy of the dense feed-forward, and a fresh router.

With identical experts the output is (sum of the top-k weights) * f(x): exact when that sum is 1,
so with renormalised weights whatever the router says. Sparse Upcycling (arXiv 2212.05055);
Scale-Out of AquilaMoE.
"""

import torch
from torch import Tensor

from growmoe.growth.axes import generator
from growmoe.models.checkpoint import Source
from growmoe.models.shapes import upcycled_config


class Upcycled:
    """`source` (dense) with its feed-forward copied into experts; see `upcycled_config`."""

    def __init__(
        self,
        source: Source,
        *,
        experts: int = 8,
        top_k: int = 2,
        router_std: float = 0.02,
        layers: str = "all",
        renormalize: bool = True,
        seed: int = 0,
    ) -> None:
        self.source, self.router_std, self.seed = source, router_std, seed
        self.config = upcycled_config(source.config, experts, top_k, layers, renormalize)
        self.dtype = source.dtype

    def load(self, name: str) -> Tensor:
        """A copy of the dense tensor, or a router row set drawn from N(0, router_std)."""
        if name.endswith("moe.router.weight"):
            count = self.config.experts_in(int(name.split(".")[1]))
            shape = (count, self.config.hidden_size)
            return torch.randn(shape, generator=generator(self.seed, name)) * self.router_std
        before, routed, expert = name.partition("moe.experts.")
        if routed:
            name = f"{before}mlp.{expert.partition('.')[2]}"
        return self.source.load(name)
