"""Expert computation through a mapping table: sort rows by expert, grouped products, unsort.

No [T,E,C] one-hot tensor exists anywhere (DeepSpeed-MoE section 5.4 replaces it by the mapping
table). Letters: T tokens, K experts per token, S=T*K routed rows, D hidden, F expert width,
E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def mapping_table(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Rows grouped by expert, in a stable order.

    Returns (order_S, counts_E): `order_S[i]` is the flat index t*K+j of the i-th row once rows
    are sorted by expert; `counts_E[e]` is how many rows expert e gets (int64, sums to T*K).
    """
    flat_S = experts_TK.reshape(-1)
    order_S = torch.argsort(flat_S, stable=True)
    return order_S, torch.bincount(flat_S, minlength=num_experts)


def grouped_linear(x_SD: Tensor, w_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """y_SF: the rows of expert e (counts_E[e] of them, in order) times w_EFD[e] transposed."""
    if _grouped_mm_fits(x_SD, w_EFD):
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        return F.grouped_mm(x_SD, w_EFD.transpose(-2, -1), offs=offsets_E)
    return grouped_linear_reference(x_SD, w_EFD, counts_E)


def grouped_linear_reference(x_SD: Tensor, w_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """A loop over experts. `unbind`, because indexing w[e] costs O(E^2) traffic in backward."""
    groups = x_SD.split(counts_E.tolist())
    return torch.cat([F.linear(x, w) for x, w in zip(groups, w_EFD.unbind(0))])


def _grouped_mm_fits(x_SD: Tensor, w_EFD: Tensor) -> bool:
    """torch's kernel wants 16-byte aligned rows, and has no float64."""
    if not hasattr(F, "grouped_mm") or x_SD.dtype not in (torch.float32, torch.bfloat16):
        return False
    rows = (w_EFD.shape[1], w_EFD.shape[2])
    if any(size * x_SD.element_size() % 16 for size in rows) or x_SD.shape[0] == 0:
        return False
    return w_EFD.data_ptr() % 16 == 0 and w_EFD.is_contiguous()


def routed_rows(x_TD: Tensor, order_S: Tensor, top_k: int) -> Tensor:
    """x_SD: the token of every routed row, in the order of the mapping table."""
    return x_TD.index_select(0, order_S // top_k)


def combine(y_SD: Tensor, order_S: Tensor, weights_TK: Tensor) -> Tensor:
    """y_TD: undo the sort and add each token's K expert outputs with their weights.

    A gather through the inverse order, not a scatter-add: deterministic on every device.
    """
    T, K = weights_TK.shape
    inverse_S = torch.empty_like(order_S)
    inverse_S[order_S] = torch.arange(order_S.numel(), device=order_S.device)
    y_TKD = y_SD.index_select(0, inverse_S).view(T, K, y_SD.shape[1])
    return torch.einsum("tkd,tk->td", y_TKD, weights_TK.to(y_TKD.dtype))
