"""grow: a larger dense model that starts where the small one stopped (Scale-Up)."""

from pathlib import Path
from typing import Any

from growmoe.data.tokenizer import load_tokenizer
from growmoe.errors import UsageError
from growmoe.growth.compose import grow
from growmoe.models.checkpoint import open_source
from growmoe.planning.derived import vocab_target
from growmoe.publishing import publish_derived
from growmoe.recipe import GrowStage


def run(spec: GrowStage, staged: Path, work: Path) -> dict[str, Any]:
    """Grow, write, verify; an operation that is declared exact and is not publishes nothing."""
    path = Path(spec.model)
    source = open_source(path)
    vocab = vocab_target(spec, source.config)
    tokenizer, pieces, shared = None, None, None
    if spec.vocab_tokenizer is not None:
        tokenizer = Path(spec.vocab_tokenizer)
        pieces, shared = _new_tokens(path, tokenizer)
        if spec.vocab_init != "from_tokens":
            pieces = None
    grown, plan = grow(source, spec, vocab, pieces)
    return publish_derived(
        staged, work, path, source, grown, lossy=plan.lossy, operation="grow", spec=spec,
        tokenizer=tokenizer, vocab=shared,
    )  # fmt: skip


def _new_tokens(model: Path, larger: Path) -> tuple[dict[int, list[int]], int]:
    """({id of a new token: ids of the old tokens that spelled it}, size of the old tokenizer).

    Raises UsageError when an old id means something else in the larger tokenizer.
    """
    old, new = load_tokenizer(model), load_tokenizer(larger)
    size = old.get_vocab_size()
    for token in range(size):
        if old.id_to_token(token) != new.id_to_token(token):
            raise UsageError(
                f"{larger}: token {token} is {new.id_to_token(token)!r}, but in {model} it is "
                f"{old.id_to_token(token)!r}; a larger tokenizer must keep the old ids"
            )
    pieces = {}
    for token in range(size, new.get_vocab_size()):
        text = new.decode([token], skip_special_tokens=False)
        spelled = old.encode(text, add_special_tokens=False).ids
        if spelled:
            pieces[token] = spelled
    return pieces, size
