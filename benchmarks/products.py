"""The three products of a linear layer on a CPU: torch's own `mm` against ours, side by side.

    python benchmarks/products.py [--rows 1 2 4 8 64 1024] [--threads 1] [--dtype fp32]

The weight is one of many that are used in turn, so that it comes from memory. CPU time, least of
several passes, interleaved. Prints a Markdown table and ends in one JSON line.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from growmoe.ops.products import onednn, outer, times, times_transposed
from growmoe.training.memory import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRODUCTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    # name: (torch's, ours), of x [S,D], y [S,F], w [F,D], g [F,D]
    "x w^T": (lambda x, y, w, g: torch.mm(x, w.t()), lambda x, y, w, g: times_transposed(x, w)),
    "y w": (lambda x, y, w, g: torch.mm(y, w), lambda x, y, w, g: times(y, w)),
    "y^T x": (lambda x, y, w, g: torch.mm(y.t(), x, out=g), lambda x, y, w, g: outer(y, x, g)),
}


def seconds(call: Callable[..., Any], x: Tensor, y: Tensor, weights: Tensor, out: Tensor) -> float:
    """CPU time of one product, over all weights in turn."""
    begun = time.process_time()
    for w, g in zip(weights, out):
        call(x, y, w, g)
    return (time.process_time() - begun) / len(weights)


def measured(rows: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per product."""
    dtype, D, width = DTYPES[options.dtype], options.hidden, options.ffn
    x, y = torch.randn(rows, D).to(dtype), torch.randn(rows, width).to(dtype)
    weights = torch.randn(options.weights, width, D).to(dtype)
    out = torch.empty_like(weights)
    found = []
    for name, pair in PRODUCTS.items():
        best = [float("inf")] * 2
        for _ in range(options.repeats + 1):
            for which, call in enumerate(pair):
                best[which] = min(best[which], seconds(call, x, y, weights, out))
        flops = 2 * rows * D * width
        found.append(
            {
                "rows": rows, "product": name, "seconds_torch": best[0], "seconds": best[1],
                "gflops_torch": flops / best[0] / 1e9, "gflops": flops / best[1] / 1e9,
            }
        )  # fmt: skip
    return found


def main() -> None:
    """Measure every number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 64, 1024])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=2048)
    parser.add_argument("--weights", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    found = [row for rows in options.rows for row in measured(rows, options)]
    print("| rows | product | torch, ms | ours, ms | torch, GFLOP/s | ours, GFLOP/s |")
    print("|---|---|---|---|---|---|")
    for row in found:
        numbers = [1e3 * row["seconds_torch"], 1e3 * row["seconds"]]
        cells = [f"{n:.3f}" for n in numbers] + [
            f"{row[k]:.0f}" for k in ("gflops_torch", "gflops")
        ]
        print(f"| {row['rows']} | {row['product']} | " + " | ".join(cells) + " |")
    config = vars(options) | {
        "torch": torch.__version__, "machine": platform.machine(), "onednn": onednn()
    }  # fmt: skip
    print(json.dumps({"benchmark": "products", "config": config, "rows": found}))


if __name__ == "__main__":
    main()
