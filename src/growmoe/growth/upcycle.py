"""Sparse upcycling: every expert a copy of the dense feed-forward, and a fresh router.

With identical experts the output is (sum of the top-k weights) * f(x): exact when that sum is 1,
so with renormalised weights whatever the router says. Sparse Upcycling (arXiv 2212.05055);
Scale-Out of AquilaMoE.
"""

import torch
from torch import Tensor

from growmoe.errors import UsageError
from growmoe.growth.axes import generator
from growmoe.models.checkpoint import Source
from growmoe.models.config import ModelConfig, MoEConfig

_MOE_FAMILY = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}


def expert_counts(layers: int, experts: int, where: str) -> tuple[int, ...]:
    """Experts per layer: `all`, `second` (every second layer, 2, 4, ... counted from 1), or a
    comma-separated list of layer numbers counted from 0."""
    if where == "all":
        return (experts,) * layers
    if where == "second":
        return tuple(experts if layer % 2 else 0 for layer in range(layers))
    try:
        chosen = {int(part) for part in where.split(",")}
    except ValueError:
        raise UsageError(
            f"layers '{where}' is neither 'all', 'second' nor a list like '3,5,7'"
        ) from None
    if outside := sorted(layer for layer in chosen if not 0 <= layer < layers):
        raise UsageError(f"layer {outside[0]} is not one of the layers 0 to {layers - 1}")
    return tuple(experts if layer in chosen else 0 for layer in range(layers))


def upcycled_config(
    source: ModelConfig, experts: int, top_k: int, layers: str = "all", renormalize: bool = True
) -> ModelConfig:
    """The target shape; raises UsageError when the source is a MoE or experts < top_k."""
    if source.moe is not None:
        raise UsageError("the source is a mixture of experts already")
    if experts < top_k:
        raise UsageError(f"experts ({experts}) are fewer than top-k ({top_k})")
    if top_k < 1:
        raise UsageError(f"top-k must be at least 1, not {top_k}")
    counts = expert_counts(source.num_layers, experts, layers)
    moe = MoEConfig(
        experts=counts, top_k=top_k, ffn_size=source.ffn_size, renormalize=renormalize
    )  # fmt: skip
    return source.replace(moe=moe, family=_MOE_FAMILY.get(source.family, source.family))


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
