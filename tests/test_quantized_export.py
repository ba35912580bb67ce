"""Quantised directories and GGUF files: what they hold, what reads them, what damages are found."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import InMemory, growmoe, tiny_config, tiny_model, write_tiny
from growmoe.errors import GrowmoeError, UsageError
from growmoe.growth.upcycle import Upcycled
from growmoe.growth.verify import Rounded, closeness
from growmoe.models import footprint
from growmoe.models.checkpoint import Directory, build_model, save_model
from growmoe.models.config import MoEConfig, tensor_shapes
from growmoe.models.stored import quantized_tensors, quantizing_notes
from growmoe.models.upcycling import Upcycling
from growmoe.ops.quantized import GROUP, dequantize, quantize, stored_or_made
from growmoe.recipe import ExportStage
from test_layouts import GROWN_ONLY, LAYERS, LAYOUTS, stage

EVEN: dict[str, Any] = {
    "hidden_size": 64, "num_heads": 8, "num_kv_heads": 4, "head_dim": 8, "ffn_size": 96,
}  # fmt: skip
MOE = MoEConfig(experts=(4, 4, 4), top_k=2, ffn_size=96)
EXPERT = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("quantized") / "m", **EVEN, moe=MOE)


@pytest.fixture(scope="module")
def int8(mixtral: Path) -> Path:
    assert growmoe("export", mixtral, mixtral.parent / "int8", "--quantize", "int8").code == 0
    return mixtral.parent / "int8"


@pytest.fixture(scope="module")
def int4(mixtral: Path) -> Path:
    assert growmoe("export", mixtral, mixtral.parent / "int4", "--quantize", "int4").code == 0
    return mixtral.parent / "int4"


# ---- what is written ----


@pytest.mark.parametrize(("form", "bits"), [("int8", 8), ("int4", 4)])
def test_a_directory_holds_what_quantising_gives(
    form: str, bits: int, mixtral: Path, request: pytest.FixtureRequest
) -> None:
    """Experts included, bit for bit; what is left is the source's in bfloat16."""
    source, made = Directory(mixtral), Directory(request.getfixturevalue(form))
    assert (made.quantized, made.dtype, source.quantized) == (form, "float32", None)
    packed = quantized_tensors(made.config)
    assert len(packed) == 3 * (4 + 4 * 3)
    for name in tensor_shapes(made.config):
        found = made.load_quantized(name)
        if name not in packed:
            assert found is None
            assert torch.equal(made.load(name), source.load(name).bfloat16()), name
            continue
        wanted = quantize(source.load(name), bits)
        assert found is not None
        assert torch.equal(found.values_NK, wanted.values_NK)
        assert torch.equal(found.scales_NG, wanted.scales_NG)
        assert torch.equal(made.load(name), dequantize(wanted))
    assert source.load_quantized("layers.0.attn.q.weight") is None


def test_files_are_those_of_compressed_tensors(mixtral: Path, int8: Path, int4: Path) -> None:
    """Names, dtypes and nibbles by hand, read by the library of safetensors."""
    w = load_file(mixtral / "model.safetensors")[EXPERT]
    files = [load_file(folder / "model.safetensors") for folder in (int8, int4)]
    for file, bits in zip(files, (8, 4)):
        assert EXPERT not in file
        packed, scale = file[f"{EXPERT}_packed"], file[f"{EXPERT}_scale"]
        assert (packed.dtype, tuple(packed.shape)) == (torch.int32, (64, 96 * bits // 32))
        assert (scale.dtype, tuple(scale.shape)) == (torch.bfloat16, (64, 3))
        assert (file[f"{EXPERT}_shape"].dtype, file[f"{EXPERT}_shape"].tolist()) == (
            torch.int64, [64, 96],
        )  # fmt: skip
        for column in (0, 1, 7, 8, 31, 32, 95):
            word = int(packed[5, column * bits // 32]) & 0xFFFFFFFF
            value = (word >> column * bits % 32 & (1 << bits) - 1) - (1 << bits - 1)
            s = float(scale[5, column // 32])
            assert abs(value * s - float(w[5, column])) <= abs(s) * (0.51 if bits == 8 else 2.05)
        for name in ("lm_head", "model.embed_tokens", "model.layers.1.block_sparse_moe.gate"):
            assert file[f"{name}.weight"].dtype == torch.bfloat16
    said = json.loads((int4 / "config.json").read_text())["quantization_config"]
    assert (said["quant_method"], said["format"]) == ("compressed-tensors", "pack-quantized")
    (group,) = said["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
        "dynamic": False,
    }  # fmt: skip
    gates = [f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(3)]
    assert set(said["ignore"]) == {*gates, "lm_head", "model.embed_tokens"}


def test_every_tensor_begins_at_a_multiple_of_its_elements(int4: Path) -> None:
    """Else the library of safetensors cannot map them (6 scales of 2 bytes are followed by numbers
    of 8)."""
    shape = {**EVEN, "hidden_size": 32, "num_heads": 48, "num_kv_heads": 3, "head_dim": 2}
    source = write_tiny(int4.parent / "odd", **shape, vocab_size=33)
    assert growmoe("export", source, int4.parent / "odd4", "--quantize", "int4").code == 0
    data = (int4.parent / "odd4" / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    width = {"I64": 8, "I32": 4, "BF16": 2}
    for entry in (entry for name, entry in header.items() if name != "__metadata__"):
        assert entry["data_offsets"][0] % width[entry["dtype"]] == 0
    with safe_open(int4.parent / "odd4" / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            file.get_tensor(name)


def test_the_result_and_the_lineage_say_how_near_it_is(mixtral: Path, tmp_path: Path) -> None:
    done = growmoe("export", mixtral, tmp_path / "out", "--quantize", "int8", "--json")
    assert done.code == 0, done.err
    found, check = done.json, done.json["check"]
    assert not found["declared_exact"]
    assert "int8" in found["lossy_because"][0]
    assert found["loss_before"] == check["ce_a"] != check["ce_b"] == found["loss_after"]
    assert 0 < check["kl"] < check["kl_max"]
    assert 0.5 < check["argmax_agreement"] < 1
    assert check["perplexity_a"] > 1
    assert "check: int8: perplexity" in done.err
    lineage = json.loads((tmp_path / "out" / "growmoe.json").read_text())
    assert lineage["checks"]["kl"] == check["kl"]
    assert [step["exact"] for step in lineage["history"]] == [False]


@pytest.mark.parametrize("name", [*LAYOUTS, *GROWN_ONLY])
def test_every_layout_survives(name: str, tmp_path: Path) -> None:
    options, counts, family = (LAYOUTS | GROWN_ONLY)[name]
    dense = InMemory(tiny_model(2, **{**EVEN, "ffn_size": 128}, num_layers=LAYERS))
    (tmp_path / "m").mkdir()
    save_model(
        tmp_path / "m", build_model(Upcycled(dense, Upcycling.of(stage(**options)))), "float32"
    )
    done = growmoe("export", tmp_path / "m", tmp_path / "out", "--quantize", "int8", "--json")
    assert done.code == 0, done.err
    made = Directory(tmp_path / "out")
    assert made.config.moe is not None
    assert (made.family, made.config.moe.experts) == (family, counts)
    assert made.load_quantized(f"layers.{LAYERS - 1}.attn.o.weight") is not None
    last = max(layer for layer, count in enumerate(counts) if count)
    for part in ("gate", "up", "down"):
        expert = f"layers.{last}.moe.experts.{counts[last] - 1}.{part}.weight"
        assert made.load_quantized(expert) is not None
    assert done.json["check"]["kl"] < 0.05
    assert done.json["check"]["argmax_agreement"] > 0.8


# ---- how near ----


def test_closeness_of_a_model_to_itself_and_to_another() -> None:
    a, b = InMemory(tiny_model(1)), InMemory(tiny_model(2))
    ids = [torch.arange(40) % 97, torch.arange(20)]
    same = closeness(a, a, ids, lambda _: None)
    assert (same.argmax_agreement, same.kl, same.kl_max) == (1.0, 0.0, 0.0)
    assert same.perplexity_a == same.perplexity_b
    other = closeness(a, b, ids, lambda _: None)
    with torch.no_grad():
        logits = [[build_model(s)(i[None]).logits[0].double() for i in ids] for s in (a, b)]
    p, q = (torch.cat(rows).softmax(-1) for rows in logits)
    kl = (p * (p / q).log()).sum(-1)
    assert other.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert other.kl_max == pytest.approx(float(kl.max()), rel=1e-4)
    assert other.argmax_agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert other.tokens == 60
    half = Rounded(a, "bfloat16")
    assert 0 < closeness(a, half, ids, lambda _: None).kl < 0.01


# ---- what reads it ----


def test_every_tool_sees_dequantised_weights(corpus: Path, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", corpus, **EVEN, vocab_size=320)
    out = tmp_path / "q"
    done = growmoe("export", source, out, "--quantize", "int4", "--data", corpus, "--json")
    assert done.code == 0, done.err
    assert set(done.json["validation_after"]) == set(done.json["validation_before"])
    seen = growmoe("inspect", out, "--json").json
    assert (seen["quantized"], seen["dtype"]) == ("int4", "float32")
    assert growmoe("verify", source, out).code == 0  # declared lossy
    assert growmoe("generate", out, "--prompt", "The river", "--max-tokens", 3).code == 0
    assert growmoe("evaluate", out, "--data", corpus, "--json").code == 0
    # what is made of it is exact against it, in float32 as for GGUF files
    done = growmoe("upcycle", out, tmp_path / "moe", "--experts", 4, "--json")
    assert done.code == 0, done.err
    assert done.json["exact"]
    done = growmoe("export", out, tmp_path / "plain", "--json")
    assert done.code == 0, done.err
    assert done.json["check"]["max_abs_logit_diff"] == 0
    assert Directory(tmp_path / "plain").quantized is None
    # once quantised, quantising changes nothing
    assert growmoe("export", out, tmp_path / "again", "--quantize", "int4").code == 0
    a, b = Directory(out), Directory(tmp_path / "again")
    assert all(torch.equal(a.load(name), b.load(name)) for name in tensor_shapes(a.config))


@pytest.mark.parametrize("family", ["mixtral", "growmoe"])
def test_compressed_tensors_itself_and_transformers_agree(
    family: str, tmp_path: Path
) -> None:  # fmt: skip
    """The export says so when the library is installed."""
    pytest.importorskip("compressed_tensors")
    moe = MOE if family == "mixtral" else MoEConfig(experts=(0, 2, 4), top_k=2, ffn_size=96)
    source = write_tiny(tmp_path / "m", **EVEN, moe=moe, family=family)
    done = growmoe("export", source, tmp_path / "out", "--quantize", "int4", "--json")
    assert done.code == 0, done.err
    assert "logits compared" in done.json["engines"]["transformers"]


def test_without_compressed_tensors_the_export_says_so(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "compressed" in name else find(name)
    )
    done = growmoe("export", mixtral, tmp_path / "out", "--quantize", "int8", "--json")
    assert "pip install compressed-tensors" in done.json["engines"]["transformers"]


# ---- damages ----


def changed(key: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        found = change(tensors.pop(key))
        if found is not None:
            tensors[key] = found
        save_file(tensors, file)

    return apply


def said(*path: str, value: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text())
        place = raw["quantization_config"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (folder / "config.json").write_text(json.dumps(raw))

    return apply


def put(at: tuple[int, int], value: float) -> Callable[[Tensor], Tensor]:
    def apply(tensor: Tensor) -> Tensor:
        tensor[at] = value
        return tensor

    return apply


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


GROUPS = ("config_groups", "group_0", "weights")
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a scale is NaN": (changed(f"{EXPERT}_scale", put((3, 1), float("nan"))), "w2.*scale .*NaN"),
    "no scales": (changed(f"{EXPERT}_scale", lambda _: None), "w2.weight_scale is missing"),
    "no shape": (changed(f"{Q}_shape", lambda _: None), "q_proj.weight_shape is missing"),
    "no integers": (changed(f"{Q}_packed", lambda _: None), "q_proj.weight is missing"),
    "too few scales": (changed(f"{Q}_scale", lambda s: s[:, :1].clone()), r"shape \[64, 1\]"),
    "other scales": (changed(f"{Q}_scale", lambda s: s.half()), "weight_scale is not bfloat16"),
    "wide integers": (changed(f"{Q}_packed", lambda p: p.long()), "weight_packed is not int32"),
    "float integers": (changed(f"{Q}_packed", lambda p: p.float()), "weight_packed is not int32"),
    "another shape said": (
        changed(f"{Q}_shape", lambda s: s + 1), r"q_proj.weight_shape says \[65, 65\]",
    ),
    "-128": (changed(f"{Q}_packed", put((0, 0), 0)), "holds -128"),
    "a router of integers": (
        changed("model.layers.0.block_sparse_moe.gate.weight", lambda g: g.int()), "dtype I32",
    ),
    "a file cut short": (cut, "not a whole safetensors file"),
    "4 bits said": (said(*GROUPS, "num_bits", value=4), "but config.json says"),
    "3 bits said": (said(*GROUPS, "num_bits", value=3), "num_bits is 3"),
    "other groups": (said(*GROUPS, "group_size", value=128), "group_size is 128; only 32 is read"),
    "zero points": (said(*GROUPS, "symmetric", value=False), "symmetric is False"),
    "reordered": (said(*GROUPS, "actorder", value="group"), "actorder"),
    "another method": (said("quant_method", value="gptq"), "quant_method is 'gptq'"),
    "another form": (said("format", value="naive-quantized"), "format is 'naive-quantized'"),
    "several groups": (said("config_groups", value={}), "not one group"),
    "nothing said": (said("config_groups", "group_0", value=7), "not a JSON object"),
    "activations": (
        said("config_groups", "group_0", "input_activations", value={"num_bits": 8}),
        "only weights are read quantised",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damages_are_found_in_one_sentence(damage: str, int8: Path, tmp_path: Path) -> None:
    apply, words = DAMAGES[damage]
    shutil.copytree(int8, tmp_path / "q")
    apply(tmp_path / "q")

    def read_all() -> None:
        made = Directory(tmp_path / "q")
        for name in tensor_shapes(made.config):
            made.load(name)

    with pytest.raises(GrowmoeError, match=words) as caught:
        read_all()
    assert str(tmp_path / "q") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_integers_that_config_json_does_not_announce_are_refused(
    int8: Path, tmp_path: Path
) -> None:  # fmt: skip
    shutil.copytree(int8, tmp_path / "q")
    raw = json.loads((int8 / "config.json").read_text())
    del raw["quantization_config"]
    (tmp_path / "q" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(GrowmoeError, match=r"q_proj\.weight is missing"):
        Directory(tmp_path / "q")


def test_an_interrupted_export_goes_on(mixtral: Path, tmp_path: Path, monkeypatch) -> None:
    from growmoe.models import checkpoint

    arguments = ("export", mixtral, tmp_path / "out", "--quantize", "int4", "--shard-gb", "2e-5")
    plain, asked = quantize, []

    def interrupted(w_NK: Tensor, bits: int) -> Any:
        asked.append(bits)
        if len(asked) == 30:
            raise KeyboardInterrupt
        return plain(w_NK, bits)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "quantize", interrupted)
        assert growmoe(*arguments).code == 130
    kept = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out.run").rglob("*.safetensors")}
    assert len(kept) > 3
    assert not (tmp_path / "out").exists()
    done = growmoe(*arguments)
    assert done.code == 0, done.err
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept
    whole = tmp_path / "whole"
    assert growmoe("export", mixtral, whole, *arguments[3:]).code == 0
    for file in whole.glob("*.safetensors*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


# ---- shapes that do not divide, and options that contradict ----


def test_matrices_that_do_not_divide_stay(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", **{**EVEN, "ffn_size": 50})
    done = growmoe("export", source, tmp_path / "q", "--quantize", "int4", "--json")
    assert done.code == 0, done.err
    assert "3 matrices stay unquantised: the 50 inputs of layers.0.mlp.down.weight" in done.err
    made = Directory(tmp_path / "q")
    assert made.load_quantized("layers.0.mlp.down.weight") is None
    assert made.load_quantized("layers.0.mlp.up.weight") is not None
    raw = json.loads((tmp_path / "q" / "config.json").read_text())
    assert "model.layers.2.mlp.down_proj" in raw["quantization_config"]["ignore"]


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(UsageError, match="no matrix of this model can be quantised: the 36 inputs"):
        quantizing_notes(tiny_config(), "transformers")
    with pytest.raises(UsageError, match="vllm cannot run this model quantised"):
        quantizing_notes(tiny_config(**{**EVEN, "ffn_size": 50}), "vllm")
    assert quantizing_notes(tiny_config(**EVEN), "vllm") == ()
    sliced = tiny_config(**EVEN, moe=MoEConfig(experts=(4, 4, 4), top_k=2, ffn_size=48), family="")
    with pytest.raises(
        UsageError, match=r"transformers .* 48 inputs of layers.0.moe.experts.0.dow"
    ):
        quantizing_notes(sliced, "transformers")
    assert "12 matrices stay unquantised" in quantizing_notes(sliced, "llama.cpp")[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float16"}, "dtype float16 contradicts quantize"),
        ({"engine": "llama.cpp", "format": "hf"}, "reads no quantised directory"),
        ({"quantize": "int3"}, "int8"),
    ],
)
def test_options_that_contradict(options: dict[str, str], words: str) -> None:
    fields = {"stage": "export", "model": "x", "engine": "vllm", "quantize": "int8", **options}
    with pytest.raises(ValueError, match=words):
        ExportStage(**fields)
    assert ExportStage(**{**fields, "dtype": "bfloat16", "engine": "vllm", "format": None,
                          "quantize": "int4"}).quantize == "int4"  # fmt: skip


def test_one_size_of_groups() -> None:
    """The planner, which may not import torch, has its own."""
    assert GROUP == footprint.GROUP


# ---- plans ----


def weights_of(folder: Path) -> int:
    return sum(
        sum(t.numel() * t.element_size() for t in load_file(file).values())
        for file in folder.glob("*.safetensors")
    )


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_plan_knows_the_bytes(
    form: str, mixtral: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    arguments = ("export", mixtral, tmp_path / "out", "--quantize", form, "--json", "--dry-run")
    plan = growmoe(*arguments).json
    made = request.getfixturevalue(form)
    assert plan["out"]["bytes_on_disk"] == weights_of(made)
    assert (plan["out"]["dtype"], plan["declared_exact"]) == (form, False)
    assert plan["in"]["bytes_on_disk"] == weights_of(mixtral)
    back = growmoe("export", made, tmp_path / "out", "--json", "--dry-run").json
    assert (back["in"]["bytes_on_disk"], back["in"]["dtype"]) == (weights_of(made), form)
    assert back["out"]["dtype"] == "float32"
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: r\nstages:\n- {{stage: export, model: {mixtral}, engine: vllm, quantize: {form}}}\n"
    )
    (entry,) = growmoe("plan", recipe, "--json").json["stages"]
    assert entry["bytes"] == weights_of(made)


# ---- GGUF ----


@pytest.fixture(scope="module")
def worded(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "m"
    return write_tiny(
        folder, corpus, **EVEN, moe=MOE, vocab_size=320, qkv_bias=True, family="qwen2_moe"
    )


@pytest.mark.parametrize(("form", "kind"), [("int8", "Q8_0"), ("int4", "Q4_0")])
def test_llama_cpp_reads_a_quantised_file(
    form: str, kind: str, worded: Path, tmp_path: Path
) -> None:  # fmt: skip
    gguf = pytest.importorskip("gguf")
    arguments = ("export", worded, tmp_path / "out", "--for", "llama.cpp", "--quantize", form)
    plan = growmoe(*arguments, "--json", "--dry-run").json
    done = growmoe(*arguments, "--json")
    assert done.code == 0, done.err
    tensors = gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors
    kinds = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    assert kinds["blk.1.ffn_down_exps.weight"] == kinds["blk.0.attn_q.weight"] == kind
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.0.attn_q.bias"] == "F32"
    assert plan["out"]["bytes_on_disk"] == sum(int(tensor.n_bytes) for tensor in tensors)
    check = done.json["check"]
    assert not done.json["declared_exact"]
    assert 0 < check["kl"] < (0.2 if form == "int8" else 3)
    if importlib.util.find_spec("xllamacpp") is not None:
        assert check["llama.cpp"]["tokens"] == 64
        assert "compared" in done.json["engines"]["llama.cpp"]


def test_a_quantised_file_is_what_the_check_measured(worded: Path, tmp_path: Path) -> None:
    """The rounded weights that were compared are those in the file, experts and rotary rows too."""
    gguf = pytest.importorskip("gguf")
    from growmoe.models.gguf import permute
    from growmoe.models.gguf_arch import gguf_tensors
    from growmoe.models.gguf_write import InGGUF, write_gguf

    source = Directory(worded)
    write_gguf(tmp_path / "m.gguf", source, worded, "bfloat16", form="int4")
    seen = InGGUF(source, "int4")
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for name, (shape, members) in gguf_tensors(source.config).items():
        values = gguf.quants.dequantize(found[name].data, found[name].tensor_type)
        values = torch.tensor(values).view(shape)
        parts = values if ".moe.experts." in members[0] else [values]
        for part, member in zip(parts, members, strict=True):
            wanted = seen.load(member).float()
            if member.rpartition(".")[0].endswith(("attn.q", "attn.k")):  # written as `llama`
                heads = wanted.shape[0] // source.config.head_dim
                wanted = permute(wanted, heads)
            assert torch.equal(part, wanted), member


@pytest.mark.parametrize(("form", "bits"), [("int8", 8), ("int4", 4)])
def test_an_engine_makes_the_integers_that_an_export_stores(
    form: str, bits: int, mixtral: Path, request: pytest.FixtureRequest
) -> None:
    """So serving a model in a form and serving its export are the same."""
    made, source = Directory(request.getfixturevalue(form)), Directory(mixtral)
    for name in quantized_tensors(source.config):
        stored, now = stored_or_made(made, name, bits), stored_or_made(source, name, bits)
        assert torch.equal(stored.values_NK, now.values_NK)
        assert torch.equal(stored.scales_NG, now.scales_NG)
