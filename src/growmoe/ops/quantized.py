"""Weights as integers of 8 or 4 bits with one scale per 32 inputs: made, undone, packed in words.

Symmetric and for weights only. Rows stand alone, so a slice of rows of a `Quantized` is that of the
rows, and any engine may store it as it likes.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from growmoe.errors import GrowmoeError, UsageError
from growmoe.ops import native
from growmoe.ops.device import plain_cpu

GROUP = 32
"""Neighbouring inputs that share a scale."""
RANGES = {8: (-127, 127), 4: (-8, 7)}
# The largest weight of a group of 4 bits becomes -8, -9 (cut to -8) or something between, with a
# scale of the sign that this takes; 7 is there so that what was quantised once stays as it is.
_DIVISORS = {8: (127.0,), 4: (8.0, 8.25, 8.5, 8.75, 9.0, 7.75, 7.0)}
BITS = {"int8": 8, "int4": 4}
_NOT_FINITE = "weights with NaN or infinite values cannot be quantised"
_SMALLEST = torch.finfo(torch.bfloat16).tiny
_PIECE = 1 << 16  # weights at a time: what the search needs stays in the processor's cache


@dataclass(frozen=True)
class Quantized:
    """A matrix [N,K] as integers and the scale of every group of 32 inputs.

    The last group is shorter where K is no multiple of 32. Scales of 4 bits may be negative.
    """

    values_NK: Tensor
    """int8: from -127 to 127 (8 bits), or from -8 to 7 (4 bits)."""
    scales_NG: Tensor
    """bfloat16 [N, K/32 rounded up]."""


@torch.no_grad()
def quantize(w_NK: Tensor, bits: int) -> Quantized:
    """The nearest integers of `bits` 8 or 4, in the order of the weights.

    8 bits: the scale is the largest weight / 127. 4 bits: of a few scales the one with the smallest
    squared error. Scales are rounded to bfloat16 before integers are computed with them, and one
    below bfloat16's normal range (2^-126) is 0, as are its weights. Raises GrowmoeError for NaN and
    infinite weights.
    """
    if bits not in RANGES:
        raise UsageError(f"weights are quantised to 8 or 4 bits, not to {bits}")
    if plain_cpu(w_NK) and native.available():
        found = native.quantize(w_NK, bits)
        if found is None:
            raise GrowmoeError(_NOT_FINITE)
        return Quantized(*found)
    return quantize_reference(w_NK, bits)


def quantize_reference(w_NK: Tensor, bits: int) -> Quantized:
    """`quantize` in torch."""
    N, K = w_NK.shape
    groups = -(-K // GROUP)
    values_NK = torch.empty(N, K, dtype=torch.int8, device=w_NK.device)
    scales_NG = torch.empty(N, groups, dtype=torch.bfloat16, device=w_NK.device)
    step = max(1, _PIECE // max(1, K))
    for start in range(0, N, step):
        rows = w_NK[start : start + step].to(torch.float32)
        if not torch.isfinite(rows).all():
            raise GrowmoeError(_NOT_FINITE)
        parts_RG = F.pad(rows, (0, groups * GROUP - K)).view(-1, GROUP)
        values, scales = _nearest(parts_RG, bits)
        values_NK[start : start + step] = values.view(len(rows), -1)[:, :K]
        scales_NG[start : start + step] = scales.view(len(rows), -1)
    return Quantized(values_NK, scales_NG)


def _nearest(parts_RG: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(integers [R,32] as float32, scales [R,1]) of groups [R,32]."""
    low, high = RANGES[bits]
    largest = parts_RG.abs().amax(dim=1, keepdim=True)
    if bits == 4:
        place = parts_RG.abs().argmax(dim=1, keepdim=True)
        largest = -parts_RG.gather(1, place)
    best = best_scales = best_errors = None
    for divisor in _DIVISORS[bits]:
        scales = (largest / divisor).to(torch.bfloat16).to(torch.float32)
        scales[scales.abs() < _SMALLEST] = 0
        values = (parts_RG / scales).round_().clamp_(low, high)
        values.masked_fill_(scales == 0, 0)
        if len(_DIVISORS[bits]) == 1:
            return values, scales
        # relative to the largest weight: squares of huge and of tiny weights leave float32
        errors = ((values * scales - parts_RG) / largest.abs().clamp_min(_SMALLEST)).square_()
        errors = errors.sum(dim=1, keepdim=True, dtype=torch.float64)  # in any order
        if best is None or best_scales is None or best_errors is None:
            best, best_scales, best_errors = values, scales, errors
            continue
        better = errors < best_errors
        best = torch.where(better, values, best)
        best_scales = torch.where(better, scales, best_scales)
        best_errors = torch.where(better, errors, best_errors)
    assert best is not None
    assert best_scales is not None
    return best, best_scales


@torch.no_grad()
def dequantize(quantized: Quantized) -> Tensor:
    """The weights [N,K] as float32: exactly value times scale."""
    values_NK, scales_NG = quantized.values_NK, quantized.scales_NG
    N, K = values_NK.shape
    out = torch.empty(N, K, device=values_NK.device)
    step = max(1, _PIECE // max(1, K))
    for start in range(0, N, step):
        rows = slice(start, start + step)
        scales = scales_NG[rows].to(torch.float32).repeat_interleave(GROUP, dim=1)[:, :K]
        torch.mul(values_NK[rows], scales, out=out[rows])
    return out


class _Weights(Protocol):
    def load(self, name: str) -> Tensor: ...


def stored_or_made(source: _Weights, name: str, bits: int) -> Quantized:
    """The integers of `name` as a quantised checkpoint stores them, if they fit `bits`; else made
    now, as an export of the same source would make them."""
    load = getattr(source, "load_quantized", None)
    found: Quantized | None = load(name) if load is not None else None
    if found is not None:
        low, high = RANGES[bits]
        smallest, largest = found.values_NK.aminmax()
        if low <= int(smallest) and int(largest) <= high:
            return found
    return quantize(source.load(name), bits)


# ---- in words of 32 bits, as the files of compressed-tensors hold them ----


def packed_width(K: int, bits: int) -> int:
    """Words of a packed row of K integers."""
    return -(-K * bits // 32)


def pack(values_NK: Tensor, bits: int) -> Tensor:
    """int32 [N, words]: integer i of a row stands at bit i * bits, raised by 2^(bits - 1) so that
    it is not negative; what is left of the last word is 0."""
    K = values_NK.shape[1]
    raised = (values_NK.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)
    raised = F.pad(raised, (0, packed_width(K, bits) * 32 // bits - K))
    if bits == 4:
        raised = raised[:, 0::2] | raised[:, 1::2] << 4
    return raised.contiguous().view(torch.int32)


def unpack(words: Tensor, bits: int, K: int) -> Tensor:
    """The int8 [N,K] that `pack` made `words` of."""
    raised = words.contiguous().view(torch.uint8)
    if bits == 4:
        raised = torch.stack((raised & 15, raised >> 4), dim=2).view(len(words), -1)
    return (raised[:, :K].to(torch.int16) - (1 << bits - 1)).to(torch.int8)
