"""Router losses and their scopes, the balancing bias, what is logged, and resuming all of it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import growmoe, tiny_model
from growmoe.data.corpus import Corpus
from growmoe.models.checkpoint import load_model, parameter_views
from growmoe.models.config import MoEConfig
from growmoe.models.router import Routing, routers
from growmoe.models.transformer import Output, adopt
from growmoe.planning.recipes import trained_config
from growmoe.training.balancing import StepCounts, update_bias
from growmoe.training.losses import LossWeights, balance_loss, language_model_loss, z_loss
from growmoe.training.observing import (
    gradient_groups,
    load_entropy,
    max_violation,
    similarity,
)
from growmoe.training.trainer import Trainer, read_metrics
from test_training import counting as counting
from test_training import fresh, spec, steps

MOE = MoEConfig(experts=(0, 4, 4), top_k=2, ffn_size=24)


def decided(probs_TE: torch.Tensor, top_k: int = 2, sequences: int = 1) -> Routing:
    weights, experts = probs_TE.topk(top_k)
    counts = torch.bincount(experts.flatten(), minlength=probs_TE.shape[1])
    return Routing(
        probs_TE.log(), probs_TE, experts, weights, counts, counts, "softmax", sequences
    )  # fmt: skip


def random_probs(T: int, E: int = 4, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(T, E, generator=rng) * 2).softmax(-1)


# ---- losses ----


def test_sequence_scope_is_the_mean_over_sequences() -> None:
    probs = random_probs(24)
    whole = balance_loss(decided(probs, sequences=3), "sequence")
    parts = [balance_loss(decided(part)) for part in probs.view(3, 8, 4)]
    assert float(whole) == pytest.approx(float(torch.stack(parts).mean()))
    # two sequences that each use other experts: even as a batch, collapsed as sequences
    split = torch.full((8, 4), 1e-6)
    split[:4, 0] = split[4:, 1] = 1.0
    both = decided(split, top_k=1, sequences=2)
    assert float(balance_loss(both, "sequence")) == pytest.approx(4.0, rel=1e-4)
    assert float(balance_loss(both, "micro")) == pytest.approx(2.0, rel=1e-4)


def test_global_scope_over_batches_is_the_loss_of_one_large_batch() -> None:
    probs = random_probs(32)
    halves = [decided(part) for part in probs.chunk(2)]
    seen = halves[0].counts_E + halves[1].counts_E
    parts = [balance_loss(half, "global", seen) for half in halves]
    assert float(sum(parts) / 2) == pytest.approx(float(balance_loss(decided(probs))))
    local = [balance_loss(half) for half in halves]
    assert float(sum(local) / 2) != pytest.approx(float(sum(parts) / 2), rel=1e-4)


def test_counts_are_summed_over_micro_batches_and_ranks() -> None:
    counts = StepCounts(reduce=lambda tensor: 3 * tensor)  # three ranks that saw the same
    first, second = decided(random_probs(8)), decided(random_probs(8, seed=1))
    assert torch.equal(counts.add([first])[0], 3 * first.counts_E)
    assert torch.equal(counts.add([second])[0], 3 * (first.counts_E + second.counts_E))
    counts.clear()
    assert torch.equal(counts.add([second])[0], 3 * second.counts_E)


def test_z_kinds_have_their_own_coefficients() -> None:
    routing = decided(random_probs(6))
    output = Output(torch.randn(1, 6, 9), [routing, decided(random_probs(6, seed=3))])
    ids = torch.zeros(1, 6, dtype=torch.long)
    kinds = {"router_logsumexp": 0.1, "router_max": 0.2, "output_logsumexp": 0.3, "output_max": 0.4}
    found = language_model_loss(output, ids, LossWeights(balance=0.0, z=kinds))
    expected = float(found.cross_entropy)
    for kind, coefficient in kinds.items():
        logits = [output.logits] if "output" in kind else [r.logits_TE for r in output.routing]
        values = [float(z_loss(one, kind)) for one in logits]
        expected += coefficient * sum(values) / len(values)
        assert float(found.z[kind]) == pytest.approx(sum(values) / len(values))
    assert float(found.total) == pytest.approx(expected, rel=1e-5)
    none = language_model_loss(output, ids, LossWeights(balance=0.0, z={}))
    assert float(none.total) == float(none.cross_entropy)


# ---- the bias ----


def test_the_bias_rises_where_the_load_is_low() -> None:
    model = tiny_model(moe=replace(MOE, selection_bias=True))
    for router in routers(model):
        router.bias.zero_()
    update_bias(routers(model), [torch.tensor([9, 1, 5, 5]), torch.tensor([0, 0, 0, 20])], 0.001)
    first, second = (router.bias.tolist() for router in routers(model))
    assert first == pytest.approx([-0.001, 0.001, 0, 0])
    assert second == pytest.approx([0.001, 0.001, 0.001, -0.001])


def test_a_bias_is_added_without_changing_the_function() -> None:
    model = tiny_model(moe=MOE)
    ids = torch.randint(0, 97, (2, 12))
    before = model(ids).logits
    config = trained_config(spec(routing={"bias_rate": 0.001}), model.config)
    adopt(model, config)
    assert torch.equal(model(ids).logits, before)
    assert all(router.bias.tolist() == [0.0] * 4 for router in routers(model))
    assert {name for name, _ in parameter_views(model) if name.endswith("router.bias")} == {
        "layers.1.moe.router.bias", "layers.2.moe.router.bias"
    }  # fmt: skip
    assert config.params_total() == sum(p.numel() for p in model.parameters())


def balanced(counting: Corpus, run: Path, **changes):
    """A short training run that balances by bias; returns the model and its records."""
    stage = spec(
        routing={"bias_rate": 0.01}, losses={"balance": 0.0}, accumulation=2, batch_size=2,
        optimizer={"lr": 1e-3}, **changes,
    )  # fmt: skip
    model = fresh(moe=MOE)
    adopt(model, trained_config(stage, model.config))
    Trainer(model, counting, stage, run).train()
    return model, steps(run)


def test_recomputation_counts_nothing_twice(counting: Corpus, tmp_path: Path) -> None:
    plain, records = balanced(counting, tmp_path / "plain")
    again, same = balanced(counting, tmp_path / "again", activation_checkpointing=True)
    assert same == records
    for (name, a), (_, b) in zip(parameter_views(plain), parameter_views(again)):
        assert torch.equal(a, b), name
    for router in routers(plain):  # every step moves every bias by the rate, or not at all
        moved = (router.bias / 0.01).round()
        assert torch.allclose(router.bias, moved * 0.01, atol=1e-6)
        assert 1 <= moved.abs().max() <= 12


def test_the_bias_evens_out_a_skewed_choice(counting: Corpus, tmp_path: Path) -> None:
    found = {}
    for rate in (0.0, 0.01):
        model = fresh(moe=replace(MOE, selection_bias=True))
        stage = spec(
            tokens=60 * 80, routing={"bias_rate": rate}, losses={"balance": 0.0, "z": 0},
            optimizer={"lr": 1e-4},
        )  # fmt: skip
        with torch.no_grad():
            for router in routers(model):
                router.bias[0] = 0.3  # every token visits expert 0
        Trainer(model, counting, stage, tmp_path / str(rate)).train()
        last = read_metrics(tmp_path / str(rate) / "metrics.jsonl")[-10:]
        found[rate] = sum(sum(r["routing"]["max_vio"]) for r in last if "routing" in r)
    assert found[0.01] < 0.6 * found[0.0]


def test_a_model_with_a_bias_is_written_and_read(corpus: Path, tmp_path: Path) -> None:
    dense = ("train", tmp_path / "dense", "--data", corpus, "--tokens", 600, "--set",
             "init.hidden_size=32", "--set", "init.num_layers=2", "--set", "init.num_heads=2",
             "--set", "init.ffn_size=48", "--set", "sequence_length=32")  # fmt: skip
    assert growmoe(*dense).code == 0
    up = growmoe("upcycle", tmp_path / "dense", tmp_path / "moe", "--experts", 4)
    assert up.code == 0, up.err
    done = growmoe(
        "train", tmp_path / "balanced", "--model", tmp_path / "moe", "--data", corpus,
        "--tokens", 2000, "--set", "routing.bias_rate=0.01", "--set", "routing.jitter=0.01",
        "--set", "routing.capacity_factor=1.5", "--set", "sequence_length=32",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["params_total"] == up.json["params_total"] + 2 * 4
    model = load_model(tmp_path / "balanced")
    assert model.config.moe.selection_bias
    assert model.config.family == "growmoe"
    assert any(router.bias.abs().max() > 0 for router in routers(model))
    shown = growmoe("inspect", tmp_path / "balanced", "--tensors")
    assert shown.json["tensors"]["layers.0.moe.router.bias"] == [4]
    for engine in ("llama.cpp", "vllm"):
        refused = growmoe("export", tmp_path / "balanced", tmp_path / engine, "--for", engine)
        assert refused.code == 2
        assert not (tmp_path / engine).exists()
    wider = growmoe(
        "grow", tmp_path / "balanced", tmp_path / "wider", "--hidden", 48, "--heads", 3,
        "--data", corpus,
    )  # fmt: skip
    assert wider.code == 0, wider.err
    assert wider.json["check"]["exact"]


def test_routing_options_need_routers(corpus: Path, tmp_path: Path) -> None:
    done = growmoe(
        "train", tmp_path / "x", "--data", corpus, "--tokens", 600, "--set", "init.hidden_size=32",
        "--set", "init.num_layers=2", "--set", "init.num_heads=2", "--set", "init.ffn_size=48",
        "--set", "sequence_length=32", "--set", "routing.jitter=0.1",
    )  # fmt: skip
    assert done.code == 2
    assert "routing.jitter is for models with experts" in done.err
    assert len(done.err.strip().splitlines()) == 1


# ---- what is logged ----


def test_every_layer_is_observed(counting: Corpus, tmp_path: Path) -> None:
    _, records = balanced(counting, tmp_path / "run", seed=3)
    logged = [record for record in records if "routing" in record]
    assert len(logged) == 12
    for record in logged:
        assert set(record["routing"]) == {
            "max_vio", "load_entropy", "router_entropy", "log_z", "dropped", "dead", "bias_range"
        }  # fmt: skip
        assert all(len(values) == 2 for values in record["routing"].values())
        assert record["routing"]["dropped"] == [0.0, 0.0]
        assert all(0 <= value <= 1 for value in record["routing"]["load_entropy"])
        norms = record["grad_norms"]
        assert set(norms) == {"router", "experts", "attention", "dense", "embedding", "norm"}
        total = math.sqrt(sum(value**2 for value in norms.values()))
        assert total == pytest.approx(record["grad_norm"], rel=1e-3)
    assert logged[0]["routing"]["log_z"] == pytest.approx([math.log(4)] * 2, abs=0.1)
    checked = [record for record in records if "experts" in record]
    for record in checked[1:]:
        assert [len(row) for row in record["experts"]["load"]] == [4, 4]
        assert [sum(row) for row in record["experts"]["load"]] == pytest.approx([1, 1], abs=1e-4)


def test_drops_are_counted(counting: Corpus, tmp_path: Path) -> None:
    stage = spec(routing={"capacity_factor": 0.5})
    Trainer(fresh(moe=MOE), counting, stage, tmp_path / "run").train()
    shares = [r["routing"]["dropped"] for r in steps(tmp_path / "run") if "routing" in r]
    assert all(share >= 0.49 for row in shares for share in row)  # half does not fit even if even


def test_load_measures() -> None:
    assert max_violation(torch.tensor([5.0, 5.0])) == 0.0
    assert max_violation(torch.tensor([0.0, 0.0, 0.0, 8.0])) == pytest.approx(3.0)
    assert load_entropy(torch.tensor([3.0, 3.0, 3.0])) == pytest.approx(1.0)
    assert load_entropy(torch.tensor([9.0, 0.0, 0.0])) == pytest.approx(0.0)
    assert load_entropy(torch.tensor([4.0])) == 1.0


def test_similarity_sees_copies_and_strangers() -> None:
    experts = tiny_model(moe=MOE).layers[1].moe.experts
    strangers = similarity(experts)
    assert strangers[2] < 0.3
    flat = torch.cat([experts.up.flatten(1), experts.down.flatten(1)], dim=1)
    cosines = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
    pairs = cosines[torch.triu(torch.ones(4, 4), 1) > 0]
    assert strangers == pytest.approx(
        tuple(map(float, (pairs.min(), pairs.mean(), pairs.max()))), abs=1e-4
    )
    with torch.no_grad():
        experts.up[2], experts.down[2] = experts.up[0], experts.down[0]
    assert similarity(experts)[2] == pytest.approx(1.0, abs=1e-5)


def test_every_trained_parameter_is_in_one_group() -> None:
    moe = replace(MOE, selection_bias=True, mix="sigmoid_gate", fixed_ffn_size=8)
    model = tiny_model(moe=moe)
    groups = gradient_groups(model)
    grouped = [p for group in groups.values() for p in group]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    assert any(p is model.layers[0].mlp.up.weight for p in groups["dense"])
    assert any(p is model.layers[1].mlp.up.weight for p in groups["fixed"])


def test_resume_is_bit_exact_with_everything_on(counting: Corpus, tmp_path: Path) -> None:
    options = {
        "routing": {
            "bias_rate": 0.01, "jitter": 0.05, "capacity_factor": 1.0, "drop": "probability",
            "ranking": {"eta": 0.05, "warmup": 0.0, "ramp": 0.1},
        },
        "activation_checkpointing": True, "accumulation": 2, "batch_size": 2,
    }  # fmt: skip

    def trainer(run: Path) -> Trainer:
        model = fresh(moe=MOE)
        adopt(model, trained_config(spec(**options), model.config))
        return Trainer(model, counting, spec(**options), run)

    whole = trainer(tmp_path / "whole")
    whole.train()
    cut = trainer(tmp_path / "cut")
    step = cut._step

    def stopping(number: int):
        if number == 8:
            raise KeyboardInterrupt
        return step(number)

    cut._step = stopping
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    again = trainer(tmp_path / "cut")
    again.train()
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole")
    for (name, a), (_, b) in zip(parameter_views(whole.model), parameter_views(again.model)):
        assert torch.equal(a, b), name
