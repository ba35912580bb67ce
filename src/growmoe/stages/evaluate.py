"""evaluate: loss per domain, and scores on local task files."""

import math
from pathlib import Path
from typing import Any

from growmoe.artifacts import check_sequences, fitting_corpus, sizes
from growmoe.data.tokenizer import load_tokenizer
from growmoe.errors import UsageError
from growmoe.evaluation.tasks import score
from growmoe.models.checkpoint import load_model, open_source
from growmoe.models.streamed import streamed_logits
from growmoe.recipe import EvaluateStage
from growmoe.training.losses import cross_entropy
from growmoe.training.validation import domain_losses, expert_loads, mean_loss


def run(spec: EvaluateStage, staged: Path | None, work: Path | None) -> dict[str, Any]:
    """Measure; a corpus, a text file and task files can be given together."""
    if spec.data is None and spec.text is None and not spec.tasks:
        raise UsageError("nothing to evaluate on: give a corpus, a text file or task files")
    path = Path(spec.model)
    model = load_model(path)
    result: dict[str, Any] = {**sizes(model.config), "tokens": 0, "flops": 0}
    if spec.data is not None:
        windows = fitting_corpus(path, model.config, spec.data).validation_windows()
        losses = domain_losses(model, windows)
        result["validation"] = losses
        result["loss_after"] = mean_loss(losses)
        result["perplexity"] = {name: math.exp(loss) for name, loss in losses.items()}
        if model.config.moe:
            result["expert_load"] = expert_loads(model, windows)
    if spec.text is not None:
        sequences, _ = check_sequences(path, model.config, spec.text, None, spec.seed)
        logits = streamed_logits(open_source(path), sequences, "float32")
        total = sum(
            float(cross_entropy(x[None, :-1], ids[None, 1:])) * (len(ids) - 1)
            for x, ids in zip(logits, sequences)
        )
        result["text_loss"] = total / sum(len(ids) - 1 for ids in sequences)
        result.setdefault("loss_after", result["text_loss"])
    if spec.tasks:
        tokenizer = load_tokenizer(path)
        result["tasks"] = {
            _task_name(task, spec.tasks): score(model, tokenizer, Path(task), spec.limit)
            for task in spec.tasks
        }
    return result


def _task_name(task: str, tasks: list[str]) -> str:
    """The file's stem; the whole path where two files share one."""
    stems = [Path(other).name.split(".")[0] for other in tasks]
    stem = Path(task).name.split(".")[0]
    return stem if stems.count(stem) == 1 else task
