"""The shape of every model in a recipe, worked out before anything runs. Imports no torch."""

from pathlib import Path
from typing import Any

from growmoe.errors import GrowmoeError, UsageError
from growmoe.files import read_json
from growmoe.models.config import ModelConfig
from growmoe.models.families import config_from_hf, pick_family
from growmoe.models.gguf_header import gguf_config, read_gguf_header
from growmoe.models.growing import plan_growth
from growmoe.models.presets import preset
from growmoe.models.upcycling import Upcycling, upcycled_config
from growmoe.planning.scratch import Spent, scratch_warning, spent_on
from growmoe.recipe import (
    GrowStage,
    InitModel,
    PrepareStage,
    Recipe,
    TrainStage,
    UpcycleStage,
)


def initial_config(init: InitModel, vocab_size: int) -> ModelConfig:
    """A new model for a tokenizer of `vocab_size` tokens; the table is padded to 64 rows."""
    plain = init.activation == "gelu"
    return ModelConfig(
        vocab_size=-(-vocab_size // 64) * 64,
        hidden_size=init.hidden_size,
        num_layers=init.num_layers,
        num_heads=init.num_heads,
        num_kv_heads=init.num_kv_heads or init.num_heads,
        head_dim=init.head_dim or init.hidden_size // init.num_heads,
        ffn_size=init.ffn_size,
        max_positions=init.max_positions,
        norm=init.norm,
        positions=init.positions,
        activation=init.activation,
        rope_theta=init.rope_theta,
        qkv_bias=init.qkv_bias or plain,
        o_bias=plain,
        mlp_bias=plain,
        qk_norm=init.qk_norm,
        tied_head=init.tied_head,
        init_std=init.init_std,
    )


def config_of(path: Path) -> ModelConfig:
    """The shape of the model in a directory, from its config.json alone."""
    if path.suffix == ".gguf":
        return gguf_config(read_gguf_header(path))
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise UsageError(f"{path} holds no config.json, so it is not a model directory")
    return config_from_hf(read_json(file), file)


def describe(config: ModelConfig, context: int | None = None) -> dict[str, Any]:
    """The accounting of one model. FLOPs are those of a forward pass for one token."""
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
        "kv_bytes_per_token": config.kv_bytes_per_token("bfloat16"),
    }


def plan_recipe(recipe: Recipe) -> list[dict[str, Any]]:
    """One entry per stage with what it will make, and `warnings`. Raises UsageError with every
    impossible step; stages that build on an impossible one are left out."""
    configs: dict[str, ModelConfig | None] = {}
    vocabs: dict[str, int] = {}
    spent: dict[str, Spent] = {}
    plan = []
    problems = []
    for index, stage in enumerate(recipe.stages):
        entry: dict[str, Any] = {"stage": stage.stage, "name": stage.name}
        if isinstance(stage, PrepareStage):
            vocabs[stage.name] = _vocab_of(stage)
        if isinstance(stage, TrainStage | GrowStage | UpcycleStage):
            try:
                config = _config_after(stage, configs, vocabs)
            except GrowmoeError as error:
                problems.append(f"{recipe.where(index)}: {error}")
                config = None
            configs[stage.name] = config
            if config is not None:
                context = stage.sequence_length if isinstance(stage, TrainStage) else None
                entry |= describe(config, context)
                before = _spent_before(stage, spent, configs)
                spent[stage.name] = before
                if isinstance(stage, TrainStage):
                    entry["tokens"] = stage.steps * stage.tokens_per_step
                    entry["flops"] = 3 * entry["tokens"] * entry["flops_per_token"]
                    moe = config.moe is not None
                    after = before.trained(entry["tokens"], entry["flops"], moe)
                    spent[stage.name] = after
                    if moe and stage.model is not None:
                        entry["warnings"] = scratch_warning(after, Spent(), stage.model)
        plan.append(entry)
    if problems:
        raise UsageError("\n".join(problems))
    return plan


def _spent_before(
    stage: TrainStage | GrowStage | UpcycleStage, spent: dict[str, Spent],
    configs: dict[str, ModelConfig | None],
) -> Spent:  # fmt: skip
    """What the model that a stage starts from has cost."""
    if stage.model is None:
        return Spent()
    said, earlier = stage.pretrained_tokens, configs.get(stage.model)
    if earlier is None:
        path = Path(stage.model)
        return spent_on(path, config_of(path), said)
    before = spent.get(stage.model, Spent())
    return before if said is None else before.with_dense(said, earlier)


def config_to_train(stage: TrainStage) -> ModelConfig:
    """The shape that a train stage starts with, when it stands alone."""
    config = _config_after(stage, {}, {})
    assert config is not None
    return config


def _config_after(
    stage: TrainStage | GrowStage | UpcycleStage,
    configs: dict[str, ModelConfig | None],
    vocabs: dict[str, int],
) -> ModelConfig | None:
    if isinstance(stage, TrainStage) and stage.model is None:
        if stage.preset is not None:
            return check_context(stage, preset(stage.preset))
        assert stage.init is not None
        vocab = vocabs.get(stage.data) or _corpus_vocab(stage.data)
        return check_context(stage, initial_config(stage.init, vocab))
    assert stage.model is not None
    source = configs[stage.model] if stage.model in configs else config_of(Path(stage.model))
    if source is None:
        return None
    if isinstance(stage, TrainStage):
        return check_context(stage, source)
    if isinstance(stage, UpcycleStage):
        return upcycled_config(source, Upcycling.of(stage))
    return plan_growth(source, stage, vocab_target(stage, source)).config


def check_context(stage: TrainStage, config: ModelConfig) -> ModelConfig:
    """Raises UsageError when the training sequences are longer than the model's context."""
    if stage.sequence_length > config.max_positions:
        raise UsageError(
            f"sequence_length {stage.sequence_length} is longer than the model's context of "
            f"{config.max_positions}"
        )
    return config


def _vocab_of(stage: PrepareStage) -> int:
    """Size of the tokenizer that a prepare stage trains or is given."""
    given = stage.tokenizer.path
    if given is None or not Path(given).exists():
        return stage.tokenizer.vocab_size
    from growmoe.data.tokenizer import load_tokenizer

    return load_tokenizer(Path(given)).get_vocab_size()


def _corpus_vocab(path: str) -> int:
    return int(read_json(Path(path) / "manifest.json")["tokenizer"]["vocab_size"])


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
