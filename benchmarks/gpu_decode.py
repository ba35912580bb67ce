"""Decoding of one random Mixtral on a GPU: our graphs, our steps without graphs, transformers.

Per batch size: a prompt of --context tokens each, then --steps greedy steps, timed by CUDA events,
median over steps; a step ends when its tokens are on the host, as an engine needs them.
transformers runs a plain loop around its model (less work than its `generate`) with `grouped_mm`
and `batched_mm`. Before anything is timed, the logits after the prompt are compared.

The floor is bytes over the bandwidth that a copy of 1 GiB reaches on this card: weights of a step
(see `random_mixtral.Sizes.step_bytes`: only experts that are hit) and the keys and values it reads.

    python benchmarks/gpu_decode.py --cache runs/models [--batches 1 8 64] [--experts 64 --top-k 8]

Prints a table and ends in one JSON line.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from growmoe.errors import GrowmoeError, UsageError
from growmoe.inference.blocks import blocks_for
from growmoe.inference.cuda_graph import BUCKETS, GraphRunner, as_it_is, cuda_graphs
from growmoe.inference.paged import PagedCache, Span
from growmoe.inference.sampling import peaks
from growmoe.inference.scheduler import Step
from growmoe.models.checkpoint import load_model
from growmoe.models.transformer import Transformer
from random_mixtral import Model, Sizes

TOLERANCE = 5e-2
"""Largest difference of bfloat16 logits, over their largest value."""
Prompts = list[list[int]]
Decoding = Iterator[tuple[Tensor | None, list[int]]]
"""First the logits after the prompts, on the host, then nothing; and the next tokens."""


def ours(model: Transformer, record: Callable[..., Any], device: str, prompts: Prompts) -> Decoding:
    """Our model in the engine's steps, without its scheduler."""
    room = blocks_for(model.config.max_positions)
    cache = PagedCache(model.config, len(prompts) * room + 1, model.embed.weight.dtype, device)
    runner = GraphRunner(model, cache, record)
    tables = [list(range(row * room, (row + 1) * room)) for row in range(len(prompts))]
    texts = [SimpleNamespace(tokens=list(prompt)) for prompt in prompts]
    done = [0] * len(texts)
    while True:
        step = Step()
        for row, text in enumerate(texts):
            held = len(text.tokens)
            table = tables[row][: blocks_for(held)]
            step.sequences.append(text)  # type: ignore[arg-type]
            step.spans.append(Span(done[row], held - done[row], table))
            done[row] = held
        logits_SV = runner.run(step)
        tokens = peaks(logits_SV)[1]
        for text, token in zip(texts, tokens):
            text.tokens.append(token)
        first = all(span.start == 0 for span in step.spans)
        yield logits_SV.float().cpu() if first else None, tokens


def theirs(model: Any, implementation: str, device: str, prompts: Prompts) -> Decoding:
    """transformers' model in a greedy loop."""
    from transformers import DynamicCache

    model.set_experts_implementation(implementation)
    cache, ids = DynamicCache(config=model.config), torch.tensor(prompts, device=device)
    first = True
    while True:
        with torch.inference_mode():
            done = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = done.logits[:, -1:].argmax(-1)
        yield done.logits[:, -1].float().cpu() if first else None, ids[:, 0].tolist()
        first = False


def milliseconds(decoding: Decoding, steps: int) -> float:
    """The median step; the first three record graphs and fill caches."""
    for _ in range(3):
        next(decoding)
    found = []
    for _ in range(steps):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        next(decoding)
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found)


def bandwidth() -> float:
    """Bytes a second, read and written, of the best of 20 copies of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target, best = torch.empty_like(source), float("inf")
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end))
    return 2 * source.numel() / (best / 1e3)


def floor_ms(sizes: Sizes, batch: int, tokens: int, speed: float) -> float:
    """What reading weights, keys and values takes at least."""
    width = sizes.hidden // sizes.heads
    held = 2 * 2 * sizes.layers * sizes.kv_heads * width * tokens * batch
    return (sizes.step_bytes(batch, "bfloat16") + held) / speed * 1e3


def compare(first: dict[str, Tensor], batch: int) -> None:
    """All logits after the prompt against those of the first engine."""
    name, want = next(iter(first.items()))
    for other, got in first.items():
        error = float((got - want).abs().max() / want.abs().max())
        if not error <= TOLERANCE:
            raise GrowmoeError(
                f"{other} differs from {name} at batch {batch}: logits by {error:.2e} of the "
                f"largest, more than {TOLERANCE:.0e}"
            )


def measure(options: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """Every engine at every batch size."""
    from transformers import AutoModelForCausalLM

    folder = Model(options.cache, sizes).directory("bfloat16")
    model = load_model(folder, "bfloat16").to("cuda")
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to("cuda")
    engines: dict[str, Callable[[Prompts], Decoding]] = {
        "growmoe": lambda prompts: ours(model, cuda_graphs(), "cuda", prompts),
        "growmoe_no_graph": lambda prompts: ours(model, as_it_is, "cuda", prompts),
        "hf_grouped_mm": lambda prompts: theirs(peer, "grouped_mm", "cuda", prompts),
        "hf_batched_mm": lambda prompts: theirs(peer, "batched_mm", "cuda", prompts),
    }
    speed, rows = bandwidth(), []
    for batch in options.batches:
        rng = torch.Generator().manual_seed(batch)
        shape = (batch, options.context)
        prompts = torch.randint(0, sizes.vocab, shape, generator=rng).tolist()
        started = {name: start(prompts) for name, start in engines.items()}
        compare({name: next(engine)[0] for name, engine in started.items()}, batch)  # type: ignore
        least = floor_ms(sizes, batch, options.context + options.steps // 2, speed)
        took = {name: milliseconds(engine, options.steps) for name, engine in started.items()}
        rows.append({"batch": batch, "floor_ms": least, "ms": took})
        print(
            f"batch {batch:3}: floor {least:7.3f} ms; "
            + ", ".join(f"{name} {ms:.3f} ({100 * least / ms:.0f}%)" for name, ms in took.items())
        )
    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "copy_bytes_per_second": speed, "sizes": vars(sizes), "context": options.context,
        "rows": rows,
    }  # fmt: skip


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("runs/models"))
    parser.add_argument("--batches", type=int, nargs="+", default=BUCKETS)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=64)
    for name in ("hidden", "layers", "experts", "top-k", "ffn"):
        default = getattr(Sizes, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise UsageError("this measures a GPU and there is none: run it where CUDA is available")
    sizes = Sizes(
        hidden=options.hidden, layers=options.layers, experts=options.experts,
        top_k=options.top_k, ffn=options.ffn,
    )  # fmt: skip
    if not 0 < max(options.batches) <= BUCKETS[-1]:
        raise UsageError(f"--batches must lie between 1 and {BUCKETS[-1]}")
    if options.context + options.steps + 4 > sizes.config().max_positions:
        raise UsageError(f"--context and --steps exceed {sizes.config().max_positions} positions")
    print(json.dumps(measure(options, sizes)))


if __name__ == "__main__":
    try:
        main()
    except GrowmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
