"""Our experts inside of transformers' models: equal logits and gradients, and who gets them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)  # fmt: skip
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import growmoe.hf_experts as ours

ours.disable()  # importing it enabled it, also for the tests of other files

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
MOE = {"num_experts": 5, "moe_intermediate_size": 24}
CONFIGS: dict[str, Any] = {
    "mixtral": (MixtralConfig, {"num_local_experts": 5}),
    "qwen2_moe": (Qwen2MoeConfig, {**MOE, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": (Qwen3MoeConfig, {**MOE, "head_dim": 8}),
    "olmoe": (OlmoeConfig, {"num_experts": 5}),
}
TOKENS = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    ours.enable()
    yield
    ours.disable()


def model_of(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    with torch.no_grad():  # large enough for a mistake to show
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


def tiny(name: str, **changes: Any) -> PreTrainedModel:
    kind, more = CONFIGS[name]
    return model_of(kind(**{**SIZES, **more, **changes}))


def logits_and_gradients(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    done = model(input_ids=TOKENS, labels=TOKENS)
    done.loss.backward()
    return done.logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every call of our experts."""
    rows: list[int] = []
    real = ours.expert_mlp

    def counted(x: Tensor, *rest: Any) -> Tensor:
        rows.append(len(x))
        return real(x, *rest)

    monkeypatch.setattr(ours, "expert_mlp", counted)
    return rows


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    scale = float(want.abs().max())
    assert float((got.float() - want.float()).abs().max()) <= tolerance * max(scale, 1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_eager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    assert model.config._experts_implementation == "growmoe"
    calls = calls_of(monkeypatch)
    logits, gradients = logits_and_gradients(model)
    assert calls == [14, 14]
    model.set_experts_implementation("eager")
    wanted, wanted_gradients = logits_and_gradients(model)
    assert calls == [14, 14]
    close(logits, wanted, 1e-5)
    for key, want in wanted_gradients.items():
        close(gradients[key], want, 1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_without_gradients(name: str) -> None:
    model = tiny(name).bfloat16().eval()
    with torch.no_grad():
        got = model(TOKENS).logits
        model.set_experts_implementation("eager")
        want = model(TOKENS).logits
    # not the largest difference: rounding may turn the choice between two close experts
    error = (got - want).float().square().mean().sqrt() / want.float().square().mean().sqrt()
    assert float(error) < 0.05


def test_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny("mixtral"), calls_of(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        logits, gradients = logits_and_gradients(model)
        model.set_experts_implementation("eager")
        wanted, wanted_gradients = logits_and_gradients(model)
    assert calls
    close(logits, wanted, 0.05)
    key = "model.layers.1.mlp.experts.down_proj"
    assert gradients[key].dtype == torch.float32
    close(gradients[key], wanted_gradients[key], 0.05)


def test_generation_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny("mixtral").eval(), calls_of(monkeypatch)
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    got = model.generate(TOKENS[:1], **asked)
    assert calls == [7, 7, 1, 1, 1, 1, 1, 1]
    model.set_experts_implementation("eager")
    assert torch.equal(got, model.generate(TOKENS[:1], **asked))


# ---- who gets them ----


def test_asking_for_another_one_is_respected() -> None:
    for wanted in ("eager", "grouped_mm", "batched_mm"):
        assert tiny("mixtral", experts_implementation=wanted).get_experts_implementation() == {
            "": wanted
        }


def test_disable_restores_the_default_and_leaves_models_alone() -> None:
    before = tiny("mixtral")
    ours.disable()
    after = tiny("mixtral")
    assert after.config._experts_implementation == "grouped_mm"
    assert before.config._experts_implementation == "growmoe"
    before(TOKENS)
    after.set_experts_implementation("growmoe")
    ours.enable()
    assert tiny("mixtral").config._experts_implementation == "growmoe"


def test_the_choice_is_not_saved_with_a_model(tmp_path: Any) -> None:
    model = tiny("olmoe")
    model.save_pretrained(tmp_path)
    assert "growmoe" not in (tmp_path / "config.json").read_text()
    again = type(model).from_pretrained(tmp_path)
    assert again.config._experts_implementation == "growmoe"
    ours.disable()
    again = type(model).from_pretrained(tmp_path)
    assert again.config._experts_implementation == "grouped_mm"


def test_models_that_differ_keep_transformers_default() -> None:
    gpt_oss = GptOssConfig(**SIZES, num_local_experts=4, head_dim=8, layer_types=None)
    assert model_of(gpt_oss).config._experts_implementation == "grouped_mm"
    gelu = tiny("mixtral", hidden_act="gelu")
    assert gelu.config._experts_implementation == "grouped_mm"
    quantised = tiny("mixtral", quantization_config={"quant_method": "fp8"})
    assert quantised.config._experts_implementation == "grouped_mm"


def test_layers_that_differ_are_computed_by_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(monkeypatch)
    gpt_oss = GptOssConfig(**SIZES, num_local_experts=4, head_dim=8, layer_types=None)
    for model in (model_of(gpt_oss), tiny("mixtral", hidden_act="gelu")):
        model.eval()
        with torch.no_grad():
            wanted = model(TOKENS).logits
            model.set_experts_implementation("growmoe")
            assert torch.equal(model(TOKENS).logits, wanted)
    assert calls == []


def test_a_family_that_nobody_named_here() -> None:
    config = DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4}, n_routed_experts=4, n_group=1, topk_group=1,
        moe_intermediate_size=16, first_k_dense_replace=0, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, n_shared_experts=1,
    )  # fmt: skip
    model = model_of(config)
    assert model.config._experts_implementation == "growmoe"
    got = model(TOKENS).logits
    model.set_experts_implementation("eager")
    close(got.detach(), model(TOKENS).logits.detach(), 1e-5)
