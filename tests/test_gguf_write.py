"""GGUF files: written, read back, and run by llama.cpp where it is installed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from conftest import CHINESE, ENGLISH, InMemory, tiny_config, tiny_model
from growmoe.data.tokenizer import save_tokenizer, train_tokenizer
from growmoe.errors import GrowmoeError, UsageError
from growmoe.models import gguf_arch, gguf_write
from growmoe.models.config import MoEConfig, tensor_shapes
from growmoe.models.gguf import GGUFFile, permute, unpermute
from growmoe.models.gguf_arch import gguf_architecture, gguf_obstacle
from growmoe.models.gguf_write import write_gguf
from growmoe.models.llama_cpp import LlamaCpp, next_token_log_probs

gguf = pytest.importorskip("gguf")

VOCAB = 330
BASE: dict[str, Any] = {"vocab_size": VOCAB, "token_ids": {"eos_token_id": 0}}
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0}
TEXTS = [*ENGLISH, *CHINESE, "def f(x):\r\n\treturn x  ** 2\n\n\n# 混合 🌱 don't 1234567.5 ½ Ⅷ\n"]
MIXED = [
    *TEXTS, "   leading   and trailing   ", "I'LL we're 'tis 12345 １２３  \t\n \n x", "", " ",
    "👩‍👩‍👧‍👦🇨🇳 e\u0301 नमस्ते สวัสดี \u3000“你好”——是的……\u00a0\u200b",
    "<|im_start|>user\nhi<|im_end|>\n",
]  # fmt: skip


def moe(experts: int = 4, top_k: int = 2, **more: Any) -> MoEConfig:
    return MoEConfig(experts=(experts,) * 3, top_k=top_k, ffn_size=24, **more)


RESIDUAL: dict[str, Any] = {"mix": "sigmoid_gate", "fixed_ffn_size": 20}
FORMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, all biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "llama, wide heads": {"num_heads": 5, "num_kv_heads": 1, "head_dim": 8, "qkv_bias": True},
    "qwen2": {"qkv_bias": True, "tied_head": True, "rope_scaling": LINEAR},
    "qwen3": {"qk_norm": True, "head_dim": 8},
}
ROUTED: dict[str, dict[str, Any]] = {
    "llama, biased experts": {"moe": moe(), "qkv_bias": True, "rope_scaling": LLAMA3},
    "qwen3moe": {"moe": moe(), "qk_norm": True, "head_dim": 8, "tied_head": True},
    "qwen2moe": {"moe": moe(4, 1, renormalize=False, **RESIDUAL), "qkv_bias": True},
    "qwen2moe, tied": {"moe": moe(3, 3, **RESIDUAL), "tied_head": True, "rope_scaling": LINEAR},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(TEXTS, 320), out)
    return out


# ---- files ----


@pytest.mark.parametrize("form", FORMS)
def test_dense_models_come_back_equal(form: str, tmp_path: Path, tokenizer: Path) -> None:
    source = InMemory(tiny_model(**{**BASE, **FORMS[form]}))
    write_gguf(tmp_path / "m.gguf", source, tokenizer, "float32")
    back = GGUFFile(tmp_path / "m.gguf")
    family = form.partition(",")[0]
    assert back.config == source.config.replace(family=family)
    for name in tensor_shapes(source.config):
        assert torch.equal(back.load(name), source.load(name)), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_rounded_once_and_vectors_not_at_all(dtype: str, tmp_path: Path) -> None:
    source = InMemory(tiny_model(qkv_bias=True))
    write_gguf(tmp_path / "m.gguf", source, None, dtype)
    back = GGUFFile(tmp_path / "m.gguf")
    for name in tensor_shapes(source.config):
        tensor = source.load(name)
        rounded = tensor.to(getattr(torch, dtype)).float() if tensor.dim() > 1 else tensor
        assert torch.equal(back.load(name), rounded), name


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_quantised_files_are_read(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "ffn_size": 96}
    source = InMemory(tiny_model(**sizes))
    write_gguf(tmp_path / "plain.gguf", source, None, "float32")
    plain, type_ = gguf.GGUFReader(tmp_path / "plain.gguf"), gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    for key, field in plain.fields.items():
        if key.startswith(("llama.", "tokenizer.")):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in plain.tensors:
        matrix = tensor.data.ndim > 1
        data = gguf.quants.quantize(tensor.data, type_) if matrix else tensor.data
        writer.add_tensor(tensor.name, data, raw_dtype=type_ if matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    back = GGUFFile(tmp_path / "small.gguf")
    for name in tensor_shapes(source.config):
        tensor = source.load(name)
        if tensor.dim() > 1:
            packed = gguf.quants.quantize(tensor.numpy(), type_)
            tensor = torch.from_numpy(gguf.quants.dequantize(packed, type_))
        assert torch.equal(back.load(name), tensor), name


def test_permute_has_an_inverse() -> None:
    rows = torch.arange(24.0).view(12, 2)
    assert permute(rows, 2)[:3, 0].tolist() == [0.0, 6.0, 2.0]
    assert torch.equal(unpermute(permute(rows, 2), 2), rows)


def test_what_overflows_float16_leaves_no_file(tmp_path: Path) -> None:
    model = tiny_model()
    model.get_parameter("layers.1.mlp.up.weight").data[0, 0] = 7e4
    with pytest.raises(GrowmoeError, match=r"blk\.1\.ffn_up\.weight.*bfloat16"):
        write_gguf(tmp_path / "m.gguf", InMemory(model), None)
    assert not list(tmp_path.iterdir())


# ---- obstacles ----


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm": "layer"}, "RMSNorm"),
        ({"positions": "learned"}, "rotary"),
        ({"activation": "gelu"}, "SwiGLU"),
        ({"sliding_window": 159}, "sliding window of 159"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_scaling": LLAMA3, "qk_norm": True}, "not in qwen3"),
        ({"qk_norm": True, "o_bias": True}, "qwen3 has biases on Q, K and V"),
        ({"qk_norm": True, "mlp_bias": True}, "qwen3 has biases on Q, K and V"),
        ({"num_layers": 513}, "512 layers"),
        ({"moe": MoEConfig(experts=(4, 0, 4), top_k=2, ffn_size=8)}, "with and without experts"),
        ({"moe": MoEConfig(experts=(4, 4, 8), top_k=2, ffn_size=8)}, "pyramid"),
        ({"moe": moe(1025)}, "1024 experts"),
        ({"moe": moe(), "mlp_bias": True}, "no biases"),
        ({"moe": moe(renormalize=False)}, "always renormalises"),
        ({"moe": moe(renormalize=False), "qk_norm": True}, "always renormalises"),
        ({"moe": moe(mix="sum", fixed_ffn_size=8)}, "'sum'"),
        ({"moe": moe(mix="softmax2", fixed_ffn_size=8)}, "'softmax2'"),
        ({"moe": moe(**RESIDUAL)}, "never renormalises"),
        ({"moe": moe(renormalize=False, **RESIDUAL), "qk_norm": True}, "QK-norm"),
        ({"moe": moe(renormalize=False, **RESIDUAL), "head_dim": 8}, "qwen2moe"),
        ({"moe": moe(renormalize=False, **RESIDUAL), "o_bias": True}, "qwen2moe has biases"),
        ({"moe": moe(renormalize=False, **RESIDUAL), "rope_scaling": LLAMA3}, "not in qwen2moe"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    config = tiny_config(**changes)
    assert words in (gguf_obstacle(config) or "")
    with pytest.raises(UsageError, match="llama.cpp cannot run this model exactly"):
        gguf_architecture(config)


@pytest.mark.parametrize("form", [*FORMS, *ROUTED])
def test_architecture_of_each_form(form: str) -> None:
    assert gguf_architecture(tiny_config(**{**FORMS, **ROUTED}[form])) == form.partition(",")[0]


def test_a_window_longer_than_the_context_is_no_obstacle() -> None:
    assert gguf_obstacle(tiny_config(sliding_window=160)) is None


# ---- tokenizers ----


def field(path: Path, key: str) -> Any:
    found = gguf.GGUFReader(path).get_field(f"tokenizer.{key}")
    return found.contents() if found else None


def test_tokens_are_padded_and_typed(tmp_path: Path, tokenizer: Path) -> None:
    source = InMemory(tiny_model(vocab_size=VOCAB, num_layers=1))
    write_gguf(tmp_path / "m.gguf", source, tokenizer)
    tokens = field(tmp_path / "m.gguf", "ggml.tokens")
    types = field(tmp_path / "m.gguf", "ggml.token_type")
    assert len(tokens) == len(types) == VOCAB
    assert tokens[320:] == [f"[PAD{i}]" for i in range(320, VOCAB)]
    assert types == [3] * 3 + [1] * 317 + [5] * (VOCAB - 320)
    assert field(tmp_path / "m.gguf", "ggml.eos_token_id") == 0  # named in tokenizer_config.json
    assert field(tmp_path / "m.gguf", "ggml.add_bos_token") is False
    assert "im_start" in field(tmp_path / "m.gguf", "chat_template")


def test_the_tokenizer_of_an_origin_is_copied_and_padded(tmp_path: Path, tokenizer: Path) -> None:
    source = InMemory(tiny_model(vocab_size=VOCAB, num_layers=1))
    write_gguf(tmp_path / "a.gguf", source, tokenizer)
    larger = InMemory(tiny_model(vocab_size=VOCAB + 5, num_layers=1))
    write_gguf(tmp_path / "b.gguf", larger, None, origin_gguf=tmp_path / "a.gguf")
    for key in ("ggml.merges", "ggml.pre", "chat_template", "ggml.eos_token_id", "ggml.model"):
        assert field(tmp_path / "b.gguf", key) == field(tmp_path / "a.gguf", key)
    tokens = field(tmp_path / "b.gguf", "ggml.tokens")
    assert len(tokens) == VOCAB + 5
    assert tokens[-1] == f"[PAD{VOCAB + 4}]"


def other_tokenizer(out: Path, pre: Any, ignore_merges: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = pre
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    out.mkdir(exist_ok=True)
    save_tokenizer(made, out)
    return made


@pytest.mark.parametrize(
    ("pre", "ignore_merges"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=True), False),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), True),
        (pre_tokenizers.Whitespace(), False),
    ],
)
def test_an_unknown_split_is_refused(pre: Any, ignore_merges: bool, tmp_path: Path) -> None:
    other_tokenizer(tmp_path / "t", pre, ignore_merges)
    with pytest.raises(GrowmoeError, match=r"tokenizer\.json: llama\.cpp has no rule.*origin"):
        write_gguf(tmp_path / "m.gguf", InMemory(tiny_model(**BASE)), tmp_path / "t")
    assert not (tmp_path / "m.gguf").exists()


# ---- the engine itself ----


def written(out: Path, tokenizer: Path, **changes: Any) -> Any:
    model = tiny_model(**{**BASE, **changes})
    for name, parameter in model.named_parameters():
        if name.startswith("layers.1.moe.mix"):  # llama.cpp would make NaN of a gate of zeros
            parameter.data.zero_()
    write_gguf(out, InMemory(model), tokenizer, "float32")
    return model


def largest_difference(path: Path, model: Any) -> float:
    ids = torch.randint(0, VOCAB, (64,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(ids[None]).logits[0].float().log_softmax(-1)
    positions = [0, 1, 2, 15, 16, 31, 40, 47, 55, 62, 63]
    theirs = next_token_log_probs(path, ids.tolist(), positions)
    return (theirs - ours[positions]).abs().max().item()


@pytest.mark.parametrize("form", [*FORMS, *ROUTED])
def test_llama_cpp_agrees(form: str, tmp_path: Path, tokenizer: Path) -> None:
    pytest.importorskip("xllamacpp")
    changes = {**FORMS, **ROUTED}[form]
    model = written(tmp_path / "m.gguf", tokenizer, **changes)
    assert largest_difference(tmp_path / "m.gguf", model) < 3e-4


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"sliding_window": 8}),
        ("llama", {"moe": moe(renormalize=False)}),
        ("qwen2moe", {"moe": moe(**RESIDUAL)}),
    ],
)
def test_the_silent_obstacles_are_real(
    architecture: str,
    changes: dict[str, Any],
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(gguf_arch, "_arch", lambda _: architecture)
    model = written(tmp_path / "m.gguf", tokenizer, **changes)
    assert largest_difference(tmp_path / "m.gguf", model) > 0.1


def test_token_ids_equal_those_of_tokenizers(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    grown = train_tokenizer(TEXTS, 320).pre_tokenizer
    qwen = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    single = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(qwen), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    source = InMemory(tiny_model(**{**BASE, "num_layers": 1}))
    for pre, whole_words, rule in [
        (grown, False, "smaug-bpe"), (grown, True, "llama-bpe"), (plain, False, "gpt-2"),
        (digits, False, "smollm"), (single, False, "qwen2"),
    ]:  # fmt: skip
        made = other_tokenizer(tmp_path / "t", pre, whole_words)
        write_gguf(tmp_path / "m.gguf", source, tmp_path / "t")
        assert field(tmp_path / "m.gguf", "ggml.pre") == rule
        with LlamaCpp(tmp_path / "m.gguf", context=64) as engine:
            for text in MIXED:
                assert engine.tokenize(text) == made.encode(text).ids, (rule, text)


def test_a_broken_file_is_named(tmp_path: Path, tokenizer: Path) -> None:
    pytest.importorskip("xllamacpp")
    written(tmp_path / "m.gguf", tokenizer)
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole.replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"))
    with pytest.raises(GrowmoeError, match=r"m\.gguf: llama\.cpp cannot load it"):
        LlamaCpp(tmp_path / "m.gguf")


def test_a_file_without_tokenizer_is_not_run(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    write_gguf(tmp_path / "m.gguf", InMemory(tiny_model()), None)
    with pytest.raises(GrowmoeError, match="holds no tokenizer"):
        LlamaCpp(tmp_path / "m.gguf")


def test_likeliest_tokens_only(tmp_path: Path, tokenizer: Path) -> None:
    pytest.importorskip("xllamacpp")
    written(tmp_path / "m.gguf", tokenizer)
    with LlamaCpp(tmp_path / "m.gguf") as engine:
        few, every = (engine.log_probs([5, 6, 7], [2], top)[0] for top in (4, None))
    known = ~few.isnan()
    assert known.nonzero()[:, 0].tolist() == sorted(every.topk(4).indices.tolist())
    torch.testing.assert_close(few[known], every[known], atol=1e-4, rtol=0)


def test_without_xllamacpp_the_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "xllamacpp", None)
    with pytest.raises(UsageError, match="pip install xllamacpp"):
        LlamaCpp(tmp_path / "m.gguf")


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dtype 'int8'"):
        gguf_write.write_gguf(tmp_path / "m.gguf", InMemory(tiny_model()), None, "int8")
