"""Export: the right form for every engine, the same function in it, and refusals with reasons."""

import json
from pathlib import Path

import pytest
import torch

from conftest import InMemory, tiny_config, tiny_model, write_tiny
from growmoe.cli import main
from growmoe.errors import GrowmoeError, UsageError
from growmoe.growth.portable import Portable, reshaped
from growmoe.growth.verify import Comparison, agreement, compare
from growmoe.models.checkpoint import Directory, Source
from growmoe.models.config import MoEConfig, tensor_shapes
from growmoe.models.streamed import streamed_logits
from growmoe.models.targets import changed_config, export_target

MIXTURE = MoEConfig(experts=(4, 4, 4), top_k=2, ffn_size=20)
TOP1 = {"top_k": 1, "ffn_size": 20, "renormalize": False}
RESIDUAL = {"mix": "sum", "fixed_ffn_size": 24}


def check(a: Source, b: Source) -> Comparison:
    rng = torch.Generator().manual_seed(3)
    tokens = [torch.randint(0, 97, (n,), generator=rng) for n in (120, 20)]
    return compare(a, b, tokens, memory_bytes=1 << 40, note=lambda _: None)


def run(*arguments: object) -> int:
    """The command line in this process; returns the exit code."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


# ---- forms ----


@pytest.mark.parametrize(
    ("step", "moe", "tied"),
    [
        ("untie", MIXTURE, True),
        ("zero_biases", MIXTURE, False),
        ("null_shared", MIXTURE, False),
        ("sum_as_gate", MoEConfig(experts=(4, 0, 4), **TOP1, **RESIDUAL), True),
        ("duplicate", MoEConfig(experts=(2, 0, 6), **TOP1), True),
        ("duplicate", MoEConfig(experts=(2, 4, 8), **{**TOP1, "renormalize": True}), False),
        ("duplicate", MoEConfig(experts=(2, 3, 3), **TOP1, **RESIDUAL), False),
    ],
)
def test_a_change_of_form_is_exact(step, moe: MoEConfig, tied: bool) -> None:
    a = InMemory(tiny_model(1, moe=moe, tied_head=tied, family=""))
    b = Portable(a, step)
    assert b.config != a.config
    for name, shape in tensor_shapes(b.config).items():
        assert tuple(b.load(name).shape) == shape, name
    assert check(a, b).exact


def test_copied_experts_without_their_factor_fail() -> None:
    a = InMemory(tiny_model(1, moe=MoEConfig(experts=(2, 4, 8), **TOP1), family=""))

    class Unscaled(Portable):
        def _duplicated(self, name: str) -> torch.Tensor:
            tensor = super()._duplicated(name)
            copies = self.config.experts_in(0) // self.source.config.experts_in(0)
            return tensor / copies if name.startswith("layers.0.") and "down" in name else tensor

    assert check(a, Portable(a, "duplicate")).exact
    assert not check(a, Unscaled(a, "duplicate")).exact


def test_a_null_shared_expert_has_a_gate_that_is_not_zero() -> None:
    b = Portable(InMemory(tiny_model(moe=MIXTURE, family="qwen2_moe")), "null_shared")
    assert b.load("layers.0.moe.mix.weight").abs().max() > 0
    assert not b.load("layers.0.mlp.down.weight").any()


# ---- targets ----

QWEN2 = {"qkv_bias": True, "family": "qwen2_moe"}
PYRAMID = MoEConfig(experts=(2, 4, 4), top_k=2, ffn_size=20)


@pytest.mark.parametrize(
    ("changes", "engine", "portable", "family", "steps"),
    [
        ({}, "transformers", False, "llama", ()),
        ({"moe": MIXTURE}, "vllm", False, "mixtral", ()),
        ({"moe": MIXTURE}, "sglang", False, "mixtral", ()),
        ({"moe": MIXTURE, "tied_head": True}, "sglang", False, "mixtral", ("untie",)),
        ({"moe": MIXTURE, **QWEN2}, "transformers", False, "qwen2_moe", ()),
        ({"moe": MIXTURE, **QWEN2}, "vllm", False, "qwen2_moe", ("null_shared",)),
        (
            {"moe": MIXTURE, **QWEN2, "tied_head": True}, "sglang", False, "qwen2_moe",
            ("untie", "null_shared"),
        ),
        (
            {"moe": MoEConfig(experts=(0, 4, 0), top_k=2, ffn_size=20)}, "vllm", False,
            "qwen2_moe", ("zero_biases", "null_shared"),
        ),
        ({"moe": MIXTURE, "qk_norm": True}, "sglang", False, "qwen3_moe", ()),
        ({"moe": PYRAMID}, "transformers", False, "growmoe", ()),
        (
            {"moe": MoEConfig(experts=(2, 4, 4), **TOP1, **RESIDUAL)}, "llama.cpp", True,
            "qwen2_moe", ("sum_as_gate", "duplicate"),
        ),
        ({"moe": MIXTURE, **QWEN2}, "llama.cpp", False, "qwen2_moe", ()),
    ],
)  # fmt: skip
def test_targets(changes, engine, portable: bool, family: str, steps: tuple[str, ...]) -> None:
    target = export_target(tiny_config(**{"family": "", **changes}), engine, portable)
    assert (target.family, target.steps) == (family, steps)


def test_a_converter_gets_a_biased_mixture_under_mixtrals_names() -> None:
    config = tiny_config(moe=MIXTURE, **QWEN2)
    assert export_target(config, "llama.cpp", gguf=False).family == "mixtral"


@pytest.mark.parametrize(
    ("changes", "engine", "portable", "words"),
    [
        ({"moe": PYRAMID}, "vllm", False, "vLLM cannot run"),
        ({"moe": PYRAMID}, "vllm", True, "top-k 1 only"),
        ({"sliding_window": 80, "family": "mistral"}, "sglang", False, "sliding window"),
        ({"mlp_bias": True}, "sglang", False, "biases of the feed-forward"),
        (
            {"moe": MIXTURE, "qk_norm": True, "qkv_bias": True, "o_bias": True}, "vllm", False,
            "output projection",
        ),
        (
            {"moe": MIXTURE, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "vllm",
            False, "rotary",
        ),
        ({"moe": MIXTURE, "head_dim": 8}, "sglang", False, "head dim"),
        ({"moe": MoEConfig(experts=(2, 4, 4), **TOP1)}, "sglang", False, "--portable may help"),
        ({"moe": MoEConfig(experts=(0, 4, 4), top_k=2, ffn_size=20)}, "sglang", False, "sparse"),
        ({"moe": MoEConfig(experts=(0, 4, 4), top_k=2, ffn_size=20)}, "llama.cpp", False, "llama"),
        (
            {"moe": MoEConfig(experts=(4, 4, 4), **TOP1, mix="softmax2", fixed_ffn_size=8)},
            "llama.cpp", True, "llama.cpp cannot run",
        ),
        ({"moe": MoEConfig(experts=(3, 5, 7), **TOP1)}, "vllm", True, "no small common multiple"),
        (
            {"moe": MoEConfig(experts=(4, 4, 4), top_k=2, ffn_size=20, scoring="sigmoid")},
            "vllm", False, "vLLM cannot run",
        ),
        (
            {"moe": MoEConfig(experts=(4, 4, 4), top_k=2, ffn_size=20, scoring="sigmoid")},
            "llama.cpp", False, "take a softmax",
        ),
        ({"qk_norm": True, "qk_norm_scope": "all"}, "llama.cpp", False, "over all heads"),
        (
            {"moe": MoEConfig(experts=(4, 4, 4), top_k=2, ffn_size=20, renormalize=False),
             "qk_norm": True},
            "llama.cpp", False, "llama.cpp cannot run",
        ),
    ],
)  # fmt: skip
def test_what_an_engine_would_get_wrong_is_refused(changes, engine, portable, words) -> None:
    with pytest.raises(UsageError, match=words):
        export_target(tiny_config(**{"family": "", **changes}), engine, portable)


def test_a_converter_that_knows_no_architecture_is_refused() -> None:
    config = tiny_config(qkv_bias=True, o_bias=True, moe=MIXTURE, family="")
    assert export_target(config, "llama.cpp").family == "growmoe"  # the GGUF file is written here
    with pytest.raises(UsageError, match="export with format gguf"):
        export_target(config, "llama.cpp", gguf=False)


# ---- the verb ----


@pytest.fixture(scope="module")
def qwen2_moe(corpus: Path, tmp_path_factory) -> Path:
    """A biased mixture with a tokenizer and rows whose width suits transformers' kernel."""
    folder = tmp_path_factory.mktemp("export") / "moe"
    moe = MoEConfig(experts=(4, 4, 4), top_k=2, ffn_size=20)
    return write_tiny(folder, corpus, moe=moe, vocab_size=320, ffn_size=52, **QWEN2)


def test_vllm_gets_a_form_that_transformers_reads_alike(qwen2_moe: Path, tmp_path, capsys) -> None:
    assert run("export", qwen2_moe, tmp_path / "out", "--for", "vllm", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["exact"]
    assert "logits compared" in result["engines"]["transformers"]
    assert result["engines"]["vllm"] == "not run"
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["model_type"] == "qwen2_moe"
    assert raw["norm_topk_prob"] is True
    assert raw["shared_expert_intermediate_size"] == 128
    lineage = json.loads((tmp_path / "out" / "growmoe.json").read_text())
    assert lineage["engines"] == result["engines"]
    assert "logits compared" in (tmp_path / "out" / "README.md").read_text()


def test_an_export_that_transformers_reads_otherwise_is_not_published(
    qwen2_moe: Path, tmp_path, capsys, monkeypatch
) -> None:
    from growmoe.models import checkpoint

    written = checkpoint.config_to_hf

    def wrong(config, dtype, family=None):
        return {**written(config, dtype, family), "rope_parameters": {
            "rope_type": "default", "rope_theta": 500.0}, "rope_theta": 10000.0}  # fmt: skip

    monkeypatch.setattr(checkpoint, "config_to_hf", wrong)
    read = checkpoint.config_from_hf
    monkeypatch.setattr(
        checkpoint, "config_from_hf", lambda raw, where: read(raw, where).replace(rope_theta=1e4)
    )
    assert run("export", qwen2_moe, tmp_path / "out", "--for", "transformers") == 1
    assert "transformers gives other logits" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [0, 1])
def test_logits_that_are_not_finite_do_not_agree(place: int) -> None:
    """NaN is neither above a tolerance nor kept by max()."""
    a = InMemory(tiny_model())
    tokens = [torch.arange(20), torch.arange(30)]
    other = streamed_logits(a, tokens, "float32")
    assert agreement(a, other, tokens, 1 << 40)[0] == 0
    other[place][3, 4] = float("nan")
    with pytest.raises(GrowmoeError, match="not finite"):
        agreement(a, other, tokens, 1 << 40)


def test_a_pyramid_reloads_through_the_public_class(tmp_path, capsys) -> None:
    pyramid = write_tiny(tmp_path / "a", moe=MoEConfig(experts=(0, 2, 4), top_k=2, ffn_size=20))
    assert run("export", pyramid, tmp_path / "out", "--for", "transformers", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert "logits compared" in result["engines"]["transformers"]


def test_the_converters_form_keeps_the_biases(qwen2_moe: Path, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert run("export", qwen2_moe, out, "--for", "llama.cpp", "--format", "hf", "--json") == 0
    assert json.loads(capsys.readouterr().out)["exact"]
    raw = json.loads((out / "config.json").read_text())
    assert (raw["model_type"], raw["num_local_experts"]) == ("mixtral", 4)
    from safetensors import safe_open

    with safe_open(out / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.0.self_attn.q_proj.bias" in names
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in names


def test_llama_cpp_itself_gives_our_log_probabilities(qwen2_moe: Path, tmp_path, capsys) -> None:
    pytest.importorskip("xllamacpp")
    assert run("export", qwen2_moe, tmp_path / "out", "--for", "llama.cpp", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["check"]["tokens"] == 64
    assert result["check"]["max_abs_log_prob_diff"] < 1e-3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "growmoe.json", "model.gguf", "stage.json",
    ]  # fmt: skip


def test_a_residual_pyramid_runs_in_llama_cpp(corpus: Path, tmp_path, capsys) -> None:
    pytest.importorskip("xllamacpp")
    moe = MoEConfig(experts=(2, 4, 4), **TOP1, **{**RESIDUAL, "fixed_ffn_size": 52})
    source = write_tiny(
        tmp_path / "a", corpus, moe=moe, vocab_size=320, head_dim=4, ffn_size=52, family="growmoe"
    )
    assert Directory(source).family == "growmoe"
    arguments = ("export", source, tmp_path / "out", "--for", "llama.cpp", "--json")
    assert run(*arguments) == 2
    assert "--portable may help" in capsys.readouterr().err
    assert run(*arguments, "--portable") == 0
    assert json.loads(capsys.readouterr().out)["check"]["max_abs_log_prob_diff"] < 1e-3


def test_all_steps_in_a_row() -> None:
    a = InMemory(tiny_model(2, moe=MoEConfig(experts=(2, 4, 4), **TOP1, **RESIDUAL), family=""))
    target = export_target(a.config, "vllm", portable=True)
    b = reshaped(a, target.steps)
    assert b.config == changed_config(a.config, target.steps)
    assert check(a, b).exact
