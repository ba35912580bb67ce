"""upcycle: a dense model becomes a mixture of experts (Scale-Out)."""

import sys
from pathlib import Path
from typing import Any

from growmoe.growth.upcycle import Upcycled
from growmoe.models.checkpoint import open_source
from growmoe.models.upcycling import Upcycling, why_lossy
from growmoe.publishing import publish_derived
from growmoe.recipe import UpcycleStage


def run(spec: UpcycleStage, staged: Path, work: Path) -> dict[str, Any]:
    """Make experts of the feed-forward, write, verify."""
    path = Path(spec.model)
    source = open_source(path)
    up = Upcycling.of(spec)
    if up.top_k == 1 and up.combine != "softmax":
        print(
            "note: with top-k 1 the renormalised weight is always 1, so the router learns from "
            "the balance and z losses only (combine: softmax lets it learn from the loss)",
            file=sys.stderr,
        )
    upcycled = Upcycled(source, up, spec.dtype)
    assert upcycled.config.moe is not None
    reason = why_lossy(up, upcycled.config.moe.experts)
    return publish_derived(
        staged, work, path, source, upcycled, lossy=(reason,) if reason else (),
        operation="upcycle", spec=spec,
    )  # fmt: skip
