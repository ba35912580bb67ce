"""`expert_mlp` on a CPU, forward and backward, with one expert's rows in the cache at a time.

Written as one autograd function, for three reasons: the activation is computed again in backward
instead of being kept; an expert's rows go through all its steps before the next expert's are
touched; and every gradient is written once, where it belongs (autograd of an indexed weight writes
E full-sized gradients). Kept for backward: the pre-activations [S,R] and the experts' outputs
[T,K,D]. Letters as in `experts`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from growmoe.ops.experts import Activation, ExpertWeights, activate, grouped_mm_fits
from growmoe.ops.mapping import MappingTable, inverse
from growmoe.ops.products import outer, times, times_transposed

_FEW_ROWS = 16
"""Rows per expert below which the loop over experts costs more than it saves, and torch's grouped
product, which loops in C++, is used for 16-bit weights (`benchmarks/moe_layer.py`)."""


def cpu_experts(
    x_TD: Tensor, table: MappingTable, weights_TK: Tensor, w: ExpertWeights, activation: Activation
) -> Tensor:
    """See `experts.expert_mlp`."""
    return _CpuExperts.apply(x_TD, weights_TK, table.order_S, table.counts_E, activation, *w)


class _CpuExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, order_S: Tensor, counts_E: Tensor,
        activation: Activation, *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        T, K = weights_TK.shape
        w = ExpertWeights(*tensors)  # type: ignore[arg-type]
        x_TD = x_TD.contiguous()
        counts = counts_E.tolist()
        kept = sum(counts)
        tokens_S = (order_S // K if K > 1 else order_S)[:kept]
        # dropped rows read a row of zeros behind the kept ones
        y_SD = x_TD.new_empty(kept + (kept < T * K), x_TD.shape[1])
        grouped = _grouped_is_faster(x_TD, w, counts)
        if grouped:
            h = [_forward_grouped(x_TD, tokens_S, counts_E, w, activation, y_SD[:kept])]
        else:
            h = _forward_looped(x_TD, tokens_S, counts, w, activation, y_SD)
        back_S = inverse(order_S)
        if kept < T * K:
            y_SD[kept] = 0.0
            back_S.clamp_(max=kept)
        y_TKD = y_SD.index_select(0, back_S).view(T, K, x_TD.shape[1])
        ctx.save_for_backward(
            x_TD, weights_TK, order_S, tokens_S, back_S, y_TKD, counts_E, *tensors, *h
        )
        ctx.counts, ctx.grouped, ctx.activation = counts, grouped, activation
        if K == 1:
            return y_TKD[:, 0] * weights_TK.to(y_TKD.dtype)
        return torch.bmm(weights_TK.to(y_TKD.dtype).unsqueeze(1), y_TKD).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, order_S, tokens_S, back_S, y_TKD, counts_E, *rest = ctx.saved_tensors
        w, h = ExpertWeights(*rest[:4]), rest[4:]
        T, K = weights_TK.shape
        dy_TD, kept = dy_TD.contiguous(), len(tokens_S)
        dweights_TK = (y_TKD * dy_TD[:, None]).sum(-1, dtype=weights_TK.dtype)
        del y_TKD
        share_S1 = weights_TK.reshape(-1)[order_S[:kept], None].to(x_TD.dtype)
        dx_SD = x_TD.new_empty(kept + (kept < T * K), x_TD.shape[1])
        run = _backward_grouped if ctx.grouped else _backward_looped
        grads = run(
            _Rows(x_TD, dy_TD, tokens_S, share_S1, dx_SD), h, w,
            counts_E if ctx.grouped else ctx.counts, ctx.activation,
        )  # fmt: skip
        dx_TD = None
        if ctx.needs_input_grad[0]:
            if kept < T * K:
                dx_SD[kept] = 0.0
            dx_TD = dx_SD.index_select(0, back_S)
            if K > 1:
                dx_TD = dx_TD.view(T, K, x_TD.shape[1]).sum(1)
        return dx_TD, dweights_TK, None, None, None, *grads


class _Rows:
    """What an expert's rows read (inputs, output gradients) and write (input gradients)."""

    def __init__(
        self, x_TD: Tensor, dy_TD: Tensor, tokens_S: Tensor, share_S1: Tensor, dx_SD: Tensor
    ) -> None:
        self.x_TD, self.dy_TD, self.tokens_S = x_TD, dy_TD, tokens_S
        self.share_S1, self.dx_SD = share_S1, dx_SD

    def inputs(self, rows: slice) -> Tensor:
        """x of these rows."""
        return self.x_TD.index_select(0, self.tokens_S[rows])

    def gradients(self, rows: slice) -> Tensor:
        """Gradient of what the experts gave for these rows, weights included."""
        return self.dy_TD.index_select(0, self.tokens_S[rows]).mul_(self.share_S1[rows])


def _grouped_is_faster(x_TD: Tensor, w: ExpertWeights, counts: list[int]) -> bool:
    if x_TD.dtype is not torch.bfloat16 or w.up_bias_ER is not None:
        return False
    active, kept = sum(1 for count in counts if count), sum(counts)
    few = active > 8 and kept < _FEW_ROWS * active
    return few and grouped_mm_fits(x_TD, w.up_ERD) and grouped_mm_fits(x_TD, w.down_EDF)


def _forward_looped(
    x_TD: Tensor, tokens_S: Tensor, counts: list[int], w: ExpertWeights, activation: Activation,
    y_SD: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Writes y_SD; returns the pre-activations of every expert that has rows."""
    kept, start = [], 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        rows = slice(start, start := start + count)
        h_SR = times_transposed(
            x_TD.index_select(0, tokens_S[rows]), w.up_ERD[expert], _of(w.up_bias_ER, expert)
        )
        times_transposed(
            _activate(h_SR, activation), w.down_EDF[expert], _of(w.down_bias_ED, expert),
            out_SF=y_SD[rows],
        )  # fmt: skip
        kept.append(h_SR)
    return kept


def _forward_grouped(
    x_TD: Tensor, tokens_S: Tensor, counts_E: Tensor, w: ExpertWeights, activation: Activation,
    y_SD: Tensor,
) -> Tensor:  # fmt: skip
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    x_SD = x_TD.index_select(0, tokens_S)
    h_SR = F.grouped_mm(x_SD, w.up_ERD.transpose(1, 2), offs=offsets_E)
    y_SD.copy_(
        F.grouped_mm(_activate(h_SR, activation), w.down_EDF.transpose(1, 2), offs=offsets_E)
    )
    return h_SR


def _backward_looped(
    rows: _Rows, kept: list[Tensor], w: ExpertWeights, counts: list[int], activation: Activation
) -> tuple[Tensor | None, ...]:
    """Writes rows.dx_SD; returns the gradients of the experts' tensors."""
    grads = [None if tensor is None else torch.empty_like(tensor) for tensor in w]
    dup_ERD, ddown_EDF, dup_bias_ER, ddown_bias_ED = grads
    assert dup_ERD is not None
    assert ddown_EDF is not None
    pre, start = iter(kept), 0
    for expert, count in enumerate(counts):
        if not count:
            for grad in grads:
                if grad is not None:
                    grad[expert].zero_()
            continue
        part = slice(start, start := start + count)
        dy_SD = rows.gradients(part)
        da_SF = times(dy_SD, w.down_EDF[expert])
        a_SF, dh_SR = _activate_backward(next(pre), da_SF, activation)
        outer(dy_SD, a_SF, ddown_EDF[expert])
        times(dh_SR, w.up_ERD[expert], out_SD=rows.dx_SD[part])
        outer(dh_SR, rows.inputs(part), dup_ERD[expert])
        if dup_bias_ER is not None:
            torch.sum(dh_SR, 0, out=dup_bias_ER[expert])
        if ddown_bias_ED is not None:
            torch.sum(dy_SD, 0, out=ddown_bias_ED[expert])
    return tuple(grads)


def _backward_grouped(
    rows: _Rows, kept: list[Tensor], w: ExpertWeights, counts_E: Tensor, activation: Activation
) -> tuple[Tensor | None, ...]:
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    dy_SD = rows.gradients(slice(None))
    da_SF = F.grouped_mm(dy_SD, w.down_EDF, offs=offsets_E)
    a_SF, dh_SR = _activate_backward(kept[0], da_SF, activation)
    ddown_EDF = F.grouped_mm(dy_SD.t(), a_SF, offs=offsets_E)
    rows.dx_SD[: len(dy_SD)] = F.grouped_mm(dh_SR, w.up_ERD, offs=offsets_E)
    dup_ERD = F.grouped_mm(dh_SR.t(), rows.inputs(slice(None)), offs=offsets_E)
    return dup_ERD, ddown_EDF, None, None


def _activate(h_SR: Tensor, activation: Activation) -> Tensor:
    """As `activate`, with one pass of memory less."""
    if activation == "gelu":
        return activate(h_SR, activation)
    gate_SF, up_SF = h_SR.chunk(2, dim=-1)
    return F.silu(gate_SF).mul_(up_SF)


def _activate_backward(
    h_SR: Tensor, da_SF: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """(activation again [S,F], gradient of the pre-activations [S,R]); da_SF is used up."""
    if activation == "gelu":
        dh_SR = torch.ops.aten.gelu_backward(da_SF, h_SR, approximate="tanh")
        return activate(h_SR, activation), dh_SR
    gate_SF, up_SF = h_SR.chunk(2, dim=-1)
    dh_SR = torch.empty_like(h_SR)
    dgate_SF, dup_SF = dh_SR.chunk(2, dim=-1)
    a_SF = F.silu(gate_SF)
    torch.mul(da_SF, a_SF, out=dup_SF)
    a_SF.mul_(up_SF)
    torch.ops.aten.silu_backward.grad_input(da_SF.mul_(up_SF), gate_SF, grad_input=dgate_SF)
    return a_SF, dh_SR


def _of(bias_EF: Tensor | None, expert: int) -> Tensor | None:
    return None if bias_EF is None else bias_EF[expert]
