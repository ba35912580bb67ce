"""What several stages need: texts for checks, losses of a model, lineage, publishing a model."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growmoe.data.corpus import Corpus
from growmoe.data.prepare import first_documents
from growmoe.data.tokenizer import load_tokenizer, same_tokenizer
from growmoe.errors import UsageError
from growmoe.growth.verify import Closeness, Comparison
from growmoe.models.checkpoint import Directory, Source, build_model
from growmoe.models.config import ModelConfig
from growmoe.training.validation import domain_losses

CHECK_TOKENS = 1024
LONG_SEQUENCE = 640
SHORT_SEQUENCE = 128


def sizes(config: ModelConfig) -> dict[str, int]:
    """The two parameter counts that every stage reports."""
    return {"params_total": config.params_total(), "params_active": config.params_active()}


def lineage_of(path: Path) -> dict[str, Any]:
    """growmoe.json of a model directory; empty for GGUF files and models from elsewhere."""
    return Directory(path).lineage() if path.is_dir() else {}


def check_sequences(
    model: Path, config: ModelConfig, text: str | None, data: str | None, seed: int,
    tokens: int = CHECK_TOKENS,
) -> tuple[list[Tensor], str]:  # fmt: skip
    """Token ids to compare two models on, and where they come from.

    One long sequence (late positions catch rotary errors) and short ones, from the validation
    split of a corpus, from a text file, or from Python's help topics; seeded random ids when the
    model has no tokenizer.
    """
    longest = min(config.max_positions, LONG_SEQUENCE)
    if data is not None:
        corpus = fitting_corpus(model, config, data)
        streams = [s for s in corpus.streams["validation"].values() if len(s) > 1]
        share = tokens // len(streams)
        ids = [t for s in streams for t in s.read(0, min(share, len(s))).tolist()]
        origin = f"validation split of {data}"
    elif model.is_dir() and not (model / "tokenizer.json").exists():
        if text is not None:
            raise UsageError(f"{model} holds no tokenizer.json, so {text} cannot be tokenised")
        rng = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, config.vocab_size, (tokens,), generator=rng).tolist()
        origin = f"random tokens (seed {seed}; the model has no tokenizer)"
    else:
        ids = _text_ids(model, text, tokens)
        origin = text or "Python's help topics"
    if len(ids) < 2:
        raise UsageError(f"{origin} gives {len(ids)} tokens; a comparison needs at least two")
    if max(ids) >= config.vocab_size:
        raise UsageError(
            f"{origin}: token {max(ids)} is outside the model's vocabulary of "
            f"{config.vocab_size}; the tokenizer does not fit the model"
        )
    pieces = [ids[:longest]]
    rest = ids[longest:]
    short = min(SHORT_SEQUENCE, longest)
    pieces += [rest[i : i + short] for i in range(0, len(rest), short)]
    return [torch.tensor(piece) for piece in pieces if len(piece) > 1], origin


def _text_ids(model: Path, text: str | None, tokens: int) -> list[int]:
    documents = first_documents(text or "docstrings:stdlib", 64)
    joined = "\n\n".join(documents)[: tokens * 16]
    if not joined:
        raise UsageError(f"{text} holds no text")
    if model.suffix == ".gguf":
        import tempfile

        from growmoe.models.gguf import export_tokenizer

        with tempfile.TemporaryDirectory() as folder:
            export_tokenizer(model, Path(folder))
            tokenizer = load_tokenizer(Path(folder))
    else:
        tokenizer = load_tokenizer(model)
    return tokenizer.encode(joined, add_special_tokens=False).ids[:tokens]


def fitting_corpus(model: Path, config: ModelConfig, data: str) -> Corpus:
    """The corpus `data`, if it was tokenised with the tokenizer of the model in `model`.

    Raises UsageError when the model has fewer tokens, or a tokenizer that cuts text differently.
    """
    corpus = Corpus(Path(data))
    if corpus.vocab_size > config.vocab_size:
        raise UsageError(
            f"{data} was tokenised with {corpus.vocab_size} tokens, but {model} has only "
            f"{config.vocab_size}"
        )
    if (model / "tokenizer.json").exists() and not same_tokenizer(
        load_tokenizer(model), load_tokenizer(corpus.path)
    ):
        raise UsageError(
            f"{data} was tokenised with another tokenizer than that of {model}; prepare it with "
            f"tokenizer.path={model}"
        )
    return corpus


def corpus_loss(source: Source, corpus: Corpus) -> dict[str, float]:
    """Validation loss of a model by domain, on the corpus's fixed windows, in float32."""
    return domain_losses(build_model(source), corpus.validation_windows())


def history(
    parent: dict[str, Any], operation: str, source: Path | str, exact: bool
) -> list[dict[str, Any]]:
    """The operations that led here, oldest first, and whether each kept the function."""
    step = {"operation": operation, "from": str(source), "exact": exact}
    return [*parent.get("history", []), step]


def declared_exact(a: Path, b: Path) -> bool:
    """Whether B is said to be the same function as A: false only when B's lineage leads back to A
    through an operation that is declared lossy, or through training."""
    steps = lineage_of(b).get("history", [])
    for number in range(len(steps) - 1, -1, -1):
        if Path(steps[number]["from"]).resolve() == a.resolve():
            return all(step.get("exact", True) for step in steps[number:])
    return True


def note(text: str) -> None:
    """A short remark on what is being done, on stderr."""
    print(f"check: {text}", file=sys.stderr, flush=True)


def report_check(check: Comparison, declared: bool) -> None:
    """Say what the check found, on stderr."""
    verdict = "exact" if check.exact else "not exact"
    said = "declared exact" if declared else "declared lossy"
    print(
        f"check: {verdict} ({said}): largest logit difference {check.max_abs_logit_diff:.3g}, "
        f"noise floor {check.noise_floor:.3g}, loss {check.ce_a:.4f} -> {check.ce_b:.4f}",
        file=sys.stderr,
    )


def report_closeness(check: Closeness, what: str) -> None:
    """Say how near the result of a lossy rounding is, on stderr."""
    print(
        f"check: {what}: perplexity {check.perplexity_a:.4f} -> {check.perplexity_b:.4f}, "
        f"KL {check.kl:.2g} (largest {check.kl_max:.2g}), the likeliest token is the same at "
        f"{check.argmax_agreement:.2%} of {check.tokens} positions",
        file=sys.stderr,
    )
