"""Cross entropy and router losses. Letters: T tokens, E experts, K experts per token, V vocabulary.

Router losses are computed per layer and averaged over layers. Pooling counts over layers first
(as transformers does) calls four layers that each collapsed on another expert perfectly balanced.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from growmoe.models.moe import Routing
from growmoe.models.transformer import Output


@dataclass(frozen=True)
class LossWeights:
    """Coefficients of the router losses; `z_kind` names the formula (see `z_loss`)."""

    balance: float = 0.001
    z: float = 0.01
    z_kind: str = "router_logsumexp"


@dataclass
class Losses:
    """Scalars of one batch; `total` is what is differentiated."""

    total: Tensor
    cross_entropy: Tensor
    balance: Tensor
    z: Tensor


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean nats per token, in float32."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def balance_loss(routing: Routing) -> Tensor:
    """E * sum_e f_e P_e of one layer (Switch, eq. 4), f the share of the T*K choices, P the mean
    probability: 1 at perfect balance, E when one expert takes everything."""
    shares_E = routing.counts_E.to(routing.probs_TE.dtype) / routing.experts_TK.numel()
    return routing.probs_TE.shape[1] * (shares_E * routing.probs_TE.mean(0)).sum()


def z_loss(logits_TE: Tensor, kind: str) -> Tensor:
    """Mean square of log Z (ST-MoE's router z-loss, PaLM's on the output) or of the largest logit
    (Baichuan 2's "max-z"). AquilaMoE prints no formula for its "max z-loss"; the kind is an
    option, the router's log Z the default."""
    wide = logits_TE.float()
    z = wide.logsumexp(-1) if kind.endswith("logsumexp") else wide.amax(-1)
    return z.square().mean()


def language_model_loss(output: Output, targets_BT: Tensor, weights: LossWeights) -> Losses:
    """Cross entropy plus the weighted router losses, averaged over the MoE layers."""
    entropy = cross_entropy(output.logits, targets_BT)
    zero = torch.zeros((), device=entropy.device)
    balance = z = zero
    if output.routing:
        balance = torch.stack([balance_loss(routing) for routing in output.routing]).mean()
        if weights.z_kind.startswith("router"):
            per_layer = [z_loss(routing.logits_TE, weights.z_kind) for routing in output.routing]
            z = torch.stack(per_layer).mean()
    if weights.z_kind.startswith("output"):
        z = z_loss(output.logits, weights.z_kind)
    total = entropy + weights.balance * balance + weights.z * z
    return Losses(total, entropy.detach(), balance.detach(), z.detach())
