"""Vocabulary, width, depth and noise put together as `growmoe grow` offers them."""

from growmoe.growth.aki import AKI
from growmoe.growth.depth import Deepened
from growmoe.growth.kv import MergedKV
from growmoe.growth.perturb import Perturbed, relative_noise
from growmoe.growth.vocab import GrownVocab
from growmoe.growth.width import Widened, Widening
from growmoe.models.checkpoint import Source
from growmoe.models.growing import Growth, plan_growth
from growmoe.recipe import GrowStage


def grow(
    source: Source, spec: GrowStage, vocab: int | None = None,
    pieces: dict[int, list[int]] | None = None,
) -> tuple[Source, Growth]:  # fmt: skip
    """The grown model as a lazy source, and the plan that says what was done and why it is not
    exact, if it is not. `vocab` and `pieces` come from a new tokenizer (see GrownVocab)."""
    plan = plan_growth(source.config, spec, vocab)
    grown: Source = source
    if plan.vocab is not None:
        grown = GrownVocab(grown, plan.vocab, spec.vocab_init, seed=spec.seed, pieces=pieces)
    if plan.merged_kv is not None:
        grown = MergedKV(grown, plan.merged_kv)
    if plan.widens:
        wide = AKI if plan.aki else Widened
        grown = wide(grown, widening_of(spec), spec.dtype)
    if plan.depth is not None:
        grown = Deepened(grown, plan.depth, halve_branches=spec.branch_scale == "count")
    if spec.noise_db is not None and spec.noise == "everywhere":
        grown = Perturbed(grown, spec.noise_db, spec.seed)
    return grown, plan


def widening_of(spec: GrowStage) -> Widening:
    """The widening that a grow stage asks for."""
    published = spec.method != "exact"
    noisy = spec.noise_db is not None and spec.noise == "copies"
    return Widening(
        hidden=spec.hidden, heads=spec.heads, kv_heads=spec.kv_heads, head_dim=spec.head_dim,
        ffn=spec.ffn, units=spec.units, split=spec.split or ("even" if published else "random"),
        keep_rms=not published, seed=spec.seed,
        copy_noise=relative_noise(spec.noise_db) if noisy and spec.noise_db is not None else 0.0,
    )  # fmt: skip
