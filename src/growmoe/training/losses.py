"""Cross entropy and router losses. Letters: B sequences, T tokens of all of them, E experts,
K experts per token, V vocabulary.

Router losses are computed per layer and averaged over layers. Pooling counts over layers first
(as transformers does) calls four layers that each collapsed on another expert perfectly balanced.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from growmoe.models.router import Routing
from growmoe.models.transformer import Output

Scope = Literal["micro", "sequence", "global"]


@dataclass(frozen=True)
class LossWeights:
    """Coefficients of the router losses; those of z by kind (see `z_loss`)."""

    balance: float = 0.001
    scope: Scope = "micro"
    z: Mapping[Any, float] = field(default_factory=lambda: {"router_logsumexp": 0.01})


@dataclass
class Losses:
    """Scalars of one batch; `total` is what is differentiated."""

    total: Tensor
    cross_entropy: Tensor
    balance: Tensor
    z: dict[str, Tensor]


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean nats per token, in float32."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def balance_loss(
    routing: Routing, scope: Scope = "micro", seen_E: Tensor | None = None
) -> Tensor:  # fmt: skip
    """E * sum_e f_e P_e of one layer (Switch, eq. 4), f the share of the T*K choices, P the mean
    probability: 1 at perfect balance, E when one expert takes everything.

    `micro` takes f and P over the batch, `sequence` over each sequence and then the mean
    (DeepSeek-V3, eq. 17 to 20), `global` takes f from `seen_E`, the choices of all batches and
    ranks of the step so far, this one included, and P from the batch (arXiv 2501.11873).
    """
    probs_TE = routing.probs_TE
    E = probs_TE.shape[1]
    if scope == "sequence":
        chosen_TE = torch.zeros_like(probs_TE).scatter_add_(
            1, routing.experts_TK, torch.ones_like(routing.weights_TK)
        )
        shape = (routing.sequences, -1, E)
        shares_BE = chosen_TE.view(shape).mean(1) / routing.experts_TK.shape[1]
        return E * (shares_BE * probs_TE.view(shape).mean(1)).sum(-1).mean()
    counts_E = routing.counts_E if scope == "micro" or seen_E is None else seen_E
    shares_E = counts_E.to(probs_TE.dtype) / counts_E.sum()
    return E * (shares_E * probs_TE.mean(0)).sum()


def z_loss(logits_TE: Tensor, kind: str) -> Tensor:
    """Mean square of log Z (ST-MoE's router z-loss, PaLM's on the output) or of the largest logit
    (Baichuan 2's "max-z"). AquilaMoE prints no formula for its "max z-loss"; the kind is an
    option, the router's log Z the default."""
    wide = logits_TE.float()
    z = wide.logsumexp(-1) if kind.endswith("logsumexp") else wide.amax(-1)
    return z.square().mean()


def language_model_loss(
    output: Output, targets_BT: Tensor, weights: LossWeights, seen: list[Tensor] | None = None
) -> Losses:
    """Cross entropy plus the weighted router losses, averaged over the MoE layers; `seen` holds
    the counts of every layer for the global scope."""
    entropy = total = cross_entropy(output.logits, targets_BT)
    balance, z = torch.zeros((), device=entropy.device), {}
    if output.routing:
        known: list[Tensor | None] = [*seen] if seen else [None] * len(output.routing)
        layers = zip(output.routing, known)
        balance = torch.stack([balance_loss(r, weights.scope, seen_E) for r, seen_E in layers])
        balance = balance.mean()
        total = total + weights.balance * balance
    for kind, coefficient in weights.z.items():
        if kind.startswith("output"):
            z[kind] = z_loss(output.logits, kind)
        elif output.routing:
            z[kind] = torch.stack([z_loss(r.logits_TE, kind) for r in output.routing]).mean()
        else:
            continue
        total = total + coefficient * z[kind]
    kept = {kind: value.detach() for kind, value in z.items()}
    return Losses(total, entropy.detach(), balance.detach(), kept)
