"""What the mapping table saves, and what the kernels save on top: one MoE layer, three ways.

    A0  onehot    one-hot masks [T,E,C], einsum dispatch, all experts on C slots, einsum combine, as
                  GShard and DeepSpeed published it; C is the largest load, so nothing is dropped
    A1  table     our mapping table, then a loop over the experts that were hit with F.linear
    A2  growmoe   our inference engine's packed experts (`ops.native`), router included

with the same weights and tokens, in bfloat16. Beside them: `onehot_cf1`, which is A0 with a
capacity factor of 1.0, the original setting: it DROPS choices (how many stands in its row), so it
computes something else; and transformers' default (`hf_grouped_mm`). Outputs of all others are
compared before a cell is timed; a difference ends the run with exit code 1.

A0/A1 and A1/A2 are given apart, for every cell of the grid. They grow with E/k at T = 1 and vanish
at large T, so no single number stands for them.

`of ceiling` is A2's: bytes of the distinct experts of the batch, over the time, over the read
bandwidth that is measured beside the cell. At T <= 16 every call takes other tokens than the one
before, as in `moe_layer.py`, whose sampling (interleaved, to and fro) this is.

    python benchmarks/baseline.py --out runs/baseline.json
    python benchmarks/baseline.py --experts 8 --tokens 1 8 --top-k 2 --threads 1

Prints tables and ends in one JSON line.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moe_layer
import moe_peers as peers
from engine_pool import environment
from engine_worker import Probe
from growmoe.errors import GrowmoeError, UsageError
from growmoe.models.config import ModelConfig
from growmoe.ops.mapping import capacity
from growmoe.ops.onehot import onehot_moe, slots_of
from moe_layer import Batch, Cell
from moe_peers import Layer, Shared, routed

DROPS = "onehot_cf1"
IMPLEMENTATIONS = ("onehot", DROPS, "table", "growmoe", "hf_grouped_mm")


def onehot_cf1(shared: Shared, k: int) -> Layer:
    """A0 with a capacity factor of 1.0."""
    E = shared.sizes[0]

    def forward(x_TD: Tensor) -> Tensor:
        experts_TK, weights_TK = routed(x_TD, shared.router, k, raw=False)
        limit = capacity(len(x_TD), k, E, 1.0)
        return onehot_moe(x_TD, experts_TK, weights_TK, shared.up, shared.down, limit)

    return Layer(DROPS, forward, shared.parameters(), shared.gradients)


def packed(shared: Shared, k: int) -> Layer:
    """A2: router, experts and combine of the inference engine. Its stream is float32."""
    from growmoe.inference.packing import PackedMoE, Reader

    config = peers.layer_config(shared, k)
    moe = PackedMoE(config, 0, Reader(_Stacked(shared, config), "bfloat16"))

    def forward(x_TD: Tensor) -> Tensor:
        return moe(x_TD.float().unsqueeze(0))[0].squeeze(0)

    return Layer("growmoe", forward, [], dict)


class _Stacked:
    """Shared weights as a Source of one layer."""

    dtype = "bfloat16"

    def __init__(self, shared: Shared, config: ModelConfig) -> None:
        self.shared, self.config = shared, config

    def load(self, name: str) -> Tensor:
        if name.endswith("router.weight"):
            return self.shared.router.detach()
        expert, part = name.split(".experts.")[1].split(".")[:2]
        if part == "down":
            return self.shared.down.detach()[int(expert)]
        gate, up = self.shared.up.detach()[int(expert)].chunk(2)
        return gate if part == "gate" else up


def builders() -> tuple[dict[str, Callable[[Shared, int], Layer]], str]:
    """Every implementation, and what ours computes with."""
    ours, by = peers.grown, "torch (there are no native kernels)"
    with contextlib.suppress(ImportError):
        from growmoe.ops import native

        if native.available():
            ours, by = packed, f"native kernels ({native.level()})"
    return {
        "onehot": peers.onehot, DROPS: onehot_cf1, "table": peers.BUILDERS["table"],
        "growmoe": ours, "hf_grouped_mm": peers.BUILDERS["hf_grouped_mm"],
    }, by  # fmt: skip


class Bench:
    """The rows so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.rows = options, list[dict[str, Any]]()
        self.builders, self.by = builders()
        self.probes = {
            threads: Probe("", "", threads, {"probe_mib": options.probe_mib})
            for threads in options.threads
        }

    def run(self) -> None:
        """The whole grid; weights are made once for E."""
        moe_layer.timed_allocator("keep")
        options = self.options
        for E in options.experts:
            shared = peers.shared_weights(
                E, options.hidden, options.ffn, torch.bfloat16, "cpu", options.seed
            )
            for k in options.top_k:
                torch.set_num_threads(max(options.threads))
                layers = {name: self.builders[name](shared, k) for name in IMPLEMENTATIONS}
                for layer in layers.values():
                    if layer.module is not None:
                        layer.module.eval()
                for T, threads in itertools.product(options.tokens, options.threads):
                    self._cell(shared, layers, Cell(T, E, k, "uniform", "bf16", False, threads))
                del layers

    def _cell(self, shared: Shared, layers: dict[str, Layer], cell: Cell) -> None:
        options = self.options
        torch.set_num_threads(cell.threads)
        seeds = moe_layer.ROTATION if cell.T <= moe_layer.ROTATED else 1
        batches = [
            moe_layer.batch_of(cell, options.hidden, options.seed + i, "cpu") for i in range(seeds)
        ]
        found = self._checked(shared, layers, batches[0], cell)
        bandwidth = self.probes[cell.threads].bandwidth()["bytes_per_s"]
        calls = {
            name: functools.partial(moe_layer.run_next, layer, itertools.cycle(batches), False)
            for name, layer in layers.items()
        }
        timings = moe_layer.timed(calls, options)
        hit = sum(int((batch.counts_E > 0).sum()) for batch in batches) / len(batches)
        read = hit * 3 * options.hidden * options.ffn * 2
        for name, timing in timings.items():
            cpu, wall = timing.medians()
            self.rows.append(
                {
                    "T": cell.T, "E": cell.E, "k": cell.k, "threads": cell.threads, "impl": name,
                    "seconds": wall, "best_seconds": min(sample[1] for sample in timing.samples),
                    "cpu_seconds": cpu, "samples": len(timing.samples), "distinct_experts": hit,
                    "fraction_of_ceiling": read / wall / bandwidth,
                    "bandwidth_gb_s": bandwidth / 1e9, "load": os.getloadavg()[0], **found[name],
                }
            )  # fmt: skip
        done = f"E {cell.E}, k {cell.k}, T {cell.T}, {cell.threads} threads"
        print(f"{done}: load {os.getloadavg()[0]:.1f}", file=sys.stderr)

    def _checked(
        self, shared: Shared, layers: dict[str, Layer], batch: Batch, cell: Cell
    ) -> dict[str, dict[str, Any]]:
        """How far every output is from the reference, and what A0 drops with capacity 1.0."""
        want = moe_layer.expected(shared, batch, cell, raw=False, backward=False)
        found: dict[str, dict[str, Any]] = {}
        for name, layer in layers.items():
            y = moe_layer.run(layer, batch, False)
            if name == DROPS:
                experts_TK, _ = routed(batch.x.detach(), shared.router, cell.k, raw=False)
                limit = capacity(cell.T, cell.k, cell.E, 1.0)
                dropped = int((slots_of(experts_TK, cell.E) >= limit).sum())
                error = moe_layer.difference([y], [want.y])
                found[name] = {"dropped": dropped / experts_TK.numel(), "difference": error}
            else:
                found[name] = {"difference": moe_layer.check(layer, batch, cell, want, y)["output"]}
        return found


def report(rows: list[dict[str, Any]]) -> None:
    """One table for each thread count and k."""
    cells: dict[tuple[int, int], dict[tuple[int, int], dict[str, dict[str, Any]]]] = {}
    for row in rows:
        table = cells.setdefault((row["threads"], row["k"]), {})
        table.setdefault((row["E"], row["T"]), {})[row["impl"]] = row
    for (threads, k), table in cells.items():
        print(f"\n{threads} threads, top-{k}: milliseconds, median (best)\n")
        print(
            "| E | T | A0 onehot | A0 at capacity 1.0 (drops) | A1 table | A2 growmoe "
            "| transformers | A0/A1 | A1/A2 | transformers/A2 | of ceiling |"
        )
        print("|---" * 11 + "|")
        for (E, T), by in table.items():
            shown = [
                f"{1e3 * by[name]['seconds']:.2f} ({1e3 * by[name]['best_seconds']:.2f})"
                for name in IMPLEMENTATIONS
            ]
            shown[1] += f" ({by[DROPS]['dropped']:.0%})"
            ratios = [
                f"{by[over]['seconds'] / by[under]['seconds']:.1f}"
                for over, under in (
                    ("onehot", "table"), ("table", "growmoe"), ("hf_grouped_mm", "growmoe")
                )
            ]  # fmt: skip
            share = f"{by['growmoe']['fraction_of_ceiling']:.0%}"
            print("| " + " | ".join([str(E), str(T), *shown, *ratios, share]) + " |")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--hidden", type=int, default=1024)
    add("--ffn", type=int, default=2048, help="width of one expert")
    add("--experts", type=int, nargs="+", default=[8, 32, 64, 128])
    add("--top-k", type=int, nargs="+", default=[1, 2])
    add("--tokens", type=int, nargs="+", default=[1, 8, 64, 512])
    add("--threads", type=int, nargs="+", default=[2])
    add("--repeats", type=int, default=20, help="samples, if the time of a cell allows")
    add("--cell-seconds", type=float, default=20.0, help="time budget of a cell")
    add("--sample-ms", type=float, default=20.0, help="shorter passes are repeated in a sample")
    add("--probe-mib", type=int, default=512, help="memory that the bandwidth probe reads")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="JSON file")
    options = parser.parse_args(argv)
    options.device = "cpu"
    if max(options.experts) > options.hidden:
        raise UsageError(
            f"--hidden {options.hidden} must be at least the number of experts, "
            f"{max(options.experts)}: the router reads one logit per value"
        )
    return options


def main() -> int:
    """Run the grid."""
    try:
        options = arguments()
        bench = Bench(options)
        bench.run()
    except GrowmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    chosen = {name: value for name, value in vars(options).items() if name != "out"}
    config = {
        **chosen, "ours": bench.by, "cpu": moe_layer.cpu_name(), "torch": torch.__version__,
        "tolerance": moe_layer.TOLERANCE["bf16"], **environment(),
    }  # fmt: skip
    document = {"benchmark": "baseline", "rows": bench.rows, "config": config}
    report(bench.rows)
    if options.out:
        options.out.write_text(json.dumps(document))
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
