"""Verbs that measure or show, and change nothing."""

from pathlib import Path
from typing import Annotated

import typer

from growmoe.cli.common import (
    Data,
    DryRun,
    Json,
    NothingDone,
    Seed,
    Text,
    existing,
    finish,
    show_dry_run,
    show_plan,
    stage,
    threads,
)
from growmoe.errors import UsageError


def verify(
    a: Annotated[str, typer.Argument(help="The model that is right.")],
    b: Annotated[str, typer.Argument(help="The model in question.")],
    text: Text = None,
    data: Data = None,
    tokens: Annotated[int, typer.Option(help="Tokens to compare on.")] = 1024,
    seed: Seed = 0,
    json_only: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Is model B the same function as A? Exit code 1 if not, unless B is declared lossy."""
    from growmoe.pipeline import measure

    options = {"a": existing(a), "b": existing(b), "text": text, "data": data, "seed": seed}
    spec = stage("verify", {**options, "tokens": tokens}, None)
    if dry_run:
        show_dry_run(spec, None, json_only)
        return
    threads()
    result = measure(spec)
    failed = result.pop("failed")
    finish(result, json_only)
    if failed:
        raise typer.Exit(1)


def evaluate(
    model: Annotated[str, typer.Argument(help="Model directory.")],
    data: Data = None,
    text: Text = None,
    task: Annotated[list[str] | None, typer.Option(help="Task file, repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows per task file.")] = None,
    json_only: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Loss per domain, and scores on local task files."""
    from growmoe.pipeline import measure

    options = {
        "model": existing(model), "data": data, "text": text, "tasks": task, "limit": limit
    }  # fmt: skip
    spec = stage("evaluate", options, None)
    if dry_run:
        show_dry_run(spec, None, json_only)
        return
    threads()
    finish(measure(spec), json_only)


def inspect(
    path: Annotated[str, typer.Argument(help="Model, corpus or run directory, or .gguf file.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    experts: Annotated[
        bool, typer.Option("--experts", help="What experts do: as trained, or on --data or --text.")
    ] = False,
    data: Annotated[str | None, typer.Option(help="--experts: corpus to measure on.")] = None,
    text: Annotated[str | None, typer.Option(help="--experts: text file to measure on.")] = None,
    json_only: Json = False,
    dry_run: DryRun = False,
) -> None:
    """What is in a directory: shape, parameters, lineage, tensors, load and credit of experts with
    what to prune first; or a corpus's counts."""
    from growmoe.stages.inspect import asked_experts, expert_lines
    from growmoe.stages.inspect import run as inspect_stage

    asked = asked_experts(experts, data, text)
    if (data or text) and not dry_run:
        threads()
    result = inspect_stage(Path(existing(path)), tensors, asked, dry_run)
    use = result.get("expert_use")
    finish(result, json_only, list(expert_lines(use)) if use else None)


def plan(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Changed fields.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A model by preset name.")] = None,
    config: Annotated[Path | None, typer.Option(help="Model directory or config.json.")] = None,
    context: Annotated[int | None, typer.Option(help="Context for the FLOPs of attention.")] = None,
    json_only: Json = False,
    dry_run: NothingDone = False,
) -> None:
    """Parameters, FLOPs and bytes before anything is spent; reads no weights."""
    from growmoe.stages.plan import run as plan_stage

    if sum(given is not None for given in (recipe, preset, config)) != 1:
        raise UsageError("give exactly one of a recipe, --preset and --config")
    result = plan_stage(recipe, overrides or [], preset, config, context)
    if "stages" in result:
        show_plan(result, json_only)
    else:
        finish(result, json_only)


def report(
    folder: Annotated[Path, typer.Argument(help="Run directory of a recipe.")],
    json_only: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Write report.html of a run: loss against FLOPs, stages, routing, lineage."""
    if dry_run:
        if not (folder / "summary.json").exists():
            raise UsageError(f"{folder} holds no summary.json, so it is not a run directory")
        finish({"dry_run": True, "report": str(folder / "report.html")}, json_only)
        return
    from growmoe.report.html import write_report

    finish({"report": str(write_report(folder))}, json_only)


def doctor(json_only: Json = False, dry_run: NothingDone = False) -> None:
    """What this machine and installation can do."""
    from growmoe.stages.doctor import run as doctor_stage

    finish(doctor_stage(), json_only)
