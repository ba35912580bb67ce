"""Sparse upcycling (Scale-Out): every feed-forward becomes a mixture of experts made from it.

Experts are copies (or slices, noisy, partly re-drawn or permuted copies) of the dense feed-forward,
scaled so that what the router combines adds up to the dense output; `models.upcycling` says when it
does for every token. Sparse Upcycling (arXiv 2212.05055), virtual groups (arXiv 2410.07524),
Drop-Upcycling (ICLR 2025), the fixed branch of DeepSpeed-MoE and Qwen2-MoE.
"""

import torch
from torch import Tensor

from growmoe.growth.axes import CHUNK_ELEMENTS, generator
from growmoe.growth.perturb import add_noise
from growmoe.models.checkpoint import Source
from growmoe.models.safetensors_io import DTYPES
from growmoe.models.upcycling import Upcycling, dense_origin, upcycled_config


class Upcycled:
    """`source` (dense) with its feed-forward copied into experts; see Upcycling."""

    def __init__(self, source: Source, up: Upcycling, dtype: str | None = None) -> None:
        self.source, self.up = source, up
        self.config = upcycled_config(source.config, up)
        self.dtype = dtype or source.dtype

    def load(self, name: str) -> Tensor:
        """The tensor of the MoE: copied, scaled, or new (router, mixing coefficients)."""
        origin = dense_origin(name)
        if origin is None:
            return self._new(name)
        if not self._in_moe_layer(name):
            return self.source.load(origin)
        if ".moe.experts." in name:
            return self._expert(name, origin)
        if ".mlp." in name and name.split(".")[-2] == "down":
            return _scaled(self.source.load(origin), self.up.fixed_share, DTYPES[self.dtype])
        return self.source.load(origin)

    def _in_moe_layer(self, name: str) -> bool:
        return name.startswith("layers.") and self.config.experts_in(int(name.split(".")[1])) > 0

    def _new(self, name: str) -> Tensor:
        """Router rows from N(0, router_std), one per virtual group; zero mixing coefficients."""
        D = self.config.hidden_size
        if ".moe.mix." in name:
            rows = 2 if self.up.residual == "softmax2" else 1
            return torch.zeros((rows,) if name.endswith("bias") else (rows, D))
        experts = self.config.experts_in(int(name.split(".")[1]))
        if self.up.router == "zero":
            return torch.zeros(experts, D)
        repeats = self.up.granularity if self.up.router == "virtual_group" else 1
        rng = generator(self.up.seed, name)
        rows_ED = torch.randn(experts // repeats, D, generator=rng) * self.up.router_std
        return rows_ED.repeat_interleave(repeats, dim=0)

    def _expert(self, name: str, origin: str) -> Tensor:
        """Expert r*G + g holds slice g of the r-th copy of the feed-forward."""
        _, layer, _, _, expert, part, leaf = name.split(".")
        G = self.up.granularity
        copy, piece = divmod(int(expert), G)
        tensor = self.source.load(origin)
        tensor = self._varied(tensor, f"layers.{layer}.copy.{copy}", part, leaf)
        scale = self._scale(int(layer), part, leaf)
        return _scaled(_slice(tensor, part, leaf, G, piece), scale, DTYPES[self.dtype])

    def kept(self, name: str, tensor: Tensor) -> Tensor:
        """Of the dense `tensor` what the expert tensor `name` holds, unscaled and without noise:
        permuted and sliced as it is, 0 for what was drawn anew or adds nothing yet."""
        _, layer, _, _, expert, part, leaf = name.split(".")
        copy, piece = divmod(int(expert), self.up.granularity)
        if part == "down" and self.up.routed_share == 0.0:
            tensor = torch.zeros_like(tensor)
        elif part != "down" or leaf != "bias":
            order_F = self._order(f"layers.{layer}.copy.{copy}", tensor, part)
            if self.up.expert_init == "permute":
                tensor = tensor.index_select(_width_dim(part), order_F)
            elif self.up.expert_init == "drop" and leaf != "bias":
                drawn = order_F[: round(self.up.drop * len(order_F))]
                tensor = tensor.index_fill(_width_dim(part), drawn, 0.0)
        return _slice(tensor, part, leaf, self.up.granularity, piece)

    def _order(self, copy: str, tensor: Tensor, part: str) -> Tensor:
        """Random order of the hidden units; gate, up and down of one copy share it, and with it
        the choice of units to draw anew."""
        width = tensor.shape[_width_dim(part)]
        return torch.randperm(width, generator=generator(self.up.seed, f"{copy}.units"))

    def _scale(self, layer: int, part: str, leaf: str) -> float:
        """With weights that add up to w and slices that each see a G-th of them, the experts'
        outputs need a factor G / w. SwiGLU is linear in `up`, so half of it (as a square root)
        goes there and keeps both matrices in range; never into the gate, which is not linear."""
        up = self.up
        weight = up.combined_weight(self.config.experts_in(layer))
        factor = up.granularity / weight
        swiglu = self.config.activation == "swiglu"
        if part == "gate" or (part == "up" and not swiglu):
            return 1.0
        if part == "up":
            return factor**0.5
        if leaf == "bias":
            return up.routed_share / weight
        return up.routed_share * (factor**0.5 if swiglu else factor)

    def _varied(self, tensor: Tensor, copy: str, part: str, leaf: str) -> Tensor:
        """The dense tensor as the copy called `copy` starts with it."""
        up = self.up
        if up.expert_init == "copy" or (part == "down" and leaf == "bias"):
            return tensor
        if up.expert_init == "noise":
            if leaf == "bias":
                return tensor
            return add_noise(tensor, up.noise, generator(up.seed, f"{copy}.{part}"))
        width_dim, order_F = _width_dim(part), self._order(copy, tensor, part)
        if up.expert_init == "permute":
            return tensor.index_select(width_dim, order_F)
        if leaf == "bias":
            return tensor
        chosen = order_F[: round(up.drop * len(order_F))].sort().values
        return _redrawn(tensor, width_dim, chosen, generator(up.seed, f"{copy}.{part}"))


def _width_dim(part: str) -> int:
    return 1 if part == "down" else 0


def _slice(tensor: Tensor, part: str, leaf: str, G: int, piece: int) -> Tensor:
    """The hidden units of one of G fine-grained experts; they all hold the bias of down."""
    if G == 1 or (part == "down" and leaf == "bias"):
        return tensor
    return tensor.chunk(G, dim=_width_dim(part))[piece]


def _redrawn(tensor: Tensor, dim: int, chosen: Tensor, rng: torch.Generator) -> Tensor:
    """A copy with the rows (dim 0) or columns (dim 1) `chosen` drawn from the normal distribution
    that has their mean and deviation; a few rows at a time."""
    result = tensor.clone(memory_format=torch.contiguous_format)
    step = max(1, CHUNK_ELEMENTS // tensor.shape[1])
    rows = chosen if dim == 0 else torch.arange(tensor.shape[0])
    columns = chosen if dim == 1 else torch.arange(tensor.shape[1])
    count, total, squares = 0, 0.0, 0.0
    for part in rows.split(step):
        old = tensor[part][:, columns].to(torch.float64)
        count += old.numel()
        total += float(old.sum())
        squares += float(old.square().sum())
    if not count:
        return result
    mean = total / count
    deviation = max(0.0, squares / count - mean**2) ** 0.5
    for part in rows.split(step):
        drawn = torch.randn(len(part), len(columns), generator=rng) * deviation + mean
        result[part[:, None], columns] = drawn.to(tensor.dtype)
    return result


def _scaled(tensor: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """`factor` times the tensor in `dtype`; itself when there is nothing to do."""
    if factor == 1.0:
        return tensor
    result = torch.empty(tensor.shape, dtype=dtype)
    pieces = zip(tensor.reshape(-1).split(CHUNK_ELEMENTS), result.view(-1).split(CHUNK_ELEMENTS))
    for old, new in pieces:
        new.copy_(old.to(torch.float32) * factor)
    return result
