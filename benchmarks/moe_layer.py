"""One MoE layer, every implementation side by side: same weights, same tokens, equal outputs.

Compares ours with transformers' (eager, grouped_mm), DeepSpeed's MoE layer without drops (when
installed), ScatterMoE, MegaBlocks and torch's grouped_mm (on a GPU), with two baselines (`table`:
the mapping table and a plain loop over experts; `onehot`: GShard's einsum with a capacity that
drops nothing) and with the limit `dense`, one SwiGLU MLP of width k*F: the same FLOPs without
routing. Before a
cell is timed, outputs, and in float32 gradients, are compared; a difference ends the run with
exit code 1.

`seconds` is CPU time (all threads together) and `wall_seconds` the clock; on a GPU both come from
the device. Forward runs without gradients. Samples go round robin over the implementations, to
and fro, so that a neighbour's load meets all of them. One sample runs for at least 20 ms. At
small T every call takes other tokens than the call before, so that the weights of the chosen
experts come from memory, as they do in a model, and not from the cache.
Peak memory is what one pass at one thread adds to what was resident before, with gradients.

    python benchmarks/moe_layer.py --out runs/moe_layer.json [--resume]
    python benchmarks/moe_layer.py --quick
    python benchmarks/moe_layer.py --tokens 1 --experts 128 --dtype bf16 --impl growmoe table dense

Prints tables and ends in one JSON line.
"""

import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import moe_peers as peers
from growmoe.errors import GrowmoeError, UsageError
from growmoe.training.memory import keep_freed_memory
from moe_peers import Layer, Shared
from moe_report import report

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest difference over the largest value of the reference, which computes in the same dtype."""
ZIPF = 1.2
TIMED_MMAP, MEASURED_MMAP = 32 << 20, 128 << 10
"""Bytes from which glibc maps a block: where its default ends up in a long run; and small while
peak memory is measured, so that it is the memory of live tensors."""
MMAP_MAX = 65536  # glibc's default: blocks that may be mapped
ROTATED, ROTATION = 16, 16
"""Up to which T the tokens change from call to call, and how many sets there are."""
KEY = ("T", "E", "k", "routing", "dtype", "pass", "threads")


class Cell(NamedTuple):
    """What a row of the tables is about; `backward` and `threads` pick the table."""

    T: int
    E: int
    k: int
    routing: str
    dtype: str
    backward: bool
    threads: int

    def key(self) -> tuple[Any, ...]:
        """As the fields KEY of a row."""
        pass_name = "forward+backward" if self.backward else "forward"
        return (self.T, self.E, self.k, self.routing, self.dtype, pass_name, self.threads)


@dataclass
class Batch:
    """Tokens whose first E values are their router logits, and the gradient of the output."""

    x: Tensor
    grad: Tensor
    counts_E: Tensor

    @property
    def imbalance(self) -> float:
        """Largest load over the mean load."""
        return float(self.counts_E.max() / self.counts_E.double().mean())


def experts_of(T: int, E: int, k: int, routing: str, generator: torch.Generator) -> Tensor:
    """experts_TK: k distinct experts per token, uniform, or drawn with p ~ 1/rank^1.2."""
    gumbel_TE = -torch.log(torch.empty(T, E).exponential_(generator=generator))
    if routing == "zipf":
        ranks_E = torch.randperm(E, generator=generator) + 1
        gumbel_TE = gumbel_TE - ZIPF * ranks_E.log()
    return gumbel_TE.topk(k, dim=1).indices


def batch_of(cell: Cell, D: int, seed: int, device: str) -> Batch:
    """The same for every pass, thread count and dtype (up to rounding)."""
    name = f"{seed} {cell.T} {cell.E} {cell.k} {cell.routing}"
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    experts_TK = experts_of(cell.T, cell.E, cell.k, cell.routing, generator)
    x_TD = torch.randn(cell.T, D, generator=generator)
    # chosen experts get distinct logits in (2, 3], every other one at most 1; times ROUTER_SCALE
    spread_T1 = 0.5 + 0.5 * torch.rand(cell.T, 1, generator=generator)
    chosen_TK = 3 - spread_T1 * torch.arange(cell.k) / max(8, cell.k)
    logits_TE = x_TD[:, : cell.E].clamp(max=1.0).scatter(1, experts_TK, chosen_TK)
    x_TD[:, : cell.E] = logits_TE
    grad_TD = torch.randn(cell.T, D, generator=generator)
    to = {"dtype": DTYPES[cell.dtype], "device": device}
    counts_E = torch.bincount(experts_TK.reshape(-1), minlength=cell.E)
    return Batch(x_TD.to(**to).requires_grad_(), grad_TD.to(**to), counts_E)


def run(layer: Layer, batch: Batch, backward: bool) -> Tensor:
    """One pass; gradients of an earlier one are let go first."""
    if not backward:
        with torch.no_grad():
            return layer.forward(batch.x)
    release(layer, batch)
    y = layer.forward(batch.x)
    y.backward(batch.grad)
    return y.detach()


def run_next(layer: Layer, turn: Iterator[Batch], backward: bool) -> Tensor:
    """One pass on other tokens than the one before."""
    return run(layer, next(turn), backward)


def release(layer: Layer, batch: Batch) -> None:
    """Let gradients go."""
    batch.x.grad = None
    for parameter in layer.parameters:
        parameter.grad = None


# ---- equal outputs, peak memory ----


def difference(
    got: Sequence[Tensor | None], want: Sequence[Tensor | None], scale: float = 0.0
) -> float:
    """Largest |got - want| over the largest |want| (at least `scale`); inf if one is missing."""
    if len(got) != len(want) or any(tensor is None for tensor in (*got, *want)):
        return float("inf")
    largest = max(scale, *(float(b.abs().max()) for b in want if b is not None))
    gaps = [float((a.float() - b.float()).abs().max()) for a, b in zip(got, want)]  # type: ignore
    return float("inf") if any(gap != gap for gap in gaps) else max(gaps) / max(largest, 1e-30)


def gradients(layer: Layer, batch: Batch) -> peers.Gradients:
    """Of x and of all weights."""
    return {"x": [batch.x.grad], **layer.gradients()}


@dataclass
class Expected:
    """Output and gradients by the definition."""

    y: Tensor
    gradients: peers.Gradients
    router_scale: float
    """Size of a router gradient before its parts cancel (with k = 1 all of it does)."""


def expected(shared: Shared, batch: Batch, cell: Cell, raw: bool, backward: bool) -> Expected:
    """From the mapping table and a plain loop."""
    layer = peers.reference(shared, cell.k, raw)
    y = run(layer, batch, backward)
    found = gradients(layer, batch) if backward else {}
    scale = float((y.float() * batch.grad.float()).sum(-1).abs().max())
    release(layer, batch)
    return Expected(y, found, scale)


def check(layer: Layer, batch: Batch, cell: Cell, want: Expected, y: Tensor) -> dict[str, float]:
    """Differences from the reference; raises if one is too large."""
    found = {"output": difference([y], [want.y])}
    if cell.backward and cell.dtype == "fp32":
        for name, got in gradients(layer, batch).items():
            scale = want.router_scale if name == "router" else 0.0
            found[name] = difference(got, want.gradients[name], scale)
    for name, error in found.items():
        if not error <= TOLERANCE[cell.dtype]:
            place = ", ".join(f"{key} {value}" for key, value in zip(KEY, cell.key()))
            raise GrowmoeError(
                f"{layer.name} differs from the reference in {place}: {name} by {error:.2e} of "
                f"the largest value, more than {TOLERANCE[cell.dtype]:.0e}"
            )
    return found


def timed_allocator(kind: str) -> None:
    """`keep`: freed memory is reused, as in `growmoe train`; `default`: as glibc left alone."""
    if kind == "default" or not keep_freed_memory():
        mmap_above(TIMED_MMAP)


def mmap_above(size: int) -> None:
    """glibc gives blocks from `size` bytes on back when they are freed; smaller ones it keeps and
    reuses in ways that depend on what ran before."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, MMAP_MAX)
        libc.mallopt(-3, size)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2 * size)  # M_TRIM_THRESHOLD


def resident_kb(field: str) -> int:
    """A field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(field)


def with_peak(
    call: Callable[[], Tensor], release: Callable[[], None], device: str, allocator: str
) -> tuple[Tensor, float | None]:
    """The call's result, and the MB that it needed at its peak beside what was there before. It is
    the second call: the first one also fills the libraries' own caches, once for all layers."""
    call()
    release()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = call()
        torch.cuda.synchronize()
        return y, (torch.cuda.max_memory_allocated() - before) / 1e6
    mmap_above(MEASURED_MMAP)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = resident_kb("VmRSS")
        y = call()
        return y, (resident_kb("VmHWM") - before) * 1024 / 1e6
    except (OSError, AttributeError):  # not Linux
        return call(), None
    finally:
        timed_allocator(allocator)


# ---- time ----


@dataclass
class Timing:
    """Samples of one implementation: (seconds, wall seconds) of one pass."""

    inner: int = 1
    rounds: int = 0
    samples: list[tuple[float, float]] = None  # type: ignore[assignment]

    def medians(self) -> tuple[float, float]:
        """Of seconds and of wall seconds."""
        own, wall = zip(*self.samples)
        return statistics.median(own), statistics.median(wall)


def sample(call: Callable[[], Any], inner: int, device: str) -> tuple[float, float]:
    """Seconds of one call: (CPU time, wall time), or twice the device's time. Short calls start
    with what the caches hold after their own, not after another implementation's."""
    for _ in range(min(inner - 1, 3)):
        call()
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(inner):
            call()
        end.record()
        end.synchronize()
        return (begin.elapsed_time(end) / 1e3 / inner,) * 2
    wall, own = time.perf_counter(), time.process_time()
    for _ in range(inner):
        call()
    return (time.process_time() - own) / inner, (time.perf_counter() - wall) / inner


def timed(calls: dict[str, Callable[[], Any]], options: argparse.Namespace) -> dict[str, Timing]:
    """Interleaved samples; who is slow gets fewer of them, and one only if it alone takes the
    whole budget of the cell."""
    budget, device, shortest = options.cell_seconds, options.device, options.sample_ms / 1e3
    timings = {}
    for name, call in calls.items():
        timing = timings[name] = Timing(samples=[])
        own, wall = first = sample(call, 1, device)
        if wall > budget:
            timing.samples.append(first)
            continue
        if own < shortest:
            own, wall = sample(call, 1, device)
            timing.inner = max(1, min(1000, math.ceil(shortest / max(own, 1e-6))))
        share = budget / len(calls) / max(wall * timing.inner, 1e-6)
        timing.rounds = max(2, min(options.repeats, int(share)))
    for number in range(options.repeats):
        for name in list(timings) if number % 2 == 0 else reversed(timings):
            timing = timings[name]
            if number < timing.rounds:
                timing.samples.append(sample(calls[name], timing.inner, device))
    return timings


# ---- the grid ----


def grid(options: argparse.Namespace) -> list[Cell]:
    """All cells, those that share weights and tokens beside each other."""
    axes = itertools.product(
        options.experts, options.dtype, options.top_k, options.tokens, options.routing,
        [name != "forward" for name in options.passes], options.threads,
    )  # fmt: skip
    return [
        Cell(T, E, k, routing, dtype, backward, threads)
        for E, dtype, k, T, routing, backward, threads in axes
        if k <= E
    ]


def expected_seconds(cell: Cell, options: argparse.Namespace) -> float:
    """A rough guess for the ETA."""
    speed = 5e10 if cell.dtype == "fp32" else 2e11
    once = cell.T * cell.k * 6 * options.hidden * options.ffn / speed
    if cell.backward:
        moved = 12 * cell.E * options.hidden * options.ffn * DTYPES[cell.dtype].itemsize
        once = 3 * once + moved / 5e9
    one = max(2e-3 * options.sample_ms, once) * (options.repeats + 1)
    return min(one * len(options.impl), options.cell_seconds + 2 * once * len(options.impl))


class Bench:
    """Rows so far, and how to make more."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.document: dict[str, Any] = {
            "benchmark": "moe_layer", "config": configuration(options), "rows": [],
        }  # fmt: skip
        if options.resume and options.out and options.out.exists():
            self._resume(json.loads(options.out.read_text()))
        self.cells = grid(options)
        done = {tuple(row[field] for field in KEY) for row in self.rows}
        self.left = [cell for cell in self.cells if cell.key() not in done]
        self.begun, self.guessed = time.perf_counter(), 0.0

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One for each cell and implementation."""
        return self.document["rows"]

    def _resume(self, earlier: dict[str, Any]) -> None:
        mine, theirs = self.document["config"], earlier["config"]
        for field in (
            "hidden",
            "ffn",
            "seed",
            "device",
            "impl",
            "versions",
            "environment",
            "commit",
            "cpu",
        ):
            if mine[field] != theirs[field]:
                raise UsageError(
                    f"{self.options.out} cannot be continued: its {field} was {theirs[field]}, "
                    f"now it is {mine[field]}"
                )
        self.document["rows"] = earlier["rows"]

    def run(self) -> None:
        """Every cell that is left; weights are made once for E and dtype, layers once for k."""
        warm_up(self.options)
        by_weights = itertools.groupby(self.left, lambda cell: (cell.E, cell.dtype))
        for (E, dtype), of_weights in by_weights:
            options = self.options
            shared = peers.shared_weights(
                E, options.hidden, options.ffn, DTYPES[dtype], options.device, options.seed
            )
            for k, of_k in itertools.groupby(of_weights, lambda cell: cell.k):
                layers = {name: peers.BUILDERS[name](shared, k) for name in options.impl}
                for _, group in itertools.groupby(of_k, lambda cell: cell[:5]):
                    self._group(shared, layers, list(group))
            del shared, layers

    def _group(self, shared: Shared, layers: dict[str, Layer], cells: list[Cell]) -> None:
        """Cells that share their tokens: check every pass, then time."""
        options = self.options
        batch = batch_of(cells[0], options.hidden, options.seed, options.device)
        for _, of_pass in itertools.groupby(cells, lambda cell: cell.backward):
            timed_cells = list(of_pass)
            rows = self._checked(shared, layers, batch, timed_cells[0])
            for cell in timed_cells:
                able = {name: layers[name] for name, row in rows.items() if "skipped" not in row}
                self._timed(cell, able, batch, rows)

    def _checked(
        self, shared: Shared, layers: dict[str, Layer], batch: Batch, cell: Cell
    ) -> dict[str, dict[str, Any]]:
        """The beginnings of rows: differences and peak memory, or why it is skipped."""
        rows: dict[str, dict[str, Any]] = {name: {"impl": name} for name in layers}
        capacity, limit = int(batch.counts_E.max()), self.options.memory_gb * 1e9
        torch.set_num_threads(1)
        for raw in (False, True):
            want = None
            for name, layer in layers.items():
                reason = peers.refuses(name, shared, cell.T, capacity, cell.backward, limit)
                if reason:
                    rows[name]["skipped"] = reason
                if reason or layer.raw != raw:
                    continue
                if layer.module is not None:
                    layer.module.train(cell.backward)
                want = want or expected(shared, batch, cell, raw, cell.backward)
                once = functools.partial(run, layer, batch, cell.backward)
                let_go = functools.partial(release, layer, batch)
                y, peak = with_peak(once, let_go, self.options.device, self.options.allocator)
                if not name.startswith("dense"):
                    rows[name]["difference"] = check(layer, batch, cell, want, y)
                    rows[name]["weights"] = "raw" if raw else "renormalised"
                rows[name]["peak_mb"] = peak
                release(layer, batch)
        return rows

    def _timed(
        self, cell: Cell, layers: dict[str, Layer], batch: Batch, rows: dict[str, dict[str, Any]]
    ) -> None:
        """One cell; its rows are kept, written and announced."""
        torch.set_num_threads(cell.threads)
        options, batches = self.options, [batch]
        if cell.T <= ROTATED:
            D, seeds = options.hidden, range(options.seed + 1, options.seed + ROTATION)
            batches += [batch_of(cell, D, seed, options.device) for seed in seeds]
        calls = {
            name: functools.partial(run_next, layer, itertools.cycle(batches), cell.backward)
            for name, layer in layers.items()
        }
        timings = {} if options.memory_only else timed(calls, options)
        for layer in layers.values():
            release(layer, batch)
        medians = {name: timing.medians() for name, timing in timings.items()}
        shown = dict(zip(KEY, cell.key())) | {"load_max_over_mean": batch.imbalance}
        for name, begun in rows.items():
            row = {**shown, **begun, "seconds": None, "ratio_to_dense": None}
            if name in medians:
                row["seconds"], row["wall_seconds"] = medians[name]
                row["n"], row["inner"] = len(timings[name].samples), timings[name].inner
                if "dense" in medians:
                    own, wall = (
                        mine / limit for mine, limit in zip(medians[name], medians["dense"])
                    )
                    row["ratio_to_dense"], row["wall_ratio_to_dense"] = own, wall
            row["load_average"] = os.getloadavg()[0]
            self.rows.append(row)
        self._kept(cell)

    def _kept(self, cell: Cell) -> None:
        """Write the document, say how far it is."""
        self.document["config"]["load_average_end"] = os.getloadavg()
        if self.options.out:
            beside = self.options.out.with_name(self.options.out.name + ".tmp")
            beside.write_text(json.dumps(self.document))
            beside.replace(self.options.out)
        self.left = self.left[1:]
        self.guessed += expected_seconds(cell, self.options)
        to_come = sum(expected_seconds(later, self.options) for later in self.left)
        eta = (time.perf_counter() - self.begun) / self.guessed * to_come / 60
        place = " ".join(f"{field}={value}" for field, value in zip(KEY, cell.key()))
        number = len(self.cells) - len(self.left)
        print(f"[{number}/{len(self.cells)}] {place}  ETA {eta:.0f} min", file=sys.stderr)


def warm_up(options: argparse.Namespace) -> None:
    """Imports and first-call costs, outside of every measurement."""
    timed_allocator(options.allocator)
    for dtype in options.dtype:
        shared = peers.shared_weights(8, 64, 64, DTYPES[dtype], options.device, 0)
        batch = batch_of(Cell(64, 8, 2, "uniform", dtype, True, 1), 64, 0, options.device)
        for name in options.impl:
            if peers.refuses(name, shared, 64, 64, True, 1e9):
                continue
            layer = peers.BUILDERS[name](shared, 2)
            run(layer, batch, True)
            run(layer, batch, False)


# ---- command line ----


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that a number depends on."""
    versions = {}
    for package in ("torch", "transformers", "deepspeed", "triton", "scattermoe", "megablocks"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    root = Path(__file__).resolve().parent
    git = ["git", "-C", str(root)]
    told = [
        subprocess.run([*git, *command], capture_output=True, text=True).stdout.strip()
        for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
    ]
    allocator = {
        key: value for key, value in os.environ.items()
        if key.startswith(("MALLOC_", "THP_MEM", "OMP_", "KMP_", "LD_PRELOAD"))
    }  # fmt: skip
    return {
        **{key: value for key, value in vars(options).items() if key not in ("out", "resume")},
        "versions": versions, "environment": allocator, "cpu": cpu_name(), "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "zipf": ZIPF, "router_scale": peers.ROUTER_SCALE, "tolerance": TOLERANCE,
        "commit": told[0] + ("+changes" if told[1] else ""), "load_average": os.getloadavg(),
    }  # fmt: skip


def cpu_name() -> str:
    """As Linux knows it, or as Python does."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; raises UsageError for impossible ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--hidden", type=int, default=512)
    add("--ffn", type=int, default=1024, help="width of one expert")
    add("--tokens", type=int, nargs="+", default=[1, 16, 256, 4096])
    add("--experts", type=int, nargs="+", default=[8, 64, 128])
    add("--top-k", type=int, nargs="+", default=[1, 2, 8])
    add("--routing", nargs="+", choices=("uniform", "zipf"), default=["uniform", "zipf"])
    add("--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    passes = ("forward", "forward+backward")
    add("--pass", dest="passes", nargs="+", choices=passes, default=list(passes))
    add("--threads", type=int, nargs="+", default=None, help="default: 1 2, on a GPU 1")
    add("--impl", nargs="+", choices=tuple(peers.BUILDERS), default=None, help="default: all")
    add("--repeats", type=int, default=5, help="samples; their median is reported")
    add("--cell-seconds", type=float, default=20.0, help="time budget of a cell")
    add("--sample-ms", type=float, default=20.0, help="shorter passes are repeated in a sample")
    add("--memory-gb", type=float, default=4.0, help="padded implementations may need this much")
    kinds = ("keep", "default")
    add("--allocator", choices=kinds, default="keep", help="see growmoe.training.memory")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=None, help="JSON, written after every cell")
    add("--resume", action="store_true", help="continue what --out holds")
    add("--memory-only", action="store_true", help="equal outputs and peak memory, no timing")
    add("--quick", action="store_true", help="a small grid, to see that it works")
    options = parser.parse_args(argv)
    options.threads = options.threads or ([1, 2] if options.device == "cpu" else [1])
    if options.quick:
        options.tokens, options.experts, options.top_k = [1, 64], [8], [2]
        options.repeats, options.threads = 2, [1]
    if max(options.experts) > options.hidden:
        raise UsageError(
            f"--hidden {options.hidden} must be at least the number of experts, "
            f"{max(options.experts)}: the router reads one logit per value"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU")
    reasons = {name: peers.unavailable(name, options.device) for name in peers.BUILDERS}
    for name in options.impl or []:
        if reasons[name] and name != "torch_grouped_mm":
            raise UsageError(f"--impl {name}: {reasons[name]}")
    options.left_out = {} if options.impl else {name: why for name, why in reasons.items() if why}
    options.impl = options.impl or [name for name in peers.BUILDERS if not reasons[name]]
    return options


def main() -> int:
    """Run the grid; tables and the JSON line go to stdout."""
    try:
        options = arguments()
        bench = Bench(options)
        bench.run()
    except GrowmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    report(bench.document)
    print(json.dumps(bench.document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
