"""Runs one step through the model."""

from typing import Protocol

import torch
from torch import Tensor

from growmoe.inference.paged import PagedBatch, PagedCache
from growmoe.inference.scheduler import Step
from growmoe.models.transformer import Transformer


class StepRunner(Protocol):
    """What the engine needs: logits of a step, and copies of blocks."""

    def run(self, step: Step) -> Tensor:
        """Compute the step; the float32 logits [S,V] of the last token of every span, wherever they
        are computed. They hold until the next call."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Copy a block of keys and values."""
        ...


class Runner:
    """A model and its paged cache."""

    def __init__(self, model: Transformer, cache: PagedCache) -> None:
        self.model, self.cache = model, cache

    @torch.inference_mode()
    def run(self, step: Step) -> Tensor:
        """One call of the model for all sequences of the step; float32 logits [S,V].

        May be called again with the same step, or parts of it: keys and values are written anew.
        """
        batch = PagedBatch(self.cache, step.spans)
        tokens_1N = torch.tensor([step.tokens()], device=self.cache.device)
        output = self.model(tokens_1N, cache=batch, rows_N=batch.last_rows_S)
        return output.logits[0].float()

    def copy(self, source: int, target: int) -> None:
        """Block `target` becomes a copy of block `source`."""
        self.cache.copy(source, target)
