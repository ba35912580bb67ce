"""The mapping table: which token goes to which row of which expert (DeepSpeed-MoE section 5.4).

A stable counting sort of the routed choices by expert. No one-hot tensor exists: the table is T*K
integers. Letters: T tokens, K experts per token, S=T*K routed rows, E experts.
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from growmoe.ops.device import plain_cpu

Drop = Literal["position", "probability"]


class MappingTable:
    """Rows grouped by expert, in a stable order.

    `order_S[i]` is the flat index t*K+j of row i once rows are sorted by expert; `counts_E[e]` is
    how many rows expert e gets. Where capacity drops rows, they stand behind the kept ones and
    belong to nobody: `counts_E` adds up to less than S. `choices_TK` are the experts themselves
    where none was dropped. The order may be given as a function: a few rows need none.
    """

    def __init__(
        self,
        order_S: Tensor | Callable[[], Tensor],
        counts_E: Tensor,
        choices_TK: Tensor | None = None,
    ) -> None:
        self._order, self.counts_E, self.choices_TK = order_S, counts_E, choices_TK

    @property
    def order_S(self) -> Tensor:
        """Sorted when it is asked for, then kept."""
        if not isinstance(self._order, Tensor):
            self._order = self._order()
        return self._order

    def kept_like(self, experts_TK: Tensor) -> Tensor:
        """Which of the choices `experts_TK` that this is the table of were not dropped."""
        places_S = torch.arange(self.order_S.numel(), device=self.order_S.device)
        kept_S = torch.empty_like(places_S, dtype=torch.bool)
        kept_S[self.order_S] = places_S < self.counts_E.sum()
        return kept_S.view_as(experts_TK)


def mapping_table(experts_TK: Tensor, num_experts: int) -> MappingTable:
    """The table of int64 choices [T,K] among `num_experts` experts."""
    flat_S = experts_TK.reshape(-1)
    if plain_cpu(flat_S) and num_experts < 2**15:
        # numpy sorts 16-bit keys by radix, in less than half the time of torch's stable sort
        keys_S = flat_S.numpy().astype(np.int16)
        counts_E = torch.from_numpy(np.bincount(keys_S, minlength=num_experts))
        return MappingTable(
            lambda: torch.from_numpy(np.argsort(keys_S, kind="stable")), counts_E, experts_TK
        )
    return MappingTable(*mapping_table_reference(experts_TK, num_experts), experts_TK)


def mapping_table_reference(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(order_S, counts_E) by torch's stable sort; on a GPU without a word to the host."""
    flat_S = experts_TK.reshape(-1)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=flat_S.device)
    counts_E.scatter_add_(0, flat_S, torch.ones_like(flat_S))
    return torch.argsort(flat_S, stable=True), counts_E


def capacity(tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """Rows that one expert may take: ceil(factor * T * K / E), at least one (GShard)."""
    return max(1, math.ceil(factor * tokens * top_k / num_experts))


def with_capacity(
    experts_TK: Tensor, scores_TK: Tensor, num_experts: int, limit: int, drop: Drop
) -> MappingTable:
    """The table when no expert takes more than `limit` rows.

    `position` keeps first choices before second ones, then earlier tokens (GShard); `probability`
    keeps the choices with the largest scores, earlier tokens first among equals.
    """
    T, K = experts_TK.shape
    flat_S = experts_TK.reshape(-1)
    if drop == "position":
        priority_S = torch.arange(T * K, device=flat_S.device).view(T, K).t().reshape(-1)
    else:
        priority_S = torch.argsort(scores_TK.reshape(-1), descending=True, stable=True)
    by_expert = torch.argsort(flat_S[priority_S], stable=True)
    ranked_S = priority_S[by_expert]  # sorted by expert, then by priority
    _, counts_E = mapping_table_reference(experts_TK, num_experts)
    starts_E = counts_E.cumsum(0) - counts_E
    sorted_S = flat_S[ranked_S]
    place_S = torch.arange(T * K, device=flat_S.device) - starts_E[sorted_S]
    owner_S = torch.empty_like(flat_S)
    owner_S[ranked_S] = torch.where(place_S < limit, sorted_S, num_experts)  # E: dropped
    return MappingTable(torch.argsort(owner_S, stable=True), counts_E.clamp(max=limit))


def inverse(order_S: Tensor) -> Tensor:
    """Where each flat index t*K+j stands in `order_S`."""
    inverse_S = torch.empty_like(order_S)
    inverse_S[order_S] = torch.arange(order_S.numel(), device=order_S.device)
    return inverse_S
