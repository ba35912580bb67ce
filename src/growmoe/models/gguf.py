"""GGUF files of the llama, mistral, qwen2 and qwen3 architectures, read tensor by tensor.

Needs the `gguf` extra. Quantised weights are dequantised to float32 by the gguf library.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from growmoe.errors import GrowmoeError, UsageError
from growmoe.models.config import tensor_shapes
from growmoe.models.gguf_arch import gguf_name
from growmoe.models.gguf_header import gguf_config, read_gguf_header
from growmoe.models.safetensors_io import is_finite

_PIECE = 1 << 22  # elements dequantised at a time


class GGUFFile:
    """One GGUF file; `load` gives float32 tensors in the row order of Hugging Face."""

    dtype = "float32"

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise UsageError(
                "reading GGUF needs the gguf extra: pip install 'growmoe[gguf]'"
            ) from None
        self.path, self._gguf = path, gguf
        self._header = read_gguf_header(path)
        self.config = gguf_config(self._header)
        size = path.stat().st_size
        for name, shape in tensor_shapes(self.config).items():
            found = self._header.tensors.get(gguf_name(self.config, name))
            if found is None:
                raise GrowmoeError(f"{path}: tensor {gguf_name(self.config, name)} is missing")
            if found.shape != shape:
                raise GrowmoeError(
                    f"{path}: tensor {found.name} has shape {list(found.shape)}, but the header "
                    f"says {list(shape)}"
                )
            rows, row_bytes = self._layout(found.name)
            if found.offset + rows * row_bytes > size:
                raise GrowmoeError(f"{path} is not a whole GGUF file (cut within {found.name})")

    def _layout(self, disk: str) -> tuple[int, int]:
        """(rows, stored bytes of a row); raises GrowmoeError for a type that is not known."""
        info = self._header.tensors[disk]
        try:
            kind = self._gguf.GGMLQuantizationType(info.kind)
        except ValueError:
            raise GrowmoeError(
                f"{self.path}: tensor {disk} has the unknown type {info.kind}"
            ) from None
        block, size = self._gguf.GGML_QUANT_SIZES[kind]
        if info.shape[-1] % block:
            raise GrowmoeError(f"{self.path}: tensor {disk} does not divide into blocks of {block}")
        rows = 1
        for side in info.shape[:-1]:
            rows *= side
        return rows, info.shape[-1] // block * size

    def load(self, name: str) -> Tensor:
        """The tensor with the canonical `name`, dequantised to float32 a few rows at a time."""
        info = self._header.tensors[gguf_name(self.config, name)]
        rows, row_bytes = self._layout(info.name)
        kind = self._gguf.GGMLQuantizationType(info.kind)
        tensor = torch.empty(rows, info.shape[-1])
        step = max(1, _PIECE // info.shape[-1])
        with open(self.path, "rb") as stream:
            stream.seek(info.offset)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                raw = np.frombuffer(stream.read(count * row_bytes), np.uint8)
                plain = {"F32": "<f4", "F16": "<f2"}.get(kind.name)
                if plain:
                    values = raw.view(plain).reshape(count, -1)
                else:
                    values = self._gguf.quants.dequantize(raw.reshape(count, row_bytes), kind)
                tensor[start : start + count] = torch.from_numpy(values.astype(np.float32))
        tensor = tensor.view(info.shape)
        if not is_finite(tensor):
            raise GrowmoeError(f"{self.path}: tensor {info.name} holds NaN or infinite values")
        part = name.rpartition(".")[0].rpartition(".")[2]
        if part in ("q", "k") and self.config.family == "llama":
            heads = self.config.num_heads if part == "q" else self.config.num_kv_heads
            tensor = unpermute(tensor, heads)
        return tensor

    def file_bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    def identity(self) -> str:
        """Changes when the file does (size and time)."""
        stat = self.path.stat()
        return hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()


def permute(rows: Tensor, heads: int) -> Tensor:
    """Rotary rows in the order of llama.cpp's `llama` (halves apart -> pairs side by side)."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """Undo `permute`."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def export_tokenizer(path: Path, out: Path) -> None:
    """Write the tokenizer that a GGUF file carries as tokenizer.json into the directory `out`."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(out)
