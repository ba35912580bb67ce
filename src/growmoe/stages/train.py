"""train: a new model from a corpus, or an existing one further."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growmoe.artifacts import fitting_corpus, history, lineage_of, sizes
from growmoe.data.corpus import Corpus
from growmoe.errors import UsageError
from growmoe.growth.inherit import Inherited, Step, ancestry, carried, known
from growmoe.models.checkpoint import (
    Source,
    copy_tokenizer,
    load_into,
    load_model,
    named_views,
    open_source,
    save_model,
)
from growmoe.models.config import ModelConfig, tensor_shapes
from growmoe.models.lineage import write_lineage
from growmoe.models.presets import preset
from growmoe.models.safetensors_io import TensorFile
from growmoe.models.transformer import Transformer, adopt
from growmoe.planning.recipes import initial_config, trained_config
from growmoe.recipe import TrainStage
from growmoe.training.memory import keep_freed_memory
from growmoe.training.resume import MOMENTS, save_moments
from growmoe.training.start import Start
from growmoe.training.trainer import Trainer
from growmoe.training.validation import mean_loss


def run(spec: TrainStage, staged: Path, work: Path) -> dict[str, Any]:
    """Train, then write the model; metrics and checkpoints stay in `work`."""
    keep_freed_memory()
    corpus = Corpus(Path(spec.data))
    model = _model(spec, corpus)
    adopt(model, trained_config(spec, model.config))
    trainer = Trainer(model, corpus, spec, work, start_of(spec, model))
    outcome = trainer.train()
    save_model(staged, model, "float32")
    if spec.keep_optimizer:
        save_moments(staged, model, trainer.optimizer, model.config)
    own = Path(spec.model) if spec.model else corpus.path
    tokenizer_home = own if (own / "tokenizer.json").exists() else corpus.path
    copy_tokenizer(tokenizer_home, staged)
    parent = lineage_of(Path(spec.model)) if spec.model else {}
    flops = 3 * outcome.tokens * model.config.flops_per_token(spec.sequence_length)
    source = spec.model or spec.preset or "random weights"
    write_lineage(
        staged,
        {
            "name": spec.name,
            "operation": "train",
            "parent": source,
            "options": spec.model_dump(mode="json", exclude_none=True),
            "checks": {"validation_before": outcome.before, "validation_after": outcome.after},
            "corpus_hash": corpus.manifest["hash"],
            "arithmetic": trainer.dtype,
            "tokens_total": parent.get("tokens_total", 0) + outcome.tokens,
            "flops_total": parent.get("flops_total", 0) + flops,
            **({"dense_spent": parent["dense_spent"]} if "dense_spent" in parent else {}),
            "history": history(parent, "train", source, exact=False),
        },
    )
    return {
        **sizes(model.config),
        "tokens": outcome.tokens,
        "flops": flops,
        "loss_before": mean_loss(outcome.before),
        "loss_after": mean_loss(outcome.after),
        "seconds": outcome.seconds,
        "validation_before": outcome.before,
        "validation_after": outcome.after,
        "expert_load": outcome.expert_load,
        "arithmetic": trainer.dtype,
    }


def after_publish(work: Path) -> None:
    """The model is safe on disk: its checkpoints are no longer needed, its metrics are."""
    shutil.rmtree(work / "checkpoints", ignore_errors=True)


def _model(spec: TrainStage, corpus: Corpus) -> Transformer:
    if spec.model is None:
        config = _new_config(spec, corpus)
        model = Transformer(config)
        model.init_weights(spec.seed)
        return model
    path = Path(spec.model)
    if path.suffix == ".gguf":
        raise UsageError(
            f"{path}: training starts from a model directory; grow or upcycle it first"
        )
    model = load_model(path)
    fitting_corpus(path, model.config, spec.data)
    return model


def _new_config(spec: TrainStage, corpus: Corpus) -> ModelConfig:
    ids = {"eos_token_id": corpus.end_of_text, "pad_token_id": corpus.end_of_text}
    if spec.preset is not None:
        config = preset(spec.preset)
        if corpus.vocab_size > config.vocab_size:
            raise UsageError(
                f"{corpus.path} was tokenised with {corpus.vocab_size} tokens, but preset "
                f"{spec.preset} has {config.vocab_size}"
            )
        return config.replace(token_ids=ids)
    assert spec.init is not None
    return initial_config(spec.init, corpus.vocab_size).replace(token_ids=ids)


def start_of(spec: TrainStage, model: Transformer) -> Start:
    """What the optimizer of `model`, loaded from `spec.model`, begins with.

    Raises UsageError where there are no moments to begin with, or nothing is new.
    """
    policy = spec.optimizer
    if spec.model is None or (policy.state == "reset" and not policy.new_warmup):
        return Start()
    base, steps = ancestry(Path(spec.model))
    if policy.new_warmup and not steps:
        raise UsageError(
            f"optimizer.new_warmup is for a grown model, but nothing is new in {spec.model}"
        )
    if policy.state != "reset" and not (base / MOMENTS).is_file():
        raise UsageError(
            f"optimizer.state: {policy.state} needs the moments of {base}; train it with "
            "keep_optimizer: true"
        )
    config = open_source(base).config
    inherited = carried(known(config), steps)
    if tensor_shapes(inherited.config) != tensor_shapes(model.config):
        raise UsageError(
            f"{base} has changed: {spec.model} was not grown from a model of its shape"
        )
    new = _zeros(model, inherited)
    if policy.new_warmup and not new:
        raise UsageError(f"optimizer.new_warmup: no element of {spec.model} is new since {base}")
    if policy.state == "reset":
        return Start(new=new)
    copies = policy.state == "copy"
    blank = _zeros(model, carried(known(config), steps, copies=True)) if copies else new
    state = _moments(model, base / MOMENTS, config, steps, copies)
    return Start(state, new, {name: mask for name, mask in blank.items() if name in state})


def _zeros(model: Transformer, source: Source) -> dict[str, Tensor]:
    """Masks of the parameters of `model` that have elements where `source` is not 1."""
    masks = {}
    for name, parameter in model.named_parameters():
        mask = torch.zeros(parameter.shape, dtype=torch.bool)
        views = named_views([(name, mask)], model.config)
        load_into(dict(views), lambda view: source.load(view) < 1)
        if mask.any():
            masks[name] = mask
    return masks


def _moments(
    model: Transformer, path: Path, config: ModelConfig, steps: list[Step], copies: bool
) -> dict[str, dict[str, Tensor]]:
    """AdamW's state by parameter. One that inherits nothing gets none: it counts from its own
    beginning."""
    file, shapes = TensorFile(path), tensor_shapes(config)

    def moments(kind: str, power: int) -> Source:
        def load(name: str) -> Tensor:
            stored = f"{name}/{kind}"
            return file.read(stored) if stored in file else torch.zeros(shapes[name])

        return carried(Inherited(config, load), steps, copies=copies, power=power)

    def count(name: str) -> Tensor:
        stored = f"{name}/step"
        value = file.read(stored) if stored in file else torch.zeros(1)
        return value.expand(shapes[name])

    sources = {
        "exp_avg": moments("exp_avg", 1),
        "exp_avg_sq": moments("exp_avg_sq", 2),
        "step": carried(Inherited(config, count), steps, copies=copies),
    }
    state: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        found = {}
        for kind, source in sources.items():
            found[kind] = torch.zeros_like(parameter, requires_grad=False)
            load_into(dict(named_views([(name, found[kind])], model.config)), source.load)
        found["step"] = found["step"].max()
        if found["step"] > 0:
            state[name] = found
    return state
