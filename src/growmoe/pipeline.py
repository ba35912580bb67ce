"""Runs stages: resolves what they refer to, publishes whole outputs, skips what is done."""

import contextlib
import fcntl
import hashlib
import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from growmoe.errors import GrowmoeError, UsageError
from growmoe.files import read_json, staged_directory, write_json, write_text
from growmoe.planning.recipes import plan_recipe
from growmoe.recipe import MODEL_STAGES, REFERENCES, Recipe

SUMMARY_FIELDS = (
    "stage", "name", "params_total", "params_active", "tokens", "flops", "loss_before",
    "loss_after", "seconds", "output",
)  # fmt: skip
STAGE_FILE = "stage.json"
RESUMABLE = ("train", "grow", "upcycle", "export")
"""Stages that keep unfinished work in NAME.run beside their output."""


def execute(spec: Any, out: Path, fingerprint: str = "") -> dict[str, Any]:
    """Run one stage and publish its output as `out`; returns its result.

    Every result has all SUMMARY_FIELDS (None where a field means nothing for the stage).
    """
    module = importlib.import_module(f"growmoe.stages.{spec.stage}")
    work = out.with_name(f"{out.name}.run")
    with contextlib.ExitStack() as stack:
        if spec.stage in RESUMABLE:
            stack.enter_context(_working_in(work))
        staged = stack.enter_context(staged_directory(out))
        started = time.monotonic()
        found = module.run(spec, staged, work)
        result: dict[str, Any] = dict.fromkeys(SUMMARY_FIELDS)
        result |= {"stage": spec.stage, "name": spec.name}
        result |= {"seconds": time.monotonic() - started, **found, "output": str(out)}
        result["seconds"] = round(result["seconds"], 3)
        record = {"fingerprint": fingerprint, "options": spec.model_dump(mode="json")}
        write_json(staged / STAGE_FILE, {**record, "result": result})
    if hasattr(module, "after_publish"):
        module.after_publish(work)
    return result


def measure(spec: Any) -> dict[str, Any]:
    """Run a stage that only measures, without an output directory."""
    module = importlib.import_module(f"growmoe.stages.{spec.stage}")
    started = time.monotonic()
    result = module.run(spec, None, None)
    return {"stage": spec.stage, "seconds": round(time.monotonic() - started, 3), **result}


def run_recipe(recipe: Recipe) -> dict[str, Any]:
    """Run the stages in order, skip finished ones, and write summary.json and report.html."""
    plan_recipe(recipe)
    folder = recipe.folder
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        write_text(folder / "recipe.json", recipe.model_dump_json(indent=2) + "\n")
        results = []
        prints: dict[str, str] = {}
        for stage in recipe.stages:
            spec = _resolved(stage, folder, prints)
            fingerprint = _fingerprint(stage, spec, prints)
            prints[stage.name] = fingerprint
            out = folder / stage.name
            result = finished(out, fingerprint)
            if result is None:
                _say(f"{stage.stage} {stage.name}")
                result = execute(spec, out, fingerprint)
            else:
                _say(f"{stage.stage} {stage.name}: already done")
            results.append(result)
            _write_summary(folder, results)
            if result.get("failed"):
                where = recipe.where(len(results) - 1)
                raise GrowmoeError(f"{where}: the models differ; see {out}")
        from growmoe.report.html import write_report

        report = write_report(folder)
    models = [r["output"] for r in results if r["stage"] in MODEL_STAGES]
    return {
        "recipe": recipe.name,
        "output": str(folder),
        "report": str(report),
        "model": models[-1] if models else None,
        "stages": [{field: result.get(field) for field in SUMMARY_FIELDS} for result in results],
    }


def _write_summary(folder: Path, results: list[dict[str, Any]]) -> None:
    extra = ("exact", "validation_before", "validation_after")
    fields = (*SUMMARY_FIELDS, *extra)
    write_json(
        folder / "summary.json",
        [{f: r.get(f) for f in fields if f in SUMMARY_FIELDS or f in r} for r in results],
    )


def finished(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """The result of a finished stage, or None when it is still to do.

    Raises UsageError when `out` was made with other options.
    """
    if not out.exists():
        return None
    if not (out / STAGE_FILE).exists():
        raise UsageError(f"{out} exists and was not made by this recipe; remove it")
    record = read_json(out / STAGE_FILE)
    if record["fingerprint"] != fingerprint:
        raise UsageError(
            f"{out} was made with other options or from another input; remove it to make it "
            "again, or name another output"
        )
    return record["result"]


def _resolved(stage: Any, folder: Path, done: dict[str, str]) -> Any:
    """The stage with references to earlier stages replaced by their directories."""
    changes = {
        key: str(folder / getattr(stage, key))
        for key in REFERENCES
        if getattr(stage, key, None) in done
    }
    return stage.model_copy(update=changes)


def _fingerprint(stage: Any, spec: Any, done: dict[str, str]) -> str:
    """Changes when an option of the stage or of anything before it changes."""
    inputs = {key: done.get(str(getattr(stage, key, None))) for key in REFERENCES}
    options = stage.model_dump(mode="json", exclude={"checkpoint_every"})
    text = json.dumps([options, inputs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def _working_in(work: Path) -> Iterator[None]:
    """Hold a stage's work directory; one that nothing was written into is removed again."""
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GrowmoeError(f"cannot write in {work.parent}: {error.strerror}") from None
    with _locked(work):
        try:
            yield
        finally:
            if [path.name for path in work.iterdir()] == [".lock"]:
                (work / ".lock").unlink()
                work.rmdir()


def _say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two runs in one directory would destroy each other's work."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another growmoe is running in {folder}") from None
        yield
