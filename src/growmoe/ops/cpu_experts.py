"""`expert_mlp` on a CPU, forward and backward, with one expert's rows in the cache at a time.

Written as one autograd function, for three reasons: the activation is computed again in backward
instead of being kept; an expert's rows go through all its steps before the next expert's are
touched; and every gradient is written once, where it belongs (autograd of an indexed weight writes
E full-sized gradients). Kept for backward: the pre-activations [S,R] and the experts' outputs
[T,K,D]. Letters as in `experts`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from growmoe.ops import native
from growmoe.ops.experts import Activation, ExpertWeights, activate, grouped_mm_fits
from growmoe.ops.mapping import MappingTable, inverse
from growmoe.ops.products import outer, times, times_transposed

_FEW_ROWS = {("forward", torch.bfloat16): 16.0, ("backward", torch.bfloat16): 16.0,
             ("backward", torch.float32): 2.0}  # fmt: skip
"""Rows per expert below which a loop over experts costs more than it saves; there torch's grouped
product is used, which loops in C++. In a float32 forward pass it never wins, because it does not
know oneDNN (`benchmarks/moe_layer.py`)."""
_NATIVE_ROWS = {torch.bfloat16: 8, torch.float32: 4}
"""Rows per expert, were they spread evenly, up to which the native kernel for row-major weights is
used where no gradients are taken (`benchmarks/hf_experts.py`)."""
_AT_ONCE = 1 << 21
"""Elements of routed rows that are gathered in one go, before the loop over experts."""


def cpu_experts(
    x_TD: Tensor, table: MappingTable, weights_TK: Tensor, w: ExpertWeights, activation: Activation
) -> Tensor:
    """See `experts.expert_mlp`."""
    if torch.is_grad_enabled():
        return _CpuExperts.apply(x_TD, weights_TK, table.order_S, table.counts_E, activation, *w)
    choices_TK, S = table.choices_TK, weights_TK.numel()
    if choices_TK is not None and _native_is_faster(x_TD, table, S, w, activation):
        y_TD = native.plain_experts(x_TD, choices_TK, weights_TK, w.up_ERD, w.down_EDF)
        return y_TD.to(x_TD.dtype)
    y_TKD, _, _ = _forward(x_TD, weights_TK, table.order_S, table.counts_E, w, activation)
    return _combined(y_TKD, weights_TK)


def _native_is_faster(
    x_TD: Tensor, table: MappingTable, S: int, w: ExpertWeights, activation: Activation
) -> bool:
    """Whether the weights are so many that reading them is all the work."""
    rows, E = _NATIVE_ROWS.get(x_TD.dtype, 0), len(w.up_ERD)
    if rows * min(E, S) < S or not native.available():
        return False
    if len(table.counts_E) != E:  # a choice of none of these experts
        return False
    plain = all(t.dtype is x_TD.dtype and t.is_contiguous() for t in (w.up_ERD, w.down_EDF))
    return plain and activation == "swiglu" and w.up_bias_ER is None and x_TD.numel() > 0


class _CpuExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, order_S: Tensor, counts_E: Tensor,
        activation: Activation, *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        y_TKD, saved, grouped = _forward(
            x_TD.contiguous(), weights_TK, order_S, counts_E, ExpertWeights(*tensors), activation  # type: ignore[arg-type]
        )  # fmt: skip
        ctx.save_for_backward(weights_TK, order_S, counts_E, y_TKD, *saved, *tensors)
        ctx.kept, ctx.grouped, ctx.activation = len(saved), grouped, activation
        return _combined(y_TKD, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        weights_TK, order_S, counts_E, y_TKD, *rest = ctx.saved_tensors
        (x_TD, tokens_S, back_S, *h), w = rest[: ctx.kept], ExpertWeights(*rest[ctx.kept :])
        T, K = weights_TK.shape
        dy_TD, kept, D = dy_TD.contiguous(), len(tokens_S), x_TD.shape[1]
        dweights_TK = _products(y_TKD, dy_TD, weights_TK.dtype)
        del y_TKD
        share_S1 = weights_TK.reshape(-1)[order_S[:kept], None].to(x_TD.dtype)
        dx_SD = x_TD.new_empty(kept + (kept < T * K), D)
        rows = _Rows(x_TD, dy_TD, tokens_S, share_S1, dx_SD[:kept])
        grouped = ctx.grouped or _grouped_is_faster("backward", x_TD, w, counts_E.tolist())
        if grouped and not ctx.grouped:
            h = [torch.cat(h)]
        run = _backward_grouped if grouped else _backward_looped
        grads = run(rows, h, w, counts_E, ctx.activation, ctx.needs_input_grad[5:])
        if kept < T * K:
            dx_SD[kept] = 0.0
        dx_TKD = dx_SD.index_select(0, back_S).view(T, K, D)
        dx_TD = dx_TKD[:, 0] + dx_TKD[:, 1] if K == 2 else dx_TKD.sum(1)
        return dx_TD, dweights_TK, None, None, None, *grads


def _forward(
    x_TD: Tensor, weights_TK: Tensor, order_S: Tensor, counts_E: Tensor, w: ExpertWeights,
    activation: Activation,
) -> tuple[Tensor, list[Tensor], bool]:  # fmt: skip
    """(expert outputs y_TKD, what backward needs, whether the grouped product was used)."""
    T, K = weights_TK.shape
    counts, D = counts_E.tolist(), x_TD.shape[1]
    kept = sum(counts)
    tokens_S = (order_S // K if K > 1 else order_S)[:kept]
    # dropped rows read a row of zeros behind the kept ones
    y_SD = x_TD.new_empty(kept + (kept < T * K), D)
    grouped = _grouped_is_faster("forward", x_TD, w, counts)
    if grouped:
        h = [_forward_grouped(x_TD, tokens_S, counts_E, w, activation, y_SD[:kept])]
    else:
        h = _forward_looped(x_TD, tokens_S, counts, w, activation, y_SD[:kept])
    back_S = inverse(order_S)
    if kept < T * K:
        y_SD[kept] = 0.0
        back_S.clamp_(max=kept)
    y_TKD = y_SD.index_select(0, back_S).view(T, K, D)
    return y_TKD, [x_TD, tokens_S, back_S, *h], grouped


def _combined(y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """y_TD: every token's outputs, weighted and added up. For one or two outputs without torch's
    batched product, which is slower then."""
    w_TK, K = weights_TK.to(y_TKD.dtype), weights_TK.shape[1]
    if K > 2:
        return torch.bmm(w_TK.unsqueeze(1), y_TKD).squeeze(1)
    y_TD = y_TKD[:, 0] * w_TK[:, :1]
    return y_TD.addcmul_(y_TKD[:, 1], w_TK[:, 1:]) if K == 2 else y_TD


def _products(y_TKD: Tensor, dy_TD: Tensor, dtype: torch.dtype) -> Tensor:
    """<y, dy> of every output, added up in `dtype`; one choice after the other, so that what is
    added up is still in the cache."""
    products = [(y_TKD[:, j] * dy_TD).sum(-1, dtype=dtype) for j in range(y_TKD.shape[1])]
    return torch.stack(products, dim=1)


class _Rows:
    """What the experts' rows read (inputs, output gradients) and write (input gradients)."""

    def __init__(
        self, x_TD: Tensor, dy_TD: Tensor, tokens_S: Tensor, share_S1: Tensor, dx_SD: Tensor
    ) -> None:
        self.x_TD, self.dy_TD, self.tokens_S = x_TD, dy_TD, tokens_S
        self.share_S1, self.dx_SD = share_S1, dx_SD

    def gradients(self) -> Tensor:
        """Gradients of what the experts gave, weights included."""
        return self.dy_TD.index_select(0, self.tokens_S).mul_(self.share_S1)

    def gradients_by(self, counts: list[int]) -> Iterable[Tensor]:
        """The same for one expert after the other."""
        if _small(self.dy_TD, self.tokens_S):
            return self.gradients().split(counts)
        parts = zip(self.tokens_S.split(counts), self.share_S1.split(counts))
        return (self.dy_TD.index_select(0, tokens).mul_(share) for tokens, share in parts)


def _rows_by(x_TD: Tensor, tokens_S: Tensor, counts: list[int]) -> Iterable[Tensor]:
    """The rows of one expert after the other, gathered at once where they are few."""
    if _small(x_TD, tokens_S):
        return x_TD.index_select(0, tokens_S).split(counts)
    return (x_TD.index_select(0, tokens) for tokens in tokens_S.split(counts))


def _small(x_TD: Tensor, tokens_S: Tensor) -> bool:
    return len(tokens_S) * x_TD.shape[1] <= _AT_ONCE


def _active(counts: list[int]) -> tuple[list[int], list[int]]:
    """The experts that have rows, and how many each."""
    experts = [expert for expert, count in enumerate(counts) if count]
    return experts, [counts[expert] for expert in experts]


def _grouped_is_faster(
    direction: str, x_TD: Tensor, w: ExpertWeights, counts: list[int]
) -> bool:  # fmt: skip
    few = _FEW_ROWS.get((direction, x_TD.dtype), 0.0)
    active = sum(1 for count in counts if count)
    if active <= 2 or sum(counts) >= few * active or w.up_bias_ER is not None:
        return False
    return grouped_mm_fits(x_TD, w.up_ERD) and grouped_mm_fits(x_TD, w.down_EDF)


def _forward_looped(
    x_TD: Tensor, tokens_S: Tensor, counts: list[int], w: ExpertWeights, activation: Activation,
    y_SD: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Writes y_SD; returns the pre-activations of every expert that has rows."""
    kept = []
    active, sizes = _active(counts)
    rows = zip(active, _rows_by(x_TD, tokens_S, sizes), y_SD.split(sizes))
    for expert, x_SD, out_SD in rows:
        h_SR = times_transposed(x_SD, w.up_ERD[expert], _of(w.up_bias_ER, expert))
        a_SF = _activate(h_SR, activation)
        times_transposed(a_SF, w.down_EDF[expert], _of(w.down_bias_ED, expert), out_SF=out_SD)
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
    rows: _Rows, kept: list[Tensor], w: ExpertWeights, counts_E: Tensor, activation: Activation,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Writes rows.dx_SD; returns the gradients of the experts' tensors that are `wanted`."""
    active, sizes = _active(counts_E.tolist())
    grads = [
        _zero_but(active, torch.empty_like(tensor)) if tensor is not None and want else None
        for tensor, want in zip(w, wanted)
    ]
    dup_ERD, ddown_EDF, dup_bias_ER, ddown_bias_ED = grads
    inputs, outputs = _rows_by(rows.x_TD, rows.tokens_S, sizes), rows.gradients_by(sizes)
    for expert, h_SR, x_SD, dy_SD, dx_SD in zip(
        active, kept, inputs, outputs, rows.dx_SD.split(sizes)
    ):
        da_SF = times(dy_SD, w.down_EDF[expert])
        a_SF, dh_SR = _activate_backward(h_SR, da_SF, activation)
        if ddown_EDF is not None:
            outer(dy_SD, a_SF, ddown_EDF[expert])
        times(dh_SR, w.up_ERD[expert], out_SD=dx_SD)
        if dup_ERD is not None:
            outer(dh_SR, x_SD, dup_ERD[expert])
        if dup_bias_ER is not None:
            torch.sum(dh_SR, 0, out=dup_bias_ER[expert])
        if ddown_bias_ED is not None:
            torch.sum(dy_SD, 0, out=ddown_bias_ED[expert])
    return tuple(grads)


def _zero_but(active: list[int], grad: Tensor) -> Tensor:
    """`grad` with zeros for all experts but the `active` ones, which are left as they are: every
    gap between them in one call, and nothing written twice."""
    for after, before in zip([-1, *active], [*active, len(grad)]):
        if before - after > 1:
            grad[after + 1 : before].zero_()
    return grad


def _backward_grouped(
    rows: _Rows, kept: list[Tensor], w: ExpertWeights, counts_E: Tensor, activation: Activation,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    dy_SD = rows.gradients()
    da_SF = F.grouped_mm(dy_SD, w.down_EDF, offs=offsets_E)
    a_SF, dh_SR = _activate_backward(kept[0], da_SF, activation)
    rows.dx_SD.copy_(F.grouped_mm(dh_SR, w.up_ERD, offs=offsets_E))
    dup_ERD = ddown_EDF = None
    if wanted[1]:
        ddown_EDF = F.grouped_mm(dy_SD.t(), a_SF, offs=offsets_E)
    if wanted[0]:
        x_SD = rows.x_TD.index_select(0, rows.tokens_S)
        dup_ERD = F.grouped_mm(dh_SR.t(), x_SD, offs=offsets_E)
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
