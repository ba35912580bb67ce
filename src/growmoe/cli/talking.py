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
    show_dry_run,
    stage,
    threads,
)
from growmoe.errors import UsageError


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
        "model": existing(model), "prompts": prompt, "max_tokens": max_tokens,
        "temperature": temperature, "top_p": top_p, "seed": seed,
    }  # fmt: skip
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
    checked = {"model": existing(model), "prompts": ["-"], "max_tokens": max_tokens}
    checked |= {"temperature": temperature, "top_p": top_p, "seed": seed}
    spec = stage("generate", checked, None)
    if dry_run:
        show_dry_run(spec, None, json_only)
        return
    threads()
    from growmoe.stages.chat import ChatOptions
    from growmoe.stages.chat import run as chat_stage

    options = ChatOptions(model, format, max_tokens, temperature, top_p, seed)
    result = chat_stage(options, sys.stdin, _silent if json_only else _show)
    print(json.dumps(result), flush=True)
