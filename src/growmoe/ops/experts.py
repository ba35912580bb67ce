"""Routed feed-forward experts through a mapping table: gather rows, two grouped products, combine.

`expert_mlp` picks the implementation by device: on a CPU `cpu_experts`, on a GPU the Triton kernels
of `triton_direct` (a few rows) or `triton_experts` where they fit, else torch's grouped product.
All compute what
`expert_mlp_reference` says. Letters: T tokens, K experts per token, S=T*K routed rows, D hidden,
F expert width, R rows of `up` (2F for SwiGLU, gate first; F for GELU), E experts.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from growmoe.ops.device import on_triton, plain_cpu
from growmoe.ops.mapping import MappingTable, inverse

Activation = Literal["swiglu", "gelu"]
DECODE_TOKENS = 64  # the largest batch that one decoding step is made for


class ExpertWeights(NamedTuple):
    """Stacked parameters of E experts."""

    up_ERD: Tensor
    down_EDF: Tensor
    up_bias_ER: Tensor | None = None
    down_bias_ED: Tensor | None = None


def expert_mlp(
    x_TD: Tensor, table: MappingTable, weights_TK: Tensor, w: ExpertWeights, activation: Activation
) -> Tensor:
    """y_TD: the sum over each token's kept experts e of weight * (down_e act(up_e x)).

    `x_TD` and the weights of the experts share one dtype; `weights_TK` may be wider.
    Differentiable in x_TD, weights_TK and every tensor of `w`; once.
    """
    if plain_cpu(x_TD):
        from growmoe.ops.cpu_experts import cpu_experts

        return cpu_experts(x_TD, table, weights_TK, w, activation)
    if on_triton(x_TD):
        y_TD = _by_triton(x_TD, table, weights_TK, w, activation)
        if y_TD is not None:
            return y_TD
    return grouped_experts(x_TD, table, weights_TK, w, activation)


def _by_triton(
    x_TD: Tensor, table: MappingTable, weights_TK: Tensor, w: ExpertWeights, activation: Activation
) -> Tensor | None:
    """By the kernels for sorted rows, or for few rows (and where the others do not fit, for as many
    as a decoding step has: it must not wait for the GPU); None where neither fits."""
    from growmoe.ops import triton_direct, triton_experts

    T, K = weights_TK.shape
    fits = activation == "swiglu" and w.up_bias_ER is None
    fits = fits and triton_experts.supported(x_TD, w.up_ERD, w.down_EDF)
    few = triton_direct.few_rows(T, K, len(w.up_ERD)) or (not fits and T <= DECODE_TOKENS)
    if few and table.choices_TK is not None and triton_direct.supported(x_TD, weights_TK, *w):
        return triton_direct.direct_experts(x_TD, table.choices_TK, weights_TK, *w)
    if not fits:
        return None
    return triton_experts.moe_experts(
        x_TD, table.order_S, table.counts_E, weights_TK, w.up_ERD, w.down_EDF
    )


def activate(h_SR: Tensor, activation: Activation) -> Tensor:
    """[S,R] -> [S,F]: silu(gate) * up, or gelu (tanh form)."""
    if activation == "gelu":
        return F.gelu(h_SR, approximate="tanh")
    gate_SF, up_SF = h_SR.chunk(2, dim=-1)
    return F.silu(gate_SF) * up_SF


def expert_mlp_reference(
    x_TD: Tensor, table: MappingTable, weights_TK: Tensor, w: ExpertWeights, activation: Activation
) -> Tensor:
    """A loop over experts, by autograd. `unbind`, because indexing w[e] would write a full
    zero-filled gradient for every expert."""
    T, K = weights_TK.shape
    groups = table.order_S.split([*table.counts_E.tolist(), T * K - int(table.counts_E.sum())])
    y_SD = x_TD.new_zeros(T * K, x_TD.shape[1])
    biases = zip(*(b.unbind(0) if b is not None else [None] * len(w.up_ERD) for b in w[2:]))
    for rows, up, down, (up_bias, down_bias) in zip(
        groups, w.up_ERD.unbind(0), w.down_EDF.unbind(0), biases
    ):
        h = activate(F.linear(x_TD[rows // K], up, up_bias), activation)
        y_SD = y_SD.index_copy(0, rows, F.linear(h, down, down_bias))
    return torch.einsum("tkd,tk->td", y_SD.view(T, K, x_TD.shape[1]), weights_TK.to(y_SD.dtype))


def grouped_experts(
    x_TD: Tensor, table: MappingTable, weights_TK: Tensor, w: ExpertWeights, activation: Activation
) -> Tensor:
    """By torch's grouped product; without a word to the host where that fits the shapes."""
    T, K = weights_TK.shape
    order_S, counts_E = table.order_S, table.counts_E
    # what lies behind the kept rows is uninitialised in outputs and gradients of grouped_mm
    kept_S1 = (torch.arange(T * K, device=order_S.device) < counts_E.sum())[:, None]
    x_SD = torch.where(kept_S1, x_TD.index_select(0, order_S // K), 0.0)
    h_SF = activate(_grouped(x_SD, w.up_ERD, w.up_bias_ER, counts_E), activation)
    y_SD = torch.where(kept_S1, _grouped(h_SF, w.down_EDF, w.down_bias_ED, counts_E), 0.0)
    y_TKD = y_SD.index_select(0, inverse(order_S)).view(T, K, x_TD.shape[1])
    return torch.einsum("tkd,tk->td", y_TKD, weights_TK.to(y_TKD.dtype))


def _grouped(x_SD: Tensor, w_EFD: Tensor, bias_EF: Tensor | None, counts_E: Tensor) -> Tensor:
    if grouped_mm_fits(x_SD, w_EFD):
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        y_SF = F.grouped_mm(x_SD, w_EFD.transpose(-2, -1), offs=offsets_E)
    else:
        groups = x_SD.split([*counts_E.tolist(), len(x_SD) - int(counts_E.sum())])
        parts = [F.linear(x, w) for x, w in zip(groups, w_EFD.unbind(0))]
        y_SF = torch.cat([*parts, x_SD.new_zeros(len(groups[-1]), w_EFD.shape[1])])
    if bias_EF is None:
        return y_SF
    places_S = torch.arange(len(x_SD), device=x_SD.device)
    owners_S = torch.searchsorted(counts_E.cumsum(0), places_S, right=True)
    return y_SF + bias_EF[owners_S.clamp(max=len(bias_EF) - 1)]


def grouped_mm_fits(x_SD: Tensor, w_EFD: Tensor) -> bool:
    """torch's kernel wants 16-byte aligned rows, and has no float64."""
    if not hasattr(F, "grouped_mm") or x_SD.dtype not in (torch.float32, torch.bfloat16):
        return False
    rows = (w_EFD.shape[1], w_EFD.shape[2])
    if any(size * x_SD.element_size() % 16 for size in rows) or x_SD.shape[0] == 0:
        return False
    return w_EFD.data_ptr() % 16 == 0 and w_EFD.is_contiguous()
