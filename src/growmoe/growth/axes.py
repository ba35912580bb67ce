"""How one axis of a tensor is widened: which old position each new one copies, and with what scale.

An axis is *written* by the rows that produce it (for the residual stream: embedding columns, o and
down rows) and *read* by the columns that consume it. With copies, the reads of all copies of one
old position must add up to one read of the original (Net2Net); how that one is split between the
copies is free, and splitting it unevenly breaks the symmetry between them at no loss.
"""

import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 20  # rows are converted in pieces of 8 MB of float64


@dataclass(frozen=True)
class Axis:
    """A widened axis of N positions.

    `index_N` holds old positions, -1 for fresh units. `write_N` scales what is written there.
    `fresh_write`/`fresh_read` are the standard deviations of fresh rows and columns (0 = zeros).
    """

    index_N: Tensor
    write_N: Tensor
    random_split: bool = False
    fresh_write: float = 0.0
    fresh_read: float = 0.0
    read_unit: int = 1
    """Consecutive positions that share one share of the split (head_dim for heads)."""
    noise: float = 0.0
    """Root mean square, relative to what is read evenly, of noise on the columns that read copies;
    it adds up to zero over the copies of a position, so what is read together stays exact."""
    seed: int = 0
    counts_N: Tensor = field(init=False)
    """Copies of the old position of each new one, in the whole axis."""

    def __post_init__(self) -> None:
        old = int(self.index_N.max()) + 1
        kept_N = self.index_N.clamp(min=0)
        counts = torch.bincount(self.index_N[self.index_N >= 0], minlength=old)
        object.__setattr__(self, "counts_N", counts[kept_N])

    def __len__(self) -> int:
        return self.index_N.numel()

    def new_N(self) -> Tensor:
        """True where a position is not the first copy of its old position."""
        if torch.equal(self.index_N, torch.arange(len(self))):
            return torch.zeros(len(self), dtype=torch.bool)
        seen_N = torch.ones_like(self.index_N, dtype=torch.bool)
        order_N = torch.argsort(self.index_N, stable=True)
        sorted_N = self.index_N[order_N]
        first_N = torch.ones_like(seen_N)
        first_N[1:] = sorted_N[1:] != sorted_N[:-1]
        seen_N[order_N] = ~first_N
        return seen_N | (self.index_N < 0)

    def read_N(self, name: str) -> Tensor:
        """Read shares (float64) of the tensor `name`; over the copies of a position they sum to 1.

        Random splits differ from tensor to tensor and stay within half of the even share.
        """
        even_N = 1.0 / self.counts_N.to(torch.float64)
        if not self.random_split:
            return even_N
        units = len(self) // self.read_unit
        noise = torch.rand(units, generator=generator(self.seed, name), dtype=torch.float64) - 0.5
        noise_N = noise.repeat_interleave(self.read_unit)
        group_N = self.index_N.clamp(min=0)
        total = torch.zeros(int(group_N.max()) + 1, dtype=torch.float64)
        total.index_add_(0, group_N, torch.where(self.index_N >= 0, noise_N, 0.0))
        return even_N * (1.0 + noise_N - total[group_N] * even_N)


def generator(seed: int, name: str) -> torch.Generator:
    """A generator of its own for every tensor, so that results do not depend on the order.

    Seed and name go into one 32-bit number, because torch's CPU generator ignores higher bits.
    """
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))


def identity_axis(size: int) -> Axis:
    """An axis that stays as it is."""
    return Axis(torch.arange(size), torch.ones(size, dtype=torch.float64))


def duplicated_axis(old: int, new: int, *, keep_rms: bool, random_split: bool, seed: int) -> Axis:
    """Position i copies i mod `old`. With `keep_rms`, copies are written with
    s_i = sqrt(new / (old * copies_i)), which keeps the mean square of the axis at any ratio."""
    index_N = torch.arange(new) % old
    axis = Axis(index_N, torch.ones(new, dtype=torch.float64), random_split, seed=seed)
    if not keep_rms:
        return axis
    write_N = (new / (old * axis.counts_N.to(torch.float64))).sqrt()
    return Axis(index_N, write_N, random_split, seed=seed)


def padded_axis(
    old: int, new: int, *, keep_rms: bool, fresh_write: float = 0.0, fresh_read: float = 0.0
) -> Axis:
    """The old positions, then fresh ones; exact when one of the two fresh deviations is 0."""
    index_N = torch.cat((torch.arange(old), torch.full((new - old,), -1)))
    scale = (new / old) ** 0.5 if keep_rms else 1.0
    write_N = torch.full((new,), scale, dtype=torch.float64)
    return Axis(index_N, write_N, fresh_write=fresh_write, fresh_read=fresh_read)


def head_axis(
    head_map: list[int], C: int, new_C: int, *, scale: float = 1.0, fresh_write: float = 0.0,
    random_split: bool = False, seed: int = 0,
) -> Axis:  # fmt: skip
    """Rows of whole heads. With new_C = m*C, rotary pair i moves to pair m*i, whose frequency in
    the larger head equals its old one; the other rows are fresh."""
    multiple = new_C // C
    inside = torch.full((new_C,), -1)
    half = torch.arange(C // 2)
    inside[half * multiple] = half
    inside[new_C // 2 + half * multiple] = C // 2 + half
    rows = [torch.where(inside >= 0, inside + head * C, -1) for head in head_map]
    index_N = torch.cat(rows)
    write_N = torch.full((index_N.numel(),), scale, dtype=torch.float64)
    return Axis(
        index_N, write_N, random_split, fresh_write=fresh_write, read_unit=new_C, seed=seed
    )  # fmt: skip


def widen_matrix(
    w_RC: Tensor, rows: Axis, columns: Axis, name: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The widened matrix in `dtype`: rows are written, columns are read (see Axis).

    Worked out in float64 pieces of a few rows, so that memory holds source and result only.
    """
    read_C = columns.read_N(name)
    column_index = columns.index_N.clamp(min=0)
    fresh_C = columns.index_N < 0
    same_columns = torch.equal(columns.index_N, torch.arange(w_RC.shape[1]))
    out = torch.empty(len(rows), len(columns), dtype=dtype)
    rng = generator(rows.seed ^ 1, name)
    noise = _CopyNoise(w_RC, columns, name) if columns.noise else None
    step = max(1, CHUNK_ELEMENTS // len(columns))
    for start in range(0, len(rows), step):
        index_R = rows.index_N[start : start + step]
        part = w_RC.index_select(0, index_R.clamp(min=0)).to(torch.float64)
        if not same_columns:
            part = part.index_select(1, column_index)
            part *= read_C
        if noise is not None:
            part += noise.draw(len(part))
        part *= rows.write_N[start : start + step, None]
        if fresh_C.any():
            _fill(part, columns.fresh_read, rng, columns=fresh_C)
        if (index_R < 0).any():
            _fill(part, rows.fresh_write, rng, rows=index_R < 0)
        out[start : start + step] = part
    return out


class _CopyNoise:
    """Noise on the columns that have copies, without its mean over the copies of a position."""

    def __init__(self, w_RC: Tensor, columns: Axis, name: str) -> None:
        self.columns, self.rng = columns, generator(columns.seed ^ 2, name)
        self.copied_C = (columns.counts_N > 1) & (columns.index_N >= 0)
        # c copies are read with 1/c each, and taking the mean out leaves 1 - 1/c of the variance
        counts_C = columns.counts_N.to(torch.float64).clamp(min=2)
        share_C = 1 / (counts_C * (1 - 1 / counts_C).sqrt())
        self.std_C = columns.noise * root_mean_square(w_RC) * share_C * self.copied_C

    def draw(self, rows: int) -> Tensor:
        """The noise of the next `rows` rows [rows, columns], float64."""
        axis = self.columns
        shape = (rows, len(axis))
        noise = torch.randn(shape, generator=self.rng, dtype=torch.float32).to(torch.float64)
        noise *= self.std_C
        index_C = axis.index_N.clamp(min=0)
        total = torch.zeros(rows, int(index_C.max()) + 1, dtype=torch.float64)
        total.index_add_(1, index_C, noise)
        return noise - (total.index_select(1, index_C) / axis.counts_N) * self.copied_C


def root_mean_square(tensor: Tensor) -> float:
    """Of all elements, added up in pieces."""
    flat = tensor.reshape(-1)
    total = sum(float(part.to(torch.float64).square().sum()) for part in flat.split(CHUNK_ELEMENTS))
    return float((total / max(1, flat.numel())) ** 0.5)


def _fill(
    part: Tensor,
    std: float,
    rng: torch.Generator,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> None:
    fresh = torch.randn(part.shape, generator=rng, dtype=torch.float32).to(part.dtype) * std
    if rows is not None:
        part[rows] = fresh[rows]
    if columns is not None:
        part[:, columns] = fresh[:, columns]


def widen_columns(w_VN: Tensor, axis: Axis, dtype: torch.dtype = torch.float32) -> Tensor:
    """An embedding table in `dtype`: rows stay, columns are written; fresh columns are 0."""
    out = torch.empty(w_VN.shape[0], len(axis), dtype=dtype)
    write_N = torch.where(axis.index_N >= 0, axis.write_N, 0.0)
    index_N = axis.index_N.clamp(min=0)
    step = max(1, CHUNK_ELEMENTS // len(axis))
    for start in range(0, w_VN.shape[0], step):
        part = w_VN[start : start + step].to(torch.float64)
        out[start : start + step] = part.index_select(1, index_N) * write_N
    return out


def widen_vector(v_N: Tensor, axis: Axis, dtype: torch.dtype = torch.float32) -> Tensor:
    """A bias: scaled like the rows that are written beside it; fresh units get 0."""
    wide = v_N.to(torch.float64)[axis.index_N.clamp(min=0)] * axis.write_N
    return torch.where(axis.index_N >= 0, wide, 0.0).to(dtype)


def part_of_axis(axis: Axis, kept_N: Tensor) -> Axis:
    """The positions where `kept_N` is true, as rows of their own (reads are left out)."""
    return Axis(axis.index_N[kept_N], axis.write_N[kept_N], seed=axis.seed)
