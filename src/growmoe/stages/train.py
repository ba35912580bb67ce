"""train: a new model from a corpus, or an existing one further."""

import shutil
from pathlib import Path
from typing import Any

from growmoe.artifacts import fitting_corpus, history, lineage_of, sizes
from growmoe.data.corpus import Corpus
from growmoe.errors import UsageError
from growmoe.models.checkpoint import copy_tokenizer, load_model, save_model
from growmoe.models.config import ModelConfig
from growmoe.models.lineage import write_lineage
from growmoe.models.presets import preset
from growmoe.models.transformer import Transformer
from growmoe.planning.recipes import check_context, initial_config
from growmoe.recipe import TrainStage
from growmoe.training.trainer import Trainer
from growmoe.training.validation import mean_loss


def run(spec: TrainStage, staged: Path, work: Path) -> dict[str, Any]:
    """Train, then write the model; metrics and checkpoints stay in `work`."""
    corpus = Corpus(Path(spec.data))
    model = _model(spec, corpus)
    check_context(spec, model.config)
    trainer = Trainer(model, corpus, spec, work)
    outcome = trainer.train()
    save_model(staged, model, "float32")
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
