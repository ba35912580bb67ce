"""The training loop: batches in, steps, validation, metrics, checkpoints, resume.

The caller gives a model, a corpus and a run directory; parallelism would be applied to the model
before it comes here.
"""

import hashlib
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from growmoe.data.corpus import Corpus
from growmoe.data.loader import Loader
from growmoe.errors import GrowmoeError
from growmoe.files import write_text
from growmoe.models.transformer import Transformer
from growmoe.progress import Progress
from growmoe.recipe import TrainStage
from growmoe.training.losses import Losses, LossWeights, language_model_loss
from growmoe.training.observing import gradient_groups, gradient_norms
from growmoe.training.optimizer import learning_rate, make_optimizer
from growmoe.training.resume import Position, load_checkpoint, save_checkpoint
from growmoe.training.routing import RoutingControl
from growmoe.training.start import Newcomers, Start
from growmoe.training.validation import domain_losses, expert_loads, mean_loss


class Interrupted(GrowmoeError):
    """Ctrl-C: the state is saved and the same command continues."""

    exit_code = 130


@dataclass(frozen=True)
class Outcome:
    """What a finished run did. Losses are validation losses by domain, in nats per token."""

    steps: int
    tokens: int
    seconds: float
    before: dict[str, float]
    after: dict[str, float]
    expert_load: list[list[float]]


def native_bfloat16() -> bool:
    """Whether this processor, on which the loop runs, multiplies bfloat16 in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Trainer:
    """Trains `model` on `corpus` as `spec` says, leaving metrics and checkpoints in `run`; `start`
    is what the optimizer begins with."""

    def __init__(
        self, model: Transformer, corpus: Corpus, spec: TrainStage, run: Path,
        start: Start | None = None,
    ) -> None:  # fmt: skip
        self.model, self.spec, self.run_dir = model.train(), spec, run
        start = start or Start()
        self.loader = Loader(corpus, spec.sequence_length, spec.seed, spec.weights)
        self.windows = corpus.validation_windows()
        self.optimizer = make_optimizer(model, spec.optimizer)
        parameters = dict(model.named_parameters())
        for name, state in start.state.items():
            self.optimizer.state[parameters[name]].update(state)
        self.newcomers = Newcomers(model, start, spec.optimizer, spec.steps)
        losses = spec.losses
        self.weights = LossWeights(losses.balance, losses.balance_scope, {**losses.z})
        self.routing = RoutingControl(model, spec)
        self.groups = gradient_groups(model)
        model.recompute = spec.activation_checkpointing
        wants = spec.dtype == "bfloat16" or (spec.dtype == "auto" and native_bfloat16())
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=wants)
        self.dtype = "bfloat16" if wants else "float32"
        self.fingerprint = _fingerprint(spec, corpus, model, self.dtype, start)
        self.metrics_path = run / "metrics.jsonl"
        self._stop = False

    def train(self) -> Outcome:
        """Run all steps, continuing from the newest checkpoint of this run if there is one.

        Raises Interrupted after Ctrl-C (state saved) and GrowmoeError when the loss is not finite.
        """
        spec = self.spec
        self.run_dir.mkdir(parents=True, exist_ok=True)
        position = self._resume()
        if position.step == 0:
            torch.manual_seed(spec.seed)  # jitter; a checkpoint holds the state that follows
            self._log(self._validation(position), truncate=True)
        records = self._records()
        if not records or records[0]["step"] != 0:
            raise GrowmoeError(f"{self.metrics_path} has lost its beginning; remove {self.run_dir}")
        before = records[0]["validation"]
        progress = Progress(spec.name, spec.steps * spec.tokens_per_step, "tokens")
        progress.update(position.tokens)
        started = time.monotonic() - position.seconds
        with self._catch_interrupt():
            for step in range(position.step, spec.steps):
                record = self._step(step)
                tokens = (step + 1) * spec.tokens_per_step
                seconds = time.monotonic() - started
                record |= {"step": step + 1, "tokens": tokens, "seconds": round(seconds, 3)}
                position = Position(step + 1, tokens, seconds, self.fingerprint)
                last = step + 1 == spec.steps
                if (step + 1) % spec.validate_every == 0 or last:
                    record |= self._validation(position)
                self._log(record)
                progress.update(tokens, _note(record))
                due = (step + 1) % spec.checkpoint_every == 0
                if due or last or self._stop:
                    self._save(position)
                if self._stop and not last:
                    progress.finish("stopped")
                    raise Interrupted(
                        f"stopped after step {step + 1} of {spec.steps}; the same command continues"
                    )
        final = self._records()[-1]
        progress.finish(f"validation {mean_loss(final['validation']):.4f}")
        return Outcome(
            spec.steps, position.tokens, position.seconds, before, final["validation"],
            final.get("expert_load", []),
        )  # fmt: skip

    def _step(self, step: int) -> dict[str, Any]:
        """One optimizer step; returns its metrics."""
        rate = learning_rate(step, self.spec.steps, self.spec.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, float] = {}
        self.routing.begin(step)
        for _ in range(self.spec.accumulation):
            losses = self._forward_backward()
            parts = {"loss": losses.cross_entropy, "balance": losses.balance}
            parts |= {f"z_{kind}": value for kind, value in losses.z.items()}
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + float(value) / self.spec.accumulation
        norms = gradient_norms(self.groups)
        norm = nn.utils.get_total_norm(list(norms.values()))
        if not torch.isfinite(norm):
            raise GrowmoeError(
                f"the gradient is not finite at step {step + 1} (loss {sums['loss']}); lower "
                "optimizer.lr; the last checkpoint is untouched"
            )
        nn.utils.clip_grads_with_norm_(
            self.model.parameters(), self.spec.optimizer.clip, norm
        )  # fmt: skip
        with self.newcomers.paced(step):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        record: dict[str, Any] = {**sums, "lr": rate, "grad_norm": float(norm)}
        record["grad_norms"] = {name: round(float(value), 6) for name, value in norms.items()}
        return record | self.routing.end()

    def _forward_backward(self) -> Losses:
        batch = torch.from_numpy(self.loader.next_batch(self.spec.batch_size))
        with self.autocast:
            output = self.model(batch[:, :-1])
        seen = self.routing.forward(output.routing)
        losses = language_model_loss(output, batch[:, 1:], self.weights, seen)
        (losses.total / self.spec.accumulation).backward()
        self.routing.backward(output.routing)
        return losses

    def _validation(self, position: Position) -> dict[str, Any]:
        losses = domain_losses(self.model, self.windows)
        record: dict[str, Any] = {
            "step": position.step, "tokens": position.tokens, "validation": losses
        }  # fmt: skip
        if self.model.config.moe:
            record["expert_load"] = expert_loads(self.model, self.windows)
            record["experts"] = self.routing.experts()
        return record

    # ---- state on disk ----

    def _resume(self) -> Position:
        folder = self.run_dir / "checkpoints"
        position = load_checkpoint(folder, self.model, self.optimizer, self.routing)
        if position is None:
            return Position(0, 0, 0.0, self.fingerprint)
        if position.fingerprint != self.fingerprint:
            raise GrowmoeError(
                f"{folder} belongs to a run with other options or another corpus; remove "
                f"{self.run_dir} to start over"
            )
        self.loader.skip(position.step * self.spec.batch_size * self.spec.accumulation)
        # steps that were logged after the checkpoint will be done again
        kept = [record for record in self._records() if record["step"] <= position.step]
        write_text(self.metrics_path, "".join(json.dumps(record) + "\n" for record in kept))
        return position

    def _save(self, position: Position) -> None:
        folder = self.run_dir / "checkpoints"
        try:
            save_checkpoint(folder, self.model, self.optimizer, position, self.routing)
        except (OSError, SafetensorError) as error:
            raise GrowmoeError(
                f"cannot write a checkpoint in {folder}: {error}; the one before is untouched"
            ) from None

    def _records(self) -> list[dict[str, Any]]:
        return read_metrics(self.metrics_path)

    def _log(self, record: dict[str, Any], truncate: bool = False) -> None:
        with open(self.metrics_path, "w" if truncate else "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    @contextmanager
    def _catch_interrupt(self) -> Iterator[None]:
        """Turn the first Ctrl-C into a stop after the current step; the second one is immediate."""

        def on_signal(number: int, frame: Any) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        try:
            old = signal.signal(signal.SIGINT, on_signal)
        except ValueError:  # not the main thread
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, old)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl; a last line cut by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def _fingerprint(
    spec: TrainStage, corpus: Corpus, model: Transformer, dtype: str, start: Start
) -> str:
    """Equal for runs whose steps are the same: start, all options, and the corpus's content."""
    ignored = {
        "name", "data", "dtype", "checkpoint_every", "pretrained_tokens", "keep_optimizer",
    }  # fmt: skip
    options = spec.model_dump(mode="json", exclude=ignored)
    text = json.dumps([options, dtype, corpus.manifest.get("hash")], sort_keys=True)
    digest = hashlib.sha256(text.encode())
    sampled: dict[str, torch.Tensor] = dict(
        model.named_parameters()
    )  # a sample of what it starts from
    for kind in ("step", "exp_avg", "exp_avg_sq"):
        sampled |= {f"{name}/{kind}": state[kind] for name, state in start.state.items()}
    for kind, masks in (("new", start.new), ("blank", start.blank)):
        sampled |= {f"{name}/{kind}": mask for name, mask in masks.items()}
    for name, tensor in sampled.items():
        flat = tensor.detach().reshape(-1)
        digest.update(name.encode() + flat[:: flat.numel() // 4096 + 1].numpy().tobytes())
    return digest.hexdigest()


def _note(record: dict[str, Any]) -> str:
    note = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}"
    if record["balance"]:
        note += f"  balance {record['balance']:.3f}"
    if "validation" in record:
        note += f"  validation {mean_loss(record['validation']):.4f}"
    return note
