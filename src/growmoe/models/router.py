"""The router: which K of E experts a token visits, and with what weights. Always float32 or wider.

Letters: B sequences, T tokens, D hidden, E experts, K experts per token, G groups of experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from growmoe.models.config import ModelConfig, MoEConfig
from growmoe.ops.device import on_triton, without_autocast
from growmoe.ops.linear import linear
from growmoe.ops.mapping import Drop, MappingTable, capacity, mapping_table, with_capacity


@dataclass(frozen=True)
class RoutingPolicy:
    """What differs between training and inference; set from outside by whoever trains."""

    jitter: float = 0.0
    """The router's input is multiplied by U(1 - jitter, 1 + jitter) (Switch Transformer)."""
    capacity_factor: float | None = None
    """No expert takes more than ceil(factor T K / E) rows of a batch; None drops nothing."""
    drop: Drop = "position"
    """Which rows go over capacity: late ones, or those of least probability."""


@dataclass
class Routing:
    """What a router decided for T tokens of B sequences; losses and metrics are computed from it.

    `counts_E` are choices per expert before any was dropped, `kept_E` those that were computed.
    """

    logits_TE: Tensor
    scores_TE: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    counts_E: Tensor
    kept_E: Tensor
    scoring: str
    sequences: int
    kept_TK: Tensor | None = None
    """Which choices were computed; None: all."""

    @property
    def probs_TE(self) -> Tensor:
        """Scores that add up to one: what the balance loss calls P."""
        if self.scoring == "softmax":
            return self.scores_TE
        return self.scores_TE / self.scores_TE.sum(-1, keepdim=True)


class Router(nn.Module):
    """Softmax or sigmoid top-k router, optionally with a selection bias and limited to groups.

    The bias and `shift_E` (see `training.ranking`) say who is chosen, never how much it counts.
    """

    def __init__(self, config: ModelConfig, experts: int) -> None:
        super().__init__()
        assert config.moe is not None
        self.config: MoEConfig = config.moe
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.bias: nn.Parameter | None = None
        if config.moe.selection_bias:
            self.bias = nn.Parameter(torch.zeros(experts), requires_grad=False)
        self.shift_E: Tensor | None = None
        self.policy = RoutingPolicy()

    def forward(self, x_TD: Tensor, sequences: int = 1) -> tuple[Routing, MappingTable]:
        """Choose K of E experts for every token; in eval mode nothing is random or dropped."""
        logits_TE = self._logits(x_TD)
        scores_TE, experts_TK, weights_TK, table = self._choice(logits_TE)
        T, E = scores_TE.shape
        counts_E, factor = table.counts_E, self.policy.capacity_factor
        kept_TK = None
        if self.training and factor is not None:
            limit = capacity(T, self.config.top_k, E, factor)
            # scores, not weights: one renormalised weight is always 1
            chosen_TK = scores_TE.detach().gather(1, experts_TK)
            table = with_capacity(experts_TK, chosen_TK, E, limit, self.policy.drop)
            kept_TK = table.kept_like(experts_TK)
        routing = Routing(
            logits_TE, scores_TE, experts_TK, weights_TK, counts_E, table.counts_E,
            self.config.scoring, sequences, kept_TK,
        )  # fmt: skip
        return routing, table

    def _logits(self, x_TD: Tensor) -> Tensor:
        wide = x_TD.dtype if x_TD.dtype is torch.float64 else torch.float32
        x_TD = x_TD.to(wide)
        if self.training and self.policy.jitter:
            low, high = 1.0 - self.policy.jitter, 1.0 + self.policy.jitter
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(low, high)
        with without_autocast(x_TD):
            return linear(x_TD, self.weight.to(wide))

    def _choice(self, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor, MappingTable]:
        """(scores_TE, experts_TK best first, weights_TK, table of all choices)."""
        top_k, renormalize = self.config.top_k, self.config.renormalize
        extras = [extra for extra in (self.bias, self.shift_E) if extra is not None]
        bias_E = sum(extras[1:], start=extras[0].float()) if extras else None
        if self.config.groups == 1 and on_triton(logits_TE):
            from growmoe.ops import triton_routing

            if triton_routing.supported(logits_TE):
                routed = triton_routing.route(
                    logits_TE, top_k, self.config.scoring, renormalize, bias_E
                )
                table = MappingTable(
                    lambda: triton_routing.mapping_table(routed.experts_TK, routed.starts_BE),
                    routed.counts_E,
                    routed.experts_TK,
                )
                return routed.scores_TE, routed.experts_TK, routed.weights_TK, table
        soft = self.config.scoring == "softmax"
        scores_TE = logits_TE.softmax(-1) if soft else logits_TE.sigmoid()
        selection_TE = scores_TE.detach()
        if bias_E is not None:
            selection_TE = selection_TE + bias_E
        if self.config.groups > 1:
            selection_TE = self._limited(selection_TE)
        experts_TK = selection_TE.topk(top_k, dim=-1).indices
        weights_TK = scores_TE.gather(1, experts_TK)
        if renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return scores_TE, experts_TK, weights_TK, mapping_table(experts_TK, scores_TE.shape[1])

    def _limited(self, scores_TE: Tensor) -> Tensor:
        """Scores outside the `top_groups` best groups become -inf; a group is worth the sum of its
        K / top_groups largest scores (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""
        groups, chosen = self.config.groups, self.config.top_groups
        scores_TGE = scores_TE.unflatten(1, (groups, -1))
        best = max(1, self.config.top_k // chosen)
        worth_TG = scores_TGE.topk(min(best, scores_TGE.shape[2]), dim=-1).values.sum(-1)
        kept_TG = torch.zeros_like(worth_TG, dtype=torch.bool)
        kept_TG.scatter_(1, worth_TG.topk(chosen, dim=-1).indices, True)
        return scores_TGE.masked_fill(~kept_TG[..., None], -torch.inf).flatten(1)


def routers(model: nn.Module) -> list[Router]:
    """The routers of a model, in layer order."""
    return [module for module in model.modules() if isinstance(module, Router)]


def set_policy(model: nn.Module, policy: RoutingPolicy) -> None:
    """Give all routers of `model` this policy."""
    for router in routers(model):
        router.policy = policy
