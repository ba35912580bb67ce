"""Find the best blocks of the expert kernels on this GPU and store them where the kernels look.

For every number of tokens: random tokens and uniform routing, every tile of a grid timed by
Triton's `do_bench` (median, L2 cleared before every run), its result compared with that of the
rule's tile. Tiles that do not compile, do not fit the card or differ are left out. Ends in one JSON
line.

    python benchmarks/tune_moe.py --experts 8 --hidden 1024 --width 2048 --top-k 2
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growmoe.errors import GrowmoeError, UsageError
from growmoe.ops import tuning
from growmoe.ops.tuning import Tile

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}
"""Largest difference from the rule's result over its largest value."""


def grid(kernel: str, rows_per_expert: float) -> Iterator[Tile]:
    """The tiles to try."""
    if kernel.startswith("direct"):
        for cols, inner, warps in itertools.product((1, 2, 4, 8, 16), (256, 512, 1024), (1, 2, 4)):
            yield Tile(1, cols, inner, warps, 2)
        return
    heights = [16, 32, 64, 128]
    enough = next((i for i, rows in enumerate(heights) if rows >= rows_per_expert), 3)
    for rows, cols, inner, warps, stages in itertools.product(
        heights[: enough + 2], (32, 64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4)
    ):
        if rows * cols <= 128 * 256:
            yield Tile(rows, cols, inner, warps, stages)


def inputs(options: argparse.Namespace, T: int, device: str) -> dict[str, Tensor]:
    """Random tokens, weights and choices for one number of tokens."""
    E, D, F, K = options.experts, options.hidden, options.width, options.top_k
    new: Any = {"device": device, "generator": torch.Generator(device).manual_seed(T)}
    dtype = DTYPES[options.dtype]
    chosen_TK = torch.rand(T, E, **new).topk(K, dim=1).indices
    flat_S = chosen_TK.reshape(-1)
    return {
        "x": torch.randn(T, D, **new).to(dtype),
        "up": (torch.randn(E, 2 * F, D, **new) / D**0.5).to(dtype),
        "down": (torch.randn(E, D, F, **new) / F**0.5).to(dtype),
        "weights": torch.rand(T, K, **new),
        "chosen": chosen_TK,
        "order": torch.argsort(flat_S, stable=True),
        "counts": torch.bincount(flat_S, minlength=E),
    }


def calls(t: dict[str, Tensor]) -> dict[str, Callable[[Tile | None], Tensor]]:
    """Per kernel: run it with a tile (None: the rule's) and return what it wrote."""
    from growmoe.ops import triton_direct as direct
    from growmoe.ops import triton_experts as sorted_rows

    (T, K), (_, D, F) = t["weights"].shape, t["down"].shape
    h_SF, y_TD = t["x"].new_empty(T * K, F), t["x"].new_empty(T, D)
    table = (t["order"], t["counts"])
    hidden_SF = torch.randn_like(h_SF)

    def direct_up(tile: Tile | None) -> Tensor:
        direct.direct_up(t["x"], t["chosen"], t["up"], None, h_SF, tile or direct.TILE, True)
        return h_SF

    def direct_down(tile: Tile | None) -> Tensor:
        direct.direct_down(
            hidden_SF, t["chosen"], t["weights"], t["down"], None, y_TD, tile or direct.TILE
        )
        return y_TD

    return {
        "gated": lambda tile: sorted_rows._gated_rows(
            t["x"], *table, t["up"], t["weights"].shape, False, tile
        )[0],
        "rows": lambda tile: sorted_rows._scattered_rows(
            hidden_SF, *table, t["weights"], t["down"], t["weights"], tile
        ),
        "direct_up": direct_up,
        "direct_down": direct_down,
    }


def milliseconds(call: Callable[[], Tensor]) -> float:
    """The median of one call, with a cold cache."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=50, return_mode="median"))


def best(
    call: Callable[[Tile | None], Tensor], tiles: Iterator[Tile], tolerance: float
) -> tuple[Tile | None, float, float]:
    """(the fastest tile, its milliseconds, those of the rule); None where the rule wins."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    want = call(None).float().clone()
    rule = fastest = milliseconds(lambda: call(None))
    found = None
    for tile in tiles:
        try:
            got = call(tile).float()
            if not (got - want).abs().max() <= tolerance * want.abs().max():
                continue
            took = milliseconds(lambda tile=tile: call(tile))  # type: ignore[misc]
        except (OutOfResources, PTXASError, CompilationError):
            continue
        if took < fastest:
            found, fastest = tile, took
    return found, fastest, rule


def tune(options: argparse.Namespace, device: str = "cuda") -> dict[str, dict[int, Tile]]:
    """The best tile per kernel and number of rows, printed as they are found."""
    from growmoe.ops.triton_direct import few_rows

    found: dict[str, dict[int, Tile]] = {kernel: {} for kernel in tuning.KERNELS}
    for T in options.tokens:
        rows = T * options.top_k
        for kernel, call in calls(inputs(options, T, device)).items():
            if kernel.startswith("direct") != few_rows(T, options.top_k, options.experts):
                continue
            tiles = grid(kernel, rows / options.experts)
            tile, took, rule = best(call, tiles, TOLERANCE[options.dtype])
            print(f"T={T:5} {kernel:12} {took * 1e3:9.1f} us, rule {rule * 1e3:9.1f} us, {tile}")
            if tile is not None:
                found[kernel][rows] = tile
    return {kernel: tiles for kernel, tiles in found.items() if tiles}


def main() -> None:
    """Parse, search, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("experts", "hidden", "width", "top-k"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--out", type=Path, default=tuning.FOLDER, help="folder of tuned files")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise UsageError("tuning measures a GPU and there is none: run it where CUDA is available")
    if not 1 <= options.top_k <= options.experts:
        raise UsageError(f"--top-k {options.top_k} must lie between 1 and --experts")
    tiles = tune(options)
    if not tiles:
        raise GrowmoeError("no tile was faster than the rule's: there is nothing to write")
    sizes = (options.experts, options.hidden, options.width)
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name()
    path = tuning.write(options.out, sizes, options.dtype, device, tiles)
    print(json.dumps(summary(path, tiles)))


def summary(path: Path, tiles: dict[str, dict[int, Tile]]) -> dict[str, Any]:
    """What was written and for how many rows."""
    rows = {kernel: sorted(found) for kernel, found in tiles.items()}
    return {"file": str(path), "device": torch.cuda.get_device_name(), "rows": rows}


if __name__ == "__main__":
    try:
        main()
    except GrowmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
