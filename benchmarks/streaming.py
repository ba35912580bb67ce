"""Grow and upcycle a checkpoint larger than the memory the process may have.

Writes a 16-layer synthetic bfloat16 checkpoint, then runs `growmoe grow` and `growmoe upcycle` on
it in processes with a limit on their address space (RLIMIT_AS, as `ulimit -v` sets it), and reports
their peak resident memory against 2.5 x the largest tensor + 300 MB. Ends in one JSON line.

    python benchmarks/streaming.py /some/folder [--gigabytes 3.5] [--limit-gb 1.5]
"""

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from growmoe.models.checkpoint import write_model
from growmoe.models.config import ModelConfig, tensor_shapes
from growmoe.planning.derived import config_of


def synthetic(folder: Path, gigabytes: float) -> ModelConfig:
    """A random llama of about `gigabytes` in bfloat16, with sizes scaled from 2560/9728."""
    scale = math.sqrt(gigabytes / 3.55)
    hidden = max(128, round(2560 * scale / 128) * 128)
    config = ModelConfig(
        vocab_size=max(256, round(64000 * scale)), hidden_size=hidden, num_layers=16,
        num_heads=hidden // 128, num_kv_heads=1, head_dim=128, ffn_size=hidden * 19 // 5,
        family="llama",
    )  # fmt: skip
    shapes = tensor_shapes(config)
    rng = torch.Generator().manual_seed(0)

    def load(name: str) -> torch.Tensor:
        tensor = torch.empty(shapes[name], dtype=torch.bfloat16)
        for part in tensor.view(-1).split(1 << 20):
            part.copy_(torch.randn(part.shape, generator=rng) * 0.02)
        return tensor + 1 if "norm" in name else tensor

    folder.mkdir(parents=True)
    write_model(folder, config, load, "bfloat16", shard_limit=2**30)
    return config


def limited(arguments: list[str], limit: int) -> tuple[float, int]:
    """Run growmoe with an address space of `limit` bytes; returns (seconds, peak bytes)."""

    def confine() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "growmoe", *arguments], preexec_fn=confine, env=environment,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"growmoe {' '.join(arguments)} failed under the limit")
    return time.monotonic() - started, usage.ru_maxrss * 1024


def main() -> None:
    """Make, grow, upcycle, compare peaks, clean up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=3.5)
    parser.add_argument("--limit-gb", type=float, default=1.5)
    options = parser.parse_args()
    work = options.folder / "streaming"
    config = synthetic(work / "source", options.gigabytes)
    wide = str(-(-config.hidden_size * 6 // 5 // 128) * 128)
    runs = {
        "grow": ["grow", "--hidden", wide, "--ffn", str(config.ffn_size + 512), "--layers", "18"],
        "aki": ["grow", "--hidden", wide, "--method", "aki"],
        "upcycle": ["upcycle", "--experts", "4"],
        "drop-upcycle": ["upcycle", "--experts", "2", "--expert-init", "drop"],
    }
    rows = []
    print(
        f"{'run':<14}{'source':>9}{'output':>9}{'largest':>9}{'peak':>9}{'allowed':>9}{'time':>8}"
    )
    for name, (verb, *rest) in runs.items():
        out = work / name
        fixed = [verb, str(work / "source"), str(out), "--no-verify", "--shard-gb", "1"]
        seconds, peak = limited([*fixed, *rest], int(options.limit_gb * 2**30))
        result = config_of(out)
        shapes = [*tensor_shapes(config).values(), *tensor_shapes(result).values()]
        largest = 2 * max(math.prod(shape) for shape in shapes)
        row = {
            "run": name, "source_mb": config.bytes() / 1e6, "output_mb": result.bytes() / 1e6,
            "largest_tensor_mb": largest / 1e6, "peak_mb": peak / 1e6,
            "allowed_mb": 2.5 * largest / 1e6 + 300, "limit_mb": options.limit_gb * 2**30 / 1e6,
            "seconds": round(seconds, 1),
        }  # fmt: skip
        rows.append(row)
        shown = [row[key] for key in list(row)[1:6]]
        print(f"{name:<14}" + "".join(f"{value:>9.0f}" for value in shown) + f"{seconds:>7.0f}s")
        shutil.rmtree(out)
    shutil.rmtree(work)
    print(json.dumps({"benchmark": "streaming", "rows": rows}))


if __name__ == "__main__":
    main()
