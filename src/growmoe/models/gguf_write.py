"""Any source that llama.cpp can run, streamed into one GGUF file. Needs the `gguf` extra."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from growmoe.errors import GrowmoeError, UsageError
from growmoe.models.attention import inverse_frequencies
from growmoe.models.checkpoint import Source
from growmoe.models.gguf import permute
from growmoe.models.gguf_arch import (
    FILE_DTYPES,
    ROPE_FREQS,
    gguf_architecture,
    gguf_fields,
    gguf_kinds,
    gguf_name,
    gguf_tensors,
    kind_bytes,
)
from growmoe.models.gguf_tokenizer import copied_tokenizer, tokenizer_fields
from growmoe.models.safetensors_io import is_finite
from growmoe.models.stored import LEFT_DTYPE, QuantizedForm

_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32, "int8": 7, "int4": 2}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE = 1 << 20  # weights quantised at a time
# What stands for a gate of zeros: llama.cpp computes sigmoid(z) as silu(z)/z, which is NaN at 0.
_SMALL_GATE = 1e-20


def write_gguf(
    file: Path,
    source: Source,
    tokenizer: Path | None,
    dtype: str = "float16",
    *,
    origin_gguf: Path | None = None,
    form: QuantizedForm | None = None,
) -> None:
    """Write `source` as a GGUF file for llama.cpp, with matrices in `dtype`, or quantised as
    `gguf_kinds` says of a `form`.

    The tokenizer is copied from `origin_gguf` if that is given, else read from the directory
    `tokenizer`; without both the file holds weights only. Norms, biases and routers are float32.
    Memory holds one tensor at a time (all experts of one layer and part are one).
    Raises UsageError when llama.cpp would compute something else (see `gguf_obstacle`).
    """
    try:
        import gguf
    except ImportError:
        raise UsageError("writing GGUF needs the gguf extra: pip install 'growmoe[gguf]'") from None
    if dtype not in FILE_DTYPES:
        raise UsageError(f"dtype '{dtype}' is not one of {', '.join(FILE_DTYPES)}")
    config = source.config
    architecture = gguf_architecture(config)
    writer = gguf.GGUFWriter(file, architecture)
    try:
        _write_fields(writer, gguf_fields(config))
        writer.add_name(file.stem)
        writer.add_file_type(_FILE_TYPES[form or dtype])
        if form:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if origin_gguf is not None:
            for key, value, kind, inner in copied_tokenizer(origin_gguf, config.vocab_size):
                writer.add_key_value(key, value, kind, sub_type=inner)
        else:
            _write_fields(writer, tokenizer_fields(tokenizer, config))
        _write_tensors(writer, source, architecture, gguf_kinds(config, dtype, form))
    except BaseException:
        writer.close()
        file.unlink(missing_ok=True)
        raise
    writer.close()


def _write_fields(writer: Any, fields: dict[str, Any]) -> None:
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _write_tensors(
    writer: Any, source: Source, architecture: str, kinds: dict[str, str]
) -> None:  # fmt: skip
    from gguf import GGMLQuantizationType as Kind

    plan = gguf_tensors(source.config)
    for name, (shape, _) in plan.items():
        size, kind = kind_bytes(shape, kinds[name]), Kind[kinds[name]]
        # the numpy dtype is only asked whether it is uint8
        writer.add_tensor_info(name, shape, np.dtype("float32"), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (shape, members) in plan.items():
        stacked = len(members) != 1 or ".moe.experts." in members[0]
        single = name != ROPE_FREQS and not stacked
        if kinds[name] not in _PLAIN:
            each = [_converted(source, architecture, members[0])] if single else None
            parts = each or (source.load(member) for member in members)
            raw = [_blocks(part, kinds[name]) for part in parts]
            writer.write_tensor_data(np.concatenate(raw))
            continue
        out = torch.empty(shape, dtype=_PLAIN[kinds[name]])
        if name == ROPE_FREQS:
            out.copy_(_rope_factors(source))
        elif single:
            _fill(out, _converted(source, architecture, members[0]), name)
        else:
            for rows, member in zip(out, members, strict=True):
                _fill(rows, source.load(member), name)
        writer.write_tensor_data(out.view(torch.uint8).numpy())


def _blocks(tensor: Tensor, kind: str) -> Any:
    """The rows of a matrix in the blocks of `kind`, as bytes."""
    import gguf

    chosen = gguf.GGMLQuantizationType[kind]
    step = max(1, _PIECE // tensor.shape[1])
    parts = [gguf.quants.quantize(t.float().numpy(), chosen) for t in tensor.split(step)]
    return np.concatenate(parts)


class InGGUF:
    """`source` as it reads from a GGUF file that is quantised to `form`."""

    def __init__(self, source: Source, form: QuantizedForm) -> None:
        self.source, self.config, self.dtype = source, source.config, "float32"
        self._kinds = gguf_kinds(source.config, LEFT_DTYPE, form)

    def load(self, name: str) -> Tensor:
        """The tensor after rounding."""
        import gguf

        tensor, kind = self.source.load(name), self._kinds[gguf_name(self.config, name)]
        if kind in _PLAIN:
            return tensor.to(_PLAIN[kind])
        values = gguf.quants.dequantize(_blocks(tensor, kind), gguf.GGMLQuantizationType[kind])
        return torch.from_numpy(values).view(tensor.shape)


def _fill(out: Tensor, tensor: Tensor, name: str) -> None:
    if tuple(tensor.shape) != tuple(out.shape):
        raise GrowmoeError(f"tensor {name} came out as {list(tensor.shape)}, not {list(out.shape)}")
    out.copy_(tensor)
    if not is_finite(out):
        raise GrowmoeError(
            f"tensor {name} holds values beyond {str(out.dtype).removeprefix('torch.')}; "
            f"write the GGUF file in bfloat16 or float32"
        )


def _converted(source: Source, architecture: str, name: str) -> Tensor:
    """One tensor the way llama.cpp wants it."""
    tensor, config = source.load(name), source.config
    part = name.rpartition(".")[0].rpartition(".")[2]
    if part in ("q", "k") and architecture == "llama":
        return permute(tensor, config.num_heads if part == "q" else config.num_kv_heads)
    if name.endswith("moe.mix.weight"):
        return tensor[0] if tensor.any() else torch.full_like(tensor[0].float(), _SMALL_GATE)
    return tensor


def _rope_factors(source: Source) -> Tensor:
    """What llama.cpp divides each plain rotary frequency by."""
    plain = inverse_frequencies(source.config.replace(rope_scaling=None))
    return plain / inverse_frequencies(source.config)
