"""bench: how fast a model reads prompts and writes answers on this machine."""

import dataclasses
import math
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growmoe import __version__
from growmoe.errors import GrowmoeError, UsageError
from growmoe.memory import free_memory
from growmoe.models.config import ModelConfig
from growmoe.models.footprint import (
    BLOCK,
    FORMS,
    Footprint,
    Form,
    Wanted,
    admit,
    check_device,
    parse_size,
)
from growmoe.models.stored import serving_form
from growmoe.ops.library import installed
from growmoe.planning.derived import config_of, describe

if TYPE_CHECKING:
    from torch import Generator

    from growmoe.inference.llm import LLM

DEVICES = ("cpu", "cuda")
KV_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class BenchOptions:
    """What to measure; raises UsageError for what cannot be."""

    model: str
    weights: Form | None = None
    """None: as the directory is quantised, else bfloat16."""
    device: str = "cpu"
    kv_dtype: str | None = None
    kv_gb: float | None = None
    expert_memory: str | None = None
    batch: tuple[int, ...] = (1, 8)
    prompt_tokens: int = 512
    tokens: int = 64
    repeat: int = 3
    step_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field, and that prompt and answer fit the model's context."""
        if self.form not in FORMS:
            raise UsageError(f"weights '{self.weights}' are none of {', '.join(FORMS)}")
        if self.device not in DEVICES:
            raise UsageError(f"device '{self.device}' is not one of {', '.join(DEVICES)}")
        if self.kv_gb is not None and not 0 < self.kv_gb < math.inf:
            raise UsageError(f"kv-gb must be above 0, not {self.kv_gb}")
        check_device(self.device, self.form, self.wanted.expert_memory is not None)
        if self.kv_dtype is not None and self.kv_dtype not in KV_DTYPES:
            raise UsageError(f"kv-dtype '{self.kv_dtype}' is not one of {', '.join(KV_DTYPES)}")
        if not self.batch or min(self.batch) < 1:
            raise UsageError(f"batch needs sizes of at least 1, as 1,8, not {self.batch}")
        least = {"prompt_tokens": 1, "tokens": 2, "repeat": 1, "seed": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                option = name.replace("_", "-")
                raise UsageError(f"{option} must be at least {value}, not {getattr(self, name)}")
        if self.step_tokens <= max(self.batch):
            raise UsageError(
                f"step-tokens {self.step_tokens} must be more than the largest batch, which is "
                f"{max(self.batch)}"
            )
        context = self.config.max_positions
        if self.prompt_tokens + self.tokens > context:
            raise UsageError(
                f"{self.prompt_tokens} tokens of prompt and {self.tokens} of answer are more than "
                f"the context of {self.model}, which is {context}"
            )

    @property
    def form(self) -> Form:
        """How the weights are held."""
        return serving_form(Path(self.model), self.weights)

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return config_of(Path(self.model))

    @property
    def wanted(self) -> Wanted:
        """What serving it this way takes."""
        kv = self.kv_dtype or ("float32" if self.form == "float32" else "bfloat16")
        return Wanted(
            form=self.form, kv_dtype=kv, step_tokens=self.step_tokens,
            max_sequences=max(self.batch), kv_gb=self.kv_gb, native=installed(),
            expert_memory=None if self.expert_memory is None else parse_size(self.expert_memory),
        )  # fmt: skip


def parse_batch(text: str) -> tuple[int, ...]:
    """`1,8` as numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"batch '{text}' is not a list of numbers as 1,8") from None


def dry_run(options: BenchOptions) -> dict[str, Any]:
    """What would be measured, and on a CPU the memory that it takes; reads no weights. Raises
    UsageError when that is not free."""
    plan = {
        "dry_run": True, **dataclasses.asdict(options), "weights": options.form,
        **describe(options.config),
    }  # fmt: skip
    if options.device == "cpu":
        found = admit(options.config, options.wanted, free_memory(), options.model)
        _check_room(found, options)
        plan["memory"] = found.report()
    return plan


def run(options: BenchOptions) -> dict[str, Any]:
    """Measure every batch size, with random token ids as prompts, greedily, without ends of text.

    Prefill is from the start to the first token of every sequence of the batch, in chunks of
    `step_tokens`; decoding is what comes after it. Both in tokens per second, the median of
    `repeat` runs; a run before them is not counted.
    """
    import torch

    from growmoe.inference.llm import LLM
    from growmoe.ops import native

    llm = LLM(
        options.model, options.weights, kv_dtype=options.kv_dtype, device=options.device,
        max_sequences=max(options.batch), step_tokens=options.step_tokens, kv_gb=options.kv_gb,
        expert_memory=options.expert_memory,
    )  # fmt: skip
    _check_room(llm.footprint, options)
    rng = torch.Generator().manual_seed(options.seed)
    _measure(llm, options, 1, rng)
    runs = []
    for batch in options.batch:
        found = [_measure(llm, options, batch, rng) for _ in range(options.repeat)]
        prefill, decode = ([round(speed, 2) for speed in speeds] for speeds in zip(*found))
        runs.append(
            {
                "batch": batch, "prefill_tokens_per_s": round(statistics.median(prefill), 2),
                "decode_tokens_per_s": round(statistics.median(decode), 2),
                "prefill_runs": prefill, "decode_runs": decode,
            }
        )  # fmt: skip
    return {
        **dataclasses.asdict(options),
        "weights": options.form,
        "kv_dtype": options.wanted.kv_dtype,
        **llm.serving(),
        "params_total": llm.config.params_total(),
        "params_active": llm.config.params_active(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "native_kernels": native.level(),
        "torch": torch.__version__,
        "growmoe": __version__,
        "python": platform.python_version(),
        "runs": runs,
    }


def table(result: dict[str, Any]) -> list[str]:
    """The speeds for people to read."""
    lines = [f"{'batch':>8}{'prefill tokens/s':>20}{'decode tokens/s':>20}{'per sequence':>16}"]
    for one in result["runs"]:
        decode = one["decode_tokens_per_s"]
        lines.append(
            f"{one['batch']:>8}{one['prefill_tokens_per_s']:>20.1f}{decode:>20.1f}"
            f"{decode / one['batch']:>16.1f}"
        )
    return lines


def _check_room(found: Footprint, options: BenchOptions) -> None:
    """A batch that does not fit the cache would measure how sequences displace each other."""
    tokens, held = options.prompt_tokens + options.tokens, found.kv_blocks
    if max(options.batch) * math.ceil(tokens / BLOCK) > held:
        raise UsageError(
            f"a batch of {max(options.batch)} with {tokens} tokens each does not fit into the KV "
            f"cache, for which there is memory for {held * BLOCK} tokens"
        )


def _measure(
    llm: "LLM", options: BenchOptions, batch: int, rng: "Generator"
) -> tuple[float, float]:
    """(prompt tokens, answer tokens) per second of one batch."""
    import torch

    shape = (batch, options.prompt_tokens)
    prompts = torch.randint(0, llm.config.vocab_size, shape, generator=rng).tolist()
    seconds, _, _ = _timed(llm, prompts, 1)
    # the prompts are in the cache now, so all sequences start to decode at once
    first, generated, end = _timed(llm, prompts, options.tokens)
    return batch * options.prompt_tokens / seconds, generated / (end - first)


def _timed(llm: "LLM", prompts: list[list[int]], tokens: int) -> tuple[float, int, float]:
    """(seconds until the last sequence had its first token, tokens generated after that, seconds
    until the end)."""
    from growmoe.inference.requests import Request, Sampling

    sampling = Sampling(tokens, temperature=0, ignore_eos=True)
    start = time.perf_counter()
    for prompt in prompts:
        llm.engine.add(Request(prompt, sampling))
    seen: set[int] = set()
    first, after = 0.0, 0
    while llm.engine.has_work():
        outputs = llm.engine.step()
        for output in outputs:
            if output.error is not None:
                raise GrowmoeError(f"the engine fails: {output.error}")
            seen.add(output.request.id)
        if first:
            after += len(outputs)
        elif len(seen) == len(prompts):
            first = time.perf_counter() - start
    return first, after, time.perf_counter() - start
