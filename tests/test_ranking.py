"""Loss-ranked routing: what credit is, what ranks do to routers, and that both survive everything.

The six tests of the definition come first: credit against the loss itself, a sabotaged expert,
permuted experts, a shift of nothing, two processes, and the ablation.
"""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from conftest import ROOT, tiny_config, write_tiny
from growmoe.data.corpus import Corpus
from growmoe.models.checkpoint import parameter_views
from growmoe.models.config import MoEConfig
from growmoe.models.router import Router, routers
from growmoe.models.transformer import Transformer, adopt
from growmoe.planning.recipes import trained_config
from growmoe.recipe import RankingModel, TrainStage
from growmoe.training.losses import LossWeights, language_model_loss
from growmoe.training.ranking import ExpertRanking, first_order_credit, watch
from growmoe.training.routing import RoutingControl
from growmoe.training.trainer import Trainer, read_metrics

E = 6
EARLY = {"warmup": 0.0, "ramp": 0.0}


def fresh(seed: int = 0, top_k: int = 2, **changes: Any) -> Transformer:
    moe = MoEConfig(experts=(E, E), top_k=top_k, ffn_size=24, renormalize=top_k > 1)
    config = {"num_layers": 2, "vocab_size": 320, "moe": moe, **changes}
    model = Transformer(tiny_config(**config))
    model.init_weights(seed)
    return model


def spec(ranking: dict | None = None, **changes: Any) -> TrainStage:
    routing = {**changes.pop("routing", {}), **({} if ranking is None else {"ranking": ranking})}
    base = {
        "stage": "train", "model": "x", "data": "x", "tokens": 12 * 4 * 20, "sequence_length": 20,
        "batch_size": 4, "dtype": "float32", "validate_every": 100, "checkpoint_every": 100,
        "optimizer": {"lr": 1e-2, "warmup": 0.2}, "routing": routing,
    }  # fmt: skip
    return TrainStage(**{**base, **changes})


def sequences(count: int, seed: int, length: int = 20) -> Tensor:
    """Counting in steps of 1 to 5, for models to learn in no time."""
    rng = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 96, (count, 1), generator=rng)
    step = torch.randint(1, 6, (count, 1), generator=rng)
    return (start + step * torch.arange(length + 1)) % 96


def learned(steps: int, **changes: Any) -> Transformer:
    """A model that was trained a little, so that its experts differ."""
    model = fresh(vocab_size=97, **changes)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(steps):
        ids = sequences(16, step + 1)
        losses = language_model_loss(model(ids[:, :-1]), ids[:, 1:], LossWeights(balance=0.01))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    return model.eval()


def drive(
    model: Transformer, stage: TrainStage, reduce: Callable[[Tensor], Tensor] | None = None,
    part: slice = slice(None), mean: Callable[[Tensor], Tensor] = lambda x: x,
    rate: float = 0.5, count: int = 4, balance: float = 0.1,
) -> tuple[RoutingControl, list[dict[str, Any]]]:  # fmt: skip
    """Steps of plain gradient descent with a control, on `part` of every batch of `count`."""
    control = RoutingControl(model, stage, *([reduce] if reduce else []))
    weights = LossWeights(balance=balance, scope="global", z={})
    records = []
    for step in range(stage.steps):
        ids = sequences(count, step)[part]
        control.begin(step)
        output = model(ids[:, :-1])
        losses = language_model_loss(output, ids[:, 1:], weights, control.forward(output.routing))
        losses.total.backward()
        control.backward(output.routing)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter -= rate * mean(parameter.grad)
                    parameter.grad = None
        record = control.end()
        record["loss"] = float(mean(losses.cross_entropy))
        record["balance"] = float(mean(losses.balance))
        record["shifts"] = [r.shift_E.clone() for r in routers(model) if r.shift_E is not None]
        records.append(record)
    return control, records


# ---- (i) credit is what it says ----


@contextmanager
def weights_changed(router: Router, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Combine weights go through `change`; who is chosen stays."""
    plain = router._choice

    def changed(logits_TE: Tensor) -> Any:
        scores_TE, experts_TK, weights_TK, table = plain(logits_TE)
        return scores_TE, experts_TK, change(weights_TK), table

    router._choice = changed  # type: ignore[method-assign]
    try:
        yield
    finally:
        del router._choice


@torch.no_grad()
def changes_of_loss(model: Transformer, router: Router, ids: Tensor, factor: float) -> Tensor:
    """[T,K]: how the summed loss of one sequence changes when one weight of `router` is multiplied
    by `factor`; as a batch in which every row has another weight changed."""
    T, K = ids.shape[1] - 1, router.config.top_k
    copies = ids.expand(T * K, -1)
    factors = torch.ones(T * K, T * K, dtype=torch.float64).fill_diagonal_(factor)

    def losses() -> Tensor:
        logits = model(copies[:, :-1]).logits.flatten(0, 1)
        return F.cross_entropy(logits, copies[:, 1:].flatten(), reduction="none").view(T * K, T)

    before = losses()
    with weights_changed(router, lambda w_TK: w_TK * factors.view(-1, K)):
        return (losses() - before).sum(1).view(T, K)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    order = torch.stack([x.flatten().argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(order)[0, 1])


def test_credit_is_the_slope_of_the_loss_and_predicts_removal() -> None:
    model = learned(30).double()
    slopes: list[Tensor] = []
    removals: list[Tensor] = []
    credits: list[Tensor] = []
    for seed in range(3):
        model.zero_grad()
        ids = sequences(1, 900 + seed)
        output = model(ids[:, :-1])
        watch(output.routing)
        F.cross_entropy(output.logits[0], ids[0, 1:], reduction="sum").backward()
        for router, routing in zip(routers(model), output.routing):
            a_TK = -(routing.weights_TK * routing.weights_TK.grad).detach()
            eps = 1e-4
            down, up = (changes_of_loss(model, router, ids, 1 + s * eps) for s in (-1, 1))
            slopes.append((down - up) / (2 * eps))
            removals.append(changes_of_loss(model, router, ids, 0.0))
            credits.append(a_TK)
            sums_3E = first_order_credit(routing)
            for e in range(E):
                mine = routing.experts_TK == e
                assert float(sums_3E[0, e]) == pytest.approx(float(a_TK[mine].sum()), abs=1e-12)
                assert float(sums_3E[2, e]) == int(mine.sum())
            # scaling an expert's output is what its down projection can do by itself
            down = model.layers[routers(model).index(router)].moe.experts.down
            scaling_E = -(down.grad * down).sum((1, 2)).detach()
            assert torch.allclose(sums_3E[0], scaling_E, rtol=1e-9, atol=1e-12)
    a, slope, removal = (torch.stack(x) for x in (credits, slopes, removals))
    assert float((a - slope).abs().max()) < 1e-3 * float(a.abs().max())
    large = a.abs() > 1e-2 * a.abs().max()
    assert int(large.sum()) > 100
    assert float(((a - slope) / a)[large].abs().max()) < 1e-3
    for layer in (0, 1):
        assert rank_correlation(a[layer::2], removal[layer::2]) > 0.8


# ---- (ii) a sabotaged expert ----


def test_a_sabotaged_expert_falls_to_the_last_rank_and_loses_its_share() -> None:
    bad = 2
    model = learned(60)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        down = model.layers[1].moe.experts.down
        noise = torch.randn(down[bad].shape, generator=rng)
        down[bad] += 4 * down.std() * noise
    for layer in model.layers:  # nobody repairs it, and the router does not learn to avoid it
        layer.moe.requires_grad_(False)
    found = {}
    for name, ranking in (("plain", None), ("ranked", {"eta": 0.1, "beta": 0.9, **EARLY})):
        twin = copy.deepcopy(model).train()
        control, _ = drive(twin, spec(ranking, tokens=20 * 80), rate=0.02, count=16)
        found[name] = (control.experts(), control.monitor.shares()[1])
    experts, shares = found["ranked"]
    assert min(experts["rank"][1]) == experts["rank"][1][bad] == 1
    assert experts["credit"][1][bad] < -1
    assert shares[bad] < 0.75 * found["plain"][1][bad]
    assert max(shares) < 2 / E


# ---- (iii) experts have no order ----


def permuted(model: Transformer, order: Tensor) -> Transformer:
    """The same function with the experts of every layer in another order."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in twin.layers:
            for parameter in (
                layer.moe.router.weight,
                layer.moe.experts.up,
                layer.moe.experts.down,
            ):
                parameter.copy_(parameter[order].clone())
    return twin


def test_permuted_experts_get_permuted_credits() -> None:
    model, order = fresh().double(), torch.tensor([3, 0, 5, 1, 4, 2])
    stage = spec({"eta": 0.05, "beta": 0.8, **EARLY}, tokens=8 * 80)
    twin = permuted(model, order)
    first, shifts = drive(model, stage)
    second, moved = drive(twin, stage)
    for a, b in zip(first.ranking.layers, second.ranking.layers):
        assert a.value_E.abs().min() > 0
        assert torch.allclose(a.value_E[order], b.value_E, atol=1e-9)
        assert torch.allclose(a.recent_4E[:, order], b.recent_4E, atol=1e-9)
    for one, other in zip(shifts, moved):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-10)
        for a_E, b_E in zip(one["shifts"], other["shifts"]):
            assert torch.equal(a_E[order], b_E)


# ---- (iv) a shift of nothing ----


def test_no_shift_is_the_plain_router_to_the_bit() -> None:
    model, ids = fresh(), sequences(3, 0)
    plain = model(ids)
    ExpertRanking([E, E], RankingModel(eta=1.0, warmup=0.5), 10).shift(routers(model), 3)
    assert all(router.shift_E is None for router in routers(model))
    assert torch.equal(model(ids).logits, plain.logits)
    for router in routers(model):
        router.shift_E = torch.zeros(E)
    shifted = model(ids)
    assert torch.equal(shifted.logits, plain.logits)
    for a, b in zip(plain.routing, shifted.routing):
        assert torch.equal(a.weights_TK, b.weights_TK)
        assert torch.equal(a.experts_TK, b.experts_TK)


def test_weights_do_not_see_the_shift() -> None:
    """It says who is chosen; how much they count comes from the scores alone."""
    router = routers(fresh())[0]
    x_TD = torch.randn(50, 36)
    router.shift_E = torch.linspace(-0.3, 0.3, E)
    routing, _ = router(x_TD)
    scores_TK = F.linear(x_TD, router.weight).softmax(-1).gather(1, routing.experts_TK)
    assert torch.allclose(routing.weights_TK, scores_TK / scores_TK.sum(-1, keepdim=True))
    assert (routing.counts_E[-2:] == 50).all()  # the shift is larger than any score here


def trained(corpus: Corpus, run: Path, stage: TrainStage, **changes: Any) -> tuple[Any, list[Any]]:
    """(model, losses and gradient norms of all steps)."""
    model = fresh(**changes)
    adopt(model, trained_config(stage, model.config))
    Trainer(model, corpus, stage, run).train()
    records = [record for record in read_metrics(run / "metrics.jsonl") if "loss" in record]
    return model, [(record["loss"], record["grad_norm"]) for record in records]


@pytest.fixture(scope="module")
def opened(corpus: Path) -> Corpus:
    return Corpus(corpus)


def test_a_run_whose_warmup_is_everything_is_a_plain_run(opened: Corpus, tmp_path: Path) -> None:
    plain, expected = trained(opened, tmp_path / "plain", spec())
    idle = spec({"eta": 0.5, "warmup": 1.0, "ramp": 0.0})
    model, found = trained(opened, tmp_path / "idle", idle)
    assert found == expected
    for (name, a), (_, b) in zip(parameter_views(plain), parameter_views(model)):
        assert torch.equal(a, b), name
    _, other = trained(opened, tmp_path / "on", spec({"eta": 0.5, **EARLY}))
    assert other != expected  # the comparison could have failed


# ---- (v) two processes ----

PARALLEL = {"eta": 0.1, "beta": 0.8, "max_load": 1.5, **EARLY}


def parallel_spec() -> TrainStage:
    return spec(PARALLEL, tokens=8 * 80, routing={"bias_rate": 0.01})


def parallel_model() -> Transformer:
    model = fresh()
    adopt(model, trained_config(parallel_spec(), model.config))
    return model.double()


def everything(control: RoutingControl, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What must not depend on the number of processes."""
    return {
        "credit": [c.value_E for c in control.ranking.layers],
        "brake": [c.brake for c in control.ranking.layers],
        "removes": [c.recent_4E[0] / c.recent_4E[3] for c in control.ranking.layers],
        "recent": control.monitor.recent,
        "bias": [router.bias.detach() for router in control.routers],
        "weights": [router.weight.detach() for router in control.routers],
        "steps": [
            torch.tensor([r["loss"], r["balance"], *torch.cat(r["shifts"] or [torch.zeros(1)])])
            for r in records
        ],
    }


def one_of_two(rank: int, folder: str) -> None:
    """Half of every batch, with an all-reduce."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )  # fmt: skip

    def summed(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def mean(tensor: Tensor) -> Tensor:
        return summed(tensor.clone()) / 2

    half = slice(2 * rank, 2 * rank + 2)
    control, records = drive(parallel_model(), parallel_spec(), summed, half, mean)
    torch.save(everything(control, records), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    control, records = drive(parallel_model(), parallel_spec())
    expected = everything(control, records)
    assert any(float(brake) < 1 for brake in expected["brake"])
    assert all(bias.abs().max() > 0 for bias in expected["bias"])
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, tensors in expected.items():
            for a, b in zip(tensors, found[name], strict=True):
                assert torch.allclose(a, b, atol=1e-9), (rank, name, a, b)


# ---- (vi) the ablation runs ----


def test_the_ablation_runs_at_a_tiny_size(corpus: Path, tmp_path: Path) -> None:
    dense = write_tiny(tmp_path / "dense", tokenizer_from=corpus, vocab_size=320, num_layers=2)
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks" / "ranking.py"), str(dense), str(corpus),
            "--tokens", "384", "--seeds", "2", "--experts", "4", "--length", "32",
            "--batch", "2",
        ],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    rows = {row["variant"]: row for row in found["rows"]}
    assert list(rows) == ["plain", "aux-free", "ranking", "random ranks"]
    assert rows["aux-free"]["apart"] == 0
    assert len({tuple(run["before"] for run in runs) for runs in found["runs"].values()}) == 1
    assert all(len(runs) == 2 for runs in found["runs"].values())
