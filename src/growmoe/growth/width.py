"""Wider models: residual stream, heads, head dim and feed-forward, exactly or as FPI published it.

The mathematics is that of Net2Net/bert2BERT with one correction: a residual stream written with
s_i = sqrt(D'/(D c_i)) keeps its mean square, so RMSNorm is exact at any ratio once gamma is divided
by s_i. FPI (AquilaMoE, section 3.1) is the same with s_i = 1, which is lossy unless D' is a
multiple of D.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from growmoe.growth.axes import (
    Axis,
    duplicated_axis,
    head_axis,
    identity_axis,
    padded_axis,
    part_of_axis,
    widen_columns,
    widen_matrix,
    widen_vector,
)
from growmoe.models.checkpoint import Source
from growmoe.models.config import ModelConfig
from growmoe.models.safetensors_io import DTYPES
from growmoe.models.shapes import head_maps, widened_config


@dataclass(frozen=True, kw_only=True)
class Widening:
    """Target sizes (None keeps the source's) and how the new units start."""

    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    ffn: int | None = None
    units: Literal["duplicate", "zero_pad"] = "duplicate"
    split: Literal["random", "even"] = "random"
    keep_rms: bool = True
    """False is FPI as published: gamma copied, lossy at non-integer ratios."""
    copy_noise: float = 0.0
    """Relative noise on what reads copies, zero over the copies of a unit (see Axis.noise)."""
    seed: int = 0


class Widened:
    """`source` with wider tensors; see Widening."""

    def __init__(self, source: Source, spec: Widening, dtype: str | None = None) -> None:
        self.source, self.spec = source, spec
        self.config = widened_config(
            source.config, hidden=spec.hidden, heads=spec.heads, kv_heads=spec.kv_heads,
            head_dim=spec.head_dim, ffn=spec.ffn, zero_pad=spec.units == "zero_pad",
        )  # fmt: skip
        self.dtype = dtype or source.dtype
        self.axes = _axes(source.config, self.config, spec)

    def load(self, name: str) -> Tensor:
        """The widened tensor in `dtype`, made from the source's tensor of the same name."""
        return self.widen(name, self.source.load(name))

    def widen(self, name: str, tensor: Tensor, kept_R: Tensor | None = None) -> Tensor:
        """Widen `tensor`, the source's tensor called `name`; with `kept_R` only those new rows."""
        dtype = DTYPES[self.dtype]
        if name.endswith("norm.weight"):
            return self._norm_gain(name, tensor).to(dtype)
        if name.endswith("norm.bias"):
            wide = widen_vector(tensor, self.axes["residual"])
            return (wide * self._tied_share() if name == "norm.bias" else wide).to(dtype)
        if name in ("embed.weight", "positions.weight"):
            return widen_columns(tensor, self.axes["residual"], dtype)
        rows, columns = self.roles(name)
        if kept_R is not None:
            rows = part_of_axis(rows, kept_R)
        if tensor.dim() == 1:
            return widen_vector(tensor, rows, dtype)
        return widen_matrix(tensor, rows, columns, name, dtype)

    def roles(self, name: str) -> tuple[Axis, Axis]:
        """(axis of the rows, axis of the columns) of a matrix, and of its bias; a norm has rows
        only."""
        axes = self.axes
        if name in ("embed.weight", "head.weight"):
            return identity_axis(self.config.vocab_size), axes["residual"]
        if name == "positions.weight":
            return identity_axis(self.config.max_positions), axes["residual"]
        if name.split(".")[-2] in ("norm", "attn_norm", "mlp_norm"):
            return axes["residual"], identity_axis(1)
        block, part = name.split(".")[2], name.split(".")[-2]
        if block == "attn":
            return {
                "q": (axes["q"], axes["residual"]),
                "k": (axes["k"], axes["residual"]),
                "v": (axes["v"], axes["residual"]),
                "o": (axes["residual"], axes["q"]),
            }[part]
        if part in ("router", "mix"):
            count = {"router": self.config.experts_in(int(name.split(".")[1]))}.get(part)
            return identity_axis(count or self._mix_rows()), axes["residual"]
        ffn = axes["ffn"] if not self.config.moe else identity_axis(self._width_of(name))
        return (axes["residual"], ffn) if part == "down" else (ffn, axes["residual"])

    def gradient_N(self, name: str) -> Tensor:
        """What the widening multiplies the gradient of each row of `name` by (a norm's elements;
        the columns of an embedding), where every old position is written with s and its c copies
        share its reads evenly: 1 / (c s).

        Reading columns keep their gradient: what they read and what comes back are as before.
        """
        rows, columns = self.roles(name)
        if name in ("embed.weight", "positions.weight"):
            rows = columns
        written, even = rows.write_N, 1.0 / rows.counts_N
        if name == "norm.weight" and self.config.tied_head:
            return written**2  # the head that reads it carries s and no share
        if name == "norm.bias" and self.config.tied_head:
            return written
        return even * (written if name.endswith("norm.weight") else 1.0 / written)

    def _mix_rows(self) -> int:
        assert self.config.moe is not None
        return 2 if self.config.moe.mix == "softmax2" else 1

    def _width_of(self, name: str) -> int:
        """Feed-forward width of the block that holds the tensor `name` of a MoE model."""
        moe = self.config.moe
        assert moe is not None
        if ".experts." in name:
            return moe.ffn_size
        routed = self.config.experts_in(int(name.split(".")[1]))
        return moe.fixed_ffn_size if routed else self.config.ffn_size

    def _norm_gain(self, name: str, gain_N: Tensor) -> Tensor:
        """gamma' = gamma / s; for the last norm of a tied head also times the read share / s,
        because the embedding carries s and cannot carry a read share."""
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            return gain_N.to(torch.float32)
        axis = self.axes["residual"]
        wide = gain_N.to(torch.float64)[axis.index_N.clamp(min=0)]
        fresh = gain_N.to(torch.float64).mean()
        wide = torch.where(axis.index_N >= 0, wide, fresh) / axis.write_N
        if name == "norm.weight":
            wide = wide * self._tied_share()
        return wide.to(torch.float32)

    def _tied_share(self) -> Tensor | float:
        """What the last norm takes over from a head that is also the embedding."""
        axis = self.axes["residual"]
        return axis.read_N("norm.weight") / axis.write_N if self.config.tied_head else 1.0


def _axes(old: ModelConfig, new: ModelConfig, spec: Widening) -> dict[str, Axis]:
    """The widened axes by name: residual, q (read by o), k, v, ffn."""
    random, seed, std = spec.split == "random", spec.seed, old.init_std
    if spec.units == "duplicate":
        residual = duplicated_axis(
            old.hidden_size, new.hidden_size, keep_rms=spec.keep_rms, random_split=random, seed=seed
        )
        ffn = duplicated_axis(
            old.ffn_size, new.ffn_size, keep_rms=False, random_split=random, seed=seed
        )
    else:
        residual = padded_axis(old.hidden_size, new.hidden_size, keep_rms=True, fresh_read=std)
        ffn = padded_axis(old.ffn_size, new.ffn_size, keep_rms=False, fresh_write=std)
        residual, ffn = (dataclasses.replace(axis, seed=seed) for axis in (residual, ffn))
    head_map, kv_map = head_maps(old.num_heads, old.num_kv_heads, new.num_heads, new.num_kv_heads)
    C, new_C = old.head_dim, new.head_dim
    scale = (new_C / C) ** 0.5  # attention divides by sqrt(head_dim)
    q = head_axis(head_map, C, new_C, scale=scale, random_split=random, seed=seed)
    return {
        "residual": dataclasses.replace(residual, noise=spec.copy_noise),
        "ffn": dataclasses.replace(ffn, noise=spec.copy_noise),
        "q": dataclasses.replace(q, noise=spec.copy_noise),
        # fresh query rows are 0 and fresh key rows are not, so that the former get a gradient
        "k": head_axis(kv_map, C, new_C, fresh_write=std, seed=seed),
        "v": head_axis(kv_map, C, new_C, fresh_write=std, seed=seed),
    }
