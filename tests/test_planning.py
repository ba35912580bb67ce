"""Dry runs: they read no weight, import no torch, leave nothing behind, and what they say is what
the real run then does."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import InMemory, tiny_model, write_tiny
from growmoe.cli import main
from growmoe.growth.compose import grow
from growmoe.growth.upcycle import Upcycled
from growmoe.models.checkpoint import Directory
from growmoe.models.config import MoEConfig, tensor_shapes
from growmoe.models.safetensors_io import TensorFile
from growmoe.models.upcycling import Upcycling
from growmoe.planning.origins import Origin, growth_origins, upcycling_origins
from growmoe.planning.recipes import plan_recipe
from growmoe.planning.scratch import Spent, scratch_warning, spent_on
from growmoe.recipe import GrowStage, UpcycleStage
from growmoe.recipe_yaml import load_recipe

GPT = {
    "norm": "layer", "positions": "learned", "activation": "gelu", "qkv_bias": True,
    "o_bias": True, "mlp_bias": True, "family": "growmoe",
}  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def last_json(out: str) -> Any:
    return json.loads(out.splitlines()[-1])


class Recording(InMemory):
    """A model in memory that remembers which tensors were asked for."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(tiny_model(**changes))
        self.asked: list[str] = []

    def load(self, name: str) -> torch.Tensor:
        self.asked.append(name)
        return super().load(name)


def read_by(source: Recording, built: Any, origin: Origin) -> set[str]:
    source.asked.clear()
    assert tuple(built.load(origin.name).shape) == origin.shape
    return set(source.asked)


GROWTHS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "width": ({}, {"hidden": 48, "ffn": 60}),
    "zero_pad": ({}, {"hidden": 48, "units": "zero_pad"}),
    "heads and head_dim": ({}, {"heads": 18, "kv_heads": 6, "head_dim": 8}),
    "aki": ({}, {"hidden": 48, "ffn": 60, "method": "aki"}),
    "aki, ffn only": ({"qkv_bias": True}, {"ffn": 60, "method": "aki"}),
    "aki, hidden only": ({}, {"hidden": 40, "heads": 9, "method": "aki"}),
    "aki-pro, deeper": ({}, {"hidden": 48, "layers": 5, "method": "aki-pro"}),
    "aki on merged heads": (
        {}, {"hidden": 48, "heads": 9, "kv_heads": 1, "merge_kv": "mean", "method": "aki"}),
    "identity": ({"o_bias": True, "mlp_bias": True}, {"layers": 5}),
    "interpolate": ({}, {"layers": 5, "depth": "interpolate", "branch_scale": "count"}),
    "dus": ({}, {"layers": 4, "depth": "dus"}),
    "list": ({}, {"depth": [2, 2, 0]}),
    "merged kv": ({}, {"kv_heads": 1, "merge_kv": "mean"}),
    "vocabulary": ({}, {"vocab": 128, "vocab_init": "mean_cov"}),
    "noise": ({}, {"noise": "everywhere", "noise_db": 20.0}),
    "gpt": (GPT, {"hidden": 72, "ffn": 60, "layers": 4}),
    "moe": ({"moe": MoEConfig(experts=(0, 2, 4), top_k=2, ffn_size=20)},
            {"hidden": 48, "layers": 4}),
    "all": ({"qkv_bias": True, "tied_head": True},
            {"hidden": 50, "heads": 15, "head_dim": 8, "ffn": 61, "layers": 5, "vocab": 128}),
}  # fmt: skip


@pytest.mark.parametrize("name", GROWTHS)
def test_growth_reads_the_tensors_that_its_plan_lists(name: str) -> None:
    shape, options = GROWTHS[name]
    source = Recording(**shape)
    grown, plan = grow(source, GrowStage(stage="grow", model="x", **options))
    assert plan.config == grown.config
    for origin in growth_origins(source.config, plan):
        assert read_by(source, grown, origin) == set(origin.sources), origin.name


@pytest.mark.parametrize(
    "options",
    [
        {}, {"experts": (0, 4, 2)}, {"experts": 4, "granularity": 2, "router": "virtual_group"},
        {"residual": "sum", "expert_init": "drop"}, {"residual": "softmax2", "router": "zero"},
        {"residual": "sigmoid_gate", "shared": "half_half", "expert_init": "permute"},
        {"combine": "softmax", "expert_init": "noise"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["llama", "gpt"])
def test_upcycling_reads_the_tensors_that_its_plan_lists(kind: str, options: dict) -> None:
    source = Recording(**(GPT if kind == "gpt" else {}))
    grown = Upcycled(source, Upcycling(**{"experts": 4, **options}))
    for origin in upcycling_origins(grown.config):
        assert read_by(source, grown, origin) == set(origin.sources), origin.name


# ---- what the command says, and what it then does ----

REAL: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "grow": ("grow", {}, ["--hidden", "48", "--layers", "4", "--ffn", "60", "--vocab", "128"]),
    "grow half": ("grow", {"tied_head": True}, ["--hidden", "72", "--dtype", "bfloat16"]),
    "grow lossy": ("grow", {}, ["--layers", "4", "--depth", "0,1,1,2"]),
    "upcycle": ("upcycle", {}, ["--experts", "4"]),
    "upcycle qwen2": ("upcycle", {"family": "qwen2", "qkv_bias": True}, ["--experts", "4"]),
    "upcycle shared": (
        "upcycle", {"family": "qwen2", "qkv_bias": True},
        ["--experts", "0,4,4", "--residual", "sigmoid_gate"]),
    "upcycle gpt": (
        "upcycle", GPT, ["--experts", "4,8,4", "--granularity", "2", "--residual", "sum"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_a_dry_run_says_what_the_real_run_does(name: str, tmp_path: Path, capsys) -> None:
    verb, shape, options = REAL[name]
    model, out = write_tiny(tmp_path / "m", **shape), tmp_path / "out"
    before = sorted(tmp_path.rglob("*"))
    code, text, _ = run(capsys, verb, model, out, *options, "--dry-run")
    assert code == 0, text
    assert sorted(tmp_path.rglob("*")) == before
    plan = last_json(text)
    code, _, err = run(capsys, verb, model, out, *options)
    assert code == 0, err
    written = TensorFile(out / "model.safetensors")
    size = 2 if "bfloat16" in options else 4
    shapes = {disk: written.shape(disk) for disk in written.names()}
    bytes_of = sum(torch.Size(shape).numel() * size for shape in shapes.values())
    assert plan["out"]["bytes_on_disk"] == bytes_of
    assert plan["out"]["dtype"] == ("bfloat16" if size == 2 else "float32")
    config = Directory(out).config
    assert plan["out"]["params_total"] == config.params_total()
    assert plan["in"]["params_total"] == Directory(model).config.params_total()
    assert plan["out"]["family"] == json.loads((out / "config.json").read_text())["model_type"]
    lineage = json.loads((out / "growmoe.json").read_text())
    assert plan["declared_exact"] == lineage["declared_exact"]
    assert plan.get("lossy_because", []) == lineage["lossy_because"]
    # every tensor is in the table once, with its shape
    kinds = Counter(tuple(shape) for shape in tensor_shapes(config).values())
    found: Counter[tuple[int, ...]] = Counter()
    for row in plan["tensors"]:
        found[tuple(row["shape"])] += row["count"]
    assert found == kinds


def test_a_dry_run_names_the_dtype_of_the_weights_not_of_the_config(tmp_path: Path, capsys) -> None:
    model = write_tiny(tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    for said in ("bfloat16", None):
        changed = {**config, "dtype": said, "torch_dtype": said}
        (model / "config.json").write_text(json.dumps(changed))
        _, out, _ = run(capsys, "grow", model, tmp_path / "o", "--layers", "4", "--dry-run")
        assert last_json(out)["out"]["dtype"] == "float32"


def test_the_plan_of_silent_layers_and_of_aki_is_printed(tmp_path: Path, capsys) -> None:
    model = write_tiny(tmp_path / "m")
    _, out, _ = run(capsys, "grow", model, tmp_path / "o", "--layers", "5", "--dry-run", "--json")
    rows = {(r["tensor"], r["from"]): r["count"] for r in last_json(out)["tensors"]}
    o = "model.layers.*.self_attn.o_proj.weight"
    assert (rows[o, o], rows[o, "new"]) == (3, 2)
    options = ["--method", "aki", "--ffn", "60", "--dry-run", "--json"]
    _, out, _ = run(capsys, "grow", model, tmp_path / "o", *options)
    rows = {(r["tensor"], r["from"]): r["count"] for r in last_json(out)["tensors"]}
    up, down = ("model.layers.*.mlp.up_proj.weight", "model.layers.*.mlp.down_proj.weight")
    assert (rows[up, f"{up} and the layer above"], rows[up, up]) == (2, 1)
    assert rows[down, down] == 3  # its rows are no new units


def verbs(tmp_path: Path) -> dict[str, list[object]]:
    model, text = write_tiny(tmp_path / "m"), tmp_path / "t.txt"
    text.write_text("some words")
    (model / "tokenizer.json").write_text("{}")  # a dry run only sees that there is one
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"name: r\noutput: {tmp_path / 'run'}\nstages:\n"
                      f"  - {{stage: grow, model: {model}, layers: 4}}\n")  # fmt: skip
    corpus = tmp_path / "c"
    corpus.mkdir()
    (corpus / "manifest.json").write_text(json.dumps({"tokenizer": {"vocab_size": 97}}))
    return {
        "run": [recipe], "prepare": [text, "--out", tmp_path / "out"],
        "train": [tmp_path / "out", "--data", corpus, "--tokens", 100, "--model", model,
                  "--set", "sequence_length=32"],
        "grow": [model, tmp_path / "out", "--layers", 4],
        "upcycle": [model, tmp_path / "out"], "verify": [model, model],
        "evaluate": [model, "--text", text], "generate": [model, "--prompt", "a"],
        "chat": [model], "bench": [model, "--prompt-tokens", 9], "inspect": [model],
        "plan": [recipe], "report": [tmp_path / "r"],
        "doctor": [],
    }  # fmt: skip


@pytest.mark.parametrize("json_only", [True, False])
def test_every_verb_has_a_dry_run_that_leaves_nothing_behind(
    json_only: bool, tmp_path: Path, capsys
) -> None:
    given = verbs(tmp_path)
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "summary.json").write_text("[]")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for verb, arguments in given.items():
        options = ["--dry-run", *(["--json"] if json_only else [])]
        code, out, err = run(capsys, verb, *arguments, *options)
        assert (code, err) == (0, ""), (verb, out, err)
        assert isinstance(last_json(out), dict), verb
        assert len(out.splitlines()) == 1 or not json_only, verb
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, verb


def test_dry_runs_import_no_torch(tmp_path: Path) -> None:
    given = [[verb, *map(str, a), "--dry-run", "--json"] for verb, a in verbs(tmp_path).items()
             if verb in ("run", "train", "grow", "upcycle", "verify", "generate",
                         "bench")]  # fmt: skip
    code = (
        "import sys, growmoe.cli\n"
        f"for arguments in {given!r}:\n"
        "    try: growmoe.cli.main(arguments)\n"
        "    except SystemExit as ended: assert not ended.code, arguments\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_dry_run_refuses_what_the_real_run_refuses(tmp_path: Path, capsys) -> None:
    model = write_tiny(tmp_path / "m")
    for options, words in (
        (["--hidden", "20"], "hidden_size 20 is smaller"), (["--layers", "2"], "layers 2 is"),
        (["--layers", "4", "--depth", "0,1,2,3"], "layer 3 is not one of"),
        (["--text", tmp_path / "absent", "--layers", "4"], "absent"),
        (["--vocab-tokenizer", tmp_path / "absent"], "absent"),
    ):  # fmt: skip
        for dry in (["--dry-run"], []):
            code, _, err = run(capsys, "grow", model, tmp_path / "o", *options, *dry)
            assert (code, words in err) == (2, True), (options, dry, err)
    (tmp_path / "o").mkdir()
    code, _, err = run(capsys, "grow", model, tmp_path / "o", "--layers", "4", "--dry-run")
    assert (code, "already exists" in err) == (2, True)


@pytest.mark.parametrize(
    ("verb", "options", "words"),
    [
        ("grow", "--layers 5 --noise-db 20", "noise: copies needs hidden"),
        ("grow", "--head-dim 8 --noise-db 20", "noise: copies needs hidden"),
        ("grow", "--layers 5 --split even", "split needs"),
        ("grow", "--layers 5 --units zero_pad", "units: zero_pad needs"),
        ("grow", "--hidden 48 --guard 1,1 --method fpi", "guard and branch_scale need layers"),
        ("grow", "--hidden 48 --depth interpolate", "depth: interpolate needs layers"),
        ("grow", "--layers 4 --vocab-init zeros", "vocab_init: zeros needs vocab"),
        ("grow", "--layers 4 --merge-kv mean", "merge_kv needs kv_heads"),
        ("grow", "--noise everywhere --noise-db -10000", "noise_db: input should be"),
        ("grow", "--hidden 48 --shard-gb 1e300", "shard_gb: input should be"),
        ("grow", "--depth 0,1,", "depth: give identity, stack"),
        ("grow", "--layers 4 --depth stack --guard 3", "guard: give two numbers"),
        ("upcycle", "--experts x", "experts: give a number"),
        ("upcycle", "--experts 0", "experts: give a number"),
        ("upcycle", "--experts 4 --router-std 1e300", "router_std: input should be"),
        ("upcycle", "--experts 4 --noise 0.1", "noise is for expert_init: noise"),
    ],
)
def test_options_that_would_do_nothing_or_harm_are_refused(
    verb: str, options: str, words: str, tmp_path: Path, capsys
) -> None:
    model = write_tiny(tmp_path / "m")
    code, _, err = run(capsys, verb, model, tmp_path / "o", *options.split())
    assert (code, words in err) == (2, True), err
    assert len(err.splitlines()) == 1
    assert "[" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


# ---- when from scratch may win ----


@pytest.mark.parametrize(
    ("tokens", "flops", "words"),
    [
        (0, 0, ["from about 250 MoE"]), (250, 10, []), (251, 10, ["above 25%"]),
        (100, 1999, []), (100, 2000, ["2.0 times"]), (900, 9000, ["above 25%", "9.0 times"]),
    ],
)  # fmt: skip
def test_warnings_come_at_a_quarter_of_the_tokens_and_twice_the_flops(
    tokens: int, flops: int, words: list[str]
) -> None:
    found = scratch_warning(Spent(1000, 1000), Spent(moe_tokens=tokens, moe_flops=flops), "m")
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found))


def test_nothing_is_said_about_models_of_unknown_cost() -> None:
    assert "unknown" in scratch_warning(Spent(), Spent(moe_tokens=10**12), "m")[0]


def test_what_a_dense_model_cost_is_remembered_by_its_moe(tmp_path: Path, capsys) -> None:
    """pretrained_tokens of a foreign model, and MoE tokens counted from the upcycling on."""
    dense = write_tiny(tmp_path / "dense")
    flops = Directory(dense).config.flops_per_token()
    code, _, err = run(
        capsys, "upcycle", dense, tmp_path / "moe", "--experts", "2", "--no-verify",
        "--pretrained-tokens", "1000",
    )  # fmt: skip
    assert code == 0, err
    moe = tmp_path / "moe"
    config = Directory(moe).config
    assert spent_on(moe, config) == Spent(1000, 3 * 1000 * flops, 0, 0)
    lineage = json.loads((moe / "growmoe.json").read_text())
    lineage |= {"tokens_total": 300, "flops_total": 12345}  # as training writes it
    (moe / "growmoe.json").write_text(json.dumps(lineage))
    assert spent_on(moe, config) == Spent(1000, 3 * 1000 * flops, 300, 12345)
    # said at the training of the MoE: tokens of the dense model, at the dense model's cost
    del lineage["dense_spent"]
    (moe / "growmoe.json").write_text(json.dumps(lineage))
    said = spent_on(moe, config, 2000)
    assert (said.dense_tokens, said.dense_flops) == (2000, 3 * 2000 * flops)


def test_a_recipe_may_say_what_its_first_model_cost(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "m")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: r\nstages:\n  - {{stage: upcycle, name: moe, model: {model}, experts: 2,"
        " pretrained_tokens: 1000}\n"
        f"  - {{stage: train, name: t, model: moe, data: {model}, tokens: 320, batch_size: 1,"
        " sequence_length: 32}\n"
        f"  - {{stage: train, name: u, model: t, data: {model}, tokens: 320, batch_size: 1,"
        " sequence_length: 32, pretrained_tokens: 100}\n"
    )
    rows = {row["name"]: row for row in plan_recipe(load_recipe(recipe))}
    assert "32%" in rows["t"]["warnings"][0]
    assert "640%" in rows["u"]["warnings"][0]  # what the later stage says counts
    assert UpcycleStage(stage="upcycle", model="x").pretrained_tokens is None
