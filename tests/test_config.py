"""Accounting: what the config says equals what the model has, and what the papers print."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import growmoe, tiny_config
from growmoe.errors import GrowmoeError
from growmoe.models.config import ModelConfig, MoEConfig
from growmoe.models.presets import PRESETS, preset
from growmoe.models.transformer import Transformer

# parameters in billions: the sizes that the papers print, and the finer recomputed ones
PRINTED = {
    "350M": (0.35, 0.356), "1.3B": (1.3, 1.315), "6.7B": (6.7, 6.66),
    "350M+MoE-128": (13, 13.14), "1.3B+MoE-128": (52, 52.45),
    "350M+PR-MoE-32/64": (4, 4.11), "1.3B+PR-MoE-64/128": (31, 31.38),
    "350M+PR-MoE-32/64+L21+MoS": (3.5, 3.54), "1.3B+PR-MoE-64/128+L21+MoS": (27, 26.93),
    "aquila3-7b": (8.2, 8.22), "aquila3-16b": (16.65, 16.65), "aquila3-8x16b": (104.7, 104.73),
}  # fmt: skip


def parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_preset_sizes_equal_the_papers(name: str) -> None:
    config = preset(name)
    printed, recomputed = PRINTED[name]
    billions = config.params_total() / 1e9
    assert parameters(config) == config.params_total()
    assert billions == pytest.approx(printed, rel=0.035)
    assert billions == pytest.approx(recomputed, rel=0.002)


def test_active_parameters_of_aquila_moe() -> None:
    assert preset("aquila3-8x16b").params_active() / 1e9 == pytest.approx(29.24, abs=0.01)


def test_prmoe_places_more_experts_late() -> None:
    moe = preset("1.3B+PR-MoE-64/128").moe
    assert moe is not None
    assert [count for count in moe.experts if count] == [64] * 10 + [128] * 2
    student = preset("1.3B+PR-MoE+L21+MoS")
    assert student.moe is not None
    assert student.num_layers == 21
    assert sum(1 for count in student.moe.experts if count == 128) == 2


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    layers = draw(st.integers(1, 4))
    kv_heads = draw(st.integers(1, 3))
    moe = None
    if draw(st.booleans()):
        top_k = draw(st.integers(1, 2))
        experts = draw(
            st.lists(st.sampled_from([0, 2, 3, 5]), min_size=layers, max_size=layers).filter(any)
        )
        mix = draw(st.sampled_from(["none", "sum", "softmax2", "sigmoid_gate"]))
        moe = MoEConfig(
            experts=tuple(experts), top_k=top_k, ffn_size=draw(st.integers(1, 9)), mix=mix,
            fixed_ffn_size=0 if mix == "none" else draw(st.integers(1, 9)),
        )  # fmt: skip
    flags = {
        name: draw(st.booleans())
        for name in ("qkv_bias", "o_bias", "mlp_bias", "qk_norm", "tied_head")
    }
    scope = draw(st.sampled_from(["head", "all"])) if flags["qk_norm"] else "head"
    return ModelConfig(
        vocab_size=draw(st.integers(2, 40)), hidden_size=draw(st.integers(1, 20)),
        num_layers=layers, num_heads=kv_heads * draw(st.integers(1, 3)), num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 4)), ffn_size=draw(st.integers(1, 30)),
        norm=draw(st.sampled_from(["rms", "layer"])),
        positions=draw(st.sampled_from(["rope", "learned"])),
        activation=draw(st.sampled_from(["swiglu", "gelu"])), moe=moe, qk_norm_scope=scope, **flags,
    )  # fmt: skip


@given(configs())
@settings(max_examples=60, deadline=None)
def test_accounting_equals_the_model(config: ModelConfig) -> None:
    assert config.params_total() == parameters(config)
    assert 0 < config.params_active() <= config.params_total()
    assert config.bytes("float32") == 4 * config.params_total()
    if config.moe is None:
        assert config.params_active() == config.params_total()


def test_flops_equal_the_matrix_products() -> None:
    """Counted by torch's own counter, on a model whose products are easy to list."""
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config(max_positions=64)
    model = Transformer(config)
    model.init_weights(0)
    model.double()  # torch's counter does not know oneDNN's float32 product
    backend = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, backend, torch.no_grad():
        model(torch.zeros(1, 64, dtype=torch.long))
    # torch's plain attention multiplies all of the square, we count the causal half of it
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * 64
    assert counter.get_total_flops() == 64 * (config.flops_per_token(64) + attention // 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 8, "num_kv_heads": 3}, "num_heads 8 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 5}, "head_dim 5 must be even"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"moe": MoEConfig(experts=(2, 2, 2), top_k=3, ffn_size=4)}, "fewer than top_k"),
        ({"moe": MoEConfig(experts=(2, 2), top_k=1, ffn_size=4)}, "2 expert counts"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(GrowmoeError, match=words):
        tiny_config(**changes)


def test_plan_of_a_preset_and_of_a_directory(tmp_path) -> None:
    done = growmoe("plan", "--preset", "350M+MoE-128", "--json")
    assert done.code == 0
    assert len(done.out.splitlines()) == 1
    config = preset("350M+MoE-128")
    assert done.json["params_total"] == config.params_total()
    assert done.json["params_active"] == config.params_active()
    assert done.json["flops_per_token"] == config.flops_per_token()
    assert done.json["bytes"] == 2 * config.params_total()
    wrong = growmoe("plan", "--preset", "350M+MoE-12")
    assert wrong.code == 2
    assert "did you mean '350M+MoE-128'?" in wrong.err
