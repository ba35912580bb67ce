"""Is model B the same function as model A? Judged by A's own noise floor, never by a fixed bound.

The noise floor is what arithmetic alone does to A's logits: float32 against float64, and for
weights stored in 16 bits also one more rounding of every weight (a rescaled weight is rounded
anew, which moves logits as much as 16-bit storage itself does).
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from growmoe.errors import GrowmoeError
from growmoe.models.checkpoint import Source
from growmoe.models.safetensors_io import DTYPES
from growmoe.models.streamed import largest_part, streamed_logits

FLOAT32_FACTOR = 10.0
HALF_FACTOR = 3.0
HALF_MEAN_FACTOR = 2.0
Logits = list[Tensor]


@dataclass(frozen=True)
class Comparison:
    """B against A on the same tokens. Cross entropies are nats per token over the whole text;
    differences are over the logits of A's vocabulary."""

    exact: bool
    max_abs_logit_diff: float
    mean_abs_logit_diff: float
    noise_floor: float
    tolerance: float
    max_abs_logit_diff_float64: float | None
    ce_a: float
    ce_b: float
    kl: float
    tokens: int
    longest_position: int

    def as_dict(self) -> dict[str, Any]:
        """Plain fields, for JSON."""
        return asdict(self)


def compare(
    a: Source, b: Source, sequences: list[Tensor], *, memory_bytes: int,
    note: Callable[[str], None], vocab: int | None = None,
) -> Comparison:  # fmt: skip
    """Run A and B on `sequences` (token ids, 1-D) one model at a time.

    Weights are read layer by layer, so the largest layer must fit into memory, not the model.
    float64 runs are made when it does so in float64, with the logits, within 80% of
    `memory_bytes`; else the floor is estimated as 16 roundings of the largest logit. `vocab`
    limits the comparison to the first tokens. Raises GrowmoeError when the vocabularies cannot be
    compared or a model's logits are not finite.
    """
    if b.config.vocab_size < a.config.vocab_size:
        raise GrowmoeError(
            f"B has {b.config.vocab_size} tokens, fewer than A's {a.config.vocab_size}"
        )
    V = min(vocab or a.config.vocab_size, a.config.vocab_size)
    size = 8 * max(largest_part(a.config), largest_part(b.config))
    size += 24 * sum(len(ids) for ids in sequences) * b.config.vocab_size
    wide = size < 0.8 * memory_bytes
    note("A in float32")
    a32 = _logits(a, sequences, "float32")
    note("B in float32")
    b32 = _logits(b, sequences, "float32")
    diff64 = None
    if wide:
        note("A in float64")
        a64 = _logits(a, sequences, "float64")
        floor, mean_floor = _largest(a32, a64, V), _mean_difference(a32, a64, V)
        note("B in float64")
        diff64 = _largest(a64, _logits(b, sequences, "float64"), V)
        del a64
    else:
        floor = 16 * torch.finfo(torch.float32).eps * max(float(x.abs().max()) for x in a32)
        mean_floor = floor
    factor = mean_factor = FLOAT32_FACTOR
    if b.dtype in ("bfloat16", "float16"):
        note(f"A with its weights rounded to {b.dtype} once more")
        rerounded = _logits(Rerounded(a, b.dtype), sequences, "float32")
        floor, factor = max(floor, _largest(a32, rerounded, V)), HALF_FACTOR
        mean_floor = max(mean_floor, _mean_difference(a32, rerounded, V))
        mean_factor = HALF_MEAN_FACTOR
    diff = _largest(a32, b32, V)
    # A tiny model can land below one rounding of its largest logit; no arithmetic does better.
    rounding = torch.finfo(torch.float32).eps * max(float(x.abs().max()) for x in a32)
    floor, mean_floor = max(floor, rounding), max(mean_floor, rounding)
    mean = _mean_difference(a32, b32, V)
    return Comparison(
        # the mean too: one expert that rounding swaps makes the largest difference of a MoE large
        exact=max(diff, diff64 or 0.0) <= factor * floor and mean <= mean_factor * mean_floor,
        max_abs_logit_diff=diff,
        mean_abs_logit_diff=mean,
        noise_floor=floor,
        tolerance=factor * floor,
        max_abs_logit_diff_float64=diff64,
        ce_a=_cross_entropy(a32, sequences),
        ce_b=_cross_entropy(b32, sequences),
        kl=_divergence(a32, b32, V),
        tokens=sum(len(ids) for ids in sequences),
        longest_position=max(len(ids) for ids in sequences),
    )


@dataclass(frozen=True)
class Closeness:
    """How near B's next-token probabilities are to A's, where B is not meant to be exact. Of every
    position of the text: KL(A || B) in nats, and how often both find the same token likeliest."""

    perplexity_a: float
    perplexity_b: float
    kl: float
    kl_max: float
    argmax_agreement: float
    ce_a: float
    ce_b: float
    tokens: int
    longest_position: int

    def as_dict(self) -> dict[str, Any]:
        """Plain fields, for JSON."""
        return asdict(self)


def closeness(
    a: Source, b: Source, sequences: list[Tensor], note: Callable[[str], None]
) -> Closeness:
    """Run A and B, which have one vocabulary, on `sequences` (token ids, 1-D) in float32."""
    note("the source")
    left = _logits(a, sequences, "float32")
    note("the result")
    right = _logits(b, sequences, "float32")
    kl, same = [], 0
    for x, y in zip(left, right):
        kl.append(_divergences(x, y))
        same += int((x.argmax(-1) == y.argmax(-1)).sum())
    every = torch.cat(kl)
    ce_a, ce_b = _cross_entropy(left, sequences), _cross_entropy(right, sequences)
    return Closeness(
        perplexity_a=math.exp(min(ce_a, 700)), perplexity_b=math.exp(min(ce_b, 700)),
        kl=float(every.mean()), kl_max=float(every.max()), argmax_agreement=same / len(every),
        ce_a=ce_a, ce_b=ce_b, tokens=sum(len(ids) for ids in sequences),
        longest_position=max(len(ids) for ids in sequences),
    )  # fmt: skip


class Rounded:
    """`source` with every weight rounded to `dtype`."""

    def __init__(self, source: Source, dtype: str) -> None:
        self.source, self.config, self.dtype = source, source.config, dtype

    def load(self, name: str) -> Tensor:
        """The rounded tensor."""
        return self.source.load(name).to(DTYPES[self.dtype])


def agreement(
    source: Source, other: Logits, sequences: list[Tensor], memory_bytes: int
) -> tuple[float, float]:
    """(largest difference, tolerance) of another engine's float32 logits for the same weights; the
    tolerance is ten times what float64 arithmetic changes (estimated where it does not fit).
    Raises GrowmoeError when a logit of either is not finite (NaN compares as no difference)."""
    if not all(bool(torch.isfinite(logits).all()) for logits in other):
        raise GrowmoeError("the other engine's logits are not finite; nothing was published")
    own = _logits(source, sequences, "float32")
    V = source.config.vocab_size
    floor = 16 * torch.finfo(torch.float32).eps * max(float(x.abs().max()) for x in own)
    if 8 * largest_part(source.config) < 0.8 * memory_bytes:
        floor = max(floor, _largest(own, _logits(source, sequences, "float64"), V))
    return _largest(own, other, V), FLOAT32_FACTOR * floor


class Rerounded:
    """`source` with every weight scaled by an odd factor, rounded to `dtype` and scaled back."""

    def __init__(self, source: Source, dtype: str) -> None:
        self.source, self.config, self.dtype = source, source.config, source.dtype
        self.rounding = DTYPES[dtype]

    def load(self, name: str) -> Tensor:
        """The tensor with one extra rounding."""
        scale = math.sqrt(4 / 3)
        tensor = self.source.load(name).to(torch.float32)
        return (tensor * scale).to(self.rounding).to(torch.float32) / scale


def _logits(source: Source, sequences: list[Tensor], dtype: str) -> Logits:
    result = streamed_logits(source, sequences, dtype)
    for logits in result:
        if not torch.isfinite(logits).all():
            raise GrowmoeError("the model's logits are not finite")
    return result


def _largest(left: Logits, right: Logits, V: int) -> float:
    return max(float((x[:, :V] - y[:, :V]).abs().max()) for x, y in zip(left, right))


def _mean_difference(left: Logits, right: Logits, V: int) -> float:
    total = sum(
        float((x[:, :V] - y[:, :V]).abs().sum(dtype=torch.float64)) for x, y in zip(left, right)
    )
    return total / sum(len(x) * V for x in left)


def _cross_entropy(logits: Logits, sequences: list[Tensor]) -> float:
    total = sum(
        float(F.cross_entropy(x[:-1].double(), ids[1:], reduction="sum"))
        for x, ids in zip(logits, sequences)
    )
    return total / sum(len(ids) - 1 for ids in sequences)


def _divergence(left: Logits, right: Logits, V: int) -> float:
    """KL(A || B) in nats per token, over A's vocabulary."""
    total = sum(float(_divergences(x[:, :V], y[:, :V]).sum()) for x, y in zip(left, right))
    return total / sum(len(x) for x in left)


def _divergences(left: Tensor, right: Tensor) -> Tensor:
    """KL(A || B) at every position."""
    p, q = left.double().log_softmax(-1), right.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
