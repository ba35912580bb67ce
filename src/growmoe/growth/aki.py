"""AKI (advanced knowledge initialisation, bert2BERT section 3.2), declared lossy.

Extra output units of layer l come from layer l+1 instead of copying layer l, which breaks symmetry
and gives the larger model knowledge of the next layer at the price of a high initial loss.
AKI-Pro (AquilaMoE) is AKI with heads inserted inside their GQA group and interpolated depth.
"""

import torch
from torch import Tensor

from growmoe.growth.width import Widened, Widening
from growmoe.models.checkpoint import Source


class AKI:
    """FPI, with the new rows of every projection of layer l < L-1 taken from layer l+1."""

    def __init__(self, source: Source, spec: Widening) -> None:
        self.source = source
        self.widened = Widened(source, spec)
        self.config = self.widened.config
        self.dtype = source.dtype

    def load(self, name: str) -> Tensor:
        """The grown tensor (float32). Embeddings, norms and the last layer are FPI's."""
        own = self.widened.load(name)
        if not name.startswith("layers.") or "norm" in name or ".moe." in name:
            return own
        _, layer, rest = name.split(".", 2)
        if int(layer) + 1 == self.config.num_layers:
            return own
        above = self.widened.load(f"layers.{int(layer) + 1}.{rest}")
        new_R = self.widened.roles(name)[0].new_N()
        mask = new_R if own.dim() == 1 else new_R[:, None]
        return torch.where(mask, above, own)
