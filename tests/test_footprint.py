"""Memory of serving: worked out before a weight is read, and a refusal that helps."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from conftest import growmoe, tiny_config, write_tiny
from growmoe import memory
from growmoe.errors import UsageError
from growmoe.inference import loading
from growmoe.inference.llm import LLM
from growmoe.inference.offloaded import PackedRecord
from growmoe.models.config import ModelConfig, MoEConfig
from growmoe.models.footprint import (
    BLOCK,
    FORMS,
    Form,
    Wanted,
    admit,
    block_bytes,
    expert_bytes,
    expert_slots,
    footprint,
    matrix_bytes,
    parse_size,
    size,
    weight_bytes,
)
from growmoe.models.presets import PRESETS
from growmoe.models.safetensors_io import TensorFile
from growmoe.models.transformer import Transformer
from growmoe.ops import native

MOE = MoEConfig(experts=(4, 8, 4), top_k=2, ffn_size=64)


def big(**changes: object) -> ModelConfig:
    """A mixture of some 300 MB in bfloat16, nearly all of it experts."""
    return tiny_config(
        hidden_size=256, head_dim=32, num_heads=8, num_kv_heads=2, vocab_size=1000,
        moe=MoEConfig(experts=(32, 64, 96), top_k=2, ffn_size=1024), **changes,
    )  # fmt: skip


def test_quantised_matrices_carry_a_scale_per_group() -> None:
    assert matrix_bytes(32, 64, "float32") == 32 * 64 * 4
    assert matrix_bytes(32, 64, "int8") == 32 * (64 + 2 * 2)
    assert matrix_bytes(32, 64, "int4") == 32 * (32 + 2 * 2)
    assert matrix_bytes(3, 33, "int8") == 32 * (64 + 2 * 2)


def test_what_is_free_bounds_the_blocks_and_need_bounds_them_too() -> None:
    config = tiny_config()
    wanted = Wanted(max_sequences=3)
    assert footprint(config, wanted, 1 << 40).kv_blocks == 3 * 160 // BLOCK
    base = footprint(config, wanted)
    tight = base.total - base.kv_cache + 25 * block_bytes(config, "bfloat16")
    assert footprint(config, wanted, tight).kv_blocks == 20
    block = block_bytes(config, "bfloat16")
    assert footprint(config, Wanted(kv_gb=7.5 * block / 2**30), 0).kv_blocks == 7
    assert footprint(config, Wanted(max_sequences=1, kv_gb=1.0), 0).kv_blocks == 10
    with pytest.raises(UsageError, match="--kv-gb 1e-06 holds no block of 16 tokens"):
        footprint(config, Wanted(kv_gb=1e-6))


def test_a_model_in_memory_needs_no_room_for_its_weights() -> None:
    config = big()
    there = footprint(config, Wanted(loaded=True))
    assert (there.weights, there.expert_cache) == (0, 0)
    with pytest.raises(UsageError, match=r"but 1.0 KiB are free; nothing fits"):
        admit(config, Wanted(loaded=True), 1 << 10, "m")


def test_what_fits_is_admitted_to_the_byte() -> None:
    config = big()
    wanted = Wanted(kv_gb=0.001, form="int4")
    need = footprint(config, wanted).total
    assert admit(config, wanted, need, "m").total == need
    with pytest.raises(UsageError, match="needs"):
        admit(config, wanted, need - 1, "m")


def suggestions(message: str) -> list[dict[str, str]]:
    """The ways that a refusal names, as options."""
    ways = message.split("this would fit: ")[1].split(" or ")
    return [dict(re.findall(r"--([\w-]+) (\S+)", way)) for way in ways]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0.9, 0.6, 0.3, 0.1])
@pytest.mark.parametrize("kv_gb", [None, 0.001])
def test_every_suggestion_would_be_admitted(form: str, share: float, kv_gb: float | None) -> None:
    config = big()
    wanted = Wanted(form=form, kv_gb=kv_gb, step_tokens=64)
    free = int(share * footprint(config, wanted).total)
    try:
        admit(config, wanted, free, "m")
    except UsageError as refusal:
        ways = suggestions(str(refusal))
        assert ways
        for way in ways:
            changed = Wanted(
                form=way.get("weights", form),
                kv_gb=float(way["kv-gb"]) if "kv-gb" in way else kv_gb,
                step_tokens=64,
                expert_memory=parse_size(way["expert-memory"]) if "expert-memory" in way else None,
            )
            assert admit(config, changed, free, "m").total <= free
    else:
        assert kv_gb is None  # fewer blocks of its own choice


def test_the_refusal_says_needs_free_and_what_fits_in_one_sentence() -> None:
    with pytest.raises(UsageError) as caught:
        admit(big(), Wanted(kv_gb=0.001, step_tokens=64), 200 << 20, "models/x")
    assert str(caught.value) == (
        "models/x in bfloat16 needs 293.3 MiB of memory (weights 290.1 MiB, KV cache 1.0 "
        "MiB, a step 2.2 MiB), but 200.0 MiB are free; this would fit: --weights int8 or "
        "--expert-memory 194M"
    )


def test_a_machine_too_small_for_anything_is_told_how_much_it_takes() -> None:
    config = big()
    with pytest.raises(UsageError, match=r"nothing fits, give it at least (.*)") as caught:
        admit(config, Wanted(step_tokens=64), 1 << 20, "m")
    least = parse_size(str(caught.value).rsplit("least ")[1].replace(" ", ""))
    assert least > 1 << 20
    experts = 2 * expert_bytes(config, "int4")
    tried = Wanted(form="int4", step_tokens=64, expert_memory=experts)
    assert admit(config, tried, int(least * 1.05), "m")


def test_expert_memory_must_hold_what_a_token_visits() -> None:
    config, each = tiny_config(moe=MOE), expert_bytes(tiny_config(moe=MOE), "int8")
    assert expert_slots(config, "int8", 2 * each) == 2
    assert expert_slots(config, "int8", 1 << 40) == 16
    with pytest.raises(UsageError, match=r"holds 1 experts of .*visits 2"):
        expert_slots(config, "int8", 2 * each - 1)
    with pytest.raises(UsageError, match="dense"):
        footprint(tiny_config(), Wanted(expert_memory=1 << 30))


def test_offloaded_experts_leave_the_weights() -> None:
    config = big()
    all_in, cached = footprint(config, Wanted()), footprint(config, Wanted(expert_memory=10 << 20))
    others, experts = weight_bytes(config, "bfloat16")
    assert (all_in.weights, all_in.expert_cache) == (others + experts, 0)
    assert cached.weights == others
    assert cached.experts_in_memory == (10 << 20) // expert_bytes(config, "bfloat16")
    assert cached.expert_cache <= 10 << 20


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_known_models_have_a_footprint_in_every_form(name: str) -> None:
    sizes = [footprint(PRESETS[name], Wanted(form=form)).weights for form in FORMS]
    assert sizes == sorted(sizes, reverse=True)


def test_sizes_are_read_and_written() -> None:
    assert [parse_size(t) for t in ("4G", "1.5MiB", "100kb", "12")] == [
        4 << 30, 3 << 19, 100 << 10, 12,
    ]  # fmt: skip
    assert [size(n) for n in (12, 1536, 3 << 40)] == ["12 B", "1.5 KiB", "3.0 TiB"]
    for wrong in ("", "G", "-1", "nan", "4X"):
        with pytest.raises(UsageError, match="no size"):
            parse_size(wrong)


@pytest.mark.parametrize("tool", ["load", "LLM"])
def test_what_does_not_fit_is_refused_before_a_weight_is_read(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path / "m")
    reads: list[str] = []
    read = TensorFile.read
    monkeypatch.setattr(
        TensorFile, "read", lambda file, name: reads.append(name) or read(file, name)
    )
    monkeypatch.setattr(loading, "free_memory", lambda: 50_000)
    with pytest.raises(UsageError, match=r"m in (float32|bfloat16) needs .* but 48.8 KiB are free"):
        loading.load(tmp_path / "m", "float32") if tool == "load" else LLM(tmp_path / "m")
    assert not reads
    monkeypatch.undo()
    model = LLM(tmp_path / "m", max_sequences=2)
    assert model.footprint.kv_blocks == 2 * 160 // BLOCK
    assert model.load_report is not None
    assert model.load_report.report()["load_bytes"] > 50_000


def held(model: Transformer) -> int:
    """Bytes of all tensors that a model holds, wherever its modules keep them."""
    found: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: object) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for each in value.values():
                visit(each)
        elif isinstance(value, list | tuple):
            for each in value:
                visit(each)
        elif type(value).__module__.startswith(("growmoe", "torch.nn.modules")):
            visit(vars(value) if hasattr(value, "__dict__") else None)

    visit(model)
    return sum(found.values())


@pytest.mark.skipif(not native.available(), reason="the native kernels are missing")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"moe": MOE}, {"tied_head": True, "qkv_bias": True},
        {"activation": "gelu", "mlp_bias": True, "norm": "layer", "positions": "learned",
         "moe": MoEConfig(experts=(0, 4, 6), top_k=2, ffn_size=50, mix="softmax2",
                          fixed_ffn_size=40)},
    ],
)  # fmt: skip
def test_the_arithmetic_is_what_a_model_takes(tmp_path: Path, form: Form, changes: dict) -> None:
    write_tiny(tmp_path / "m", hidden_size=144, **changes)
    loaded = loading.load(tmp_path / "m", form)
    assert loaded.footprint is not None
    assert math.isclose(loaded.footprint.weights, held(loaded.model), rel_tol=0.05)
    if "moe" in changes:
        each = PackedRecord(loaded.model.config, form).record.nbytes
        assert each == expert_bytes(loaded.model.config, form)


def test_free_memory_knows_the_limit_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    machine = memory.free_memory()
    assert machine > 0
    (tmp_path / "memory.max").write_text(f"{1 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{700 << 10}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {300 << 10}\n")
    assert memory.free_memory() == (1 << 20) - (400 << 10)
    (tmp_path / "memory.max").write_text("max\n")
    assert math.isclose(memory.free_memory(), machine, rel_tol=0.5)


@pytest.mark.skipif(not native.available(), reason="the native kernels are missing")
def test_generate_takes_a_budget_for_experts_and_its_dry_run_says_what_fits(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m", moe=MOE)
    arguments = ("generate", tmp_path / "m", "--prompt", "x", "--dry-run", "--json")
    done = growmoe(*arguments, "--weights", "int4", "--expert-memory", "20K", "--kv-gb", "0.001")
    assert done.code == 0, done.err
    plan = json.loads(done.out)["memory"]
    assert plan["experts_in_memory"] == 20480 // expert_bytes(tiny_config(moe=MOE), "int4")
    assert plan["total"] <= plan["free"]
    done = growmoe(*arguments, "--expert-memory", "1K")
    assert done.code == 2
    assert "--expert-memory 1.0 KiB holds 0 experts" in done.err


def test_without_kernels_integers_take_bytes_and_are_multiplied_out() -> None:
    config = big()
    there = {form: footprint(config, Wanted(form=form)) for form in FORMS}
    missing = {form: footprint(config, Wanted(form=form, native=False)) for form in FORMS}
    assert missing["bfloat16"] == there["bfloat16"]
    assert missing["int4"].weights == missing["int8"].weights == there["int8"].weights
    largest = 1024 * 256
    for form in ("int8", "int4"):
        assert missing[form].step == there[form].step + 6 * largest
    with pytest.raises(UsageError, match="experts on disk need the native kernels"):
        footprint(config, Wanted(native=False, expert_memory=1 << 30))
    with pytest.raises(UsageError) as caught:
        admit(config, Wanted(kv_gb=0.001, step_tokens=64, native=False), 100 << 20, "m")
    assert "nothing fits" in str(caught.value)
    least = parse_size(str(caught.value).rsplit("least ")[1].replace(" ", ""))
    assert least > there["int8"].weights


def test_plans_and_loads_know_whether_there_are_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny(tmp_path / "m")
    arguments = ("generate", model, "--prompt", "x", "--weights", "int4", "--dry-run", "--json")
    monkeypatch.setenv("GROWMOE_NATIVE", "0")
    monkeypatch.setattr(native, "available", lambda: False)
    found = loading.load(model, "int4")
    assert found.footprint is not None
    wanted = Wanted(form="int4", native=False)
    assert found.footprint.weights == footprint(tiny_config(), wanted).weights
    assert json.loads(growmoe(*arguments).out)["memory"]["weights"] == found.footprint.weights


def test_bench_plans_what_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_tiny(tmp_path / "m")
    sizes = ("--prompt-tokens", 20, "--tokens", 6, "--batch", 2, "--repeat", 1)
    five = 5.5 * block_bytes(tiny_config(), "bfloat16") / 2**30
    done = growmoe("bench", model, *sizes, "--kv-gb", five)
    assert done.code == 0, done.err
    for dry in ((), ("--dry-run",)):
        for options, said in (
            (("--kv-gb", five / 2), "does not fit into the KV cache"),
            (("--kv-gb", 0), "kv-gb must be above 0"),
            (("--device", "gpu"), "device 'gpu' is not one of cpu, cuda"),
            (("--expert-memory", "1G"), "this one is dense"),
            (("--device", "cuda", "--expert-memory", "1G"), "run on CPUs only"),
        ):
            done = growmoe("bench", model, *sizes, *options, *dry)
            assert (done.code, said in done.err) == (2, True), done.err
    assert "memory" not in growmoe("bench", model, *sizes, "--device", "cuda", "--dry-run").json
    plan = growmoe("bench", model, *sizes, "--dry-run").json["memory"]
    llm = LLM(model, max_sequences=2)
    assert plan["kv_blocks"] == llm.footprint.kv_blocks
    monkeypatch.setattr("growmoe.stages.bench.free_memory", lambda: 50_000)
    done = growmoe("bench", model, *sizes, "--dry-run")
    assert (done.code, "48.8 KiB are free" in done.err) == (2, True), done.err


@pytest.mark.skipif(not native.available(), reason="the native kernels are missing")
def test_bench_with_experts_on_disk_says_how_they_were_found(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "m", moe=MOE)
    sizes = ("--prompt-tokens", 20, "--tokens", 6, "--batch", 1, "--repeat", 1)
    found = growmoe("bench", model, *sizes, "--expert-memory", "200K").json
    assert found["experts"]["misses"] > 0
