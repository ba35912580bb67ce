"""inspect --experts: its numbers against the definition, its suggestions, its sentences."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from conftest import growmoe, tiny_model, write_tiny
from growmoe.data.corpus import Corpus
from growmoe.evaluation.experts import batches_of, measure_experts
from growmoe.models.checkpoint import copy_tokenizer, load_model, save_model
from growmoe.models.config import MoEConfig
from growmoe.models.router import routers
from growmoe.stages.inspect import expert_lines, suggestions
from growmoe.training.ranking import ranks

MOE = MoEConfig(experts=(0, 6, 4), top_k=2, ffn_size=24)


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small MoE that growmoe trained."""
    out = tmp_path_factory.mktemp("trained") / "moe"
    done = growmoe(
        "train", out, "--data", corpus, "--tokens", 60 * 128, "--lr", 0.01,
        *(f"--set={pair}" for pair in (
            "init.hidden_size=32", "init.num_layers=3", "init.num_heads=4", "init.ffn_size=64",
            "init.moe.experts=0,8,8", "init.moe.ffn_size=32", "sequence_length=32",
            "batch_size=4", "dtype=float32", "validate_every=60",
        )),
    )  # fmt: skip
    assert done.code == 0, done.err
    return out


def sabotaged(trained: Path, out: Path, layer: int, expert: int) -> Path:
    """`trained` with noise in what one expert writes."""
    model = load_model(trained)
    down = model.layers[layer].moe.experts.down
    with torch.no_grad():
        noise = torch.randn(down[expert].shape, generator=torch.Generator().manual_seed(1))
        down[expert] += 4 * down.std() * noise
    out.mkdir()
    save_model(out, model, "float32")
    copy_tokenizer(trained, out)
    return out


def test_values_equal_a_direct_computation() -> None:
    """The same numbers token by token, with the gradient of the loss by autograd."""
    model = tiny_model(moe=MOE).double()
    batches = [torch.randint(0, 97, (n, 21), generator=torch.Generator().manual_seed(n))
               for n in (2, 3)]  # fmt: skip
    asked = [p.requires_grad for p in model.parameters()]
    model.train()
    records, tokens = measure_experts(model, batches)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == asked
    assert all(p.grad is None for p in model.parameters())
    assert tokens == 100
    assert [record["layer"] for record in records] == [1, 2]
    model.eval()
    sums = [torch.zeros(3, E, dtype=torch.float64) for E in (6, 4)]
    for ids in batches:
        output = model(ids[:, :-1])
        weights = [routing.weights_TK for routing in output.routing]
        loss = F.cross_entropy(output.logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        for number, grad_TK in enumerate(torch.autograd.grad(loss, weights)):
            routing = output.routing[number]
            for t, row in enumerate(routing.experts_TK.tolist()):
                for k, e in enumerate(row):
                    w = float(weights[number][t, k].detach())
                    sums[number][:, e] += torch.tensor([-w * float(grad_TK[t, k]), w, 1.0])
    for record, (gain_E, weight_E, rows_E) in zip(records, sums):
        assert record["load"] == pytest.approx((rows_E / 200).tolist())
        assert record["removes"] == pytest.approx((gain_E / 100).tolist(), rel=1e-5)
        assert record["removes_total"] == pytest.approx(float(gain_E.sum()) / 100, rel=1e-5)
        assert record["weight"] == pytest.approx((weight_E / rows_E).tolist())
        mean_E = gain_E / weight_E
        z_E = (mean_E - mean_E.mean()) / mean_E.std(unbiased=False)
        assert record["credit"] == pytest.approx(z_E.tolist(), rel=1e-5)
        assert record["rank"] == ranks(mean_E).tolist()
        share_E = rows_E / 200
        entropy = float(-(share_E * share_E.log()).sum()) / torch.tensor(len(share_E)).log()
        assert record["load_entropy"] == pytest.approx(float(entropy), abs=1e-5)
        experts = model.layers[record["layer"]].moe.experts
        flat = torch.cat([experts.up.flatten(1), experts.down.flatten(1)], 1)
        for e, (like, cosine) in enumerate(zip(record["like"], record["cosine"])):
            others = F.cosine_similarity(flat[e][None], flat, dim=1)
            others[e] = -2
            assert (like, cosine) == (
                int(others.argmax()),
                pytest.approx(float(others.max().detach()), abs=1e-5),
            )


def test_an_expert_without_tokens_removes_nothing() -> None:
    model = tiny_model(moe=MOE)
    with torch.no_grad():
        routers(model)[0].weight[3] = 0.0
        routers(model)[0].weight[[0, 1]] *= 100.0
    routers(model)[0].shift_E = torch.tensor([0.0, 0, 0, -9, 0, 0])
    record = measure_experts(model, [torch.randint(0, 97, (2, 21))])[0][0]
    found = [record[name][3] for name in ("load", "removes", "weight")]
    assert found == [0.0, 0.0, 0.0]
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("how", ["data", "text"])
def test_a_sabotaged_expert_is_suggested_for_pruning(
    how: str, trained: Path, corpus: Path, texts: Path, tmp_path: Path
) -> None:
    broken = sabotaged(trained, tmp_path / "broken", 2, 5)
    source = corpus if how == "data" else tmp_path / "some.txt"
    if how == "text":
        lines = (texts / "english.jsonl").read_text().splitlines()[:60]
        source.write_text("\n".join(json.loads(line)["text"] for line in lines))
    done = growmoe("inspect", broken, "--experts", f"--{how}", source)
    assert done.code == 0, done.err
    use = done.json["expert_use"]
    layer = use["layers"][1]
    assert min(layer["rank"]) == layer["rank"][5]
    assert layer["removes"][5] < 0
    assert use["suggestions"]["prune_first"]["2"][0] == 5
    assert str(source) in use["measured_on"]
    assert use["tokens"] > 500
    rows = [line.split() for line in done.out.splitlines() if line.startswith("  ")]
    rows = [row for row in rows if len(row) == 8 and row[0] in ("expert", *"01234567")]
    assert [row[0] for row in rows] == ["expert", *"01234567"] * 2
    assert "present use" in done.out


def test_what_training_left(trained: Path) -> None:
    found = growmoe("inspect", trained, "--experts", "--json")
    assert len(found.out.splitlines()) == 1
    use = found.json["expert_use"]
    assert use["measured_on"] == "training"
    assert use["tokens"] == 60 * 128
    log = (trained.parent / "moe.run" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(log[-1])["experts"]
    assert [record["layer"] for record in use["layers"]] == [1, 2]
    for number, record in enumerate(use["layers"]):
        assert record["load"] == pytest.approx(last["load"][number], abs=1e-6)
        assert record["credit"] == pytest.approx(last["credit"][number], abs=1e-6)
        assert record["rank"] == last["rank"][number]
        assert max(record["cosine"]) == pytest.approx(last["cosine_max"][number], abs=1e-6)
        assert all(0 < weight < 1 for weight in record["weight"])
        assert record["removes_total"] == pytest.approx(sum(record["removes"]))


def record(layer: int, E: int, **changes: Any) -> dict[str, Any]:
    base = {
        "layer": layer, "experts": E, "removes_total": 0.1, "load_entropy": 0.9,
        "load": [1 / E] * E, "credit": [0.0] * E, "rank": [float(e + 1) for e in range(E)],
        "removes": [0.1 / E] * E, "weight": [0.5] * E, "cosine": [0.9] * E, "like": [0] * E,
    }  # fmt: skip
    return {**base, **changes}


def test_suggestions_by_their_rule() -> None:
    config = tiny_model(
        num_layers=4, moe=MoEConfig(experts=(8, 8, 4, 2), top_k=2, ffn_size=8)
    ).config
    low = [0.05, 0.3, 0.05, 0.3, 0.05, 0.1, 0.1, 0.05]
    layers = [
        record(0, 8, load=low, rank=[8.0, 1, 3, 2, 7, 6, 5, 4]),
        record(1, 8, removes=[-0.1, *[0.1] * 7], removes_total=0.6),
        record(2, 4, removes_total=0.5, load_entropy=0.2),
        record(3, 2, load=[0.1, 0.9]),
    ]
    found = suggestions(config, layers)
    assert found["prune_first"] == {"0": [2, 7], "1": [0], "2": [], "3": []}
    assert found["layers_by_use"] == [1, 2, 0, 3]
    assert found["more_experts"] == [1]
    assert found["pyramid"] == "8,16,4,2"
    assert suggestions(config, [record(0, 8)])["more_experts"] == []


def test_a_table_of_128_experts_shows_the_extremes() -> None:
    config = tiny_model(num_layers=1, moe=MoEConfig(experts=(128,), top_k=2, ffn_size=4)).config
    layers = [record(0, 128, load=[0.0] * 100 + [1 / 28] * 28)]
    use = {"measured_on": "x", "tokens": 5, "layers": layers, "caveat": "present use"}
    lines = list(expert_lines({**use, "suggestions": suggestions(config, layers)}))
    assert len(lines) < 25
    assert max(map(len, lines)) < 100
    assert any(line.endswith("0, 1, 2, 3, 4, 5, 6, 7 and 24 more") for line in lines)
    shown = [
        line.split()[0] for line in lines if line.startswith("  ") and line.split()[0].isdigit()
    ]
    assert shown == ["0", "1", "2", "3", "124", "125", "126", "127"]
    assert any("100 unused" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{moe}", "--experts"], "holds no experts.json, which training leaves; give a corpus"),
        (["{dense}", "--experts"], "has no experts: it is a dense model"),
        (["{corpus}", "--experts"], "is a corpus directory; experts are those of a model"),
        (["{moe}", "--data", "{corpus}"], "--data is for --experts"),
        (["{moe}", "--text", "{corpus}"], "--text is for --experts"),
        (["{moe}", "--experts", "--data", "{corpus}", "--text", "{corpus}"], "not both"),
        (["{moe}", "--experts", "--data", "{moe}/no"], "does not exist"),
        (["{moe}", "--experts", "--data", "{moe}"], "holds no manifest.json"),
        (["{moe}", "--experts", "--text", "{moe}/config.json"], "holds no tokenizer.json"),
    ],
)
def test_wrong_use_gives_one_sentence(
    arguments: list[str], words: str, corpus: Path, tmp_path: Path
) -> None:
    places = {"moe": tmp_path / "moe", "dense": tmp_path / "dense", "corpus": corpus}
    write_tiny(places["moe"], moe=MOE, vocab_size=320)
    write_tiny(places["dense"])
    done = growmoe("inspect", *(argument.format(**places) for argument in arguments))
    assert done.code == 2, done.err
    assert words in done.err
    assert len(done.err.splitlines()) == 1
    assert done.out == ""


def test_a_dry_run_measures_nothing(trained: Path, corpus: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("growmoe.models.checkpoint.load_model", None)
    done = growmoe("inspect", trained, "--experts", "--data", corpus, "--dry-run", "--json")
    assert done.code == 0, done.err
    assert done.json["expert_use"] == {"measured_on": f"validation windows of {corpus}"}


def test_windows_of_every_domain_are_taken(corpus: Path) -> None:
    windows = Corpus(corpus).validation_windows()
    batches = batches_of(windows, tokens=256)
    length = next(iter(windows.values())).shape[1] - 1
    assert sum(batch[:, 1:].numel() for batch in batches) == 256 // length * length
    assert len(batches) == len(windows)
    everything = sum(len(rows) * length for rows in windows.values())
    assert sum(batch[:, 1:].numel() for batch in batches_of(windows)) == everything
