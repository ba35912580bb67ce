"""Verbs that make a corpus or a model."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from growmoe.cli import looking
from growmoe.cli.common import (
    Data,
    DryRun,
    Dtype,
    Json,
    Seed,
    Set,
    ShardGb,
    Text,
    Verify,
    execute_stage,
    existing,
    own_options,
    stage,
    threads,
)


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
        looking.plan(recipe, overrides, json_only=json_only)
        return
    from growmoe.pipeline import run_recipe
    from growmoe.recipe_yaml import load_recipe

    loaded = load_recipe(recipe, overrides)
    from growmoe.planning.recipes import plan_recipe

    plan_recipe(loaded)
    threads()
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
    execute_stage(stage("prepare", options, set_), out, json_only, dry_run)


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
    options = {"data": existing(data), "tokens": tokens, "preset": preset, "seed": seed}
    if model is not None:
        options["model"] = existing(model)
    if lr is not None:
        options["optimizer"] = {"lr": lr}
    execute_stage(stage("train", options, set_), out, json_only, dry_run)


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
    options = {**own_options(locals()), "model": existing(src)}
    execute_stage(stage("grow", options, None), out, json_only, dry_run)


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
    options = {**own_options(locals()), "model": existing(src)}
    execute_stage(stage("upcycle", options, None), out, json_only, dry_run)


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
    quantize: Annotated[
        str | None, typer.Option(help="int8 or int4: matrices as integers (lossy).")
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
    options = {**own_options(locals()), "model": existing(src)}
    execute_stage(stage("export", options, None), out, json_only, dry_run)
