"""Loss-ranked routing, piece by piece: ramp, brake, ranks, state, drops, recomputation."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from growmoe.data.corpus import Corpus
from growmoe.models.checkpoint import parameter_views
from growmoe.models.router import Routing, RoutingPolicy, routers, set_policy
from growmoe.recipe import RankingModel
from growmoe.training.losses import cross_entropy
from growmoe.training.ranking import ExpertRanking, first_order_credit, phi, ranks, watch
from growmoe.training.routing import RoutingControl
from growmoe.training.trainer import Trainer, read_metrics
from test_ranking import EARLY, E, drive, fresh, sequences, spec


def made(
    weights: list[list[float]], grads: list[list[float]], experts: list[list[int]], count: int = E
) -> Routing:
    """A routing whose backward pass is over."""
    w_TK = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
    w_TK.grad = torch.tensor(grads, dtype=torch.float64)
    chosen = torch.tensor(experts)
    counts = torch.bincount(chosen.flatten(), minlength=count)
    logits = torch.zeros(len(weights), count)
    return Routing(logits, logits, chosen, w_TK, counts, counts, "softmax", 1)


# ---- ramp, ranks ----


def test_eta_is_zero_then_rises_stays_and_ends_at_zero() -> None:
    ranking = ExpertRanking([E], RankingModel(eta=0.4, warmup=0.1, ramp=0.2), 100)
    eta = [ranking.eta(step) for step in range(100)]
    assert eta[:11] == [0.0] * 11
    assert all(a < b for a, b in zip(eta[10:30], eta[11:31]))
    assert eta[20] == pytest.approx(0.2)
    assert eta[30:80] == [0.4] * 50
    assert all(a > b for a, b in zip(eta[79:99], eta[80:100]))
    assert eta[99] == 0.0
    steep = ExpertRanking([E], RankingModel(eta=0.4, warmup=0.1, ramp=0.0), 100)
    assert [steep.eta(step) for step in (9, 10, 98, 99)] == [0.0, 0.4, 0.4, 0.0]
    assert ExpertRanking([E], None, 100).eta(50) == 0.0


def test_ranks_and_phi() -> None:
    credit = torch.tensor([0.3, -2.0, 0.3, 9.0, 0.3], dtype=torch.float64)
    assert ranks(credit).tolist() == [3.0, 1.0, 3.0, 5.0, 3.0]
    assert phi(ranks(credit)).tolist() == [0.0, -1.0, 0.0, 1.0, 0.0]
    assert phi(ranks(torch.zeros(4))).tolist() == [0.0] * 4
    assert phi(ranks(torch.zeros(1))).tolist() == [0.0]
    for seed in range(5):
        values = torch.randn(17, generator=torch.Generator().manual_seed(seed)) * 10.0**seed
        found = phi(ranks(values))
        assert float(found.min()) == -1
        assert float(found.max()) == 1
        assert torch.equal(found.argsort(), values.argsort())
        assert float(found.sum()) == pytest.approx(0, abs=1e-5)


def test_the_last_step_and_the_model_after_it_are_plain() -> None:
    model = fresh()
    _, records = drive(model, spec({"eta": 0.1, **EARLY}))
    assert all(record["shifts"] for record in records[:-1])
    assert not records[-1]["shifts"]
    assert all(router.shift_E is None for router in routers(model))


# ---- credit over steps ----


def test_credit_is_a_running_mean_of_standard_scores() -> None:
    ranking = ExpertRanking([3], RankingModel(beta=0.9), 10)
    counts = [torch.tensor([2, 2, 2])]
    weights, chosen = [[0.5, 0.25], [0.5, 0.75], [0.2, 0.2]], [[0, 1], [1, 2], [2, 0]]
    expected = torch.zeros(3, dtype=torch.float64)
    for scale in (1.0, 1e-6):  # whatever the scale of the loss
        grads = [[-scale, 2 * scale], [3 * scale, scale], [scale, -scale]]
        ranking.add([made(weights, grads, chosen, 3)])
        ranking.step(counts)
        gain = torch.tensor([0.5 + 0.2, -0.5 - 1.5, -0.75 - 0.2], dtype=torch.float64)
        mean = gain / torch.tensor([0.7, 0.75, 0.95], dtype=torch.float64)
        z = (mean - mean.mean()) / mean.std(unbiased=False)
        expected = 0.9 * expected + 0.1 * z
    assert torch.allclose(ranking.layers[0].value_E, expected, rtol=1e-3)
    assert ranking.rank(0).tolist() == [3.0, 1.0, 2.0]


def test_micro_batches_of_a_step_add_up() -> None:
    weights, grads, chosen = (
        [[0.5], [0.3], [0.9], [1.0]],
        [[-1.0], [2.0], [0.5], [3.0]],
        [0, 1, 2, 1],
    )
    rows = [[e] for e in chosen]
    found = []
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        ranking = ExpertRanking([3], None, 10)
        for part in parts:
            ranking.add([made(weights[part], grads[part], rows[part], 3)])
        ranking.step([torch.tensor([1, 2, 1])])
        found.append(ranking.layers[0])
    assert torch.equal(found[0].value_E, found[1].value_E)
    assert torch.equal(found[0].recent_4E, found[1].recent_4E)
    removes = found[0].recent_4E[0] / found[0].recent_4E[3]
    assert removes.tolist() == pytest.approx([0.5, -3.6, -0.45])


def test_experts_with_few_rows_keep_their_credit() -> None:
    ranking = ExpertRanking([4], RankingModel(beta=0.5, min_tokens=2), 10)
    ranking.layers[0].value_E.copy_(torch.tensor([5.0, 6.0, 7.0, 8.0]))
    routing = made([[1.0]] * 5, [[-1.0], [-1.0], [1.0], [1.0], [9.0]], [[0], [0], [1], [1], [2]], 4)
    ranking.add([routing])
    ranking.step([routing.counts_E])
    assert ranking.layers[0].value_E.tolist() == pytest.approx([3.0, 2.5, 7.0, 8.0])
    ranking.add([made([[1.0]], [[1.0]], [[0]], 4)])  # one alone compares with nobody
    ranking.step([torch.tensor([1, 0, 0, 0])])
    assert ranking.layers[0].value_E.tolist() == pytest.approx([3.0, 2.5, 7.0, 8.0])


def test_every_step_counts_its_own_choices() -> None:
    control, _ = drive(fresh(), spec(tokens=3 * 80))
    assert [int(counts_E.sum()) for counts_E in control.counts.layers] == [160, 160]
    assert not control.ranking._sums


# ---- the brake ----


def test_the_brake_halves_the_shift_of_an_overloaded_layer_only() -> None:
    model = fresh()
    ranking = ExpertRanking([E, E], RankingModel(eta=0.2, max_load=2.0, **EARLY), 100)
    even, full = torch.full((E,), 10), torch.tensor([21, 9, 9, 9, 6, 6])  # the mean is 10

    def step(number: int, counts: list[torch.Tensor]) -> list[float]:
        for credit in ranking.layers:
            credit.value_E.copy_(torch.arange(float(E)))
        ranking.shift(routers(model), number)
        largest = [float(router.shift_E.max()) for router in routers(model)]
        ranking.add([made([[1.0]], [[0.0]], [[0]])] * 2)
        ranking.step(counts)
        return largest

    assert step(0, [even, full]) == pytest.approx([0.2, 0.2])
    assert step(1, [even, full]) == pytest.approx([0.2, 0.1])
    assert step(2, [even, full.clone().fill_(10)]) == pytest.approx([0.2, 0.05])
    assert step(3, [even, even]) == pytest.approx([0.2, 0.055])
    exactly = torch.tensor([20, 8, 8, 8, 8, 8])
    step(4, [exactly, exactly])
    assert float(ranking.layers[0].brake) == 1.0
    for number in range(5, 50):
        step(number, [even, even])
    assert step(50, [even, even]) == pytest.approx([0.2, 0.2])  # given back, and no more


def test_there_is_nothing_to_brake_before_the_shift() -> None:
    ranking = ExpertRanking([E], RankingModel(warmup=0.5, ramp=0.1), 10)
    model = fresh()
    full = torch.tensor([60, 0, 0, 0, 0, 0])
    for number in range(7):
        ranking.shift(routers(model)[:1], number)
        ranking.add([made([[1.0]], [[0.0]], [[0]])])
        ranking.step([full])
        assert float(ranking.layers[0].brake) == (1.0 if number <= 5 else 0.5)


# ---- state ----


def test_state_goes_there_and_back() -> None:
    control, _ = drive(fresh(), spec({"eta": 0.3, "max_load": 1.2, **EARLY}))
    state = {name: tensor.clone() for name, tensor in control.state().items()}
    other = ExpertRanking([E, E], control.spec.ranking, 12)
    other.load(state)
    for a, b in zip(control.ranking.layers, other.layers):
        assert torch.equal(a.value_E, b.value_E)
        assert torch.equal(a.brake, b.brake)
        assert torch.equal(a.recent_4E, b.recent_4E)
        assert float(a.brake) < 1
    del state["1.credit"]
    with pytest.raises(KeyError):
        other.load(state)


def test_a_ranked_run_that_was_cut_continues_to_the_bit(corpus: Path, tmp_path: Path) -> None:
    stage = spec({"eta": 0.3, "max_load": 1.3, "warmup": 0.1, "ramp": 0.1}, checkpoint_every=5)
    opened = Corpus(corpus)
    whole = fresh()
    Trainer(whole, opened, stage, tmp_path / "whole").train()

    class Stopped(Exception):
        pass

    trainer = Trainer(fresh(), opened, stage, tmp_path / "cut")
    step = trainer._step

    def stopping(number: int) -> dict[str, Any]:
        if number == 7:
            raise Stopped
        return step(number)

    trainer._step = stopping  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        trainer.train()
    again = fresh()
    resumed = Trainer(again, opened, stage, tmp_path / "cut")
    resumed.train()
    for (name, a), (_, b) in zip(parameter_views(whole), parameter_views(again)):
        assert torch.equal(a, b), name
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")
    assert any(record.get("ranking_eta", 0) > 0 for record in timeless(tmp_path / "cut"))


def timeless(run: Path) -> list[dict[str, Any]]:
    records = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


# ---- the forward pass it is taken from ----


def credit_of(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """[3,E] per layer of one batch."""
    output = model(ids[:, :-1])
    watch(output.routing)
    cross_entropy(output.logits, ids[:, 1:]).backward()
    found = [first_order_credit(routing) for routing in output.routing]
    assert all(routing.weights_TK.grad is None for routing in output.routing)  # used up
    return found


def test_what_training_leaves_is_in_nats_per_token() -> None:
    """Whatever the memory of the running means, and however few steps they saw."""
    model = fresh().train()
    sums = credit_of(model, sequences(4, 0))
    assert RoutingControl(model, spec()).use() == []
    control, _ = drive(fresh().train(), spec(tokens=80), balance=0.0)
    for number, (record, sums_3E) in enumerate(zip(control.use(), sums, strict=True)):
        assert record["layer"] == number
        assert record["removes"] == pytest.approx(sums_3E[0].tolist(), rel=1e-4)
        assert record["weight"] == pytest.approx((sums_3E[1] / sums_3E[2]).tolist(), rel=1e-5)
        assert record["load"] == pytest.approx((sums_3E[2] / 160).tolist())


@pytest.mark.parametrize("drop", ["position", "probability"])
def test_dropped_choices_earn_nothing_and_count_nowhere(drop: str) -> None:
    model, ids = fresh(seed=3).train(), sequences(4, 1)
    set_policy(model, RoutingPolicy(capacity_factor=0.5, drop=drop))
    output = model(ids[:, :-1])
    watch(output.routing)
    cross_entropy(output.logits, ids[:, 1:]).backward()
    for routing in output.routing:
        w_TK, kept_TK = routing.weights_TK.detach(), routing.kept_TK
        grad_TK = routing.weights_TK.grad.clone()
        assert int(kept_TK.sum()) == int(routing.kept_E.sum()) < kept_TK.numel()
        assert not grad_TK[~kept_TK].any()
        assert grad_TK[kept_TK].all()
        sums_3E = first_order_credit(routing)
        for e in range(E):
            mine = (routing.experts_TK == e) & kept_TK
            assert int(mine.sum()) == int(routing.kept_E[e])
            expected = [float(-(w_TK * grad_TK)[mine].sum()), float(w_TK[mine].sum())]
            assert sums_3E[:2, e].tolist() == pytest.approx(expected, abs=1e-6)
            assert float(sums_3E[2, e]) == int(mine.sum())


def test_recomputation_does_not_double_credit() -> None:
    model, ids = fresh().train(), sequences(4, 1)
    plain = credit_of(model, ids)
    model.recompute = True
    for a, b in zip(plain, credit_of(model, ids), strict=True):
        assert torch.allclose(a, b, rtol=1e-6)
        assert float(a[0].abs().max()) > 0


@pytest.mark.parametrize("renormalize", [True, False])
def test_one_expert_per_token(renormalize: bool) -> None:
    """A renormalised weight is always 1, and its gradient teaches no router; it is credit still."""
    model, ids = fresh(top_k=1), sequences(4, 1)
    for router in routers(model):
        router.config = model.config.replace(
            moe=dataclasses.replace(model.config.moe, renormalize=renormalize)
        ).moe
    for sums_3E in credit_of(model, ids):
        assert float(sums_3E[2].sum()) == 80
        assert (float(sums_3E[1].sum()) == 80) == renormalize
        assert int((sums_3E[0] != 0).sum()) == int((sums_3E[2] > 0).sum()) > 1
    control, _ = drive(fresh(top_k=1), spec({"eta": 0.05, **EARLY}))
    assert all(credit.value_E.any() for credit in control.ranking.layers)
