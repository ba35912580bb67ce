"""How evenly tokens are spread: choices per expert of a step, and the bias that evens them out.

Counts come from what the forward pass returned, so a layer that is computed again in backward
(activation checkpointing) is counted once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from growmoe.models.router import Router, Routing

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks; with one process, the tensor itself."""


def alone(tensor: Tensor) -> Tensor:
    """The Reduce of a single process."""
    return tensor


class StepCounts:
    """Choices per expert [E] of every MoE layer, over the micro batches and ranks of one step."""

    def __init__(self, reduce: Reduce = alone) -> None:
        self.reduce = reduce
        self.layers: list[Tensor] = []

    def add(self, routing: list[Routing]) -> list[Tensor]:
        """Count one micro batch; returns the sums so far, which the global balance loss needs."""
        new = [self.reduce(routed.counts_E.clone()) for routed in routing]
        self.layers = [a + b for a, b in zip(self.layers, new)] if self.layers else new
        return self.layers

    def clear(self) -> None:
        """Begin another step."""
        self.layers = []


@torch.no_grad()
def update_bias(routers: list[Router], counts: list[Tensor], rate: float) -> None:
    """b_e += rate * sign(mean load - load_e): balancing without a loss (arXiv 2408.15664)."""
    for router, counts_E in zip(routers, counts):
        assert router.bias is not None
        load_E = counts_E.to(torch.float32)
        router.bias.add_(rate * torch.sign(load_E.mean() - load_E))
