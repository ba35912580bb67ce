"""Models of transformers with our experts (`import growmoe.hf_experts`) and with its own.

Random Mixtral and Qwen2-MoE (shared expert) models; one model each, whose experts implementation is
switched between measurements, so that all use the same weights. Forward passes run without
gradients on 1, 8 and 512 tokens, forward and backward with a loss on 512; other tokens every time.
Interleaved, to and fro. Before a cell is timed, logits (and in float32 gradients) are compared with
eager's (see `check`); a difference ends the run with exit code 1.

    python benchmarks/hf_experts.py --out runs/hf_experts.json
    python benchmarks/hf_experts.py --models mixtral --dtype bf16 --tokens 1 8 --repeats 3

Prints a table and ends in one JSON line.
"""

import argparse
import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import growmoe.hf_experts
from engine_pool import environment
from growmoe.errors import GrowmoeError
from growmoe.training.memory import keep_freed_memory
from moe_layer import DTYPES, TOLERANCE, cpu_name, difference

IMPLEMENTATIONS = (growmoe.hf_experts.NAME, "grouped_mm", "eager")


def model_of(name: str, options: argparse.Namespace, dtype: torch.dtype) -> Any:
    """A random model of the family; experts of Qwen2-MoE are narrower and more."""
    sizes: dict[str, Any] = {
        "vocab_size": options.vocab, "hidden_size": options.hidden,
        "num_hidden_layers": options.layers, "num_attention_heads": options.heads,
        "num_key_value_heads": options.heads, "intermediate_size": options.ffn,
        "dtype": dtype,
    }  # fmt: skip
    if name == "mixtral":
        config = transformers.MixtralConfig(
            **sizes, num_local_experts=options.experts, num_experts_per_tok=2
        )
    else:
        config = transformers.Qwen2MoeConfig(
            **sizes, num_experts=4 * options.experts, num_experts_per_tok=4,
            moe_intermediate_size=options.ffn // 4,
            shared_expert_intermediate_size=options.ffn // 2,
        )  # fmt: skip
    torch.manual_seed(options.seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    if model.config._experts_implementation != growmoe.hf_experts.NAME:
        raise GrowmoeError(f"{name} does not take our experts by default")
    return model.to(dtype)


def run(model: Any, implementation: str, ids_1T: Tensor, backward: bool) -> Tensor:
    """One pass; the logits."""
    model.set_experts_implementation(implementation)
    if not backward:
        with torch.no_grad():
            return model(ids_1T, use_cache=False).logits
    model.zero_grad(set_to_none=True)
    done = model(ids_1T, labels=ids_1T, use_cache=False)
    done.loss.backward()
    return done.logits.detach()


def check(model: Any, sets: list[Tensor], backward: bool, dtype: str) -> dict[str, float]:
    """How far each implementation is from eager; raises when it is too far.

    In float32 that is the largest difference of logits and gradients. In bfloat16 it is the median
    over tokens of the difference of their logits: where two experts are nearly equally likely,
    rounding decides who is chosen, and the few tokens that this happens to differ by much more.
    """
    found: dict[str, float] = {}
    wanted: list[Tensor] = []
    exact = dtype == "fp32"
    for implementation in reversed(IMPLEMENTATIONS):  # eager first
        rows = [run(model, implementation, ids_1T, backward)[0] for ids_1T in sets]
        got = [torch.cat(rows).float()]
        if backward and exact:
            got += [one.grad for one in model.parameters() if one.grad is not None]
        wanted = wanted or [tensor.clone() for tensor in got]
        if len(got) != len(wanted):
            raise GrowmoeError(f"{implementation} gives gradients to other weights than eager")
        if exact:
            error = max(difference([a], [b]) for a, b in zip(got, wanted))
        else:
            gaps_T = (got[0] - wanted[0]).abs().amax(-1) / wanted[0].abs().amax(-1)
            error = float(gaps_T.median())
        if not error <= (1e-3 if exact else 3 * TOLERANCE[dtype]):
            raise GrowmoeError(f"{implementation} differs from eager by {error:.1e} in {dtype}")
        found[implementation] = error
    model.zero_grad(set_to_none=True)
    return found


def samples_of(
    calls: dict[str, Callable[[], Any]], repeats: int, shortest: float
) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) seconds of a call; short calls are repeated in a sample."""
    inner, found = dict[str, int](), {name: list[tuple[float, float]]() for name in calls}
    for name, call in calls.items():
        call()
        begun = time.perf_counter()
        call()
        inner[name] = max(1, round(shortest / (time.perf_counter() - begun)))
    for number in range(repeats):
        for name in list(calls) if number % 2 == 0 else reversed(calls):
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(inner[name]):
                calls[name]()
            times = (time.perf_counter() - wall, time.process_time() - cpu)
            found[name].append((times[0] / inner[name], times[1] / inner[name]))
    return found


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every cell of the grid."""
    rows = []
    passes = [(T, False) for T in options.tokens] + [(T, True) for T in options.train_tokens]
    for name, dtype in itertools.product(options.models, options.dtype):
        model = model_of(name, options, DTYPES[dtype])
        for (T, backward), threads in itertools.product(passes, options.threads):
            torch.set_num_threads(threads)
            model.train(backward)
            generator = torch.Generator().manual_seed(options.seed)
            sets = [torch.randint(options.vocab, (1, T), generator=generator) for _ in range(16)]
            errors = check(model, sets if T <= 16 else sets[:1], backward, dtype)
            turn = itertools.cycle(sets)

            def call(implementation: str, turn: Any, backward: bool, model: Any) -> None:
                run(model, implementation, next(turn), backward)

            calls = {
                one: functools.partial(call, one, turn, backward, model) for one in IMPLEMENTATIONS
            }
            timed = samples_of(calls, options.repeats, options.sample_ms / 1e3)
            for one, samples in timed.items():
                walls = [wall for wall, _ in samples]
                rows.append(
                    {
                        "model": name, "dtype": dtype, "T": T, "threads": threads,
                        "pass": "forward+backward" if backward else "forward", "experts": one,
                        "seconds": statistics.median(walls), "best_seconds": min(walls),
                        "cpu_seconds": statistics.median(cpu for _, cpu in samples),
                        "difference": errors[one], "load": os.getloadavg()[0],
                    }
                )  # fmt: skip
            model.zero_grad(set_to_none=True)
            print(f"{name} {dtype} T {T}, {threads} threads", file=sys.stderr)
        del model
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """One line for each cell."""
    fields = ("model", "dtype", "pass", "T", "threads")
    cells: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(tuple(row[field] for field in fields), {})[row["experts"]] = row
    print("\nmilliseconds, median (best); speed-up of ours\n")
    print(
        f"| {' | '.join(fields)} | {' | '.join(IMPLEMENTATIONS)} | grouped_mm/ours | eager/ours |"
    )
    print("|---" * (len(fields) + len(IMPLEMENTATIONS) + 2) + "|")
    for key, by in cells.items():
        shown = [
            f"{1e3 * by[one]['seconds']:.1f} ({1e3 * by[one]['best_seconds']:.1f})"
            for one in IMPLEMENTATIONS
        ]
        ours = by[IMPLEMENTATIONS[0]]["seconds"]
        ratios = [f"{by[one]['seconds'] / ours:.2f}" for one in IMPLEMENTATIONS[1:]]
        print("| " + " | ".join([*map(str, key), *shown, *ratios]) + " |")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=("mixtral", "qwen2_moe"), default=["mixtral", "qwen2_moe"])
    add("--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    add("--tokens", type=int, nargs="+", default=[1, 8, 512], help="of a forward pass")
    add("--train-tokens", type=int, nargs="*", default=[512], help="of forward and backward")
    add("--threads", type=int, nargs="+", default=[2])
    add("--hidden", type=int, default=768)
    add("--ffn", type=int, default=1536)
    add("--layers", type=int, default=6)
    add("--heads", type=int, default=12)
    add("--experts", type=int, default=8, help="of Mixtral; Qwen2-MoE has four times as many")
    add("--vocab", type=int, default=4096)
    add("--repeats", type=int, default=9)
    add("--sample-ms", type=float, default=100.0, help="shorter passes are repeated in a sample")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="JSON file")
    return parser.parse_args(argv)


def main() -> int:
    """Measure, print, end in the JSON line."""
    options = arguments()
    keep_freed_memory()
    try:
        rows = measure(options)
    except GrowmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report(rows)
    chosen = {name: value for name, value in vars(options).items() if name != "out"}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    config = {**chosen, "versions": versions, "cpu": cpu_name(), **environment()}
    document = {"benchmark": "hf_experts", "rows": rows, "config": config}
    if options.out:
        options.out.write_text(json.dumps(document))
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
