"""The shape of one model, and what a growth, an upcycling or an export makes of it. No torch."""

from pathlib import Path
from typing import Any

from growmoe.errors import UsageError
from growmoe.files import read_json
from growmoe.models.config import ModelConfig
from growmoe.models.families import config_from_hf, pick_family
from growmoe.models.footprint import FORMS, weight_bytes
from growmoe.models.gguf_arch import gguf_kinds, gguf_tensors, kind_bytes
from growmoe.models.gguf_header import gguf_config, read_gguf_header
from growmoe.models.growing import plan_growth
from growmoe.models.stored import LEFT_DTYPE, quantizing_notes, stored_bytes
from growmoe.models.targets import changed_config, export_target
from growmoe.models.upcycling import Upcycling, upcycled_config, why_lossy
from growmoe.planning.origins import growth_origins, origin_table, upcycling_origins
from growmoe.recipe import ExportStage, GrowStage, UpcycleStage


def config_of(path: Path) -> ModelConfig:
    """The shape of the model in a directory, from its config.json alone."""
    if path.suffix == ".gguf":
        return gguf_config(read_gguf_header(path))
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise UsageError(f"{path} holds no config.json, so it is not a model directory")
    return config_from_hf(read_json(file), file)


def describe(config: ModelConfig, context: int | None = None) -> dict[str, Any]:
    """The accounting of one model. FLOPs are those of a forward pass for one token; `bytes_served`
    are the weights in memory, in every form that they can be served in."""
    return {
        "family": pick_family(config),
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "ffn": config.moe.ffn_size if config.moe else config.ffn_size,
        "experts": max(config.moe.experts) if config.moe else 0,
        "top_k": config.moe.top_k if config.moe else 0,
        "vocab": config.vocab_size,
        "params_total": config.params_total(),
        "params_active": config.params_active(),
        "flops_per_token": config.flops_per_token(context),
        "bytes": config.bytes("bfloat16"),
        "bytes_served": {form: sum(weight_bytes(config, form)) for form in FORMS},
        "kv_bytes_per_token": config.kv_bytes_per_token("bfloat16"),
    }


def derived_config(source: ModelConfig, spec: GrowStage | UpcycleStage) -> ModelConfig:
    """The shape that a growth or an upcycling leads to; raises UsageError for an impossible one."""
    if isinstance(spec, UpcycleStage):
        return upcycled_config(source, Upcycling.of(spec))
    return plan_growth(source, spec, vocab_target(spec, source)).config


def exported_config(source: ModelConfig, spec: ExportStage) -> ModelConfig:
    """The shape that an export writes; raises UsageError where the engine cannot run it."""
    target = export_target(source, spec.engine, spec.portable, spec.as_gguf)
    config = changed_config(source, target.steps)
    if spec.quantize:
        quantizing_notes(config, spec.engine)
    return config


def exported_bytes(config: ModelConfig, spec: ExportStage, family: str, dtype: str) -> int:
    """Bytes of the weights that an export writes for `config`, in `dtype` unless quantised."""
    stored = LEFT_DTYPE if spec.quantize else spec.dtype or dtype
    if spec.as_gguf:
        kinds, tensors = gguf_kinds(config, stored, spec.quantize), gguf_tensors(config)
        return sum(kind_bytes(shape, kinds[name]) for name, (shape, _) in tensors.items())
    return stored_bytes(config, family, stored, spec.quantize)


def derivation(source: ModelConfig, spec: GrowStage | UpcycleStage) -> dict[str, Any]:
    """Whether the function is kept and why not, the layers that are copied, and for every kind of
    tensor what it is made from."""
    layers = None
    if isinstance(spec, GrowStage):
        growth = plan_growth(source, spec, vocab_target(spec, source))
        target, lossy = growth.config, list(growth.lossy)
        origins = growth_origins(source, growth)
        layers = list(growth.depth.source) if growth.depth else None
    else:
        up = Upcycling.of(spec)
        target = upcycled_config(source, up)
        assert target.moe is not None
        reason = why_lossy(up, target.moe.experts)
        lossy = [reason] if reason else []
        origins = upcycling_origins(target)
    return {
        "declared_exact": not lossy,
        **({"lossy_because": lossy} if lossy else {}),
        **({"layer_map": layers} if layers else {}),
        "verification": "logits against the source" if spec.verify else "left out: unverified",
        "tensors": origin_table(source, target, origins),
    }


def vocab_target(spec: GrowStage, source: ModelConfig) -> int | None:
    """The vocabulary that a growth leads to when a new tokenizer sets it; None leaves it alone.

    Raises UsageError when the tokenizer has fewer tokens than the model's."""
    if spec.vocab_tokenizer is None:
        return spec.vocab
    from growmoe.data.tokenizer import load_tokenizer

    size = load_tokenizer(Path(spec.vocab_tokenizer)).get_vocab_size()
    wanted = spec.vocab or max(size, source.vocab_size)
    if wanted < size:
        raise UsageError(f"vocab {wanted} cannot hold the {size} tokens of {spec.vocab_tokenizer}")
    return wanted
