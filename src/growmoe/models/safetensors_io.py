"""safetensors files, read and written one tensor at a time.

The library maps a whole file (its pages count against every memory limit) and its writer wants all
tensors of a shard at once; models larger than memory need neither.
"""

import json
import math
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from growmoe.errors import GrowmoeError
from growmoe.models.safetensors_header import CODES, INTEGER_CODES, Stored, read_header

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_INTEGERS = {"int32": torch.int32, "int64": torch.int64}
_WORTH_MAPPING = 1 << 16
_CODE_OF = {name: code for code, name in (CODES | INTEGER_CODES).items()}
_CHUNK = 1 << 22
"""Elements that are converted at a time when writing."""


class TensorFile:
    """One safetensors file; its header is checked when it is opened.

    With `mapped`, large tensors are private pages of the file that go when the tensor does: nothing
    is copied on the way into a model. For passing through only: whoever cuts the file short while a
    tensor of it lives kills the process at the next touch (SIGBUS), so nothing that stays may point
    into it. Raises GrowmoeError that names the file when the header is damaged or the file is cut
    short.
    """

    def __init__(self, path: Path, mapped: bool = False) -> None:
        self.path, self.mapped = path, mapped
        self._entries, self._start = read_header(path)

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
        """The tensor, in memory of its own unless mapped; raises GrowmoeError when its dtype is
        not known, when it is not finite, or when the file shrank."""
        known = (CODES | INTEGER_CODES).get(self.code(name))
        if known is None:
            raise GrowmoeError(
                f"{self.path}: tensor {name} has dtype {self.code(name)}; "
                f"known are {', '.join(CODES)}"
            )
        dtype = (DTYPES | _INTEGERS)[known]
        first, last = (self._start + place for place in self._entries[name]["data_offsets"])
        # torch wants aligned elements
        plain = not self.mapped or last - first < _WORTH_MAPPING or first % dtype.itemsize
        tensor = (self._read if plain else self._map)(self.shape(name), dtype, first, last)
        if dtype.is_floating_point and not is_finite(tensor):
            raise GrowmoeError(f"{self.path}: tensor {name} holds NaN or infinite values")
        return tensor

    def _read(self, shape: tuple[int, ...], dtype: torch.dtype, first: int, last: int) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            buffer = tensor.view(-1).view(torch.uint8).numpy().data
            with open(self.path, "rb", buffering=0) as stream:
                stream.seek(first)
                done = 0
                while done < last - first:
                    got = stream.readinto(buffer[done:])
                    if not got:
                        raise GrowmoeError(f"{self.path} is not a whole safetensors file")
                    done += got
        return tensor

    def _map(self, shape: tuple[int, ...], dtype: torch.dtype, first: int, last: int) -> Tensor:
        before = first % mmap.ALLOCATIONGRANULARITY
        with open(self.path, "rb") as stream:
            if os.fstat(stream.fileno()).st_size < last:
                raise GrowmoeError(f"{self.path} is not a whole safetensors file")
            pages = mmap.mmap(
                stream.fileno(), last - first + before, access=mmap.ACCESS_COPY,
                offset=first - before,
            )  # fmt: skip
        count = (last - first) // dtype.itemsize
        return torch.frombuffer(pages, dtype=dtype, count=count, offset=before).view(shape)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite. The extremes tell (NaN is both), in one pass and
    without a mask."""
    if not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def numel(shape: tuple[int, ...]) -> int:
    """Elements of a tensor of this shape."""
    return math.prod(shape)


def write_shard(
    path: Path,
    tensors: dict[str, Stored],
    load: Callable[[str], Tensor],
    on_bytes: Callable[[int], None],
) -> None:
    """Write the tensors of one shard, asking `load` for one at a time in the order of `tensors`.

    The file appears under its name when it is complete and flushed, or not at all. Raises
    GrowmoeError when a tensor has another shape than announced.
    """
    aside = path.with_name(f"{path.name}.partial")
    header, places = _header(tensors)
    with open(aside, "wb") as stream:
        stream.write(header)
        for name, stored in tensors.items():
            tensor = load(name)
            if tuple(tensor.shape) != stored.shape:
                raise GrowmoeError(
                    f"tensor {name} came out as {list(tensor.shape)}, not {list(stored.shape)}"
                )
            stream.seek(len(header) + places[name])
            _write_tensor(stream, name, tensor, (DTYPES | _INTEGERS)[stored.dtype])
            on_bytes(stored.bytes)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, path)


def shard_bytes(tensors: dict[str, Stored]) -> int:
    """Size of the file that `write_shard` makes."""
    return len(_header(tensors)[0]) + sum(stored.bytes for stored in tensors.values())


def _header(tensors: dict[str, Stored]) -> tuple[bytes, dict[str, int]]:
    """(8 bytes of length, then JSON padded with spaces to 8 bytes; where each tensor begins).

    Wide elements come first, so that each tensor begins at a multiple of its elements' size: the
    reader of the safetensors library wants that.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    offset = 0
    for name, stored in sorted(tensors.items(), key=lambda item: -item[1].item_bytes):
        places[name], end = offset, offset + stored.bytes
        header[name] = {
            "dtype": _CODE_OF[stored.dtype], "shape": stored.shape, "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def _write_tensor(stream: BinaryIO, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Write row-major bytes, converting in pieces."""
    if not tensor.numel():
        return
    for part in tensor.detach().contiguous().view(-1).split(_CHUNK):
        stored = part.to(dtype)
        if dtype == torch.float16 and not torch.isfinite(stored).all():
            raise GrowmoeError(
                f"tensor {name} holds values that float16 cannot; write bfloat16 or float32"
            )
        stream.write(stored.view(torch.uint8).numpy().data)
