"""prepare: raw text to a corpus directory."""

import json
from pathlib import Path
from typing import Any

from growmoe.data.prepare import PrepareSpec, SourceSpec, prepare
from growmoe.progress import Progress
from growmoe.recipe import PrepareStage


def run(spec: PrepareStage, staged: Path, work: Path) -> dict[str, Any]:
    """Read, clean, deduplicate, tokenise; returns counts of documents and tokens."""
    progress = Progress("prepare", None, "documents")
    done = 0

    def report(documents: int, doing: str) -> None:
        nonlocal done
        done += documents
        progress.update(done, doing)

    prepare(
        PrepareSpec(
            sources=[SourceSpec(**source.model_dump()) for source in spec.sources],
            tokenizer=spec.tokenizer.path,
            vocab_size=spec.tokenizer.vocab_size,
            sample_mb=spec.tokenizer.sample_mb,
            validation_fraction=spec.validation_fraction,
            min_chars=spec.min_chars,
            max_document_mb=spec.max_document_mb,
            skip_bad_records=spec.bad_records == "skip",
            shard_tokens=spec.shard_tokens,
            validation_length=spec.validation_length,
            validation_tokens=spec.validation_tokens,
        ),
        staged,
        report,
    )
    progress.finish()
    manifest = json.loads((staged / "manifest.json").read_text())
    return {
        "tokens": manifest["totals"]["train"]["tokens"],
        "validation_tokens": manifest["totals"]["validation"]["tokens"],
        "documents": manifest["totals"]["train"]["documents"],
        "dropped": {s["name"]: s["dropped"] for s in manifest["sources"]},
        "vocab_size": manifest["tokenizer"]["vocab_size"],
        "hash": manifest["hash"],
        "flops": 0,
    }
