"""chat: talk to a model in the terminal."""

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from growmoe.artifacts import lineage_of
from growmoe.data.tokenizer import load_tokenizer
from growmoe.errors import GrowmoeError, UsageError
from growmoe.files import read_json
from growmoe.inference.blocks import BLOCK
from growmoe.inference.llm import LLM
from growmoe.inference.requests import Sampling
from growmoe.recipe import GenerateStage

Render = Callable[[list[dict[str, str]]], str]
HELP = "/reset forgets the conversation, /quit ends it."


def run(
    spec: GenerateStage, format: str, lines: TextIO, show: Callable[[str], None]
) -> dict[str, Any]:
    """Answer every line of `lines`; returns how many turns were taken, and how many tokens of
    prompts were found in the cache, because they were in the conversation before.

    `spec` says which model, and how to sample; `format` is auto, template (the model's chat
    template) or plain. Without a chat template the model simply continues what was typed: it is
    a base model.
    """
    path, asked = Path(spec.model), Sampling.of(spec)
    if path.is_dir() and not (path / "tokenizer.json").exists():
        raise UsageError(f"{path} holds no tokenizer.json, so it cannot read what is typed")
    render = _renderer(path, format)
    if render:
        render([{"role": "user", "content": "hello"}])  # a broken template is found before loading
    llm = LLM.of(spec)
    most = min(llm.config.max_positions, llm.engine.pool.total * BLOCK)
    room = most - min(asked.max_tokens, most // 2)  # the rest is for the answer
    kind = "its chat template" if render else "plain continuation: a base model, it has no dialogue"
    print(f"{path}: {kind}. {HELP}", file=sys.stderr)
    messages: list[dict[str, str]] = []
    turns = 0
    while (line := _ask(lines)) is not None:
        if line == "/quit":
            break
        if line == "/reset":
            messages.clear()
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        sampling = replace(asked, seed=asked.seed + turns)
        answer = ""
        try:
            prompt = render(messages) if render else line
            while render and len(messages) > 1 and len(llm.encode(prompt)) > room:
                del messages[:2]  # the oldest turn goes first
                prompt = render(messages)
            llm.check(prompt, sampling)
            with closing(llm.stream([prompt], sampling)) as stream:
                for _, output in stream:
                    if output.error is not None:
                        raise GrowmoeError(output.error)
                    answer += output.text
                    show(output.text)
        except GrowmoeError as error:  # what goes wrong spoils one turn, not the conversation
            print(f"growmoe: {error}", file=sys.stderr)
            messages.pop()
            continue
        except KeyboardInterrupt:
            print(" (stopped)", file=sys.stderr)
        show("\n")
        messages.append({"role": "assistant", "content": answer})
        turns += 1
    stats = llm.engine.stats()
    return {
        "model": str(path), "turns": turns, "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.cached_tokens, "generated_tokens": stats.generated_tokens,
    }  # fmt: skip


def _ask(lines: TextIO) -> str | None:
    if lines.isatty():
        print("you> ", end="", file=sys.stderr, flush=True)
    try:
        line = lines.readline()
    except KeyboardInterrupt:
        return None
    return line.strip() if line else None


def _renderer(path: Path, kind: str) -> Render | None:
    """A function from messages to prompt, or None for plain continuation."""
    if kind == "plain":
        return None
    template = _template(path)
    if kind == "template" and template is None:
        raise UsageError(f"{path} has no chat template; use --format plain")
    steps = lineage_of(path).get("history", [])
    untaught = (
        bool(steps) and steps[0]["operation"] == "train"
    )  # from scratch: never saw a dialogue
    if template is None or (kind == "auto" and untaught):
        return None
    from transformers import PreTrainedTokenizerFast

    load_tokenizer(path)  # says what is wrong with it in one sentence
    # from_pretrained, because templates use the special tokens of tokenizer_config.json
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)

    def render(messages: list[dict[str, str]]) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # a template is a program, and may raise anything
            raise GrowmoeError(f"the chat template of {path} fails: {error}") from None

    return render


def _template(path: Path) -> str | None:
    if (path / "chat_template.jinja").exists():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    if (path / "tokenizer_config.json").exists():
        found = read_json(path / "tokenizer_config.json").get("chat_template")
        return found if isinstance(found, str) else None
    return None
