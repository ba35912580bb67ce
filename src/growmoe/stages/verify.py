"""verify: is model B the same function as model A?"""

from pathlib import Path
from typing import Any

from growmoe.artifacts import (
    check_sequences,
    declared_exact,
    note,
    report_check,
    sizes,
)
from growmoe.growth.verify import compare
from growmoe.memory import free_memory
from growmoe.models.checkpoint import open_source
from growmoe.recipe import VerifyStage


def run(spec: VerifyStage, staged: Path | None, work: Path | None) -> dict[str, Any]:
    """Compare logits, cross entropy and KL on real text; see growth.verify."""
    a, b = open_source(Path(spec.a)), open_source(Path(spec.b))
    sequences, origin = check_sequences(
        Path(spec.a), a.config, spec.text, spec.data, spec.seed, spec.tokens
    )
    check = compare(a, b, sequences, memory_bytes=free_memory(), note=note)
    declared = declared_exact(Path(spec.a), Path(spec.b))
    report_check(check, declared)
    return {
        **sizes(b.config),
        "tokens": 0,
        "flops": 0,
        "loss_before": check.ce_a,
        "loss_after": check.ce_b,
        **check.as_dict(),
        "declared_exact": declared,
        "text": origin,
        "failed": declared and not check.exact,
    }
