"""Options that many verbs share, and what every verb does with its result."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from growmoe.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="Print nothing but one JSON line.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other field, repeatable."),
]
Text = Annotated[str | None, typer.Option(help="Text file to check on.")]
Data = Annotated[str | None, typer.Option(help="Corpus whose validation split to check on.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be made, and read no weights.")
]
NothingDone = Annotated[
    bool, typer.Option("--dry-run", help="The same: this verb writes nothing and reads no weights.")
]
Verify = Annotated[bool, typer.Option(help="Check the result against the source on real text.")]
ShardGb = Annotated[float | None, typer.Option(help="Largest file in GiB.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default as source.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


def finish(result: dict[str, Any], as_json: bool, lines: list[str] | None = None) -> None:
    """A table that people read (unless --json), then the JSON line. `lines` are shown in place of
    the last entry."""
    if not as_json:
        for key, value in list(result.items())[: -1 if lines else None]:
            if isinstance(value, float):
                value = f"{value:.6g}"
            if isinstance(value, dict | list):
                text = json.dumps(value, ensure_ascii=False)
                value = text if len(text) <= 100 else f"{text[:97]}..."
            print(f"{key:>28}  {value}")
        if lines:
            print("", *lines, "", sep="\n")
    print(json.dumps(result, ensure_ascii=False), flush=True)


def threads() -> None:
    """One compute thread per usable core, unless the caller said otherwise."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)))


def stage(kind: str, options: dict[str, Any], overrides: list[str] | None) -> Any:
    """The checked specification of one stage, from options and KEY=VALUE overrides."""
    from growmoe.recipe_yaml import stage_from_options

    return stage_from_options(kind, options, overrides or [])


def own_options(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a verb that are fields of its stage."""
    plumbing = ("src", "out", "set_", "json_only", "dry_run")
    return {key: value for key, value in given.items() if key not in plumbing}


def execute_stage(spec: Any, out: Path, as_json: bool, dry: bool = False) -> None:
    """Run a stage that makes `out`, or show what it would make."""
    if dry:
        show_dry_run(spec, out, as_json)
        return
    from growmoe.pipeline import execute

    if out.exists():
        raise UsageError(f"{out} already exists; choose another output directory or remove it")
    threads()
    finish(execute(spec, out), as_json)


def show_dry_run(spec: Any, out: Path | None, as_json: bool) -> None:
    """What a stage would make, without reading weights."""
    from growmoe.planning.dry_run import dry_run

    show_plan(dry_run(spec, out), as_json)


def show_plan(result: dict[str, Any], as_json: bool) -> None:
    """A plan as people read it, then the JSON line."""
    if not as_json:
        from growmoe.planning.table import plan_lines

        print("\n".join(plan_lines(result)))
    print(json.dumps(result, ensure_ascii=False), flush=True)


def existing(path: str) -> str:
    """`path`, which must be there."""
    if not Path(path).exists():
        raise UsageError(f"{path} does not exist")
    return path
