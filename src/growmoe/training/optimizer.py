"""AdamW with decay on matrices only, and the learning rate over the run."""

import math

import torch
from torch import nn

from growmoe.recipe import OptimizerModel


def make_optimizer(model: nn.Module, spec: OptimizerModel) -> torch.optim.AdamW:
    """AdamW; norms, biases and routers are not decayed."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # a selection bias: balancing moves it, not the loss
            continue
        plain = parameter.dim() < 2 or name.endswith(("bias", "router.weight"))
        (free if plain else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": spec.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    # fused: one pass over memory; instead of several per parameter
    betas = (spec.beta1, spec.beta2)
    return torch.optim.AdamW(groups, lr=spec.lr, betas=betas, eps=1e-8, fused=True)


def learning_rate(step: int, steps: int, spec: OptimizerModel) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up, then cosine, wsd or constant."""
    warmup = round(spec.warmup * steps)
    if step < warmup:
        return spec.lr * (step + 1) / warmup
    low = spec.lr * spec.min_lr_ratio
    if spec.schedule == "constant":
        return spec.lr
    if spec.schedule == "cosine":
        done = (step - warmup) / max(1, steps - 1 - warmup)
        return low + (spec.lr - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    decay_from = steps - round(spec.decay * steps)
    if step < decay_from:
        return spec.lr
    done = (step - decay_from + 1) / max(1, steps - decay_from)
    return spec.lr + (low - spec.lr) * done
