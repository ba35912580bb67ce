"""Everything that training does with routers: policy, counts, bias, ranking, what is logged."""

from typing import Any

import torch
from torch import Tensor

from growmoe.models.config import moe_layers
from growmoe.models.moe import Experts
from growmoe.models.router import Routing, RoutingPolicy, routers, set_policy
from growmoe.models.transformer import Transformer
from growmoe.recipe import TrainStage
from growmoe.training.balancing import Reduce, StepCounts, alone, update_bias
from growmoe.training.observing import RoutingMonitor, similarities
from growmoe.training.ranking import ExpertRanking, ranks, watch
from growmoe.training.usefulness import layer_record


class RoutingControl:
    """Called by the training loop at the seams of a step. A dense model has nothing to control."""

    def __init__(self, model: Transformer, spec: TrainStage, reduce: Reduce = alone) -> None:
        self.model, self.spec = model, spec.routing
        set_policy(
            model, RoutingPolicy(self.spec.jitter, self.spec.capacity_factor, self.spec.drop)
        )
        self.routers = routers(model)
        experts = [model.config.experts_in(layer) for layer in moe_layers(model.config)]
        self.counts = StepCounts(reduce)
        self.ranking = ExpertRanking(experts, self.spec.ranking, spec.steps, reduce)
        self.monitor = RoutingMonitor(experts)
        self._eta = 0.0

    def begin(self, step: int) -> None:
        """Before the first micro batch of step `step` (from 0)."""
        self.counts.clear()
        self._eta = self.ranking.shift(self.routers, step)

    def forward(self, routing: list[Routing]) -> list[Tensor]:
        """After a forward pass; returns the choices of the step so far, per layer."""
        watch(routing)
        self.monitor.add(routing)
        return self.counts.add(routing)

    def backward(self, routing: list[Routing]) -> None:
        """After the backward pass of the same micro batch."""
        self.ranking.add(routing)

    def end(self) -> dict[str, Any]:
        """After the optimizer's step; returns what to log."""
        if not self.routers:
            return {}
        if self.spec.bias_rate:
            update_bias(self.routers, self.counts.layers, self.spec.bias_rate)
        self.ranking.step(self.counts.layers)
        record: dict[str, Any] = {"routing": self.monitor.step(self.counts.layers, self.routers)}
        if self.spec.ranking:
            record["ranking_eta"] = self._eta
        return record

    def experts(self) -> dict[str, Any]:
        """One list per layer of what every expert did lately, and how alike experts are."""
        credits = [credit.value_E for credit in self.ranking.layers]
        return {
            "load": self.monitor.shares(),
            "credit": [[round(v, 6) for v in value_E.tolist()] for value_E in credits],
            "rank": [ranks(value_E).tolist() for value_E in credits],
            "brake": [float(credit.brake) for credit in self.ranking.layers],
            **similarities(self.model),
        }

    def use(self) -> list[dict[str, Any]]:
        """One record per layer of what every expert was of use for; none before the first step."""
        layers, found = moe_layers(self.model.config), []
        modules = [m for m in self.model.modules() if isinstance(m, Experts)]
        recent = self.monitor.recent
        for layer, module, credit, load_E in zip(layers, modules, self.ranking.layers, recent):
            removes_E, weight_E, rows_E, processes_E = credit.recent_4E
            if float(processes_E[0]) > 0:
                sums_3E = torch.stack([removes_E / processes_E, weight_E, rows_E])
                found.append(layer_record(layer, module, load_E, sums_3E, credit.value_E))
        return found

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return self.ranking.state() | self.monitor.state()

    def load(self, state: dict[str, Tensor]) -> None:
        """The reverse of `state`."""
        self.ranking.load(state)
        self.monitor.load(state)
