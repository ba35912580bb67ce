"""AKI (advanced knowledge initialisation, bert2BERT section 3.2), declared lossy.

Extra output units of layer l come from layer l+1 instead of copying layer l, which breaks symmetry
and gives the larger model knowledge of the next layer at the price of a high initial loss.
AKI-Pro (AquilaMoE) is AKI with heads inserted inside their GQA group and interpolated depth.
"""

from torch import Tensor

from growmoe.growth.width import Widened, Widening
from growmoe.models.checkpoint import Source
from growmoe.models.shapes import aki_origins


class AKI:
    """FPI, with the new rows of every projection of layer l < L-1 taken from layer l+1."""

    def __init__(self, source: Source, spec: Widening, dtype: str | None = None) -> None:
        self.source = source
        self.widened = Widened(source, spec, dtype)
        self.config = self.widened.config
        self.dtype = self.widened.dtype

    def load(self, name: str) -> Tensor:
        """The grown tensor. Embeddings, norms and the last layer are FPI's."""
        own = self.widened.load(name)
        above = aki_origins(name, self.config.num_layers)[1:]
        if not above:
            return own
        new_R = self.widened.roles(name)[0].new_N()
        if new_R.any():
            own[new_R] = self.widened.widen(above[0], self.source.load(above[0]), new_R)
        return own
