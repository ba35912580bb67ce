"""MODEL directories: config.json + sharded safetensors + tokenizer + growmoe.json.

Reads and writes the layout of Hugging Face, tensor by tensor, so that no more than a few tensors
are in memory whatever the model's size. Only safetensors, never pickle.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from growmoe import __version__
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
from growmoe.models.transformer import Transformer

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_CODES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CODE_OF = {name: code for code, name in _CODES.items()}
SHARD_BYTES = 4 * 2**30
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

    Raises GrowmoeError that names the file, key or tensor that is wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise UsageError(f"{path} is not a model directory")
        config_path = path / "config.json"
        if not config_path.exists():
            raise UsageError(f"{path} holds no config.json, so it is not a model directory")
        self.config = config_from_hf(read_json(config_path), config_path)
        self.family = pick_family(self.config)
        self._names = hf_names(self.config, self.family)
        self._files = _index(path)
        self._open: dict[str, Any] = {}
        self.dtype = self._check()

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = _safe_open(self.path / file)
        return self._open[file]

    def _check(self) -> str:
        widest = "float16"
        for name, shape in tensor_shapes(self.config).items():
            disk = self._names[name]
            if disk not in self._files:
                raise GrowmoeError(f"{self.path}: tensor {disk} is missing from the checkpoint")
            file = self._files[disk]
            handle = self._handle(file)
            if disk not in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                raise GrowmoeError(f"{self.path / file}: tensor {disk} is missing from this shard")
            part = handle.get_slice(disk)
            if tuple(part.get_shape()) != shape:
                raise GrowmoeError(
                    f"{self.path / file}: tensor {disk} has shape {list(part.get_shape())}, "
                    f"but config.json says {list(shape)}"
                )
            code = part.get_dtype()
            if code not in _CODES:
                raise GrowmoeError(
                    f"{self.path / file}: tensor {disk} has dtype {code}; "
                    f"known are {', '.join(_CODES)}"
                )
            widest = max(widest, _CODES[code], key=["float16", "bfloat16", "float32", "float64"].index)  # fmt: skip  # noqa: E501
        self._refuse_unknown()
        return widest

    def _refuse_unknown(self) -> None:
        known = set(self._names.values()) | {n for n, _ in empty_tensors(self.config, self.family)}
        if self.config.tied_head:
            known.add("lm_head.weight")  # a redundant copy that tied models may carry
        for disk, file in self._files.items():
            if disk not in known and not disk.endswith("rotary_emb.inv_freq"):
                raise GrowmoeError(
                    f"{self.path / file}: tensor {disk} has no place in a {self.family} model of "
                    f"this config.json"
                )

    def load(self, name: str) -> Tensor:
        """The tensor `name`; raises GrowmoeError when it holds NaN or infinity."""
        disk = self._names[name]
        tensor = self._handle(self._files[disk]).get_tensor(disk)
        if not torch.isfinite(tensor).all():
            file = self.path / self._files[disk]
            raise GrowmoeError(f"{file}: tensor {disk} holds NaN or infinite values")
        return tensor

    def lineage(self) -> dict[str, Any]:
        """The directory's growmoe.json; empty for models from elsewhere."""
        path = self.path / "growmoe.json"
        return read_json(path) if path.exists() else {}


def _safe_open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise GrowmoeError(f"{path} does not exist, but the index names it") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise GrowmoeError(f"{path} is not a whole safetensors file ({error})") from None


def _index(path: Path) -> dict[str, str]:
    """{tensor name on disk: file} from the index, or from the only safetensors file."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict):
            raise GrowmoeError(f"{index}: key 'weight_map' is missing")
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
    return dict.fromkeys(_safe_open(single).keys(), single.name)


def open_source(path: Path) -> Source:
    """A MODEL directory or a .gguf file, opened for reading tensor by tensor."""
    if path.suffix == ".gguf":
        from growmoe.models.gguf import GGUFFile

        return GGUFFile(path)
    return Directory(path)


# ---- writing ----


def write_model(
    out: Path,
    config: ModelConfig,
    load: Callable[[str], Tensor],
    dtype: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    on_tensor: Callable[[int], None] = lambda done: None,
) -> None:
    """Write config.json and the weights of `config` into the existing directory `out`.

    `load(name)` gives each canonical tensor once, in checkpoint order; it is converted to `dtype`
    and written before the next is asked for, so memory holds one tensor at a time.
    Raises GrowmoeError when `load` returns another shape than the config says.
    """
    family = pick_family(config)
    names = hf_names(config, family)
    shapes: dict[str, tuple[int, ...]] = {
        names[name]: shape for name, shape in tensor_shapes(config).items()
    }
    shapes.update(empty_tensors(config, family))
    canonical = {disk: name for name, disk in names.items()}
    size = DTYPES[dtype].itemsize
    shards = _plan_shards(shapes, size, shard_bytes)
    done = 0
    for file, members in shards.items():
        with open(out / file, "wb") as stream:
            _write_header(stream, {disk: shapes[disk] for disk in members}, dtype)
            for disk in members:
                if disk in canonical:
                    tensor = load(canonical[disk])
                else:
                    tensor = torch.zeros(shapes[disk])
                if tuple(tensor.shape) != shapes[disk]:
                    raise GrowmoeError(
                        f"tensor {disk} came out as {list(tensor.shape)}, not {list(shapes[disk])}"
                    )
                _write_tensor(stream, tensor.to(DTYPES[dtype]))
                done += 1
                on_tensor(done)
    if len(shards) > 1:
        total = sum(_numel(shape) * size for shape in shapes.values())
        weight_map = {disk: file for file, members in shards.items() for disk in members}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(out / "model.safetensors.index.json", index)
    write_json(out / "config.json", config_to_hf(config, dtype))


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _plan_shards(
    shapes: dict[str, tuple[int, ...]], size: int, limit: int
) -> dict[str, list[str]]:  # fmt: skip
    groups: list[list[str]] = [[]]
    used = 0
    for disk, shape in shapes.items():
        weight = _numel(shape) * size
        if groups[-1] and used + weight > limit:
            groups.append([])
            used = 0
        groups[-1].append(disk)
        used += weight
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group
        for i, group in enumerate(groups)
    }


def _write_header(stream: BinaryIO, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    """The safetensors header: 8 bytes of length, then JSON padded with spaces to 8 bytes.

    Written by hand because the library's writer wants every tensor of a shard in memory at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for disk, shape in shapes.items():
        end = offset + _numel(shape) * DTYPES[dtype].itemsize
        header[disk] = {"dtype": _CODE_OF[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)


def _write_tensor(stream: BinaryIO, tensor: Tensor) -> None:
    if tensor.numel():
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        stream.write(flat.numpy().data)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy what turns text into tokens and ends it (tokenizer, template, generation defaults)."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)


def write_lineage(out: Path, lineage: dict[str, Any]) -> None:
    """Write growmoe.json and the model card (README.md) of a MODEL directory."""
    lineage = {"growmoe": __version__, **lineage}
    write_json(out / "growmoe.json", lineage)
    config = config_from_hf(read_json(out / "config.json"), out / "config.json")
    total, active = config.params_total() / 1e6, config.params_active() / 1e6
    checks = json.dumps(lineage.get("checks", {}), indent=2, ensure_ascii=False)
    options = json.dumps(lineage.get("options", {}), indent=2, ensure_ascii=False)
    own = pick_family(config) == "growmoe"
    load = "- transformers loads it after `import growmoe.hf`\n" if own else ""
    (out / "README.md").write_text(
        "---\nlibrary_name: transformers\ntags: [growmoe]\n---\n\n"
        f"# {lineage.get('name', 'model')}\n\n"
        f"Made by growmoe {__version__} with `{lineage.get('operation')}` from "
        f"`{lineage.get('parent')}`.\n\n"
        f"- architecture: {pick_family(config)}, {config.num_layers} layers, "
        f"hidden {config.hidden_size}\n"
        f"- parameters: {total:.2f} M in all, {active:.2f} M active per token\n"
        f"{load}\n"
        f"## Checks\n\n```json\n{checks}\n```\n\n## Options\n\n```json\n{options}\n```\n",
        encoding="utf-8",
    )


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


@torch.no_grad()
def load_weights(model: Transformer, load: Callable[[str], Tensor]) -> None:
    """Copy canonical tensors into the parameters of `model`, experts into their stack."""
    views = dict(parameter_views(model))
    for name in tensor_shapes(model.config):
        views[name].copy_(load(name))


def parameter_views(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, view of the parameter's data) for every tensor of the model."""
    for name, parameter in model.named_parameters():
        data = parameter.data
        before, stacked, leaf = name.partition(".moe.experts.")
        if not stacked:
            yield name, data
            continue
        part, _, bias = leaf.partition("_")
        kind = "bias" if bias else "weight"
        for expert, rows in enumerate(data.unbind(0)):
            place = f"{before}.moe.experts.{expert}"
            if part == "up" and model.config.activation == "swiglu":
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
