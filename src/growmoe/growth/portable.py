"""The same function in the form that an engine wants (see models.targets); all exact."""

import torch
from torch import Tensor

from growmoe.growth.axes import generator
from growmoe.models.checkpoint import Source
from growmoe.models.config import tensor_shapes
from growmoe.models.targets import Step, changed_config


class Portable:
    """`source` after one step:

    - untie: the head gets its own copy of the embedding;
    - zero_biases: Q, K and V biases of 0;
    - sum_as_gate: a fixed branch that is added becomes a shared expert twice as strong behind a
      gate of zeros, sigmoid(0) = 1/2;
    - null_shared: a shared expert whose down projection is 0 (and whose gate is not: an engine
      divides by it);
    - duplicate: every expert of a layer with E of the most experts M stands there M/E times, with
      its router row. Top-1 picks one of the copies; without renormalisation its probability is
      E/M times smaller, which the down projection makes good.
    """

    def __init__(self, source: Source, step: Step, seed: int = 0) -> None:
        self.source, self.step, self.seed = source, step, seed
        self.config = changed_config(source.config, (step,))
        self.dtype = source.dtype
        self._own = set(tensor_shapes(source.config))

    def load(self, name: str) -> Tensor:
        """The tensor in the new form."""
        if self.step == "duplicate" and ".moe." in name:
            return self._duplicated(name)
        if name in self._own:
            tensor = self.source.load(name)
            doubled = self.step == "sum_as_gate" and ".mlp.down." in name
            return tensor * 2 if doubled and self._routes(name) else tensor
        if name == "head.weight":
            return self.source.load("embed.weight")
        shape = tensor_shapes(self.config)[name]
        if self.step == "null_shared" and ".down." not in name:
            return torch.randn(shape, generator=generator(self.seed ^ 5, name)) * 0.02
        return torch.zeros(shape)

    def _routes(self, name: str) -> bool:
        return self.config.experts_in(int(name.split(".")[1])) > 0

    def _duplicated(self, name: str) -> Tensor:
        parts = name.split(".")
        layer = int(parts[1])
        copies = self.config.experts_in(layer) // self.source.config.experts_in(layer)
        if parts[3] == "router":
            return self.source.load(name).repeat_interleave(copies, dim=0)
        if parts[3] == "mix":
            return self.source.load(name)
        parts[4] = str(int(parts[4]) // copies)
        tensor = self.source.load(".".join(parts))
        moe = self.config.moe
        scaled = parts[5] == "down" and moe is not None and not moe.renormalize
        return tensor * copies if scaled and copies > 1 else tensor


def reshaped(source: Source, steps: tuple[Step, ...], seed: int = 0) -> Source:
    """`source` after all steps."""
    for step in steps:
        source = Portable(source, step, seed)
    return source
