"""The architectures of DeepSpeed-MoE: grown from a dense model, new, trained, written and read."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import InMemory, tiny_config, tiny_model
from growmoe.data.corpus import Corpus
from growmoe.errors import UsageError
from growmoe.growth.upcycle import Upcycled
from growmoe.growth.verify import compare
from growmoe.models.checkpoint import build_model, load_model, save_model
from growmoe.models.presets import PRESETS, preset
from growmoe.models.transformer import Transformer
from growmoe.models.upcycling import Upcycling, expert_counts
from growmoe.planning.recipes import initial_config
from growmoe.recipe import TrainStage, UpcycleStage
from growmoe.training.trainer import Trainer, read_metrics
from test_training import counting as counting
from test_training import spec

LAYERS = 4
LAYOUTS: dict[str, tuple[dict[str, Any], tuple[int, ...], str]] = {
    # options, experts per layer, the architecture it is written as
    "all layers": ({"experts": 4}, (4, 4, 4, 4), "mixtral"),
    "every second": ({"experts": 4, "layers": "second"}, (0, 4, 0, 4), "qwen2_moe"),
    "first half": ({"experts": 4, "layers": "first_half"}, (4, 4, 0, 0), "qwen2_moe"),
    "second half": ({"experts": 4, "layers": "second_half"}, (0, 0, 4, 4), "qwen2_moe"),
    "pyramid": ({"experts": 4, "pyramid": 2}, (4, 4, 8, 8), "growmoe"),
    "residual, sum": ({"experts": 4, "residual": "sum"}, (4,) * 4, "growmoe"),
    "residual, softmax2": ({"experts": 4, "residual": "softmax2"}, (4,) * 4, "growmoe"),
    "residual, sigmoid_gate": ({"experts": 4, "residual": "sigmoid_gate"}, (4,) * 4, "qwen2_moe"),
    "PR-MoE": (
        {"experts": 4, "layers": "second", "pyramid": 1, "residual": "softmax2"}, (0, 4, 0, 8),
        "growmoe",
    ),
    "groups": ({"experts": 4, "groups": 2, "top_groups": 1}, (4,) * 4, "growmoe"),
}  # fmt: skip
GROWN_ONLY = {
    "fine-grained": ({"experts": 8, "granularity": 2, "top_k": 2}, (8,) * 4, "mixtral"),
    "shared, half and half": (
        {"experts": 4, "residual": "sigmoid_gate", "shared": "half_half"}, (4,) * 4, "qwen2_moe"
    ),
}  # fmt: skip


def stage(**options: Any) -> UpcycleStage:
    return UpcycleStage(stage="upcycle", model="x", **options)


def short(model: Transformer, counting: Corpus, run: Path) -> list[dict[str, Any]]:
    Trainer(model, counting, spec(tokens=6 * 80, checkpoint_every=100), run).train()
    return [record for record in read_metrics(run / "metrics.jsonl") if "loss" in record]


@pytest.mark.parametrize("name", [*LAYOUTS, *GROWN_ONLY])
def test_grown_from_a_dense_model(name: str, counting: Corpus, tmp_path: Path) -> None:
    """The same function at first; then it trains, and is what it was after writing and reading."""
    options, counts, family = (LAYOUTS | GROWN_ONLY)[name]
    dense = InMemory(tiny_model(2, num_layers=LAYERS, ffn_size=48))
    grown = Upcycled(dense, Upcycling.of(stage(**options)))
    assert grown.config.moe is not None
    assert grown.config.moe.experts == counts
    ids = [torch.arange(60) % 97, torch.arange(30) * 7 % 97]
    assert compare(dense, grown, ids, memory_bytes=1 << 40, note=lambda _: None).exact
    model = build_model(grown)
    records = short(model, counting, tmp_path / "run")
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["grad_norms"]["experts"] > 0
    model.eval()
    (tmp_path / "out").mkdir()
    save_model(tmp_path / "out", model, "float32")
    again = load_model(tmp_path / "out")
    assert again.config.family == family
    assert again.config.moe == model.config.moe
    ids_BT = torch.randint(0, 97, (2, 20))
    assert torch.equal(again(ids_BT).logits, model(ids_BT).logits)
    if family != "growmoe":
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        with torch.no_grad():
            assert torch.allclose(theirs(ids_BT).logits, model(ids_BT).logits, atol=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_from_random_weights(name: str, counting: Corpus, tmp_path: Path) -> None:
    """`init.moe` takes the same words as upcycling, and makes the same shape."""
    options, counts, family = LAYOUTS[name]
    init = {
        "hidden_size": 36, "num_layers": LAYERS, "num_heads": 9, "num_kv_heads": 3, "head_dim": 4,
        "ffn_size": 48, "tied_head": False, "moe": options,
    }  # fmt: skip
    made = TrainStage(stage="train", init=init, data="x", tokens=100)
    config = initial_config(made.init, 97).replace(vocab_size=97)
    upcycled = Upcycled(
        InMemory(tiny_model(num_layers=LAYERS, ffn_size=48)), Upcycling.of(stage(**options))
    ).config
    assert config.moe == upcycled.moe
    assert config.moe.experts == counts
    model = Transformer(config)
    model.init_weights(0)
    records = short(model, counting, tmp_path / "run")
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[0]["grad_norms"]["router"] > 0
    (tmp_path / "out").mkdir()
    save_model(tmp_path / "out", model, "float32")
    assert load_model(tmp_path / "out").config.family == family


def test_expert_counts() -> None:
    assert expert_counts(6, 4, "second", 1) == (0, 4, 0, 4, 0, 8)
    assert expert_counts(5, 4, "first_half") == (4, 4, 0, 0, 0)
    assert expert_counts(5, 4, "second_half") == (0, 0, 4, 4, 4)
    assert expert_counts(4, 4, "1,3", 2) == (0, 8, 0, 8)
    with pytest.raises(UsageError, match="pyramid 3 is more than the 2 layers with experts"):
        expert_counts(4, 4, "second", 3)
    with pytest.raises(UsageError, match="neither all, second, first_half, second_half nor"):
        expert_counts(4, 4, "third")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts": [0, 4], "pyramid": 1}, "pyramid contradicts a list of experts"),
        ({"top_groups": 2}, "top_groups needs groups"),
        ({"groups": 3}, "8 experts are not a multiple of groups 3"),
        ({"groups": 2, "top_groups": 3}, "top_groups 3 is more than groups 2"),
        ({"groups": 8}, r"1 of 8 groups hold fewer than top_k \(2\) of 8 experts"),
        (
            {"experts": [0, 4, 6], "groups": 4, "top_groups": 2},
            "6 experts are not a multiple of groups 4",
        ),
        ({"experts": 2, "top_k": 3}, "are fewer than top_k"),
    ],
)
def test_layouts_that_contradict_themselves(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stage(**options)


def test_top_1_is_raw_in_new_models_and_the_rest_renormalised() -> None:
    def moe(**options: Any):
        init = {"hidden_size": 8, "num_layers": 2, "num_heads": 1, "ffn_size": 8, "moe": options}
        made = TrainStage(stage="train", init=init, data="x", tokens=100)
        return initial_config(made.init, 97).moe

    assert not moe(top_k=1).renormalize  # else its weight is 1 and the router learns nothing
    assert moe(top_k=2).renormalize
    assert not moe(top_k=2, renormalize=False).renormalize
    assert moe(ffn_size=4, residual="sum", fixed_ffn_size=6).fixed_ffn_size == 6


def test_presets_have_the_layers_of_the_paper() -> None:
    """P = 12 L h^2 + (V + S) h + 8 h^2 (sum of experts - M, unless residual), and what the formula
    leaves out: biases, norms and routers, under 0.2%."""
    for name in PRESETS:
        config = preset(name)
        if config.activation != "gelu":
            continue
        L, h, moe = config.num_layers, config.hidden_size, config.moe
        formula = 12 * L * h**2 + (50257 + 2048) * h
        if moe is not None:
            replaced = sum(1 for e in moe.experts if e) if moe.mix == "none" else 0
            formula += 8 * h**2 * (sum(moe.experts) - replaced)
            assert [e > 0 for e in moe.experts] == [layer % 2 == 1 for layer in range(L)]
            assert moe.top_k == 1
        extra = config.params_total() - formula
        assert 0 < extra < 0.002 * formula, name


def test_tiny_config_is_dense() -> None:
    assert tiny_config().moe is None


def test_what_a_stage_writes_down_can_be_read_again() -> None:
    init = {"hidden_size": 8, "num_layers": 2, "num_heads": 1, "ffn_size": 8, "moe": {"experts": 4}}
    made = TrainStage(stage="train", init=init, data="x", tokens=100, routing={"ranking": {}})
    assert TrainStage(**made.model_dump()).init == made.init
    assert TrainStage(**made.model_dump()).routing == made.routing
