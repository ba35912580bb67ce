"""What every expert of a layer is of use for, as one record: after training, or measured on text.

Letters: E experts.
"""

from typing import Any

import torch
from torch import Tensor

from growmoe.models.moe import Experts
from growmoe.training.observing import cosines, load_entropy
from growmoe.training.ranking import ranks

EXPERTS_FILE = "experts.json"
"""Written beside a trained model: what the last training found of its experts."""


def layer_record(
    layer: int, experts: Experts, load_E: Tensor, sums_3E: Tensor, credit_E: Tensor
) -> dict[str, Any]:
    """The record of a layer; lists have one entry per expert.

    `load_E` counts choices, `sums_3E` holds sums of -w dL/dw (in nats per token), of w, and of
    the choices that these were summed over; experts are ranked by `credit_E`. `removes` is the
    loss in nats per token that an expert removes, of the layer their sum; `like` is the expert
    that it resembles most, with their `cosine` (alone in a layer: itself, 1).
    """
    removes_E, weight_E, rows_E = sums_3E
    cosine_EE = cosines(experts)
    if len(cosine_EE) > 1:
        cosine_EE = cosine_EE.clone().fill_diagonal_(-torch.inf)
    cosine_E, like_E = cosine_EE.max(1)
    return {
        "layer": layer,
        "experts": len(load_E),
        "removes_total": _rounded(removes_E.sum()),
        "load_entropy": round(load_entropy(load_E), 6),
        "load": _rounded(load_E.double() / load_E.sum().clamp(min=1e-30)),
        "credit": _rounded(credit_E),
        "rank": ranks(credit_E).tolist(),
        "removes": _rounded(removes_E),
        "weight": _rounded(weight_E / rows_E.clamp(min=1e-30)),
        "cosine": _rounded(cosine_E.clamp(max=1.0)),
        "like": like_E.tolist(),
    }


def _rounded(values: Tensor) -> Any:
    """Numbers with eight significant digits: differences of the loss can be very small."""
    found = values.double().tolist()
    return [float(f"{v:.8g}") for v in found] if isinstance(found, list) else float(f"{found:.8g}")
