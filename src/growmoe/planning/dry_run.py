"""What a verb would do and make, worked out without reading a weight. Imports no torch."""

import shutil
from pathlib import Path
from typing import Any

from growmoe.errors import GrowmoeError, UsageError
from growmoe.files import read_json
from growmoe.memory import free_memory
from growmoe.models.config import DTYPE_BYTES, ModelConfig
from growmoe.models.families import pick_family
from growmoe.models.footprint import Wanted, admit, check_device, parse_size
from growmoe.models.gguf_tokenizer import tokenizer_fields
from growmoe.models.safetensors_header import stored_dtype as dtype_of_weights
from growmoe.models.stored import (
    LEFT_DTYPE,
    QuantizedForm,
    quantized_form,
    quantizing_notes,
    serving_form,
    stored_bytes,
    why_rounded,
)
from growmoe.models.targets import changed_config, export_target
from growmoe.ops.library import installed
from growmoe.planning.derived import (
    config_of,
    derivation,
    derived_config,
    describe,
    exported_bytes,
)
from growmoe.planning.recipes import config_to_train
from growmoe.planning.scratch import Spent, scratch_warning, spent_on
from growmoe.recipe import (
    ExportStage,
    GenerateStage,
    GrowStage,
    PrepareStage,
    TrainStage,
    UpcycleStage,
)


def dry_run(spec: Any, out: Path | None = None) -> dict[str, Any]:
    """Shapes in and out, parameters, bytes, FLOPs per token, tensor origins and warnings of one
    stage. Raises UsageError when the stage is impossible or `out` exists."""
    if out is not None and out.exists():
        raise UsageError(f"{out} already exists; choose another output directory or remove it")
    _check_texts(spec)
    plan: dict[str, Any] = {"dry_run": True, "stage": spec.stage}
    if out is not None:
        plan["output"] = str(out)
        plan["disk_free"] = shutil.disk_usage(_existing(out)).free
    if isinstance(spec, GrowStage | UpcycleStage):
        return plan | _derived(spec, plan.get("disk_free"))
    if isinstance(spec, ExportStage):
        return plan | _export(spec)
    if isinstance(spec, TrainStage):
        return plan | _training(spec)
    if isinstance(spec, PrepareStage):
        return plan | _preparing(spec)
    models = [key for key in ("model", "a", "b") if getattr(spec, key, None)]
    for key in models:
        path = Path(getattr(spec, key))
        plan[key] = {"path": str(path), **describe(config_of(path))}
    if isinstance(spec, GenerateStage):
        plan |= _serving(spec)
    for key in ("text", "data", "tasks", "tokens", "prompts", "max_tokens"):
        if getattr(spec, key, None):
            plan[key] = getattr(spec, key)
    return plan


def _serving(spec: GenerateStage) -> dict[str, Any]:
    """Bytes that the model takes while it speaks, on a CPU; raises UsageError when they are not
    free."""
    form = serving_form(Path(spec.model), spec.weights)
    wanted = Wanted(
        form=form, kv_gb=spec.kv_gb, max_sequences=64,
        native=installed(), kv_dtype="float32" if form == "float32" else "bfloat16",
        expert_memory=None if spec.expert_memory is None else parse_size(spec.expert_memory),
    )  # fmt: skip
    check_device(spec.device, form, wanted.expert_memory is not None)
    if spec.device != "cpu":
        return {}
    found = admit(config_of(Path(spec.model)), wanted, free_memory(), spec.model)
    return {"memory": found.report()}


def _check_texts(spec: Any) -> None:
    """Raises UsageError when a text or a corpus that a stage names is not there."""
    text, data = getattr(spec, "text", None), getattr(spec, "data", None)
    if text and ":" not in text and not any(c in text for c in "*?[") and not Path(text).exists():
        raise UsageError(f"{text} does not exist")
    model = Path(getattr(spec, "model", None) or getattr(spec, "a", None) or "x.gguf")
    if text and model.is_dir() and not (model / "tokenizer.json").exists():
        raise UsageError(f"{model} holds no tokenizer.json, so {text} cannot be tokenised")
    if data and not (Path(data) / "manifest.json").exists():
        raise UsageError(f"{data} holds no manifest.json, so it is not a corpus directory")


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def stored_dtype(path: Path) -> str:
    """The dtype of a model's weights, or where there are none the one that its config.json names;
    float32 for GGUF (dequantised) and for none."""
    if path.suffix == ".gguf":
        return "float32"
    if path.is_dir() and (found := dtype_of_weights(path)):
        return found
    raw = read_json(path / "config.json" if path.is_dir() else path)
    name = raw.get("dtype") or raw.get("torch_dtype")
    return name if name in DTYPE_BYTES else "float32"


def _derived(spec: GrowStage | UpcycleStage, free: int | None) -> dict[str, Any]:
    path = Path(spec.model)
    source = config_of(path)
    dtype = spec.dtype or stored_dtype(path)
    target = derived_config(source, spec)
    before, after = _stored_shape(path, source), _shape(target, dtype)
    warnings = []
    if free is not None and after["bytes_on_disk"] > free:
        warnings.append(f"only {free >> 20} MiB are free where {after['bytes_on_disk'] >> 20} go")
    if target.moe is not None:
        said = spec.pretrained_tokens
        warnings += scratch_warning(spent_on(path, source, said), Spent(), str(path))
    return {
        "in": {"path": str(path), **before},
        "out": after,
        "warnings": warnings,
        **derivation(source, spec),
    }


def _export(spec: ExportStage) -> dict[str, Any]:
    path = Path(spec.model)
    source = config_of(path)
    target = export_target(source, spec.engine, spec.portable, spec.as_gguf)
    dtype = stored_dtype(path)
    config = changed_config(source, target.steps)
    after = _shape(config, spec.dtype or dtype, target.family)
    after["family"] = "gguf" if spec.as_gguf else target.family
    after["bytes_on_disk"] = exported_bytes(config, spec, target.family, dtype)
    notes, lossy = target.notes, []
    if spec.quantize:
        after["dtype"], lossy = spec.quantize, [why_rounded(spec.quantize)]
        notes += quantizing_notes(config, spec.engine)
    if spec.as_gguf and (path / "tokenizer.json").exists():
        tokenizer_fields(path, source)  # refuses one that llama.cpp would read otherwise
    return {
        "in": {"path": str(path), **_stored_shape(path, source)}, "out": after,
        "declared_exact": not lossy, **({"lossy_because": lossy} if lossy else {}),
        "changes_of_form": list(target.steps),
        "verification": "reloaded and compared" if spec.verify else "left out: unverified",
        "warnings": list(notes),
    }  # fmt: skip


def _shape(
    config: ModelConfig, dtype: str, family: str | None = None, form: QuantizedForm | None = None
) -> dict[str, Any]:  # fmt: skip
    found = describe(config)
    del found["bytes"]
    size = stored_bytes(config, family or pick_family(config), dtype, form)
    return {**found, "dtype": form or dtype, "bytes_on_disk": size}


def _stored_shape(path: Path, config: ModelConfig) -> dict[str, Any]:
    """The shape of a model that is there."""
    file, form = path / "config.json" if path.is_dir() else path, None
    if path.suffix != ".gguf":
        form = quantized_form(read_json(file), file)
    return _shape(config, LEFT_DTYPE if form else stored_dtype(path), None, form)


def _training(spec: TrainStage) -> dict[str, Any]:
    config = config_to_train(spec)
    tokens = spec.steps * spec.tokens_per_step
    flops = 3 * tokens * config.flops_per_token(spec.sequence_length)
    # weights, gradients and two moments in float32
    memory = 16 * config.params_total()
    warnings = []
    if spec.model is not None and config.moe is not None:
        before = spent_on(Path(spec.model), config, spec.pretrained_tokens)
        warnings = scratch_warning(before, Spent(moe_tokens=tokens, moe_flops=flops), spec.model)
    return {
        "out": _shape(config, "float32"), "steps": spec.steps, "tokens": tokens, "flops": flops,
        "state_bytes": memory, "warnings": warnings,
    }  # fmt: skip


def _preparing(spec: PrepareStage) -> dict[str, Any]:
    sources = []
    for source in spec.sources:
        path = Path(source.path)
        found: dict[str, Any] = {"name": source.name, "path": source.path, "weight": source.weight}
        if path.is_file():
            found["bytes"] = path.stat().st_size
        elif path.is_dir():
            files = [file for file in path.rglob("*") if file.is_file()]
            found |= {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
        elif ":" not in source.path and not any(c in source.path for c in "*?["):
            raise GrowmoeError(f"source {source.name}: {source.path} does not exist")
        sources.append(found)
    return {"sources": sources, "tokenizer": spec.tokenizer.model_dump(exclude_none=True)}
