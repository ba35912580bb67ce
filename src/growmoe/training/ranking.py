"""Which experts lower the loss: credit, ranking, and routing by it (opt-in). Our own definition.

To first order, removing expert e from token t changes the loss by a_te = -w_te * dL/dw_te, with w
the combine weight: no forward pass more, only the gradient that reaches the weight. (L is what is
trained on, the router losses of later layers included.) Per step and layer A_e = sum_t a_te /
sum_t w_te, standardised over the experts, is added to a running credit; the rank of the credit is
reported. With loss-ranked routing the selection score of an expert is shifted by eta * phi_e,
phi_e = 2 (r_e - 1) / (E - 1) - 1 in [-1, 1] by its rank r_e (E: best). Weights use the unshifted
score, and no gradient flows through the shift. Choices that capacity dropped contribute nothing and
count nowhere. It says who is of use at present, not who could be.
Letters: T tokens, K experts per token, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from growmoe.models.router import Router, Routing
from growmoe.recipe import RankingModel
from growmoe.training.balancing import Reduce, alone

BETA = 0.99
"""Memory of the credit where no ranking is configured (it is reported all the same)."""

RELEASE = 1.1
"""A brake loosens by this factor per step without overload: seven such steps undo one halving.
Without it, the chance overloads of small batches would end all shifts before long."""


@dataclass
class Credit:
    """Of one layer's experts, float64: what they did, and the brake on their shift."""

    value_E: Tensor
    brake: Tensor
    recent_4E: Tensor
    """Running means over steps of -w dL/dw, w, rows and processes, all times one factor: the first
    over the last is the loss in nats per token that an expert removes."""

    @classmethod
    def none(cls, experts: int) -> "Credit":
        """Before the first step."""
        return cls(_zeros(experts), torch.ones((), dtype=torch.float64), _zeros(4, experts))


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def watch(routing: list[Routing]) -> None:
    """Ask for the gradients that credit is made of; before backward."""
    for routed in routing:
        if routed.weights_TK.requires_grad:
            routed.weights_TK.retain_grad()


class ExpertRanking:
    """Running credit of every expert of every layer, and the shift of routers by it."""

    def __init__(
        self, experts: list[int], spec: RankingModel | None, steps: int, reduce: Reduce = alone
    ) -> None:
        self.spec, self.steps, self.reduce = spec, steps, reduce
        self.layers = [Credit.none(E) for E in experts]
        self._sums: list[Tensor] = []  # [3,E] per layer: credit, weight, rows
        self._acting = False

    def add(self, routing: list[Routing]) -> None:
        """Take in one micro batch after its backward pass; its gradients are used up."""
        new = [first_order_credit(routed) for routed in routing]
        self._sums = [a + b for a, b in zip(self._sums, new)] if self._sums else new

    def step(self, counts: list[Tensor]) -> None:
        """Update credits from the micro batches of all ranks, and brake overloaded layers: those
        that a shift overloaded, for before it begins there is nothing to brake."""
        spec = self.spec
        beta, fewest = (spec.beta, spec.min_tokens) if spec else (BETA, 1)
        for credit, sums_3E, counts_E in zip(self.layers, self._sums, counts):
            sums_4E = self.reduce(torch.cat([sums_3E, torch.ones_like(sums_3E[:1])])).cpu()
            credit.recent_4E = beta * credit.recent_4E + (1 - beta) * sums_4E
            gain_E, weight_E, rows_E, _ = sums_4E
            mean_E = gain_E / (weight_E + 1e-12)
            known_E = rows_E >= fewest
            if int(known_E.sum()) > 1:
                z = standardised(mean_E[known_E])
                credit.value_E[known_E] = beta * credit.value_E[known_E] + (1 - beta) * z
            if spec and self._acting:
                limit = spec.max_load * float(counts_E.double().mean())
                credit.brake *= 0.5 if float(counts_E.max()) > limit else RELEASE
                credit.brake.clamp_(max=1.0)
        self._sums = []

    def shift(self, routers: list[Router], step: int) -> float:
        """Give every router its shift for step `step` (from 0); returns eta without brakes."""
        eta = self.eta(step)
        self._acting = eta > 0
        for layer, router in enumerate(routers):
            router.shift_E = None
            if self._acting:
                phi_E = phi(self.rank(layer)) * (eta * float(self.layers[layer].brake))
                router.shift_E = phi_E.to(router.weight)
        return eta

    def rank(self, layer: int) -> Tensor:
        """Ranks of the experts of a MoE layer, from 1 to E."""
        return ranks(self.layers[layer].value_E)

    def eta(self, step: int) -> float:
        """0 during the warm-up, rising, flat, and 0 again at the end of the run."""
        if self.spec is None:
            return 0.0
        begin, length = self.spec.warmup * self.steps, self.spec.ramp * self.steps
        rising = (step - begin) / length if length else float(step >= begin)
        falling = (self.steps - 1 - step) / length if length else float(step < self.steps - 1)
        return self.spec.eta * min(1.0, max(0.0, rising), max(0.0, falling))

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        named = {}
        for number, credit in enumerate(self.layers):
            named[f"{number}.credit"], named[f"{number}.brake"] = credit.value_E, credit.brake
            named[f"{number}.use"] = credit.recent_4E
        return named

    def load(self, state: dict[str, Tensor]) -> None:
        """The reverse of `state`; raises KeyError where a layer is missing."""
        for number, credit in enumerate(self.layers):
            credit.value_E.copy_(state[f"{number}.credit"])
            credit.brake.copy_(state[f"{number}.brake"])
            credit.recent_4E.copy_(state[f"{number}.use"])


@torch.no_grad()
def first_order_credit(routing: Routing) -> Tensor:
    """[3,E] sums over the kept choices of a micro batch: -w dL/dw, w, and rows, per expert."""
    w_TK, E = routing.weights_TK, routing.logits_TE.shape[1]
    grad_TK = w_TK.grad if w_TK.grad is not None else torch.zeros_like(w_TK)
    w_TK.grad = None
    kept_TK = torch.ones_like(w_TK) if routing.kept_TK is None else routing.kept_TK.to(w_TK)
    parts_3S = torch.stack([-w_TK * grad_TK, w_TK * kept_TK, kept_TK]).double().flatten(1)
    sums_3E = torch.zeros(3, E, dtype=torch.float64, device=w_TK.device)
    return sums_3E.index_add_(1, routing.experts_TK.reshape(-1), parts_3S)


def standardised(values_E: Tensor) -> Tensor:
    """Distances from the mean in standard deviations; zeros where all are equal."""
    return (values_E - values_E.mean()) / (values_E.std(unbiased=False) + 1e-12)


def ranks(credit_E: Tensor) -> Tensor:
    """1 for the least credit to E for the most; equal credits share their mean rank."""
    below_E = (credit_E[None, :] < credit_E[:, None]).sum(1)
    equal_E = (credit_E[None, :] == credit_E[:, None]).sum(1)
    return below_E + (equal_E + 1) / 2


def phi(rank_E: Tensor) -> Tensor:
    """Ranks as numbers from -1 (last) to 1 (first): bounded, whatever the scale of the loss."""
    return 2.0 * (rank_E - 1.0) / max(1, len(rank_E) - 1) - float(len(rank_E) > 1)
