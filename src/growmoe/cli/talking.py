"""Verbs that let a model speak."""

import json
import sys
from typing import Annotated

import typer

from growmoe.cli.common import (
    DryRun,
    Json,
    Seed,
    existing,
    finish,
    own_options,
    show_dry_run,
    stage,
    threads,
)
from growmoe.errors import UsageError

Weights = Annotated[
    str | None,
    typer.Option(
        help="How the model is held: float32, bfloat16, int8 or int4; default: as stored when "
        "quantised, else bfloat16."
    ),
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
KvGb = Annotated[float | None, typer.Option(help="GiB for keys and values; default: what fits.")]
ExpertMemory = Annotated[
    str | None, typer.Option(help="Memory for experts, like 4G; the rest of them stays on disk.")
]
MaxTokens = Annotated[int, typer.Option(help="Longest answer.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Only the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Only the likeliest tokens that make up this much.")]
MinP = Annotated[float, typer.Option(help="Only tokens this likely, relative to the likeliest.")]
Penalty = Annotated[float, typer.Option(help="Above 1: tokens seen become less likely.")]


def generate(
    model: Annotated[str, typer.Argument(help="Model directory or .gguf file.")],
    prompt: Annotated[list[str], typer.Option(help="Text to continue, repeatable.")],
    weights: Weights = None,
    device: Device = "cpu",
    kv_gb: KvGb = None,
    expert_memory: ExpertMemory = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    n: Annotated[int, typer.Option("--n", help="Samples per prompt.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="Text to end before, repeatable.")] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end of a text.")
    ] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="Log-probabilities of so many likeliest tokens, in the JSON.")
    ] = None,
    seed: Seed = 0,
    json_only: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Continue prompts, all at once, streaming."""
    given = {**locals(), "model": existing(model), "prompts": prompt, "stop": stop or []}
    options = {key: value for key, value in own_options(given).items() if key != "prompt"}
    spec = stage("generate", options, None)
    if dry_run:
        show_dry_run(spec, None, json_only)
        return
    threads()
    from growmoe.stages.generate import run as generate_stage

    result = generate_stage(spec, None, None, _silent if json_only else _show)
    print(json.dumps(result, ensure_ascii=False), flush=True)


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _silent(piece: str) -> None:
    pass


def chat(
    model: Annotated[str, typer.Argument(help="Model directory.")],
    format: Annotated[str, typer.Option(help="auto, template or plain.")] = "auto",
    weights: Weights = None,
    device: Device = "cpu",
    kv_gb: KvGb = None,
    expert_memory: ExpertMemory = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    json_only: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Talk to a model; one line from standard input is one turn."""
    given = {**locals(), "model": existing(model), "prompts": ["-"]}
    options = {key: value for key, value in own_options(given).items() if key != "format"}
    if format not in ("auto", "template", "plain"):
        raise UsageError(f"format '{format}' is not auto, template or plain")
    spec = stage("generate", options, None)
    if dry_run:
        show_dry_run(spec, None, json_only)
        return
    threads()
    from growmoe.stages.chat import run as chat_stage

    result = chat_stage(spec, format, sys.stdin, _silent if json_only else _show)
    print(json.dumps(result), flush=True)


def bench(
    model: Annotated[str, typer.Argument(help="Model directory or .gguf file.")],
    weights: Weights = None,
    device: Device = "cpu",
    kv_dtype: Annotated[
        str | None, typer.Option(help="Keys and values: float32 or bfloat16; default by weights.")
    ] = None,
    kv_gb: KvGb = None,
    expert_memory: ExpertMemory = None,
    batch: Annotated[str, typer.Option(help="Sequences at a time, as 1,8.")] = "1,8",
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompts.")] = 512,
    tokens: Annotated[int, typer.Option(help="Length of the answers.")] = 64,
    repeat: Annotated[int, typer.Option(help="Runs of each; the median counts.")] = 3,
    step_tokens: Annotated[int, typer.Option(help="Most tokens of one step.")] = 512,
    seed: Seed = 0,
    json_only: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Prefill and decoding speed, load time; the last line is one JSON document."""
    given = own_options(locals())
    from growmoe.stages.bench import BenchOptions, parse_batch, table
    from growmoe.stages.bench import dry_run as bench_dry_run
    from growmoe.stages.bench import run as bench_stage

    options = BenchOptions(**{**given, "model": existing(model), "batch": parse_batch(batch)})
    if dry_run:
        finish(bench_dry_run(options), json_only)
        return
    threads()
    result = bench_stage(options)
    finish(result, json_only, table(result))
