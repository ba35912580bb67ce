"""What a safetensors file holds and where, and which file of a directory holds what. No torch."""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from growmoe.errors import GrowmoeError
from growmoe.files import read_json
from growmoe.models.config import DTYPE_BYTES

CODES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
INTEGER_CODES = {"I32": "int32", "I64": "int64"}
"""Of packed integers and of shapes; no weight is stored so as it is."""
_BYTES = {**DTYPE_BYTES, "int32": 4, "int64": 8}
_LONGEST_HEADER = 100_000_000
_WIDTHS = ("float16", "bfloat16", "float32", "float64")


class Stored(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return _BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.item_bytes


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """({tensor: dtype, shape, data_offsets}, where the data begin).

    Raises GrowmoeError that names the file when the header is damaged or the file is cut short.
    """
    try:
        return _read(path)
    except FileNotFoundError:
        raise GrowmoeError(f"{path} does not exist, but the index names it") from None
    except RecursionError:
        raise GrowmoeError(f"{path} is not a whole safetensors file (a nested header)") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GrowmoeError(f"{path} is not a whole safetensors file ({error})") from None


def _read(path: Path) -> tuple[dict[str, Any], int]:
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
        if not isinstance(shape, list) or not isinstance(code, str):
            raise ValueError(f"tensor {name} has no shape or no dtype")
        if not all(type(side) is int and 0 <= side < 2**62 for side in (*shape, first, last)):
            raise ValueError(f"tensor {name} has an impossible shape or place")
        # a side may be 0: the others must still be such that torch can count them
        if math.prod(side for side in shape if side) >= 2**62:
            raise ValueError(f"tensor {name} has an impossible shape")
        dtype = (CODES | INTEGER_CODES).get(code)
        if dtype and last - first != Stored(tuple(shape), dtype).bytes:
            raise ValueError(f"tensor {name} does not fill its place")
        if last > size - 8 - length:
            raise ValueError(f"tensor {name} lies beyond the end of the file")
    return entries, 8 + length


def widest(codes: list[str]) -> str:
    """The widest dtype of some that are known."""
    return max((CODES[code] for code in codes), key=_WIDTHS.index, default="float16")


def tensor_files(path: Path) -> dict[str, str]:
    """{tensor name on disk: file} from the index, or from the only safetensors file."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        record = read_json(index)
        table = record.get("weight_map") if isinstance(record, dict) else None
        if not isinstance(table, dict):
            raise GrowmoeError(f"{index}: key 'weight_map' is missing")
        for name, file in table.items():
            if not isinstance(file, str) or not file:
                raise GrowmoeError(f"{index}: 'weight_map' names no file for tensor {name}")
        for file in sorted(set(table.values())):
            if not (path / file).exists():
                raise GrowmoeError(f"{index} names {file}, which is not in {path}")
        return table
    single = path / "model.safetensors"
    if not single.exists():
        others = sorted(p.name for p in path.glob("*.bin")) + sorted(
            p.name for p in path.glob("*.pt*")
        )
        hint = f" ({others[0]} is a pickle, which growmoe never reads)" if others else ""
        raise GrowmoeError(f"{path} holds no model.safetensors{hint}")
    return dict.fromkeys(read_header(single)[0], single.name)


def stored_dtype(path: Path) -> str | None:
    """The widest dtype of a directory's weights, float32 for those that are dequantised; None when
    it holds none."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if not index.exists() and not single.exists():
        return None
    codes = [
        entry["dtype"]
        for file in sorted(set(tensor_files(path).values()))
        for entry in read_header(path / file)[0].values()
    ]
    if any(code in INTEGER_CODES for code in codes):
        return "float32"
    return widest([code for code in codes if code in CODES])
