"""Validation loss per domain, always on the same windows and in float32, for every model alike."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from growmoe.models.transformer import Transformer
from growmoe.training.losses import cross_entropy

_ROW_TOKENS = 4096
Windows = dict[str, "np.ndarray[Any, Any]"]


@contextlib.contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """Switch to eval mode without gradients, and back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def domain_losses(model: Transformer, windows: Windows) -> dict[str, float]:
    """Mean nats per token of each domain's windows [n, length+1]."""
    losses = {}
    with evaluating(model):
        for name, rows in windows.items():
            total = 0.0
            step = max(1, _ROW_TOKENS // rows.shape[1])
            for start in range(0, len(rows), step):
                batch = torch.from_numpy(rows[start : start + step])
                logits = model(batch[:, :-1]).logits
                total += float(cross_entropy(logits, batch[:, 1:])) * len(batch)
            losses[name] = total / len(rows)
    return losses


def mean_loss(losses: dict[str, float]) -> float:
    """One number: the plain mean over domains."""
    return sum(losses.values()) / len(losses)


def expert_loads(model: Transformer, windows: Windows) -> list[list[float]]:
    """Per MoE layer, the share of routed choices that each expert gets on the windows."""
    counts: list[torch.Tensor] = []
    with evaluating(model):
        for rows in windows.values():
            step = max(1, _ROW_TOKENS // rows.shape[1])
            batch = torch.from_numpy(rows[:step])
            routing = model(batch[:, :-1]).routing
            batch_counts = [routed.counts_E for routed in routing]
            counts = [a + b for a, b in zip(counts, batch_counts)] if counts else batch_counts
    return [(count / count.sum()).tolist() for count in counts]
