"""The adapter for transformers: same numbers, same files, and no wrong answer in silence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import growmoe.hf
from conftest import tiny_config, tiny_model, write_tiny
from growmoe.errors import GrowmoeError, UsageError
from growmoe.inference.llm import LLM
from growmoe.inference.loading import Loaded
from growmoe.inference.requests import Sampling
from growmoe.models.checkpoint import Directory, load_model
from growmoe.models.config import MoEConfig, tensor_shapes
from growmoe.models.families import config_from_hf

PYRAMID = MoEConfig(experts=(0, 2, 4), top_k=1, ffn_size=12, renormalize=False)
GPT = {
    "norm": "layer", "positions": "learned", "activation": "gelu", "qkv_bias": True,
    "o_bias": True, "mlp_bias": True, "tied_head": True,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "pyramid": {"moe": PYRAMID},
    "softmax2": {
        "moe": MoEConfig(
            experts=(0, 2, 4), top_k=2, ffn_size=12, renormalize=False, mix="softmax2",
            fixed_ffn_size=20,
        ),
    },
    "sum": {
        "moe": MoEConfig(experts=(4, 0, 4), top_k=2, ffn_size=12, mix="sum", fixed_ffn_size=6),
        "tied_head": True,
    },
    "sigmoid-window": {
        "moe": MoEConfig(
            experts=(2, 12, 3), top_k=2, ffn_size=12, mix="sigmoid_gate", fixed_ffn_size=8
        ),
        "sliding_window": 6, "mlp_bias": True, "qkv_bias": True,
    },
    "gpt": GPT,
    "gpt-pyramid": {**GPT, "moe": PYRAMID, "tied_head": False},
    "norm-over-heads": {"qk_norm": True, "qk_norm_scope": "all"},
}  # fmt: skip
TOKENS = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(1))


def directory(path: Path, kind: str, **changes: Any) -> Path:
    return write_tiny(path, family="growmoe", **KINDS[kind], **changes)


def wrapped(kind: str, **changes: Any) -> growmoe.hf.GrowmoeForCausalLM:
    ours = tiny_model(family="growmoe", **KINDS[kind], **changes)
    config = growmoe.hf.GrowmoeConfig.from_shape(ours.config)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.model.load_state_dict(ours.state_dict())
    return model


# ---- files ----


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_files_both_ways(kind: str, tmp_path: Path) -> None:
    path = directory(tmp_path / "a", kind)
    ours = load_model(path)
    theirs, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert isinstance(theirs, growmoe.hf.GrowmoeForCausalLM)
    assert not any(info.values()), info
    assert torch.equal(theirs(TOKENS).logits, ours(TOKENS).logits)

    theirs.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    before, after = Directory(path), Directory(tmp_path / "b")
    assert after.config == before.config
    assert set(after._files) == set(tensor_shapes(before.config))
    for name in tensor_shapes(before.config):
        assert torch.equal(before.load(name), after.load(name)), name
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(again(TOKENS).logits, ours(TOKENS).logits)


@pytest.mark.parametrize("kind", ["softmax2", "gpt-pyramid"])
@torch.no_grad()
def test_a_model_that_was_never_loaded_is_saved_alike(kind: str, tmp_path: Path) -> None:
    model = wrapped(kind)
    model.save_pretrained(tmp_path / "a")
    assert set(Directory(tmp_path / "a")._files) == set(tensor_shapes(model.model.config))
    assert torch.equal(load_model(tmp_path / "a")(TOKENS).logits, model(TOKENS).logits)


@torch.no_grad()
def test_bfloat16(tmp_path: Path) -> None:
    path = directory(tmp_path / "a", "softmax2")
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    ours = load_model(path, "bfloat16")
    assert torch.equal(theirs(TOKENS).logits, ours(TOKENS).logits)
    theirs.save_pretrained(tmp_path / "b")
    assert Directory(tmp_path / "b").dtype == "bfloat16"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert again.dtype == torch.bfloat16


@pytest.mark.parametrize("lost", ["experts.1.up.", "experts.1.", ".gate.", "experts."])
def test_missing_experts_are_not_filled_in_silence(lost: str, tmp_path: Path) -> None:
    path = directory(tmp_path / "a", "pyramid")
    tensors = load_file(path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if f"layers.1.moe.{lost}" not in name}
    if lost == ".gate.":
        kept = {n: t for n, t in tensors.items() if not ("layers.1.moe" in n and lost in n)}
    assert len(kept) < len(tensors)
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    if lost == "experts.":  # all of them: a report, as transformers does for any tensor
        _, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert len(info["missing_keys"]) == 2
    else:
        with pytest.raises(RuntimeError):
            AutoModelForCausalLM.from_pretrained(path)


def test_config_round_trip(tmp_path: Path) -> None:
    shape = tiny_config(
        family="growmoe", moe=PYRAMID, sliding_window=7, init_std=0.3,
        rope_scaling={"rope_type": "linear", "factor": 2.0}, token_ids={"eos_token_id": [5, 6]},
    )  # fmt: skip
    config = growmoe.hf.GrowmoeConfig.from_shape(shape)
    assert config.shape() == shape
    assert (config.num_hidden_layers, config.max_position_embeddings) == (3, 160)
    config.pad_token_id = 3
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, growmoe.hf.GrowmoeConfig)
    assert (again.eos_token_id, again.pad_token_id, again.bos_token_id) == ([5, 6], 3, None)
    raw = json.loads((tmp_path / "config.json").read_text())
    found = config_from_hf(raw, tmp_path / "config.json")
    assert found == again.shape()
    assert found == shape.replace(token_ids={"eos_token_id": [5, 6], "pad_token_id": 3})


def test_an_impossible_config_is_refused() -> None:
    with pytest.raises(GrowmoeError, match=r"config.json: .*num_heads 8 is not a multiple"):
        growmoe.hf.GrowmoeConfig.from_shape(tiny_config()).from_dict(
            {**growmoe.hf.GrowmoeConfig.from_shape(tiny_config()).to_dict(), "num_heads": 8}
        )
    with pytest.raises(GrowmoeError, match="hidden_size"):
        growmoe.hf.GrowmoeConfig(vocab_size=10)


def test_new_weights_follow_the_rule_of_the_house() -> None:
    shape = tiny_config(
        family="growmoe", hidden_size=64, ffn_size=256, vocab_size=500, init_std=0.1, mlp_bias=True,
        moe=MoEConfig(experts=(0, 8, 8), top_k=2, ffn_size=64),
    )  # fmt: skip
    config = growmoe.hf.GrowmoeConfig.from_shape(shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.model.named_parameters():
        values = parameter.detach()
        if "norm" in name:
            assert (values == 1).all(), name
        elif name.endswith("bias"):
            assert (values == 0).all(), name
        elif values.numel() > 2000:
            std = 0.1 / 6**0.5 if "down" in name or ".o." in name else 0.1
            assert values.std().item() == pytest.approx(std, rel=0.1), name
    torch.manual_seed(0)
    again = AutoModelForCausalLM.from_config(config)
    for a, b in zip(model.parameters(), again.parameters()):
        assert torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pyramid", "sum"])
def test_more_tokens(kind: str, tmp_path: Path) -> None:
    model = wrapped(kind)
    before = model(TOKENS).logits
    model.resize_token_embeddings(100, mean_resizing=False)
    assert (model(TOKENS).logits[..., :97] - before).abs().max() < 1e-5
    model.save_pretrained(tmp_path / "a")
    assert torch.equal(load_model(tmp_path / "a")(TOKENS).logits, model(TOKENS).logits)


# ---- loss ----


@pytest.mark.parametrize("kind", ["softmax2", "gpt"])
def test_loss_and_gradients(kind: str) -> None:
    model = wrapped(kind).train()
    labels = TOKENS.clone()
    labels[:, :4] = -100
    result = model(TOKENS, labels=labels, output_router_logits=True)
    expected = torch.nn.functional.cross_entropy(
        result.logits[:, 3:-1].reshape(-1, 97), TOKENS[:, 4:].reshape(-1)
    )
    assert result.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert result.past_key_values is None
    assert len(result.router_logits) == sum(1 for n in KINDS[kind].get("moe", GPT_MOE).experts if n)
    result.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


GPT_MOE = MoEConfig(experts=(), top_k=1, ffn_size=1)


# ---- generation ----


@pytest.mark.parametrize("kind", ["softmax2", "sigmoid-window", "gpt-pyramid", "norm-over-heads"])
@torch.no_grad()
def test_greedy_generation(kind: str) -> None:
    model = wrapped(kind)
    prompt = TOKENS[:1, :9]
    with_cache = model.generate(prompt, max_new_tokens=20, do_sample=False)
    without = model.generate(prompt, max_new_tokens=20, do_sample=False, use_cache=False)
    engine = LLM(Loaded(kind, model.model, None, frozenset(), torch.float32))
    sampling = Sampling(max_tokens=20, temperature=0)
    ours = engine.generate(prompt.tolist(), sampling)[0].token_ids
    assert with_cache[0, 9:].tolist() == without[0, 9:].tolist() == ours
    assert len(set(ours)) > 1


@torch.no_grad()
def test_beam_search_moves_the_cache_with_the_beams() -> None:
    model = wrapped("softmax2")
    with_cache, without = (
        model.generate(TOKENS[:, :9], max_new_tokens=8, num_beams=3, use_cache=use).tolist()
        for use in (True, False)
    )
    assert with_cache == without


@torch.no_grad()
def test_generation_stops_at_the_end_token() -> None:
    plain = wrapped("pyramid").generate(TOKENS[:1, :5], max_new_tokens=12, do_sample=False)
    end = plain[0, 8].item()
    model = wrapped("pyramid", token_ids={"eos_token_id": end, "pad_token_id": 0})
    stopped = model.generate(TOKENS[:1, :5], max_new_tokens=12, do_sample=False)
    first = plain[0, 5:].tolist().index(end)
    assert stopped[0].tolist() == plain[0, : 5 + first + 1].tolist()


@pytest.mark.parametrize("kind", ["softmax2", "sigmoid-window", "gpt-pyramid"])
@torch.no_grad()
def test_padding_changes_nothing(kind: str) -> None:
    model = wrapped(kind)
    long, short = TOKENS[0, :14], TOKENS[1, :9]
    expected = model(short[None]).logits[0]
    zeros, ones = torch.zeros(5, dtype=torch.long), torch.ones(9, dtype=torch.long)
    for tokens, mask, real in (
        (torch.cat((zeros, short)), torch.cat((zeros, ones)), slice(5, None)),
        (torch.cat((short, zeros)), torch.cat((ones, zeros)), slice(0, 9)),
    ):
        batch = torch.stack((long, tokens))
        both = torch.stack((torch.ones(14, dtype=torch.long), mask))
        logits = model(batch, attention_mask=both).logits
        assert (logits[1, real] - expected).abs().max() < 1e-4
        assert (logits[0] - model(long[None]).logits[0]).abs().max() < 1e-4
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("kind", ["softmax2", "sigmoid-window", "gpt-pyramid"])
@torch.no_grad()
def test_prompts_of_several_lengths(kind: str) -> None:
    """A batch padded on the left, with the cache, says what each prompt says alone."""
    model = wrapped(kind, token_ids={"pad_token_id": 96})
    prompts = [TOKENS[0, :14], TOKENS[1, :9]]
    batch = torch.full((2, 14), 96)
    for row, prompt in zip(batch, prompts):
        row[-len(prompt) :] = prompt
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, :5] = 0
    together = model.generate(batch, attention_mask=mask, max_new_tokens=12, do_sample=False)
    for row, prompt in zip(together, prompts):
        alone = model.generate(prompt[None], max_new_tokens=12, do_sample=False)
        assert row[14:].tolist() == alone[0, len(prompt) :].tolist()


@torch.no_grad()
def test_left_padding_takes_no_learned_position() -> None:
    model = wrapped("gpt", max_positions=10)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[:, :2] = 0
    logits = model(TOKENS[:, :12], attention_mask=mask).logits[:, 2:]
    assert (logits - model(TOKENS[:, 2:12]).logits).abs().max() < 1e-4
    with pytest.raises(GrowmoeError, match="only 10 positions"):
        model(TOKENS[:, :12])
    mask[:, 1] = 1
    with pytest.raises(GrowmoeError, match="only 10 positions"):
        model(TOKENS[:, :12], attention_mask=mask)


# ---- what would be wrong in silence is refused ----


@torch.no_grad()
def test_masks_that_cannot_be_right_are_refused() -> None:
    model = wrapped("sigmoid-window")
    hole = torch.tensor([[1, 1, 0, 1]])
    with pytest.raises(UsageError, match="padding between tokens"):
        model(TOKENS[:1, :4], attention_mask=hole)
    held = model(TOKENS[:1, :4]).past_key_values
    for mask in (torch.ones(1, 2), torch.ones(2, 6), torch.ones(1, 1, 2, 6)):
        with pytest.raises(UsageError, match=r"attention_mask has shape .* \[1, 6\]"):
            model(TOKENS[:1, 4:6], attention_mask=mask, past_key_values=held)
    with pytest.raises(UsageError, match="pad prompts on the left"):
        model.generate(TOKENS[:1, :4], attention_mask=torch.tensor([[1, 1, 1, 0]]))


@torch.no_grad()
def test_a_hole_without_a_window_is_skipped() -> None:
    model = wrapped("softmax2")
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]])
    kept = TOKENS[:1, :6][:, mask[0].bool()]
    logits = model(TOKENS[:1, :6], attention_mask=mask).logits[:, mask[0].bool()]
    assert (logits - model(kept).logits).abs().max() < 1e-4


@torch.no_grad()
def test_what_the_architecture_lacks_is_refused() -> None:
    model = wrapped("pyramid")
    for key in ("inputs_embeds", "position_ids"):
        with pytest.raises(UsageError, match=f"does not take {key}"):
            model(TOKENS, **{key: TOKENS})
    with pytest.raises(UsageError, match="does not take output_attentions"):
        model(TOKENS, output_attentions=True)
    assert model(TOKENS, output_hidden_states=False, inputs_embeds=None).logits is not None
    with pytest.raises(UsageError, match="static cache"):
        model.generate(TOKENS, max_new_tokens=4, cache_implementation="static")


@torch.no_grad()
def test_a_cache_of_the_callers_own() -> None:
    model = wrapped("sigmoid-window")
    whole = model(TOKENS).logits
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        first = model(TOKENS[:, :20], past_key_values=cache)
        assert first.past_key_values is cache
        rest = model(TOKENS[:, 20:], past_key_values=cache).logits
        assert (rest - whole[:, 20:]).abs().max() < 1e-4
    logits, held = model(TOKENS, return_dict=False)
    assert torch.equal(logits, whole)
    assert held.get_seq_length() == 30
