"""grow: a larger dense model that starts where the small one stopped (Scale-Up)."""

from pathlib import Path
from typing import Any

from growmoe.artifacts import publish_derived
from growmoe.growth.compose import grow
from growmoe.models.checkpoint import open_source
from growmoe.recipe import GrowStage


def run(spec: GrowStage, staged: Path, work: Path) -> dict[str, Any]:
    """Grow, write, verify; an operation that is declared exact and is not publishes nothing."""
    path = Path(spec.model)
    source = open_source(path)
    grown, exact = grow(source, spec)
    return publish_derived(
        staged, path, source, grown, dtype=spec.dtype, exact=exact, operation="grow", spec=spec
    )
