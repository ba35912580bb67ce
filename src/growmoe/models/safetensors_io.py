"""safetensors files, read and written one tensor at a time in ordinary memory.

The library maps a whole file (its pages count against every memory limit) and its writer wants all
tensors of a shard at once; models larger than memory need neither.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from growmoe.errors import GrowmoeError

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
CODES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CODE_OF = {name: code for code, name in CODES.items()}
_LONGEST_HEADER = 100_000_000
FINITE_CHUNK = 1 << 20


class TensorFile:
    """One safetensors file; its header is checked when it is opened.

    Raises GrowmoeError that names the file when the header is damaged or the file is cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._entries, self._start = _read_header(path)
        except FileNotFoundError:
            raise GrowmoeError(f"{path} does not exist, but the index names it") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise GrowmoeError(f"{path} is not a whole safetensors file ({error})") from None

    def names(self) -> list[str]:
        """The tensors of this file."""
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`."""
        return tuple(self._entries[name]["shape"])

    def code(self, name: str) -> str:
        """Dtype as safetensors spells it (F32, BF16, ...)."""
        return self._entries[name]["dtype"]

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own; raises GrowmoeError when it is not finite or the file
        shrank."""
        first, last = self._entries[name]["data_offsets"]
        tensor = torch.empty(self.shape(name), dtype=DTYPES[CODES[self.code(name)]])
        if tensor.numel():
            buffer = tensor.view(-1).view(torch.uint8).numpy().data
            with open(self.path, "rb", buffering=0) as stream:
                stream.seek(self._start + first)
                done = 0
                while done < last - first:
                    got = stream.readinto(buffer[done:])
                    if not got:
                        raise GrowmoeError(f"{self.path} is not a whole safetensors file")
                    done += got
        if not is_finite(tensor):
            raise GrowmoeError(f"{self.path}: tensor {name} holds NaN or infinite values")
        return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, found out in pieces (masks of a whole tensor would
    double the memory)."""
    flat = tensor.reshape(-1)
    return all(bool(torch.isfinite(part).all()) for part in flat.split(FINITE_CHUNK))


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries of a header and where the data begin; raises ValueError and its like."""
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError("the header is cut short")
        entries = json.loads(stream.read(length))
    if not isinstance(entries, dict):
        raise ValueError("the header is not a JSON object")
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        first, last = entry["data_offsets"]
        shape, code = entry["shape"], entry["dtype"]
        if not all(isinstance(side, int) and side >= 0 for side in (*shape, first, last)):
            raise ValueError(f"tensor {name} has an impossible shape or place")
        if code in CODES and last - first != math.prod(shape) * DTYPES[CODES[code]].itemsize:
            raise ValueError(f"tensor {name} does not fill its place")
        if last > size - 8 - length:
            raise ValueError(f"tensor {name} lies beyond the end of the file")
    return entries, 8 + length


def numel(shape: tuple[int, ...]) -> int:
    """Elements of a tensor of this shape."""
    return math.prod(shape)


def write_shard(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: str,
    load: Callable[[str], Tensor],
    on_bytes: Callable[[int], None],
) -> None:
    """Write the tensors of one shard in the order of `shapes`, asking `load` for one at a time.

    The file appears under its name when it is complete and flushed, or not at all. Raises
    GrowmoeError when a tensor has another shape than announced.
    """
    aside = path.with_name(f"{path.name}.partial")
    with open(aside, "wb") as stream:
        _write_header(stream, shapes, dtype)
        for name, shape in shapes.items():
            tensor = load(name)
            if tuple(tensor.shape) != shape:
                raise GrowmoeError(
                    f"tensor {name} came out as {list(tensor.shape)}, not {list(shape)}"
                )
            _write_tensor(stream, tensor, DTYPES[dtype])
            on_bytes(tensor.numel() * DTYPES[dtype].itemsize)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, path)


def shard_bytes(shapes: dict[str, tuple[int, ...]], dtype: str) -> int:
    """Size of the file that `write_shard` makes."""
    data = sum(numel(shape) for shape in shapes.values()) * DTYPES[dtype].itemsize
    return len(_header(shapes, dtype)) + data


def _header(shapes: dict[str, tuple[int, ...]], dtype: str) -> bytes:
    """8 bytes of length, then JSON padded with spaces to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + numel(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": _CODE_OF[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_header(stream: BinaryIO, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    stream.write(_header(shapes, dtype))


def _write_tensor(stream: BinaryIO, tensor: Tensor, dtype: torch.dtype) -> None:
    """Write row-major bytes, converting in pieces."""
    if not tensor.numel():
        return
    for part in tensor.detach().contiguous().view(-1).split(FINITE_CHUNK * 4):
        stream.write(part.to(dtype).view(torch.uint8).numpy().data)
