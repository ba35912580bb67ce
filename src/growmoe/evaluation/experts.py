"""What the experts of a model are of use for on given text: one pass forward and back, no training.

Only the gradients of the routing weights are asked for. Letters: B sequences, T tokens, E experts.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from growmoe.models.config import moe_layers
from growmoe.models.moe import Experts
from growmoe.models.router import routers
from growmoe.models.transformer import Transformer
from growmoe.training.losses import cross_entropy
from growmoe.training.ranking import first_order_credit, standardised, watch
from growmoe.training.usefulness import layer_record
from growmoe.training.validation import Windows

TOKENS = 16384
"""Enough for every domain to count, little enough for a minute."""
_BATCH_TOKENS = 2048


def batches_of(windows: Windows, tokens: int = TOKENS) -> list[Tensor]:
    """Batches [B,T+1] of the first windows of each domain, about `tokens` tokens in all."""
    batches = []
    for rows in windows.values():
        length = rows.shape[1] - 1
        few = torch.from_numpy(rows[: max(1, tokens // len(windows) // length)])
        batches += few.split(max(1, _BATCH_TOKENS // length))
    return batches


def measure_experts(model: Transformer, batches: list[Tensor]) -> tuple[list[dict[str, Any]], int]:
    """(one record per MoE layer, tokens), on sequences [B,T+1] of token ids.

    Credit is -w dL/dw over w, summed over all tokens and standardised over a layer's experts; an
    expert without a token has removed nothing.
    """
    layers = moe_layers(model.config)
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    tokens = 0
    with _routing_gradients(model):
        for batch in batches:
            output = model(batch[:, :-1])
            watch(output.routing)
            here = batch[:, 1:].numel()
            loss = cross_entropy(output.logits, batch[:, 1:]) * here
            loss.backward(inputs=[routed.weights_TK for routed in output.routing])
            new = [first_order_credit(routed) for routed in output.routing]
            chosen = [routed.counts_E for routed in output.routing]
            sums = [a + b for a, b in zip(sums, new)] if sums else new
            counts = [a + b for a, b in zip(counts, chosen)] if counts else chosen
            tokens += here
    modules = [module for module in model.modules() if isinstance(module, Experts)]
    records = []
    for layer, module, load_E, sums_3E in zip(layers, modules, counts, sums):
        credit_E = standardised(sums_3E[0] / (sums_3E[1] + 1e-12))
        sums_3E[0] /= tokens
        records.append(layer_record(layer, module, load_E, sums_3E, credit_E))
    return records, tokens


@contextlib.contextmanager
def _routing_gradients(model: Transformer) -> Iterator[None]:
    """Eval mode, in which nothing but what the routers decide is differentiated; and back."""
    was_training, asked = model.training, [(p, p.requires_grad) for p in model.parameters()]
    model.eval().requires_grad_(False)
    for router in routers(model):
        router.weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, wanted in asked:
            parameter.requires_grad_(wanted)
        model.train(was_training)
