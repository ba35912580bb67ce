"""Blocks of the Triton kernels that were found by measuring: one JSON file per size and device.

`benchmarks/tune_moe.py` writes a file, `tuned_tile` reads it. A file counts only on the device, for
the dtype and the minor version of Triton that it names; elsewhere the kernels follow their rule.
Letters: E experts, D hidden, F expert width, rows = tokens times experts per token.
"""

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from growmoe.errors import GrowmoeError

FOLDER = Path(__file__).parent / "tuned"
KERNELS = ("gated", "rows", "direct_up", "direct_down")
Sizes = tuple[int, int, int]
Tiles = dict[str, dict[int, "Tile"]]


@dataclass(frozen=True)
class Tile:
    """A program's tile: rows x cols of output, `inner` of the summed axis per step."""

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int

    def shared_bytes(self, itemsize: int, operands: int) -> int:
        """Shared memory of the pipeline: a left tile and `operands` right tiles per stage."""
        return self.stages * itemsize * self.inner * (self.rows + operands * self.cols)


def file_name(sizes: Sizes, dtype: str, device: str) -> str:
    """The file of experts of these sizes (E, D, F)."""
    E, D, F = sizes
    return f"E={E},D={D},F={F},{dtype},{re.sub(r'[^A-Za-z0-9]+', '_', device)}.json"


def write(
    folder: Path, sizes: Sizes, dtype: str, device: str, tiles: Mapping[str, Mapping[int, Tile]]
) -> Path:
    """Store the best tile per kernel and number of rows."""
    E, D, F = sizes
    body = {
        "device": device, "dtype": dtype, "triton": _triton_version(),
        "experts": E, "hidden": D, "width": F,
        "tiles": {
            kernel: {str(rows): asdict(tile) for rows, tile in sorted(found.items())}
            for kernel, found in tiles.items()
        },
    }  # fmt: skip
    path = folder / file_name(sizes, dtype, device)
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return path


def tuned_tile(
    kernel: str, device: torch.device, dtype: torch.dtype, sizes: Sizes, rows: int
) -> Tile | None:
    """The tile measured at the number of rows nearest to `rows` (by ratio), if there is one."""
    name = str(dtype).removeprefix("torch.")
    found = _read(FOLDER, sizes, name, _device_name(device)).get(kernel)
    if not found:
        return None
    return found[min(found, key=lambda bucket: abs(math.log(bucket / max(1, rows))))]


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def _read(folder: Path, sizes: Sizes, dtype: str, device: str) -> Tiles:
    """Nothing where there is no file, or one of another version of Triton."""
    path = folder / file_name(sizes, dtype, device)
    if not path.exists():
        return {}
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if _minor(body["triton"]) != _minor(_triton_version()):
            return {}
        return {
            kernel: {int(rows): _tile(kernel, tile) for rows, tile in found.items()}
            for kernel, found in body["tiles"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GrowmoeError(
            f"{path} does not hold tuned blocks ({error}); delete it or make it again with "
            "benchmarks/tune_moe.py"
        ) from error


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _tile(kernel: str, fields: dict[str, int]) -> Tile:
    tile = Tile(**fields)
    least = 1 if kernel.startswith("direct") else 16  # tensor cores want 16 of everything
    blocks = (tile.rows, tile.cols, tile.inner)
    if kernel not in KERNELS or any(size < least or size & (size - 1) for size in blocks):
        raise ValueError(f"no tile of kernel {kernel!r}: {fields}")
    if tile.warps not in (1, 2, 4, 8, 16) or tile.stages < 1:
        raise ValueError(f"impossible warps or stages of kernel {kernel!r}: {fields}")
    return tile
