"""The loop: golden losses, kill -9 at any moment, Ctrl-C, losses and schedules by formula."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, growmoe, tiny_config, tiny_model, write_tiny
from growmoe.data.corpus import Corpus, ShardWriter, token_dtype
from growmoe.errors import GrowmoeError
from growmoe.files import write_json
from growmoe.models.checkpoint import load_model, parameter_views
from growmoe.models.config import MoEConfig
from growmoe.models.router import Routing
from growmoe.models.transformer import Output, Transformer
from growmoe.recipe import OptimizerModel, TrainStage
from growmoe.training.losses import LossWeights, balance_loss, language_model_loss, z_loss
from growmoe.training.optimizer import learning_rate, make_optimizer
from growmoe.training.trainer import Trainer, read_metrics
from growmoe.training.validation import domain_losses

MOE = MoEConfig(experts=(0, 4, 4), top_k=2, ffn_size=24)


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus of token ids made by a rule, so that golden losses depend on no tokenizer."""
    out = tmp_path_factory.mktemp("counting")
    rng = np.random.default_rng(0)
    entries = []
    for number, name in enumerate(("up", "down")):
        tokens = {}
        for split, documents in (("train", 80), ("validation", 8)):
            (out / split).mkdir(exist_ok=True)
            writer = ShardWriter(out / split, name, token_dtype(97), 10**6)
            for _ in range(documents):
                start = int(rng.integers(0, 96))
                step = 1 + number
                writer.add([(start + step * i) % 96 for i in range(40)] + [96])
            writer.close()
            tokens[split] = writer.tokens
        entries.append({"name": name, "weight": 1.0, "tokens": tokens})
    write_json(
        out / "manifest.json",
        {
            "hash": "counting",
            "tokenizer": {"vocab_size": 97, "end_of_text_id": 96},
            "validation": {"fraction": 0.1, "length": 20, "tokens": 200},
            "sources": entries,
        },
    )
    return Corpus(out)


def spec(**changes) -> TrainStage:
    base = {
        "stage": "train", "model": "x", "data": "x", "tokens": 12 * 4 * 20, "sequence_length": 20,
        "batch_size": 4, "dtype": "float32", "validate_every": 4, "checkpoint_every": 5,
        "optimizer": {"lr": 1e-2, "warmup": 0.2},
    }  # fmt: skip
    return TrainStage(**{**base, **changes})


def fresh(seed: int = 0, **changes) -> Transformer:
    model = Transformer(tiny_config(**changes))
    model.init_weights(seed)
    return model


GOLDEN = {
    "dense": [4.57715, 4.52641, 4.37646, 4.3615, 4.38378, 4.3088],
    "moe": [4.58685, 4.53812, 4.37381, 4.2827, 4.24964, 4.23708],
}


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_golden_losses(kind: str, counting: Corpus, tmp_path: Path) -> None:
    """Committed losses of a seeded run: any change of the arithmetic shows here."""
    model = fresh(moe=MOE if kind == "moe" else None)
    Trainer(model, counting, spec(), tmp_path / "run").train()
    losses = [r["loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert len(losses) == 12
    assert losses[:6] == pytest.approx(GOLDEN[kind], abs=2e-4)


def test_training_learns_the_rule(counting: Corpus, tmp_path: Path) -> None:
    model = fresh(moe=MOE)
    outcome = Trainer(model, counting, spec(tokens=400 * 80), tmp_path / "run").train()
    assert outcome.before["up"] == pytest.approx(np.log(97), abs=0.1)
    assert max(outcome.after.values()) < 1.5
    assert len(outcome.expert_load) == 2
    assert sum(outcome.expert_load[0]) == pytest.approx(1)


def test_accumulation_equals_a_larger_batch(counting: Corpus, tmp_path: Path) -> None:
    """Step by step; not weight by weight, because AdamW makes a step of the rounding of a gradient
    that is nearly zero."""
    results = []
    for name, sizes in (("one", (4, 1)), ("two", (2, 2))):
        changes = {"batch_size": sizes[0], "accumulation": sizes[1]}
        Trainer(fresh(), counting, spec(**changes), tmp_path / name).train()
        records = read_metrics(tmp_path / name / "metrics.jsonl")[1:]
        results.append([(record["loss"], record["grad_norm"]) for record in records])
    assert results[0] == [pytest.approx(pair, rel=0.02) for pair in results[1]]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)


def test_resume_restores_everything(counting: Corpus, tmp_path: Path) -> None:
    whole = fresh(moe=MOE)
    Trainer(whole, counting, spec(), tmp_path / "whole").train()

    class Stopped(Exception):
        pass

    trainer = Trainer(fresh(moe=MOE), counting, spec(), tmp_path / "cut")
    step = trainer._step

    def stopping(number: int):
        if number == 8:
            raise Stopped
        return step(number)

    trainer._step = stopping
    with pytest.raises(Stopped):
        trainer.train()
    again = fresh(moe=MOE)
    resumed = Trainer(again, counting, spec(), tmp_path / "cut")
    with torch.no_grad():  # its weights must come from the checkpoint
        for parameter in again.parameters():
            parameter.zero_()
    resumed.train()
    for (name, a), (_, b) in zip(parameter_views(whole), parameter_views(again)):
        assert torch.equal(a, b), name
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole")


def steps(run: Path) -> list[dict]:
    """The metrics of a run without what differs by clock."""
    records = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def test_other_options_do_not_resume(counting: Corpus, tmp_path: Path) -> None:
    Trainer(fresh(), counting, spec(), tmp_path / "run").train()
    with pytest.raises(GrowmoeError, match="other options"):
        Trainer(fresh(), counting, spec(seed=1), tmp_path / "run").train()


def test_a_damaged_checkpoint_is_named(counting: Corpus, tmp_path: Path) -> None:
    Trainer(fresh(), counting, spec(), tmp_path / "run").train()
    file = next((tmp_path / "run" / "checkpoints").glob("*/optimizer.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(GrowmoeError, match="step-00000012 is damaged"):
        Trainer(fresh(), counting, spec(), tmp_path / "run").train()


def test_a_diverging_run_stops_with_a_sentence(counting: Corpus, tmp_path: Path) -> None:
    model = fresh()
    with torch.no_grad():
        model.head.weight.mul_(1e30)
    with pytest.raises(GrowmoeError, match="the gradient is not finite at step 1"):
        Trainer(model, counting, spec(), tmp_path / "run").train()


def test_bfloat16_arithmetic_stays_close(counting: Corpus, tmp_path: Path) -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        model = fresh(moe=MOE)
        outcome = Trainer(model, counting, spec(dtype=dtype), tmp_path / dtype).train()
        assert next(model.parameters()).dtype == torch.float32
        found.append(outcome.after["up"])
    assert found[0] == pytest.approx(found[1], rel=0.02)
    assert found[0] != found[1]


def test_validation_is_the_mean_over_windows(counting: Corpus) -> None:
    model = tiny_model()
    windows = counting.validation_windows()
    expected = {}
    for name, rows in windows.items():
        ids = torch.from_numpy(rows)
        logits = model(ids[:, :-1]).logits
        nll = -logits.log_softmax(-1).gather(2, ids[:, 1:, None])
        expected[name] = float(nll.detach().mean())
    assert domain_losses(model, windows) == pytest.approx(expected, rel=1e-5)


# ---- kill -9 and Ctrl-C, for real ----


def train_command(corpus: Path, out: Path, tokens: int = 60 * 128) -> list[str]:
    return [
        sys.executable, "-m", "growmoe", "train", str(out), "--data", str(corpus),
        "--tokens", str(tokens), "--lr", "0.01", "--json",
        *(f"--set={pair}" for pair in (
            "init.hidden_size=32", "init.num_layers=2", "init.num_heads=4", "init.ffn_size=64",
            "sequence_length=32", "batch_size=4", "dtype=float32", "validate_every=20",
            "checkpoint_every=7",
        )),
    ]  # fmt: skip


def start(command: list[str]) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for_step(process: subprocess.Popen, metrics: Path, step: int) -> None:
    """Return as soon as the run has logged `step` steps (or has ended)."""
    while process.poll() is None:
        if metrics.exists() and len(metrics.read_bytes().splitlines()) > step:
            return
        try:
            process.wait(timeout=0.01)
        except subprocess.TimeoutExpired:
            continue


def test_kill_9_at_three_random_moments(corpus: Path, tmp_path: Path) -> None:
    whole = subprocess.run(
        train_command(corpus, tmp_path / "whole"), capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert whole.returncode == 0, whole.stderr
    moments = sorted(random.Random(int.from_bytes(os.urandom(4), "big")).sample(range(2, 58), 3))
    for moment in moments:
        process = start(train_command(corpus, tmp_path / "cut"))
        wait_for_step(process, tmp_path / "cut.run" / "metrics.jsonl", moment)
        process.kill()
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), moments
    process = start(train_command(corpus, tmp_path / "cut"))
    _, err = process.communicate()
    if process.returncode != 0:  # the last kill may have come too late
        assert "already exists" in err, (moments, err)
    assert steps(tmp_path / "cut.run") == steps(tmp_path / "whole.run"), moments
    first, second = (
        dict(parameter_views(load_model(tmp_path / name))) for name in ("whole", "cut")
    )
    assert all(torch.equal(first[name], second[name]) for name in first), moments
    assert not list(tmp_path.glob(".*.tmp"))


def test_ctrl_c_stops_and_the_same_command_continues(corpus: Path, tmp_path: Path) -> None:
    command = train_command(corpus, tmp_path / "out", tokens=4000 * 128)
    process = start(command)
    metrics = tmp_path / "out.run" / "metrics.jsonl"
    wait_for_step(process, metrics, 5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert "the same command continues" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    done = len(steps(tmp_path / "out.run"))
    process = start(command)
    wait_for_step(process, metrics, done + 3)
    process.send_signal(signal.SIGINT)
    process.communicate()
    numbers = [record["step"] for record in steps(tmp_path / "out.run")]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) > done


# ---- starting points that do not fit ----


def test_a_tokenizer_that_does_not_fit_the_model(corpus: Path, tmp_path: Path) -> None:
    small = write_tiny(tmp_path / "small", vocab_size=97)
    done = growmoe("train", tmp_path / "out", "--model", small, "--data", corpus, "--tokens", 1000)
    assert done.code == 2
    assert "has only 97" in done.err
    other = write_tiny(tmp_path / "other", vocab_size=400)
    tokenizer = json.loads((corpus / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-5]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = growmoe("train", tmp_path / "out", "--model", other, "--data", corpus, "--tokens", 1000)
    assert (done.code, "another tokenizer" in done.err) == (2, True), done.err
    assert not (tmp_path / "out").exists()


# ---- formulas ----


def routing(probs_TE: torch.Tensor, top_k: int = 1) -> Routing:
    weights, experts = probs_TE.topk(top_k)
    counts = torch.bincount(experts.flatten(), minlength=probs_TE.shape[1])
    return Routing(
        probs_TE.log(), probs_TE, experts, weights, counts, counts, "softmax", sequences=1
    )  # fmt: skip


def collapsed(expert: int, E: int = 4, T: int = 64) -> Routing:
    probs = torch.full((T, E), 1e-9)
    probs[:, expert] = 1.0
    return routing(probs)


def test_balance_is_one_when_even_and_E_when_collapsed() -> None:
    even = routing(torch.eye(4).repeat(16, 1))
    assert float(balance_loss(even)) == pytest.approx(1.0)
    assert float(balance_loss(collapsed(2))) == pytest.approx(4.0)
    top2 = routing(torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]).repeat(8, 1), top_k=2)
    assert float(balance_loss(top2)) == pytest.approx(1.0)


def test_layers_are_averaged_not_pooled() -> None:
    """Four layers, each collapsed on another expert: pooled counts would look perfectly even."""
    output = Output(torch.zeros(1, 64, 5), [collapsed(expert) for expert in range(4)])
    losses = language_model_loss(output, torch.zeros(1, 64, dtype=torch.long), LossWeights())
    assert float(losses.balance) == pytest.approx(4.0)
    pooled = torch.stack([c.counts_E for c in output.routing]).float().mean(0)
    assert torch.equal(pooled, torch.full((4,), 16.0))  # what a pooled loss would see


def test_z_losses() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    log_z = logits.logsumexp(-1)
    assert float(z_loss(logits, "router_logsumexp")) == pytest.approx(float((log_z**2).mean()))
    assert float(z_loss(logits, "router_max")) == pytest.approx(4.5)
    ids = torch.zeros(1, 2, dtype=torch.long)
    output = Output(logits[None], [])
    weights = LossWeights(balance=0.0, z={"output_max": 0.5})
    found = language_model_loss(output, ids, weights)
    assert float(found.total) == pytest.approx(float(found.cross_entropy) + 0.5 * 4.5)
    assert language_model_loss(output, ids, LossWeights()).z == {}  # a dense model has no router


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_schedules(schedule: str) -> None:
    options = OptimizerModel(lr=1.0, schedule=schedule, warmup=0.1, decay=0.2, min_lr_ratio=0.05)
    rates = [learning_rate(step, 100, options) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.05)
    if schedule == "wsd":
        assert rates[10:80] == [1.0] * 70
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_decay_spares_norms_biases_and_routers() -> None:
    model = fresh(moe=MOE, qkv_bias=True)
    decayed, free = make_optimizer(model, OptimizerModel()).param_groups
    free_names = {n for n, p in model.named_parameters() if any(p is q for q in free["params"])}
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0.0
    assert all(n.endswith(("norm.weight", "bias", "router.weight")) for n in free_names)
    assert "layers.1.moe.router.weight" in free_names
    assert dataclasses.is_dataclass(model.config)


def test_checkpoints_outlive_a_failed_publish(
    counting: Corpus, tmp_path: Path, monkeypatch
) -> None:
    """The state may go only when the model is safe; then it does go."""
    from growmoe import files, pipeline

    write_tiny(tmp_path / "start", vocab_size=97)
    options = spec(model=str(tmp_path / "start"), data=str(counting.path))
    (counting.path / "tokenizer.json").unlink(missing_ok=True)

    def failing(staged: Path, out: Path) -> None:
        raise OSError("the disk went away")

    with monkeypatch.context() as patch:
        patch.setattr(files, "publish", failing)
        with pytest.raises(OSError, match="went away"):
            pipeline.execute(options, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    checkpoints = tmp_path / "out.run" / "checkpoints"
    assert list(checkpoints.glob("step-*"))
    result = pipeline.execute(options, tmp_path / "out")
    assert result["tokens"] == 12 * 80
    assert not checkpoints.exists()
    assert load_model(tmp_path / "out").config.vocab_size == 97


def test_another_starting_model_does_not_resume(counting: Corpus, tmp_path: Path) -> None:
    """The same path may hold another model by then."""
    Trainer(fresh(), counting, spec(), tmp_path / "run").train()
    with pytest.raises(GrowmoeError, match="other options"):
        Trainer(fresh(seed=1), counting, spec(), tmp_path / "run").train()
