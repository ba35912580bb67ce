"""generate: continue prompts."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from growmoe.artifacts import sizes
from growmoe.errors import GrowmoeError
from growmoe.inference.llm import LLM
from growmoe.inference.requests import Output, Sample, Sampling
from growmoe.recipe import GenerateStage

Show = Callable[[str], None]


def run(
    spec: GenerateStage,
    staged: Path | None,
    work: Path | None,
    show: Show = lambda piece: None,
) -> dict[str, Any]:
    """Continue every prompt; `show` gets the texts piece by piece, one after another."""
    llm = LLM.of(spec)
    sampling = Sampling.of(spec)
    for prompt in spec.prompts:
        llm.check(prompt, sampling)
    shown = _InOrder(spec.prompts, spec.n, show)
    found: dict[tuple[int, int], Sample] = {}
    for number, output in llm.stream(spec.prompts, sampling):
        if output.error is not None:
            raise GrowmoeError(f"prompt {number + 1} of {len(spec.prompts)} fails: {output.error}")
        sample = found.setdefault((number, output.index), Sample(logprobs=[]))
        sample.add(output)
        shown.add(number, output)
    samples = []
    for number, prompt in enumerate(spec.prompts):
        for index in range(spec.n):
            samples.append(_entry(prompt, found[number, index], spec))
    return {**sizes(llm.config), "tokens": 0, "flops": 0, "samples": samples, **llm.serving()}


def _entry(prompt: str, sample: Sample, spec: GenerateStage) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "prompt": prompt, "text": sample.text, "finish_reason": sample.finish_reason,
        "tokens": len(sample.token_ids),
    }  # fmt: skip
    if spec.logprobs is not None:
        entry["logprobs"] = [dataclasses.asdict(found) for found in sample.logprobs or []]
    return entry


class _InOrder:
    """Shows samples that grow side by side one after another: the first that is not finished as it
    grows, those after it when their turn comes."""

    def __init__(self, prompts: list[str], n: int, show: Show) -> None:
        self._prompts, self._n, self._show = prompts, n, show
        self._turn = 0
        self._begun = False
        self._text = [""] * (len(prompts) * n)
        self._ended = [False] * (len(prompts) * n)

    def add(self, number: int, output: Output) -> None:
        """What one step brought."""
        place = number * self._n + output.index
        self._text[place] += output.text
        self._ended[place] = output.finish_reason is not None
        while self._turn < len(self._text):
            if not self._begun:
                self._show(self._prompts[self._turn // self._n])
                self._begun = True
            if self._text[self._turn]:
                self._show(self._text[self._turn])
                self._text[self._turn] = ""
            if not self._ended[self._turn]:
                return
            self._show("\n")
            self._turn, self._begun = self._turn + 1, False
