"""The shape of every model in a recipe, worked out before anything runs. Imports no torch."""

import dataclasses
from pathlib import Path
from typing import Any

from growmoe.errors import GrowmoeError, UsageError
from growmoe.files import read_json
from growmoe.models.config import ModelConfig, MoEConfig
from growmoe.models.families import pick_family
from growmoe.models.presets import preset
from growmoe.models.stored import LEFT_DTYPE
from growmoe.models.upcycling import expert_counts
from growmoe.planning.derived import (
    config_of,
    derivation,
    derived_config,
    describe,
    exported_bytes,
    exported_config,
)
from growmoe.planning.scratch import Spent, scratch_warning, spent_on
from growmoe.recipe import (
    ExportStage,
    GrowStage,
    InitModel,
    InitMoE,
    PrepareStage,
    Recipe,
    RoutingModel,
    TrainStage,
    UpcycleStage,
)

ModelStage = TrainStage | GrowStage | UpcycleStage | ExportStage


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
        moe=_initial_moe(init, init.moe) if init.moe else None,
    )


def _initial_moe(init: InitModel, moe: InitMoE) -> MoEConfig:
    several = moe.top_k > 1
    return MoEConfig(
        experts=expert_counts(init.num_layers, moe.experts, moe.layers, moe.pyramid),
        top_k=moe.top_k,
        ffn_size=moe.ffn_size or init.ffn_size,
        renormalize=several if moe.renormalize is None else moe.renormalize,
        scoring=moe.scoring,
        selection_bias=moe.selection_bias,
        groups=moe.groups,
        top_groups=moe.top_groups,
        mix=moe.residual,
        fixed_ffn_size=(moe.fixed_ffn_size or init.ffn_size) if moe.residual != "none" else 0,
    )


def trained_config(stage: TrainStage, config: ModelConfig) -> ModelConfig:
    """The shape while and after training: balancing by bias gives every router one.

    Raises UsageError for routing options of a model without routers, and for sequences that are
    longer than the model's context.
    """
    asked = [key for key, value in stage.routing if value != getattr(RoutingModel(), key)]
    if config.moe is None and asked:
        raise UsageError(f"routing.{asked[0]} is for models with experts")
    if stage.sequence_length > config.max_positions:
        raise UsageError(
            f"sequence_length {stage.sequence_length} is longer than the model's context of "
            f"{config.max_positions}"
        )
    if config.moe is None or not stage.routing.bias_rate or config.moe.selection_bias:
        return config
    return config.replace(moe=dataclasses.replace(config.moe, selection_bias=True), family="")


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
        if isinstance(stage, ModelStage):
            try:
                _check_moments(stage, recipe)
                config = _config_after(stage, configs, vocabs)
            except GrowmoeError as error:
                problems.append(f"{recipe.where(index)}: {error}")
                config = None
            configs[stage.name] = config
            if config is not None:
                context = stage.sequence_length if isinstance(stage, TrainStage) else None
                entry |= describe(config, context)
                if isinstance(stage, ExportStage) and stage.quantize:
                    family = pick_family(config)
                    entry["bytes"] = exported_bytes(config, stage, family, LEFT_DTYPE)
                if isinstance(stage, GrowStage | UpcycleStage):
                    source = _source_of(stage, configs)
                    assert source is not None
                    entry |= derivation(source, stage)
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


def _check_moments(stage: ModelStage, recipe: Recipe) -> None:
    """Raises UsageError when a train stage wants moments that no earlier stage will leave."""
    if not isinstance(stage, TrainStage) or stage.optimizer.state == "reset":
        return
    stages: dict[str, Any] = {other.name: other for other in recipe.stages}
    before = stages.get(stage.model or "")
    while isinstance(before, GrowStage | UpcycleStage):
        before = stages.get(before.model)
    if isinstance(before, TrainStage) and not before.keep_optimizer:
        raise UsageError(
            f"optimizer.state {stage.optimizer.state} needs the moments of stage "
            f"'{before.name}', which leaves none; give it keep_optimizer: true"
        )


def _spent_before(
    stage: ModelStage, spent: dict[str, Spent],
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
    stage: ModelStage,
    configs: dict[str, ModelConfig | None],
    vocabs: dict[str, int],
) -> ModelConfig | None:
    if isinstance(stage, TrainStage) and stage.model is None:
        if stage.preset is not None:
            return trained_config(stage, preset(stage.preset))
        assert stage.init is not None
        vocab = vocabs.get(stage.data) or _corpus_vocab(stage.data)
        return trained_config(stage, initial_config(stage.init, vocab))
    source = _source_of(stage, configs)
    if source is None:
        return None
    if isinstance(stage, TrainStage):
        return trained_config(stage, source)
    if isinstance(stage, ExportStage):
        return exported_config(source, stage)
    return derived_config(source, stage)


def _source_of(stage: ModelStage, configs: dict[str, ModelConfig | None]) -> ModelConfig | None:
    """The shape of the model that a stage starts from; None when it is impossible itself."""
    assert stage.model is not None
    return configs[stage.model] if stage.model in configs else config_of(Path(stage.model))


def _vocab_of(stage: PrepareStage) -> int:
    """Size of the tokenizer that a prepare stage trains or is given."""
    given = stage.tokenizer.path
    if given is None or not Path(given).exists():
        return stage.tokenizer.vocab_size
    from growmoe.data.tokenizer import load_tokenizer

    return load_tokenizer(Path(given)).get_vocab_size()


def _corpus_vocab(path: str) -> int:
    return int(read_json(Path(path) / "manifest.json")["tokenizer"]["vocab_size"])
