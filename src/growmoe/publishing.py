"""A model made from another one: written shard by shard, checked, and published whole."""

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from growmoe import __version__
from growmoe.artifacts import (
    check_sequences,
    corpus_loss,
    fitting_corpus,
    history,
    lineage_of,
    note,
    report_check,
    report_closeness,
    sizes,
)
from growmoe.errors import GrowmoeError, UsageError
from growmoe.files import read_json, write_json
from growmoe.growth.verify import Comparison, Rounded, closeness, compare
from growmoe.memory import free_memory
from growmoe.models.checkpoint import (
    Directory,
    Source,
    config_json,
    copy_tokenizer,
    disk_free,
    open_source,
    plan_shards,
    write_model,
)
from growmoe.models.families import pick_family
from growmoe.models.lineage import write_lineage
from growmoe.models.stored import LEFT_DTYPE, QuantizedForm, stored_bytes
from growmoe.planning.scratch import spent_on
from growmoe.progress import Progress
from growmoe.tokenizer_check import check_tokenizer
from growmoe.training.validation import mean_loss

MIB = 2**20


def publish_derived(
    staged: Path, work: Path, source_path: Path, source: Source, derived: Source, *,
    lossy: tuple[str, ...], operation: str, spec: Any, tokenizer: Path | None = None,
    vocab: int | None = None, family: str | None = None, form: QuantizedForm | None = None,
    public_check: Callable[[Path, list[Tensor]], dict[str, str]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write `derived`, check it against `source` after reading it back, and note its lineage.

    Shards are written into `work`; after an interruption the same call goes on with the next one.
    `tokenizer` replaces the parent's; `vocab` limits the check to the tokens both have; `family`
    is the architecture to write; `form` stores matrices as integers, and the check then measures
    how near they come. `public_check(folder, sequences)` says how engines agree.
    Raises GrowmoeError when it is declared exact (`lossy` is empty) and is not: then nothing is
    published and nothing kept.
    """
    dtype = LEFT_DTYPE if form else spec.dtype or source.dtype
    family = family or pick_family(derived.config)
    # the text first: a wrong one is to be found before hours of writing
    text = None
    if spec.verify:
        text = check_sequences(source_path, source.config, spec.text, spec.data, spec.seed)
    parent = lineage_of(source_path)
    home = tokenizer or source_path
    inputs = [open_source(source_path).identity(), _tokenizer_hash(home)]
    with _resumable(work, operation, spec, inputs) as folder:
        # the tokenizer first, beside the config that decides how transformers reads it
        write_json(folder / "config.json", config_json(derived.config, dtype, family, form))
        tokens = check_tokenizer(home, _copy_tokenizer(home, folder), derived.config)
        _write(folder, derived, dtype, operation, spec.shard_gb, family, form)
        engines = {}
        if text is not None and public_check is not None:
            engines = public_check(folder, text[0])
        checks, losses = _check(folder, source_path, source, text, spec, lossy, vocab, form)
        lineage = _lineage(source_path, source, spec, operation, lossy, vocab, parent)
        lineage |= {"checks": {**checks, **tokens}, "engines": engines}
        write_lineage(folder, lineage)
        _move_all(folder, staged)
    return {
        **sizes(derived.config), "tokens": 0, "flops": 0,
        "loss_before": checks.get("ce_a"), "loss_after": checks.get("ce_b"),
        "exact": checks.get("exact"), "declared_exact": not lossy,
        **({"lossy_because": list(lossy)} if lossy else {}),
        **losses, "check": checks, **({"engines": engines} if engines else {}),
    }  # fmt: skip


def _lineage(
    source_path: Path, source: Source, spec: Any, operation: str, lossy: tuple[str, ...],
    vocab: int | None, parent: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """What growmoe.json says of where the model comes from, without the checks."""
    lineage = {
        "name": spec.name,
        "operation": operation,
        "parent": str(source_path),
        "options": spec.model_dump(mode="json", exclude_none=True),
        "declared_exact": not lossy,
        "lossy_because": list(lossy),
        "tokens_total": parent.get("tokens_total", 0),
        "flops_total": parent.get("flops_total", 0),
        "history": history(parent, operation, source_path, exact=not lossy),
        **({"shared_tokens": vocab} if vocab is not None else {}),
    }
    if operation == "upcycle":
        dense = spent_on(source_path, source.config, spec.pretrained_tokens)
        lineage["dense_spent"] = {
            "tokens": dense.dense_tokens or 0, "flops": dense.dense_flops or 0,
            "tokens_before": lineage["tokens_total"], "flops_before": lineage["flops_total"],
        }  # fmt: skip
    elif "dense_spent" in parent:
        lineage["dense_spent"] = parent["dense_spent"]
    return lineage


def _move_all(folder: Path, staged: Path) -> None:
    """Rename every file into `staged`; back again when that is interrupted."""
    moved: list[str] = []
    try:
        for file in sorted(folder.iterdir()):
            os.rename(file, staged / file.name)
            moved.append(file.name)
    except BaseException:
        for name in moved:
            os.rename(staged / name, folder / name)
        raise


def _tokenizer_hash(home: Path) -> str:
    """Of the tokenizer that the output gets; empty where the source's identity covers it."""
    file = home / "tokenizer.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _write(
    folder: Path, derived: Source, dtype: str, label: str, shard_gb: float, family: str,
    form: QuantizedForm | None,
) -> None:  # fmt: skip
    config, limit = derived.config, int(shard_gb * 2**30)
    total = stored_bytes(config, family, dtype, form)
    _check_disk(folder, total)
    progress = Progress(label, max(1, round(total / MIB)), "MiB")
    files = plan_shards(config, family, dtype, limit, form)
    kept = [file for file in files if (folder / file).exists()]
    if kept:
        print(f"{label}: {len(kept)} of {len(files)} files are there already", file=sys.stderr)
    write_model(
        folder, config, derived.load, dtype, shard_limit=limit,
        on_bytes=lambda done: progress.update(round(done / MIB)), family=family, form=form,
    )  # fmt: skip
    progress.finish("written")


def _check(
    folder: Path, source_path: Path, source: Source, text: tuple[list[Tensor], str] | None,
    spec: Any, lossy: tuple[str, ...], vocab: int | None, form: QuantizedForm | None,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """(what the check found, losses by domain when there is a corpus)."""
    if text is None:
        print("check: left out (--no-verify): the output is unverified", file=sys.stderr)
        return {"unverified": True}, {}
    sequences, origin = text
    written = Directory(folder)
    losses: dict[str, Any] = {}
    if form is not None:
        near = closeness(Rounded(source, LEFT_DTYPE), written, sequences, note)
        report_closeness(near, form)
        found = {**near.as_dict(), "against": f"weights in {LEFT_DTYPE}", "text": origin}
    else:
        check = compare(
            source, written, sequences, memory_bytes=free_memory(), note=note, vocab=vocab
        )  # fmt: skip
        report_check(check, not lossy)
        _refuse_inexact(check, lossy)
        found = {**check.as_dict(), "text": origin}
    if spec.data is not None:
        corpus = fitting_corpus(source_path, source.config, spec.data)
        if written.config.bytes("float32") > 0.8 * free_memory():
            print("check: losses by domain left out: a whole model does not fit", file=sys.stderr)
            return found, {}
        before, after = corpus_loss(source, corpus), corpus_loss(written, corpus)
        losses = {"validation_before": before, "validation_after": after}
        losses |= {"loss_before": mean_loss(before), "loss_after": mean_loss(after)}
    return found, losses


def _refuse_inexact(check: Comparison, lossy: tuple[str, ...]) -> None:
    if not lossy and not check.exact:
        raise GrowmoeError(
            f"the result was declared exact, but the largest logit difference "
            f"{check.max_abs_logit_diff:.3g} is above the tolerance {check.tolerance:.3g} "
            f"({check.noise_floor:.3g} noise floor); nothing was published"
        )


def _copy_tokenizer(home: Path, folder: Path) -> Path:
    if home.suffix == ".gguf":
        from growmoe.models.gguf import export_tokenizer

        export_tokenizer(home, folder)
    else:
        copy_tokenizer(home, folder)
    return folder


@contextlib.contextmanager
def _resumable(work: Path, operation: str, spec: Any, inputs: list[str]) -> Iterator[Path]:
    """The folder in `work` that finished shards wait in until all are there.

    It outlives an interruption (Ctrl-C, kill -9) and is emptied by a failure. Raises UsageError
    when another operation, other options or another source left one there.
    """
    folder, mark = work / "model", work / "unfinished.json"
    ignored = {"name", "text", "data", "verify", "pretrained_tokens"}
    wanted = {
        "operation": operation,
        "options": spec.model_dump(mode="json", exclude=ignored),
        "inputs": inputs,
        "growmoe": __version__,
    }
    if mark.exists() and read_json(mark) != wanted:
        raise UsageError(
            f"{work} holds an unfinished {read_json(mark).get('operation')} with other options or "
            "from another input; remove it to start over"
        )
    if not mark.exists() and folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} holds files that no unfinished run claims; remove it")
    folder.mkdir(exist_ok=True)
    write_json(mark, wanted)
    for file in folder.glob(".*.tmp"):  # of a process that was killed
        file.unlink()
    try:
        yield folder
    except KeyboardInterrupt:
        print(f"\nfinished files are kept in {work}; the same command continues", file=sys.stderr)
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        mark.unlink(missing_ok=True)
        raise
    mark.unlink()
    folder.rmdir()


def _check_disk(folder: Path, total: int) -> None:
    there = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    wanted, free = total - there, disk_free(folder)
    if wanted > free:
        raise GrowmoeError(
            f"the model takes {wanted / MIB:.0f} MiB more, but only {free / MIB:.0f} MiB are free "
            f"on the disk of {folder}"
        )
