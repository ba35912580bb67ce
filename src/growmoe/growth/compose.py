"""Vocabulary, width and depth put together as `growmoe grow` offers them."""

from growmoe.errors import UsageError
from growmoe.growth.aki import AKI
from growmoe.growth.depth import Deepened
from growmoe.growth.vocab import GrownVocab
from growmoe.growth.width import Widened, Widening
from growmoe.models.checkpoint import Source
from growmoe.models.shapes import depth_map
from growmoe.recipe import GrowStage


def grow(source: Source, spec: GrowStage) -> tuple[Source, bool]:
    """The grown model as a lazy source, and whether it is declared the same function.

    Order: vocabulary, width, depth. FPI is declared exact only when every size that it duplicates
    is a whole multiple; AKI never is; depth is exact for identity blocks only.
    """
    old = source.config
    grown: Source = source
    exact = True
    if spec.vocab is not None:
        grown = GrownVocab(grown, spec.vocab)
    published = spec.method != "exact"
    widening = Widening(
        hidden=spec.hidden, heads=spec.heads, kv_heads=spec.kv_heads, head_dim=spec.head_dim,
        ffn=spec.ffn, units=spec.units, split=spec.split or ("even" if published else "random"),
        keep_rms=not published, seed=spec.seed,
    )  # fmt: skip
    if any((spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, spec.ffn)):
        if spec.method in ("aki", "aki-pro"):
            if old.moe is not None:
                raise UsageError("AKI is defined for dense models only")
            grown, exact = AKI(grown, widening), False
        else:
            grown = Widened(grown, widening)
            exact = not published or grown.config.hidden_size % old.hidden_size == 0
    method = spec.depth_method
    if spec.layers is not None and spec.layers != old.num_layers:
        layers = depth_map(old.num_layers, spec.layers, method)
        grown = Deepened(grown, layers)
        exact = exact and method == "identity"
    return grown, exact
