"""The one-hot einsum dispatch, kept as the named baseline that the mapping table is measured
against. Nothing in a model calls it.

GShard (Lepikhin et al. 2020, arXiv 2006.16668, algorithm 2) and DeepSpeed-MoE as it was published
(Rajbhandari et al. 2022, arXiv 2201.05596, section 5.4 calls it the sparse einsum) send tokens to
experts by products with a mask [T,E,C] that is almost all zeros: 2*T*E*C*D operations to move
T*K rows.

Letters: T tokens, K experts per token, E experts, C slots of an expert (capacity), D hidden,
F expert width, R=2F rows of gate and up.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def slots_of(experts_TK: Tensor, num_experts: int) -> Tensor:
    """slots_TK: which slot of its expert a choice takes, counted from 0 and without a limit.

    Choice-major priority: all first choices in token order, then all second choices, and so on.
    """
    T, K = experts_TK.shape
    mask_SE = F.one_hot(experts_TK.t().reshape(-1), num_experts)
    slots_S = ((mask_SE.cumsum(0) - 1) * mask_SE).sum(-1)
    return slots_S.view(K, T).t()


def onehot_moe(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    up_ERD: Tensor,
    down_EDF: Tensor,
    capacity: int,
) -> Tensor:
    """y_TD of SwiGLU experts (gate rows first in `up_ERD`), by one-hot products.

    Choices that find all `capacity` slots of their expert taken are dropped: they add nothing to
    their token. As in DeepSpeed the dispatch mask is where the combine weights are not zero, so a
    weight of exactly zero dispatches nothing.
    """
    E = up_ERD.shape[0]
    slots_TK = slots_of(experts_TK, E)
    kept_TK = slots_TK < capacity
    gates_TKE = F.one_hot(experts_TK, E) * (weights_TK * kept_TK).to(x_TD.dtype).unsqueeze(-1)
    slots_TKC = F.one_hot(slots_TK.clamp(max=capacity - 1), capacity).to(x_TD.dtype)
    combine_TEC = torch.einsum("tke,tkc->tec", gates_TKE, slots_TKC)
    dispatch_TEC = combine_TEC.detach().bool().to(x_TD.dtype)
    slots_ECD = torch.einsum("tec,td->ecd", dispatch_TEC, x_TD)
    gate, up = torch.bmm(slots_ECD, up_ERD.transpose(1, 2)).chunk(2, dim=-1)
    y_ECD = torch.bmm(F.silu(gate) * up, down_EDF.transpose(1, 2))
    return torch.einsum("tec,ecd->td", combine_TEC, y_ECD)
