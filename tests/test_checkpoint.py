"""Hugging Face directories both ways, and damaged ones named precisely."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from conftest import fresh_growmoe, growmoe, tiny_model, write_tiny
from growmoe.errors import GrowmoeError, UsageError
from growmoe.models.checkpoint import (
    Directory,
    load_model,
    parameter_views,
    save_model,
    write_model,
)
from growmoe.models.config import MoEConfig
from growmoe.models.families import config_from_hf, config_to_hf

COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama-biased-tied-scaled": (
        "LlamaConfig",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 16,
         "rope_parameters": LLAMA3},
    ),
    "llama-linear-rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "mistral-window": ("MistralConfig", {"sliding_window": 8}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}
    ),
    "qwen2_moe-renorm": (
        "Qwen2MoeConfig",
        {**MOE, "shared_expert_intermediate_size": 0, "norm_topk_prob": True},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**MOE, "norm_topk_prob": True, "decoder_sparse_step": 2, "head_dim": 8},
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "olmoe-biased-renorm": (
        "OlmoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True,
         "attention_bias": True, "tie_word_embeddings": True},
    ),
}  # fmt: skip


def public_model(kind: str) -> transformers.PreTrainedModel:
    name, changes = FAMILIES[kind]
    config = getattr(transformers, name)(**{**COMMON, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
        else:  # biases too, so that a lost one shows
            parameter.data.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_parity_with_transformers_both_ways(kind: str, tmp_path: Path) -> None:
    theirs = public_model(kind)
    theirs.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    tokens = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    ours = load_model(tmp_path / "a")
    assert (ours(tokens).logits - expected).abs().max() < 1e-5

    source = Directory(tmp_path / "a")
    (tmp_path / "b").mkdir()
    write_model(tmp_path / "b", source.config, source.load, "float32", shard_limit=20000)
    assert (tmp_path / "b" / "model.safetensors.index.json").exists()
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(again) is type(theirs)
    assert (again.eval()(tokens).logits - expected).abs().max() < 1e-5
    saved = tmp_path / "c"
    saved.mkdir()
    save_model(saved, ours, "float32")
    assert (load_model(saved)(tokens).logits - ours(tokens).logits).abs().max() == 0


def test_parity_catches_a_wrong_renormalisation(tmp_path: Path) -> None:
    """The parity test must be able to fail: flip one flag of the config and the logits differ."""
    theirs = public_model("qwen3_moe")
    theirs.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["norm_topk_prob"] = False
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        difference = load_model(tmp_path / "a")(tokens).logits - theirs(tokens).logits
    assert difference.abs().max() > 1e-2


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "layer", "positions": "learned", "activation": "gelu", "qkv_bias": True,
         "o_bias": True, "mlp_bias": True, "tied_head": True},
        {"moe": MoEConfig(experts=(0, 2, 4), top_k=1, ffn_size=12, renormalize=False,
                          mix="softmax2", fixed_ffn_size=20)},
        {"activation": "gelu", "mlp_bias": True,
         "moe": MoEConfig(experts=(3, 0, 2), top_k=2, ffn_size=12)},
        {"moe": MoEConfig(experts=(4, 4, 4), top_k=2, ffn_size=12, mix="sum", fixed_ffn_size=6)},
        {"qk_norm": True, "qk_norm_scope": "all"},
        {"qk_norm": True, "mlp_bias": True,
         "moe": MoEConfig(experts=(4, 4, 4), top_k=2, ffn_size=12)},
        {"qk_norm": True, "qk_norm_scope": "all", "hidden_size": 40,
         "moe": MoEConfig(experts=(4, 4, 4), top_k=2, ffn_size=12)},
    ],
)  # fmt: skip
@torch.no_grad()
def test_what_no_public_architecture_expresses_survives_too(changes: dict, tmp_path: Path) -> None:
    model = tiny_model(**changes)
    path = write_tiny(tmp_path / "m", **changes)
    assert json.loads((path / "config.json").read_text())["model_type"] == "growmoe"
    tokens = torch.arange(30)[None]
    again = load_model(path)
    assert again.config.moe == model.config.moe
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_an_expressible_moe_is_written_as_a_public_architecture(tmp_path: Path) -> None:
    residual = MoEConfig(
        experts=(4, 4, 4), top_k=1, ffn_size=12, renormalize=False, mix="sigmoid_gate",
        fixed_ffn_size=50,
    )  # fmt: skip
    path = write_tiny(tmp_path / "m", moe=residual)
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        assert (model(tokens).logits - load_model(path)(tokens).logits).abs().max() < 1e-5


def test_clip_qkv_is_refused(tmp_path: Path) -> None:
    theirs = public_model("olmoe").config.to_dict() | {"clip_qkv": 8.0}
    with pytest.raises(GrowmoeError, match=r"config.json: clip_qkv 8.0 is not supported"):
        config_from_hf(theirs, tmp_path / "config.json")


def test_absent_keys_of_olmoe_mean_what_transformers_takes_for_them(tmp_path: Path) -> None:
    public = transformers.OlmoeConfig()
    size = {"hidden_size": 2048, "num_attention_heads": 16, "intermediate_size": 2048}
    raw = {"model_type": "olmoe", "vocab_size": 50304, "num_hidden_layers": 16, **size}
    found = config_from_hf(raw, tmp_path / "config.json")
    moe = found.moe
    assert moe is not None
    assert moe.experts == (public.num_experts,) * 16
    assert (moe.top_k, moe.renormalize) == (public.num_experts_per_tok, public.norm_topk_prob)
    assert (moe.ffn_size, found.norm_eps) == (public.intermediate_size, public.rms_norm_eps)
    assert (found.qkv_bias, found.o_bias, found.tied_head) == (False, False, False)
    assert found.head_dim == 128


# ---- damaged input ----


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model")


def refused(path: Path, *words: str) -> None:
    with pytest.raises(GrowmoeError) as caught:
        source = Directory(path)
        for name in source._names:
            source.load(name)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def edit(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_truncated_file(model_dir: Path) -> None:
    file = model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(model_dir, "model.safetensors is not a whole safetensors file")


def test_garbage_file(model_dir: Path) -> None:
    (model_dir / "model.safetensors").write_bytes(b"\x80\x04 not safetensors")
    refused(model_dir, "model.safetensors is not a whole safetensors file")


def test_missing_tensor(model_dir: Path) -> None:
    edit(model_dir, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    refused(model_dir, "model.layers.1.mlp.up_proj.weight is missing")


def test_unknown_tensor(model_dir: Path) -> None:
    edit(model_dir, lambda t: t.update({"model.layers.0.mlp.extra": torch.zeros(2)}))
    refused(model_dir, "model.layers.0.mlp.extra has no place in a llama model")


def test_wrong_dtype(model_dir: Path) -> None:
    name = "model.norm.weight"
    edit(model_dir, lambda t: t.update({name: t[name].to(torch.int32)}))
    refused(model_dir, name, "dtype I32")


def test_nan(model_dir: Path) -> None:
    edit(model_dir, lambda t: t["lm_head.weight"][3].fill_(float("nan")))
    refused(model_dir, "model.safetensors", "lm_head.weight holds NaN")


def test_config_that_contradicts_the_tensors(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    config["intermediate_size"] = 51
    (model_dir / "config.json").write_text(json.dumps(config))
    refused(model_dir, "mlp.gate_proj.weight has shape [50, 36]", "config.json says [51, 36]")


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_missing_config_key(model_dir: Path, key: str) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    del config[key]
    (model_dir / "config.json").write_text(json.dumps(config))
    refused(model_dir, "config.json", f"'{key}' is missing")


def test_wrong_config_type(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    config["hidden_size"] = "wide"
    (model_dir / "config.json").write_text(json.dumps(config))
    refused(model_dir, "config.json", "wrong type")


def test_index_names_a_missing_shard(tmp_path: Path) -> None:
    public_model("llama").save_pretrained(tmp_path / "a", max_shard_size="20KB")
    shard = sorted((tmp_path / "a").glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(tmp_path / "a", "model.safetensors.index.json names", shard.name)


def test_pickles_are_never_read(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    refused(model_dir, "no model.safetensors", "pickle")


def test_unsupported_architecture(model_dir: Path) -> None:
    (model_dir / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    refused(model_dir, "model_type 'mamba' is not supported")


def test_damage_reaches_the_command_line_as_one_sentence(model_dir: Path, tmp_path: Path) -> None:
    edit(model_dir, lambda t: t["lm_head.weight"][3].fill_(float("nan")))
    done = growmoe("upcycle", model_dir, tmp_path / "out")
    assert done.code == 1
    assert "lm_head.weight holds NaN" in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    debug = fresh_growmoe("upcycle", model_dir, tmp_path / "out", "--debug")
    assert "Traceback" in debug.err


def test_existing_output_is_refused(model_dir: Path, tmp_path: Path) -> None:
    done = growmoe("upcycle", model_dir, model_dir)
    assert done.code == 2
    assert "already exists" in done.err
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="no config.json"):
        Directory(empty)
    shutil.rmtree(empty)


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "olmoe"]
)
@pytest.mark.parametrize(
    "key", ["num_key_value_heads", "rope_parameters", "max_position_embeddings"]
)
def test_absent_keys_mean_what_transformers_takes_for_them(
    kind: str, key: str, tmp_path: Path
) -> None:
    theirs = public_model(kind).config.to_dict()
    del theirs[key]
    theirs.pop("rope_theta", None)
    public = getattr(transformers, FAMILIES[kind][0])(
        **{k: v for k, v in theirs.items() if k not in ("architectures", "model_type", "dtype")}
    )
    if key == "num_key_value_heads" and public.num_attention_heads % public.num_key_value_heads:
        pytest.skip("the default does not divide this model's heads")
    found = config_from_hf(theirs, tmp_path / "config.json")
    assert found.num_kv_heads == public.num_key_value_heads
    assert found.max_positions == public.max_position_embeddings
    assert found.rope_theta == public.rope_parameters["rope_theta"]


def test_a_llama_whose_heads_do_not_divide_is_written_as_what_loads(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", hidden_size=40, num_heads=9, head_dim=8, ffn_size=52)
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert (model(ids).logits - load_model(path)(ids).logits).abs().max() < 1e-5


def test_token_ids_are_not_invented(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", token_ids={"eos_token_id": 5})
    config = transformers.AutoConfig.from_pretrained(path)
    assert (config.bos_token_id, config.eos_token_id) == (None, 5)


def test_a_config_that_is_no_object(model_dir: Path) -> None:
    (model_dir / "config.json").write_text("[]")
    refused(model_dir, "config.json is not a JSON object")


def test_float16_does_not_take_what_it_cannot_hold(tmp_path: Path) -> None:

    model = tiny_model()
    views = dict(parameter_views(model))
    views["layers.1.mlp.up.weight"][3, 4] = 1e5
    with pytest.raises(GrowmoeError, match="up_proj.weight holds values that float16 cannot"):
        write_model(tmp_path, model.config, views.__getitem__, "float16")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
             "rope_scaling": {"type": "linear", "factor": 2.0}},
            "contradict",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}},
            "needs a low_freq_factor",
        ),
    ],
)  # fmt: skip
def test_rotary_settings_that_cannot_be_right(changes, words: str) -> None:
    raw = {**config_to_hf(tiny_model().config, "float32"), **changes}
    with pytest.raises(GrowmoeError, match=words):
        config_from_hf(raw, Path("config.json"))
