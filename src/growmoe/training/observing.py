"""What practitioners watch in a mixture of experts, per MoE layer.

Scalars are logged every step, vectors over experts with every validation. Letters: E experts.
"""

import math

import torch
from torch import Tensor, nn

from growmoe.models.config import moe_layers
from growmoe.models.moe import Experts
from growmoe.models.router import Router, Routing
from growmoe.models.transformer import Transformer

_MEMORY = 0.98
"""Share of the recent load that one step keeps (about 50 steps)."""
_DEAD = 0.01
"""Below this share of the mean recent load an expert counts as dead."""
_SAMPLE = 1 << 16
"""Elements of an expert that its similarity to others is computed from."""


class RoutingMonitor:
    """Collects what the routers of one step did, and remembers the recent load."""

    def __init__(self, experts: list[int]) -> None:
        self.recent = [torch.zeros(E, dtype=torch.float64) for E in experts]
        self._sums: list[Tensor] = []

    @torch.no_grad()
    def add(self, routing: list[Routing]) -> None:
        """Take in one micro batch."""
        new = [_sums(routed) for routed in routing]
        self._sums = [a + b for a, b in zip(self._sums, new)] if self._sums else new

    def step(self, counts: list[Tensor], routers: list[Router]) -> dict[str, list[float]]:
        """One number per layer and measure for the step that ends here."""
        found: dict[str, list[float]] = {}
        for number, (counts_E, sums) in enumerate(zip(counts, self._sums)):
            load_E = counts_E.double().cpu()
            recent_E = self.recent[number].mul_(_MEMORY).add_(load_E, alpha=1 - _MEMORY)
            tokens, entropy, log_z, dropped, choices = sums.tolist()
            dead = (recent_E < _DEAD * recent_E.mean()).sum()
            measures = {
                "max_vio": max_violation(load_E),
                "load_entropy": load_entropy(load_E),
                "router_entropy": entropy / tokens / math.log(max(2, len(load_E))),
                "log_z": log_z / tokens,
                "dropped": dropped / choices,
                "dead": float(dead),
            }
            bias = routers[number].bias
            if bias is not None:
                measures["bias_range"] = float(bias.max() - bias.min())
            for name, value in measures.items():
                found.setdefault(name, []).append(round(value, 6))
        self._sums = []
        return found

    def shares(self) -> list[list[float]]:
        """Recent load of every expert of every layer, as shares of the layer's choices."""
        return [[round(v, 6) for v in (r / r.sum()).tolist()] for r in self.recent if r.sum() > 0]

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {f"{number}.recent": recent for number, recent in enumerate(self.recent)}

    def load(self, state: dict[str, Tensor]) -> None:
        """The reverse of `state`; raises KeyError where a layer is missing."""
        for number, recent in enumerate(self.recent):
            recent.copy_(state[f"{number}.recent"])


def _sums(routing: Routing) -> Tensor:
    """Tokens, entropy of the probabilities, log Z, dropped choices and choices: float64 [5]."""
    probs_TE = routing.probs_TE.detach().double()
    entropy = -(probs_TE * probs_TE.clamp(min=1e-30).log()).sum()
    log_z = routing.logits_TE.detach().double().logsumexp(-1).sum()
    choices = routing.counts_E.sum().double()
    dropped = choices - routing.kept_E.sum()
    tokens = torch.full_like(choices, len(probs_TE))
    return torch.stack([tokens, entropy, log_z, dropped, choices])


def max_violation(load_E: Tensor) -> float:
    """MaxVio: largest load over the mean, minus one; 0 at perfect balance (arXiv 2408.15664)."""
    return float(load_E.max() / load_E.mean() - 1.0) if load_E.sum() else 0.0


def load_entropy(load_E: Tensor) -> float:
    """Entropy of the load over its largest value ln E; 1 at perfect balance."""
    if len(load_E) == 1 or not load_E.sum():
        return 1.0
    share_E = load_E.double() / load_E.sum()
    entropy = -(share_E * share_E.clamp(min=1e-30).log()).sum()
    return float(entropy) / math.log(len(load_E))


@torch.no_grad()
def cosines(experts: Experts) -> Tensor:
    """[E,E] cosines between the experts of a layer; 1 for exact copies.

    All weights of an expert as one vector, of which at most 2^16 evenly spaced elements of each
    matrix are taken.
    """
    gram_EE: Tensor | None = None
    for stack in (experts.up, experts.down):
        flat_ES = stack.flatten(1)
        flat_ES = flat_ES[:, :: flat_ES.shape[1] // _SAMPLE + 1].float()
        part_EE = flat_ES @ flat_ES.t()
        gram_EE = part_EE if gram_EE is None else gram_EE + part_EE
    assert gram_EE is not None
    norm_E = gram_EE.diagonal().sqrt().clamp(min=1e-12)
    return gram_EE / norm_E[:, None] / norm_E[None, :]


def similarity(experts: Experts) -> tuple[float, float, float]:
    """(least, mean, largest) cosine between two experts of a layer. One expert alone is like
    itself: 1."""
    cosine_EE = cosines(experts)
    upper = torch.triu_indices(len(cosine_EE), len(cosine_EE), 1)
    pairs = cosine_EE[upper[0], upper[1]]
    if not len(pairs):
        return 1.0, 1.0, 1.0
    return float(pairs.min()), float(pairs.mean()), float(pairs.max())


def similarities(model: nn.Module) -> dict[str, list[float]]:
    """The similarity of the experts of every MoE layer, as lists over layers."""
    found = [similarity(m) for m in model.modules() if isinstance(m, Experts)]
    least, mean, most = zip(*found) if found else ((), (), ())
    return {
        "cosine_min": [round(v, 6) for v in least],
        "cosine_mean": [round(v, 6) for v in mean],
        "cosine_max": [round(v, 6) for v in most],
    }


def group_of(name: str) -> str:
    """The group that the parameter `name` belongs to: router, experts, fixed (the branch beside
    them, its mixing coefficients), attention, dense (a dense layer's feed-forward), embedding or
    norm."""
    if ".moe.router." in name:
        return "router"
    if ".moe.experts." in name:
        return "experts"
    if ".moe.mix." in name:
        return "fixed"
    if "norm" in name.rsplit(".", 2)[-2]:
        return "norm"
    if ".attn." in name:
        return "attention"
    return "dense" if ".mlp." in name else "embedding"


def gradient_groups(model: Transformer) -> dict[str, list[nn.Parameter]]:
    """Trained parameters by group, for their gradient norms."""
    layers = moe_layers(model.config)
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = group_of(name)
        if group == "dense" and int(name.split(".")[1]) in layers:
            group = "fixed"
        groups.setdefault(group, []).append(parameter)
    return groups


def gradient_norms(groups: dict[str, list[nn.Parameter]]) -> dict[str, Tensor]:
    """The norm of every group's gradient, together."""
    return {
        name: nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        for name, group in groups.items()
    }
