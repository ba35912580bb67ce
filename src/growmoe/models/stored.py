"""What a MODEL directory holds on disk: every tensor with its shape and dtype, quantised or not.

Quantised directories are in the form `pack-quantized` of compressed-tensors, which vLLM and
transformers read: in place of a matrix NAME they hold NAME_packed, NAME_scale and NAME_shape.
Facts about the form were checked with compressed-tensors 0.20. Imports no torch.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from growmoe.errors import GrowmoeError, UsageError
from growmoe.files import read_json
from growmoe.models.config import ModelConfig, tensor_shapes
from growmoe.models.families import empty_tensors, hf_name
from growmoe.models.footprint import GROUP, Form
from growmoe.models.safetensors_header import Stored

QuantizedForm = Literal["int8", "int4"]
BITS: dict[str, int] = {"int8": 8, "int4": 4}
LEFT_DTYPE = "bfloat16"
"""How a quantised directory stores what it leaves unquantised, and its scales."""
PARTS = ("packed", "scale", "shape")
_LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
_WEIGHTS: dict[str, Any] = {
    "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "dynamic": False,
}  # fmt: skip


def quantized_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The matrices that a quantised directory holds as integers: those of attention, feed-forward
    and experts whose rows divide into groups. Embedding, head, routers and mixing layers stay."""
    return {
        name: shape for name, shape in _matrices(config).items() if shape[1] % GROUP == 0
    }  # fmt: skip


def left_out(config: ModelConfig) -> list[str]:
    """Matrices that would be quantised if their rows divided into groups."""
    return [name for name, shape in _matrices(config).items() if shape[1] % GROUP]


def quantizing_notes(config: ModelConfig, engine: str) -> tuple[str, ...]:
    """What to say about matrices that stay unquantised. Raises UsageError where nothing would be
    quantised, where an engine fuses layers and so wants all of them (vLLM, SGLang), and where it
    stacks experts and so wants all of those (transformers)."""
    left = left_out(config)
    if not left:
        return ()
    experts = [name for name in left if ".experts." in name]
    first = (experts or left)[0]
    why = f"the {tensor_shapes(config)[first][1]} inputs of {first} do not divide into groups of "
    why += str(GROUP)
    if not quantized_tensors(config):
        raise UsageError(f"no matrix of this model can be quantised: {why}")
    if engine in ("vllm", "sglang") or (engine == "transformers" and experts):
        raise UsageError(f"{engine} cannot run this model quantised: {why}")
    return (f"{len(left)} matrices stay unquantised: {why}",)


def why_rounded(form: QuantizedForm) -> str:
    """Why a quantised model is not the same function."""
    return f"{form}: matrices are rounded to integers with a scale per {GROUP} weights"


def _matrices(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {
        name: shape
        for name, shape in tensor_shapes(config).items()
        if len(shape) == 2 and name.split(".")[-2] in _LINEAR
    }


def packed_tensors(disk: str, shape: tuple[int, ...], bits: int) -> dict[str, Stored]:
    """What stands on disk for the quantised matrix `disk` of this shape."""
    N, K = shape
    return {
        f"{disk}_packed": Stored((N, math.ceil(K * bits / 32)), "int32"),
        f"{disk}_scale": Stored((N, math.ceil(K / GROUP)), LEFT_DTYPE),
        f"{disk}_shape": Stored((2,), "int64"),
    }


def stored_tensors(
    config: ModelConfig, family: str, dtype: str, quantize: QuantizedForm | None = None
) -> dict[str, Stored]:
    """{name on disk: shape and dtype} of a directory written as `family`, in checkpoint order."""
    packed = quantized_tensors(config) if quantize else {}
    found: dict[str, Stored] = {}
    for name, shape in tensor_shapes(config).items():
        disk = hf_name(config, family, name)
        if quantize and name in packed:
            found |= packed_tensors(disk, shape, BITS[quantize])
        else:
            found[disk] = Stored(shape, dtype)
    for disk, shape in empty_tensors(config, family):
        found[disk] = Stored(shape, dtype)
    return found


def stored_bytes(
    config: ModelConfig, family: str, dtype: str, quantize: QuantizedForm | None = None
) -> int:
    """Bytes of all tensors of such a directory."""
    return sum(one.bytes for one in stored_tensors(config, family, dtype, quantize).values())


# ---- config.json ----


def quantization_fields(
    config: ModelConfig, family: str, quantize: QuantizedForm | None
) -> dict[str, Any]:
    """What config.json says beside the fields of the model; nothing when it is not quantised."""
    if quantize is None:
        return {}
    packed = quantized_tensors(config)
    kept = [
        hf_name(config, family, name).removesuffix(".weight")
        for name, shape in tensor_shapes(config).items()
        if len(shape) == 2 and name not in packed
    ]
    kept += [n.removesuffix(".weight") for n, _ in empty_tensors(config, family)]
    kept.append(hf_name(config, family, "head.weight").removesuffix(".weight"))
    if family == "growmoe":  # the class of transformers has the model in an attribute
        kept = [f"model.{name}" for name in kept]
    group = {"targets": ["Linear"], "weights": {"num_bits": BITS[quantize], **_WEIGHTS}}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(dict.fromkeys(kept)),
        }
    }


def quantized_form(raw: Mapping[str, Any], where: Path) -> QuantizedForm | None:
    """How the directory of a parsed config.json is quantised; None when it is not.

    Raises GrowmoeError that names the first key of a form that is not read.
    """
    said = raw.get("quantization_config")
    if said is None:
        return None
    _demand(said, {"quant_method": "compressed-tensors"}, where, "quantization_config")
    _demand(said, {"format": "pack-quantized"}, where, "quantization_config")
    groups = said.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise GrowmoeError(f"{where}: quantization_config.config_groups is not one group")
    key, group = next(iter(groups.items()))
    place = f"quantization_config.config_groups.{key}"
    _demand(group, {"weights": ...}, where, place)
    if group.get("input_activations") is not None:
        raise GrowmoeError(f"{where}: {place}.input_activations: only weights are read quantised")
    wanted = {name: value for name, value in _WEIGHTS.items() if name != "dynamic"}
    _demand(group["weights"], wanted, where, f"{place}.weights")
    if group["weights"].get("actorder") is not None:
        raise GrowmoeError(f"{where}: {place}.weights.actorder: reordered inputs are not read")
    bits = group["weights"].get("num_bits")
    for form in ("int8", "int4"):
        if BITS[form] == bits:
            return "int8" if form == "int8" else "int4"
    raise GrowmoeError(f"{where}: {place}.weights.num_bits is {bits!r}; 8 and 4 are read")


def serving_form(path: Path, asked: Form | None) -> Form:
    """How a model is held in memory: as asked, else as its directory is quantised, or bfloat16."""
    if asked is not None:
        return asked
    config = path / "config.json"
    found = quantized_form(read_json(config), config) if config.exists() else None
    return found or "bfloat16"


def _demand(found: Any, wanted: dict[str, Any], where: Path, place: str) -> None:
    if not isinstance(found, Mapping):
        raise GrowmoeError(f"{where}: {place} is not a JSON object")
    for key, value in wanted.items():
        if found.get(key) is None or (value is not ... and found[key] != value):
            said = "missing" if value is ... else f"{found.get(key)!r}; only {value!r} is read"
            raise GrowmoeError(f"{where}: {place}.{key} is {said}")
