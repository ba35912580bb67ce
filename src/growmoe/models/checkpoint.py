"""MODEL directories: config.json + sharded safetensors + tokenizer + growmoe.json.

Reads and writes the layout of Hugging Face, tensor by tensor, so that no more than a few tensors
are in memory whatever the model's size. Only safetensors, never pickle.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from growmoe.errors import GrowmoeError, UsageError
from growmoe.files import read_json, write_json
from growmoe.models.config import ModelConfig, tensor_shapes
from growmoe.models.families import (
    config_from_hf,
    config_to_hf,
    empty_tensors,
    hf_names,
    pick_family,
)
from growmoe.models.safetensors_header import CODES, INTEGER_CODES, Stored, tensor_files, widest
from growmoe.models.safetensors_io import DTYPES, TensorFile, shard_bytes, write_shard
from growmoe.models.stored import (
    BITS,
    PARTS,
    QuantizedForm,
    packed_tensors,
    quantization_fields,
    quantized_form,
    stored_tensors,
)
from growmoe.models.transformer import Transformer
from growmoe.ops.quantized import Quantized, dequantize, pack, quantize, unpack

SHARD_BYTES = 4 * 2**30
_INTEGER_ENDS = ("_packed", "_shape")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
    "merges.txt", "tokenizer.model", "added_tokens.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip


class Source(Protocol):
    """Weights that can be read tensor by tensor: a directory, a GGUF file, or a growth of one."""

    config: ModelConfig
    dtype: str
    """Storage dtype of the weights (the widest, where they differ)."""

    def load(self, name: str) -> Tensor:
        """The tensor with the canonical `name`, in its storage dtype."""
        ...


class Directory:
    """A MODEL directory, checked when opened: every tensor present, whole and of the right shape.

    With `mapped`, tensors are pages of the files, to be packed or copied and not to be kept (see
    TensorFile). Raises GrowmoeError that names the file, key or tensor that is wrong.
    """

    def __init__(self, path: Path, mapped: bool = False) -> None:
        self.path, self.mapped = path, mapped
        if not path.is_dir():
            raise UsageError(f"{path} is not a model directory")
        config_path = path / "config.json"
        if not config_path.exists():
            raise UsageError(f"{path} holds no config.json, so it is not a model directory")
        raw = read_json(config_path)
        self.config = config_from_hf(raw, config_path)
        self.quantized = quantized_form(raw, config_path)
        """int8 or int4 where matrices are stored as integers, else None."""
        self.family = self.config.family  # as written, also in the form for a converter
        self._names = hf_names(self.config, self.family)
        self._files = tensor_files(path)
        self._open: dict[str, TensorFile] = {}
        self._shapes = tensor_shapes(self.config)
        self.dtype = self._check()

    def _handle(self, file: str) -> TensorFile:
        if file not in self._open:
            self._open[file] = TensorFile(self.path / file, self.mapped)
        return self._open[file]

    def _check(self) -> str:
        codes = []
        for name, shape in self._shapes.items():
            if not self._is_quantized(name):
                codes.append(self._checked(self._names[name], shape))
                continue
            for disk, stored in self._packed(name).items():
                if (CODES | INTEGER_CODES)[self._checked(disk, stored.shape)] != stored.dtype:
                    raise GrowmoeError(
                        f"{self.path / self._files[disk]}: tensor {disk} is not {stored.dtype}"
                    )
            codes.append("F32")
        self._refuse_unknown()
        return widest(codes)

    def _is_quantized(self, name: str) -> bool:
        return self.quantized is not None and f"{self._names[name]}_{PARTS[0]}" in self._files

    def _packed(self, name: str) -> dict[str, Stored]:
        assert self.quantized is not None
        shape = self._shapes[name]
        if len(shape) != 2:
            raise GrowmoeError(f"{self.path}: tensor {self._names[name]} cannot be quantised")
        return packed_tensors(self._names[name], shape, BITS[self.quantized])

    def _checked(self, disk: str, shape: tuple[int, ...]) -> str:
        """The dtype code of the tensor `disk`, which must be there and of this shape."""
        if disk not in self._files:
            raise GrowmoeError(f"{self.path}: tensor {disk} is missing from the checkpoint")
        file = self._files[disk]
        handle = self._handle(file)
        if disk not in handle:
            raise GrowmoeError(f"{self.path / file}: tensor {disk} is missing from this shard")
        if handle.shape(disk) != shape:
            raise GrowmoeError(
                f"{self.path / file}: tensor {disk} has shape {list(handle.shape(disk))}, "
                f"but config.json says {list(shape)}"
            )
        code = handle.code(disk)
        known = CODES | (INTEGER_CODES if disk.endswith(_INTEGER_ENDS) else {})
        if code not in known:
            raise GrowmoeError(
                f"{self.path / file}: tensor {disk} has dtype {code}; known are {', '.join(known)}"
            )
        return code

    def _refuse_unknown(self) -> None:
        known = set(self._names.values()) | {n for n, _ in empty_tensors(self.config, self.family)}
        for name in self._shapes:
            if self._is_quantized(name):
                known -= {self._names[name]}
                known |= set(self._packed(name))
        if self.config.tied_head:
            known.add("lm_head.weight")  # a redundant copy that tied models may carry
        for disk, file in self._files.items():
            if disk not in known and not disk.endswith("rotary_emb.inv_freq"):
                raise GrowmoeError(
                    f"{self.path / file}: tensor {disk} has no place in a {self.family} model of "
                    f"this config.json"
                )

    def load(self, name: str) -> Tensor:
        """The tensor `name`, float32 where it is stored as integers; raises GrowmoeError when it
        holds NaN or infinity."""
        if (integers := self.load_quantized(name)) is not None:
            return dequantize(integers)
        return self._read(self._names[name])

    def load_quantized(self, name: str) -> Quantized | None:
        """The tensor `name` as it is stored; None when that is not as integers."""
        if not self._is_quantized(name):
            return None
        assert self.quantized is not None
        words, scales_NG, shape = (self._read(disk) for disk in self._packed(name))
        place = f"{self.path / self._files[f'{self._names[name]}_{PARTS[0]}']}"
        N, K = self._shapes[name]
        if shape.tolist() != [N, K]:
            raise GrowmoeError(
                f"{place}: {self._names[name]}_shape says {shape.tolist()}, but config.json says "
                f"{[N, K]}"
            )
        values_NK = unpack(words, BITS[self.quantized], K)
        if values_NK.numel() and int(values_NK.min()) == -128:
            raise GrowmoeError(
                f"{place}: tensor {self._names[name]} holds -128, which lies outside the symmetric "
                f"range of 8 bits"
            )
        return Quantized(values_NK, scales_NG.clone())  # integers may be kept, mapped pages not

    def _read(self, disk: str) -> Tensor:
        return self._handle(self._files[disk]).read(disk)

    def file_bytes(self) -> int:
        """Size of all shards."""
        return sum((self.path / file).stat().st_size for file in set(self._files.values()))

    def identity(self) -> str:
        """Changes when the config or any shard of the directory changes (sizes and times)."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in sorted(set(self._files.values())):
            stat = (self.path / file).stat()
            digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.hexdigest()

    def lineage(self) -> dict[str, Any]:
        """The directory's growmoe.json; empty for models from elsewhere."""
        path = self.path / "growmoe.json"
        return read_json(path) if path.exists() else {}


class File(Source, Protocol):
    """A source that lies on disk."""

    def identity(self) -> str:
        """Changes when the files do."""
        ...

    def file_bytes(self) -> int:
        """Size of the files."""
        ...


def open_source(path: Path, mapped: bool = False) -> File:
    """A MODEL directory (see there for `mapped`) or a .gguf file, opened for reading tensor by
    tensor."""
    if path.suffix == ".gguf":
        from growmoe.models.gguf import GGUFFile

        return GGUFFile(path)
    return Directory(path, mapped)


# ---- writing ----


def write_model(
    out: Path,
    config: ModelConfig,
    load: Callable[[str], Tensor],
    dtype: str,
    *,
    shard_limit: int = SHARD_BYTES,
    on_bytes: Callable[[int], None] = lambda done: None,
    family: str | None = None,
    form: QuantizedForm | None = None,
) -> None:
    """Write config.json and the weights of `config` into the existing directory `out`.

    `load(name)` gives each canonical tensor once, in checkpoint order; it is converted to `dtype`
    and written before the next is asked for, so memory holds one tensor at a time. Shards that
    are complete already are kept (an interrupted call with the same arguments made them). `form`
    stores matrices as integers (see models.stored). `on_bytes` gets the bytes written so far.
    Raises GrowmoeError when `load` returns another shape than the config says.
    """
    family = family or pick_family(config)
    names = hf_names(config, family)
    canonical = {disk: name for name, disk in names.items()}
    shards = plan_shards(config, family, dtype, shard_limit, form)
    integers = _Integers(load, BITS[form]) if form else None
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        on_bytes(done)

    def load_from_disk_name(disk: str) -> Tensor:
        if disk in canonical:
            return load(canonical[disk])
        stem, _, part = disk.rpartition("_")
        if integers is not None and stem in canonical:
            return integers.part(canonical[stem], part)
        return torch.zeros(dict(empty_tensors(config, family))[disk])

    for file, tensors in shards.items():
        path = out / file
        if path.exists() and path.stat().st_size == shard_bytes(tensors):
            count(sum(stored.bytes for stored in tensors.values()))
            continue
        write_shard(path, tensors, load_from_disk_name, count)
    if len(shards) > 1:
        weight_map = {disk: file for file, tensors in shards.items() for disk in tensors}
        index = {"metadata": {"total_size": done}, "weight_map": weight_map}
        write_json(out / "model.safetensors.index.json", index)
    write_json(out / "config.json", config_json(config, dtype, family, form))


def config_json(
    config: ModelConfig, dtype: str, family: str, form: QuantizedForm | None = None
) -> dict[str, Any]:
    """The config.json of a directory with these weights."""
    return {**config_to_hf(config, dtype, family), **quantization_fields(config, family, form)}


class _Integers:
    """What stands on disk for quantised matrices, part by part; each is quantised once."""

    def __init__(self, load: Callable[[str], Tensor], bits: int) -> None:
        self.load, self.bits = load, bits
        self.name, self.made = "", Quantized(torch.empty(0, 0), torch.empty(0, 0))

    def part(self, name: str, part: str) -> Tensor:
        """One of PARTS of the matrix `name`."""
        if name != self.name:
            self.name, self.made = name, quantize(self.load(name), self.bits)
        if part == "packed":
            return pack(self.made.values_NK, self.bits)
        return self.made.scales_NG if part == "scale" else torch.tensor(self.made.values_NK.shape)


def plan_shards(
    config: ModelConfig, family: str, dtype: str, limit: int, form: QuantizedForm | None = None
) -> dict[str, dict[str, Stored]]:
    """{file: {tensor name on disk: shape and dtype}} in checkpoint order, files of at most `limit`
    bytes (a larger tensor has a file of its own)."""
    groups: list[dict[str, Stored]] = [{}]
    used = 0
    for disk, stored in stored_tensors(config, family, dtype, form).items():
        if groups[-1] and used + stored.bytes > limit:
            groups.append({})
            used = 0
        groups[-1][disk] = stored
        used += stored.bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group
        for i, group in enumerate(groups)
    }


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy what turns text into tokens and ends it (tokenizer, template, generation defaults)."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)


# ---- whole models ----


def load_model(
    path: Path, dtype: str = "float32", device: str = "cpu"
) -> Transformer:  # fmt: skip
    """Build the model of a MODEL directory (or GGUF file) with its weights in `dtype`."""
    return build_model(open_source(path), dtype, device)


def build_model(source: Source, dtype: str = "float32", device: str = "cpu") -> Transformer:
    """Build the model that `source` holds, tensor by tensor, in eval mode."""
    with torch.device("meta"):
        model = Transformer(source.config)
    model.to(dtype=DTYPES[dtype]).to_empty(device=device)
    load_weights(model, source.load)
    return model.eval()


def load_weights(model: Transformer, load: Callable[[str], Tensor]) -> None:
    """Copy canonical tensors into the parameters of `model`, experts into their stack."""
    load_into(dict(parameter_views(model)), load)


@torch.no_grad()
def load_into(views: dict[str, Tensor], load: Callable[[str], Tensor]) -> None:
    """Copy the tensor that `load(name)` gives into every view."""
    for name, view in views.items():
        view.copy_(load(name))


def parameter_views(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, view of the parameter's data) for every tensor of the model."""
    return named_views(model.named_parameters(), model.config)


def named_views(
    parameters: Iterable[tuple[str, Tensor]], config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """As parameter_views, for the named parameters of a part of a model with this config."""
    for name, parameter in parameters:
        data = parameter.data
        before, stacked, leaf = name.partition("moe.experts.")
        if not stacked:
            yield name, data
            continue
        part, _, bias = leaf.partition("_")
        kind = "bias" if bias else "weight"
        for expert, rows in enumerate(data.unbind(0)):
            place = f"{before}moe.experts.{expert}"
            if part == "up" and config.activation == "swiglu":
                gate, up = rows.chunk(2, dim=0)
                yield f"{place}.gate.{kind}", gate
                yield f"{place}.up.{kind}", up
            else:
                yield f"{place}.{part}.{kind}", rows


def save_model(out: Path, model: Transformer, dtype: str) -> None:
    """Write the weights of a model in memory into the existing directory `out`."""
    views = dict(parameter_views(model))
    write_model(out, model.config, lambda name: views[name], dtype)


def disk_free(path: Path) -> int:
    """Free bytes where `path` (or its nearest existing parent) lies."""
    while not path.exists():
        path = path.parent
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize
