"""upcycle: a dense model becomes a mixture of experts (Scale-Out)."""

import sys
from pathlib import Path
from typing import Any

from growmoe.artifacts import publish_derived
from growmoe.growth.upcycle import Upcycled
from growmoe.models.checkpoint import open_source
from growmoe.recipe import UpcycleStage


def run(spec: UpcycleStage, staged: Path, work: Path) -> dict[str, Any]:
    """Copy the feed-forward into experts, write, verify."""
    path = Path(spec.model)
    source = open_source(path)
    if spec.top_k == 1:
        print(
            "note: with top-k 1 the renormalised weight is always 1, so the router learns from "
            "the balance and z losses only",
            file=sys.stderr,
        )
    upcycled = Upcycled(
        source,
        experts=spec.experts,
        top_k=spec.top_k,
        router_std=spec.router_std,
        layers=spec.layers,
        seed=spec.seed,
    )
    return publish_derived(
        staged, path, source, upcycled, dtype=spec.dtype, exact=True, operation="upcycle", spec=spec
    )
