"""The command line: verbs parse, check, and call a stage. Importing this imports no torch."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from growmoe.errors import GrowmoeError, UsageError

app = typer.Typer(
    name="growmoe",
    help="Grow a dense language model into a mixture of experts, train it and talk to it, "
    "with proof at every seam that nothing was lost.",
    epilog="Errors are one sentence (exit code 2: wrong use, 1: failure); --debug after any verb "
    "shows the traceback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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


def _version(wanted: bool) -> None:
    if wanted:
        from growmoe import __version__

        print(f"growmoe {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _finish(result: dict[str, Any], as_json: bool, lines: list[str] | None = None) -> None:
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


def _threads() -> None:
    """One compute thread per usable core, unless the caller said otherwise."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)))


def _stage(kind: str, options: dict[str, Any], overrides: list[str] | None) -> Any:
    from growmoe.recipe_yaml import stage_from_options

    return stage_from_options(kind, options, overrides or [])


def _own_options(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a verb that are fields of its stage."""
    plumbing = ("src", "out", "set_", "json_only", "dry_run")
    return {key: value for key, value in given.items() if key not in plumbing}


def _execute(spec: Any, out: Path, as_json: bool, dry: bool = False) -> None:
    if dry:
        _dry_run(spec, out, as_json)
        return
    from growmoe.pipeline import execute

    if out.exists():
        raise UsageError(f"{out} already exists; choose another output directory or remove it")
    _threads()
    _finish(execute(spec, out), as_json)


def _dry_run(spec: Any, out: Path | None, as_json: bool) -> None:
    from growmoe.planning.dry_run import dry_run

    _show_plan(dry_run(spec, out), as_json)


def _show_plan(result: dict[str, Any], as_json: bool) -> None:
    """A plan as people read it, then the JSON line."""
    if not as_json:
        from growmoe.planning.table import plan_lines

        print("\n".join(plan_lines(result)))
    print(json.dumps(result, ensure_ascii=False), flush=True)


def _existing(path: str) -> str:
    if not Path(path).exists():
        raise UsageError(f"{path} does not exist")
    return path


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Changed fields.")
    ] = None,
    json_only: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Run a recipe; finished stages are skipped, an interrupted one continues."""
    if dry_run:
        plan(recipe, overrides, json_only=json_only)
        return
    from growmoe.pipeline import run_recipe
    from growmoe.recipe_yaml import load_recipe

    loaded = load_recipe(recipe, overrides)
    from growmoe.planning.recipes import plan_recipe

    plan_recipe(loaded)
    _threads()
    result = run_recipe(loaded)
    if not json_only:
        _print_stages(result["stages"])
        print(f"\nreport: {result['report']}")
        if result["model"]:
            print(f"talk to it: {_program()} chat {result['model']}\n")
    print(json.dumps(result, ensure_ascii=False), flush=True)


def _program() -> str:
    """How the user can call this program again from here."""
    own = Path(sys.argv[0])
    if own.name != "growmoe" or shutil.which("growmoe") == str(own):
        return "growmoe"
    return os.path.relpath(own)


def _print_stages(stages: list[dict[str, Any]]) -> None:
    from growmoe.progress import human_count, human_seconds

    print(
        f"\n{'stage':<10}{'name':<14}{'params':>9}{'active':>9}{'tokens':>9}{'FLOPs':>9}"
        f"{'loss before':>13}{'loss after':>12}{'time':>8}"
    )
    for row in stages:
        counts = [row[k] for k in ("params_total", "params_active", "tokens", "flops")]
        losses = [row[k] for k in ("loss_before", "loss_after")]
        cells = "".join(f"{human_count(float(c)) if c else '-':>9}" for c in counts)
        cells += f"{f'{losses[0]:.4f}' if losses[0] is not None else '-':>13}"
        cells += f"{f'{losses[1]:.4f}' if losses[1] is not None else '-':>12}"
        print(f"{row['stage']:<10}{row['name']:<14}{cells}{human_seconds(row['seconds']):>8}")


@app.command()
def prepare(
    paths: Annotated[
        list[str], typer.Argument(help="Files, folders or globs; NAME=PATH names one.")
    ],
    out: Annotated[Path, typer.Option(help="The corpus directory to make.")],
    vocab: Annotated[int | None, typer.Option(help="Size of the tokenizer to train.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer to use instead.")] = None,
    set_: Set = None,
    json_only: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Raw text (jsonl, txt, md, parquet) to a tokenised corpus."""
    sources = []
    for number, path in enumerate(paths):
        name, equals, rest = path.partition("=")
        if not equals or "/" in name:
            name, rest = f"source{number}", path
        sources.append({"name": name, "path": rest})
    chosen = {"path": tokenizer, "vocab_size": vocab}
    options = {
        "sources": sources,
        "tokenizer": {key: value for key, value in chosen.items() if value is not None},
    }
    _execute(_stage("prepare", options, set_), out, json_only, dry_run)


@app.command()
def train(
    out: Annotated[Path, typer.Argument(help="The model directory to make.")],
    data: Annotated[str, typer.Option(help="Corpus directory.")],
    tokens: Annotated[int, typer.Option(help="Training tokens.")],
    model: Annotated[str | None, typer.Option(help="Model to go on from.")] = None,
    preset: Annotated[str | None, typer.Option(help="A new model by preset name.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Seed = 0,
    set_: Set = None,
    json_only: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Train a new model (--preset, or --set init.hidden_size=...) or an existing one (--model)."""
    options = {"data": _existing(data), "tokens": tokens, "preset": preset, "seed": seed}
    if model is not None:
        options["model"] = _existing(model)
    if lr is not None:
        options["optimizer"] = {"lr": lr}
    _execute(_stage("train", options, set_), out, json_only, dry_run)


@app.command()
def grow(
    src: Annotated[str, typer.Argument(help="Model directory or .gguf file.")],
    out: Annotated[Path, typer.Argument(help="The model directory to make.")],
    hidden: Annotated[int | None, typer.Option(help="Residual width.")] = None,
    layers: Annotated[int | None, typer.Option()] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads; default follows hidden.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key/value heads.")] = None,
    merge_kv: Annotated[
        str | None, typer.Option(help="mean: average kv heads where there are to be fewer (lossy).")
    ] = None,
    ffn: Annotated[int | None, typer.Option(help="Feed-forward width.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="A multiple of the source's.")] = None,
    vocab: Annotated[int | None, typer.Option()] = None,
    vocab_init: Annotated[
        str | None, typer.Option(help="mean, mean_cov, zeros or from_tokens.")
    ] = None,
    vocab_tokenizer: Annotated[
        str | None, typer.Option(help="A larger tokenizer that keeps the old ids.")
    ] = None,
    method: Annotated[str, typer.Option(help="exact, fpi, aki or aki-pro.")] = "exact",
    depth: Annotated[
        str | None,
        typer.Option(help="identity, stack, interpolate, dus, or the layers to copy as 0,0,1,2."),
    ] = None,
    guard: Annotated[
        str | None, typer.Option(help="First and last layers to leave single, as 3,3.")
    ] = None,
    branch_scale: Annotated[
        str | None, typer.Option(help="count: divide the branches of a layer by its copies.")
    ] = None,
    units: Annotated[str | None, typer.Option(help="duplicate or zero_pad.")] = None,
    split: Annotated[str | None, typer.Option(help="random or even shares of copies.")] = None,
    noise_db: Annotated[float | None, typer.Option(help="Signal-to-noise ratio.")] = None,
    noise: Annotated[str | None, typer.Option(help="copies (exact) or everywhere (lossy).")] = None,
    pretrained_tokens: Annotated[
        int | None, typer.Option(help="What the source was trained on, for warnings.")
    ] = None,
    seed: Seed = 0,
    text: Text = None,
    data: Data = None,
    dtype: Dtype = None,
    shard_gb: ShardGb = None,
    verify: Verify = True,
    json_only: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Scale-up: a larger dense model, verified against the small one before it is published."""
    options = {**_own_options(locals()), "model": _existing(src)}
    _execute(_stage("grow", options, None), out, json_only, dry_run)


@app.command()
def upcycle(
    src: Annotated[str, typer.Argument(help="Dense model directory or .gguf file.")],
    out: Annotated[Path, typer.Argument(help="The model directory to make.")],
    experts: Annotated[str, typer.Option(help="A number, or one per layer as 0,4,8,8.")] = "8",
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 2,
    combine: Annotated[str, typer.Option(help="renorm, softmax or sigmoid.")] = "renorm",
    router: Annotated[
        str | None, typer.Option(help="normal, zero or virtual_group; default by granularity.")
    ] = None,
    router_std: Annotated[float | None, typer.Option(help="Deviation of the new router.")] = None,
    layers: Annotated[
        str, typer.Option(help="all, second, first_half, second_half, or a list like 3,5,7.")
    ] = "all",
    pyramid: Annotated[int, typer.Option(help="Last MoE layers with twice the experts.")] = 0,
    groups: Annotated[int, typer.Option(help="Groups that experts stand in.")] = 1,
    top_groups: Annotated[int | None, typer.Option(help="Groups a token may visit.")] = None,
    expert_init: Annotated[str, typer.Option(help="copy, noise, drop or permute.")] = "copy",
    noise: Annotated[
        float | None, typer.Option(help="expert-init noise: relative to each matrix.")
    ] = None,
    drop: Annotated[
        float | None, typer.Option(help="expert-init drop: part of the units drawn anew.")
    ] = None,
    granularity: Annotated[int, typer.Option(help="Slices per copy of the feed-forward.")] = 1,
    residual: Annotated[
        str, typer.Option(help="Fixed branch: none, sum, softmax2 or sigmoid_gate.")
    ] = "none",
    shared: Annotated[str | None, typer.Option(help="dense_plus_null or half_half.")] = None,
    pretrained_tokens: Annotated[
        int | None, typer.Option(help="What the source was trained on, for warnings.")
    ] = None,
    seed: Seed = 0,
    text: Text = None,
    data: Data = None,
    dtype: Dtype = None,
    shard_gb: ShardGb = None,
    verify: Verify = True,
    json_only: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Scale-out: experts made of the dense feed-forward; the same function at first."""
    options = {**_own_options(locals()), "model": _existing(src)}
    _execute(_stage("upcycle", options, None), out, json_only, dry_run)


@app.command()
def export(
    src: Annotated[str, typer.Argument(help="Model directory or .gguf file.")],
    out: Annotated[Path, typer.Argument(help="The directory to make.")],
    engine: Annotated[
        str, typer.Option("--for", help="transformers, vllm, sglang or llama.cpp.")
    ] = "transformers",
    portable: Annotated[
        bool, typer.Option("--portable", help="Allow forms that cost space (copied experts).")
    ] = False,
    format: Annotated[
        str | None, typer.Option(help="llama.cpp: gguf (default), or hf for its converter.")
    ] = None,
    seed: Seed = 0,
    text: Text = None,
    data: Data = None,
    dtype: Dtype = None,
    shard_gb: ShardGb = None,
    verify: Verify = True,
    json_only: Json = False,
    dry_run: DryRun = False,
) -> None:
    """The form that an engine runs, reloaded and compared; refused where it would be wrong."""
    options = {**_own_options(locals()), "model": _existing(src)}
    _execute(_stage("export", options, None), out, json_only, dry_run)


@app.command()
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

    options = {"a": _existing(a), "b": _existing(b), "text": text, "data": data, "seed": seed}
    spec = _stage("verify", {**options, "tokens": tokens}, None)
    if dry_run:
        _dry_run(spec, None, json_only)
        return
    _threads()
    result = measure(spec)
    failed = result.pop("failed")
    _finish(result, json_only)
    if failed:
        raise typer.Exit(1)


@app.command()
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
        "model": _existing(model), "data": data, "text": text, "tasks": task, "limit": limit
    }  # fmt: skip
    spec = _stage("evaluate", options, None)
    if dry_run:
        _dry_run(spec, None, json_only)
        return
    _threads()
    _finish(measure(spec), json_only)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Model directory.")],
    prompt: Annotated[list[str], typer.Option(help="Text to continue, repeatable.")],
    max_tokens: Annotated[int, typer.Option()] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option()] = 0.95,
    seed: Seed = 0,
    json_only: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Continue a prompt, streaming."""
    options = {
        "model": _existing(model), "prompts": prompt, "max_tokens": max_tokens,
        "temperature": temperature, "top_p": top_p, "seed": seed,
    }  # fmt: skip
    spec = _stage("generate", options, None)
    if dry_run:
        _dry_run(spec, None, json_only)
        return
    _threads()
    from growmoe.stages.generate import run as generate_stage

    result = generate_stage(spec, None, None, _silent if json_only else _show)
    print(json.dumps(result, ensure_ascii=False), flush=True)


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _silent(piece: str) -> None:
    pass


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Model directory.")],
    format: Annotated[str, typer.Option(help="auto, template or plain.")] = "auto",
    max_tokens: Annotated[int, typer.Option()] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option()] = 0.95,
    seed: Seed = 0,
    json_only: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Talk to a model; one line from standard input is one turn."""
    if format not in ("auto", "template", "plain"):
        raise UsageError(f"format '{format}' is not auto, template or plain")
    checked = {"model": _existing(model), "prompts": ["-"], "max_tokens": max_tokens}
    checked |= {"temperature": temperature, "top_p": top_p, "seed": seed}
    spec = _stage("generate", checked, None)
    if dry_run:
        _dry_run(spec, None, json_only)
        return
    _threads()
    from growmoe.stages.chat import ChatOptions
    from growmoe.stages.chat import run as chat_stage

    options = ChatOptions(model, format, max_tokens, temperature, top_p, seed)
    result = chat_stage(options, sys.stdin, _silent if json_only else _show)
    print(json.dumps(result), flush=True)


@app.command()
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
        _threads()
    result = inspect_stage(Path(_existing(path)), tensors, asked, dry_run)
    use = result.get("expert_use")
    _finish(result, json_only, list(expert_lines(use)) if use else None)


@app.command()
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
        _show_plan(result, json_only)
    else:
        _finish(result, json_only)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Run directory of a recipe.")],
    json_only: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Write report.html of a run: loss against FLOPs, stages, routing, lineage."""
    if dry_run:
        if not (folder / "summary.json").exists():
            raise UsageError(f"{folder} holds no summary.json, so it is not a run directory")
        _finish({"dry_run": True, "report": str(folder / "report.html")}, json_only)
        return
    from growmoe.report.html import write_report

    _finish({"report": str(write_report(folder))}, json_only)


@app.command()
def doctor(json_only: Json = False, dry_run: NothingDone = False) -> None:
    """What this machine and installation can do."""
    from growmoe.stages.doctor import run as doctor_stage

    _finish(doctor_stage(), json_only)


def main(argv: list[str] | None = None) -> None:
    """Entry point: turns every failure into one sentence and an exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(args=arguments, standalone_mode=False)
    except Exception as error:
        if debug:
            raise
        sys.exit(_explain(error))
    except KeyboardInterrupt:
        print("\ngrowmoe: stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Exception) -> int:
    """Print one sentence about `error`; returns the exit code."""
    if isinstance(error, GrowmoeError):
        for line in str(error).splitlines():
            print(f"growmoe: {line}", file=sys.stderr)
        return error.exit_code
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's own, any copy
        print(f"growmoe: {error.format_message()}", file=sys.stderr)
        return int(error.exit_code)
    if type(error).__name__ == "Abort":
        print("growmoe: stopped", file=sys.stderr)
        return 130
    if isinstance(error, OSError):
        place = f" ({error.filename})" if error.filename else ""
        reasons = {errno.ENOSPC: "the disk is full", errno.EFBIG: "the file size limit is reached"}
        reason = reasons.get(error.errno or 0, error.strerror or str(error))
        print(f"growmoe: {reason}{place}; nothing was published", file=sys.stderr)
        return 1
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        print("growmoe: out of memory; nothing was published", file=sys.stderr)
        return 1
    detail = str(error).splitlines()[0] if str(error) else "no message"
    print(
        f"growmoe: unexpected {type(error).__name__}: {detail} (run again with --debug)",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    main()
