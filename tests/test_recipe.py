"""Recipes: every mistake at once, with line and hint; overrides; every shipped recipe loads."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT, growmoe, write_tiny
from growmoe.errors import GrowmoeError, UsageError
from growmoe.inference.requests import Sampling
from growmoe.planning.recipes import plan_recipe
from growmoe.recipe_yaml import load_recipe

GOOD = """\
name: t
stages:
  - stage: prepare
    sources: [{name: a, path: texts}]
  - stage: train
    name: small
    data: corpus
    init: {hidden_size: 32, num_layers: 2, num_heads: 4, ffn_size: 64}
    tokens: 1000
  - stage: grow
    name: big
    model: small
    hidden: 48
    layers: 3
  - stage: upcycle
    name: moe
    model: big
    experts: 4
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        plan_recipe(load_recipe(write(tmp_path, text), list(overrides)))
    return str(caught.value).replace(str(tmp_path) + "/", "").splitlines()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda p: p.name)
def test_shipped_recipes_load(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    plan = plan_recipe(recipe)
    assert [entry["stage"] for entry in plan] == [stage.stage for stage in recipe.stages]
    sizes = [entry["params_total"] for entry in plan if "params_total" in entry]
    grows = any(stage.stage == "grow" for stage in recipe.stages)
    assert sizes == sorted(sizes) or not grows


def test_a_plan_works_out_every_shape(tmp_path: Path) -> None:
    plan = plan_recipe(load_recipe(write(tmp_path, GOOD)))
    by_name = {entry["name"]: entry for entry in plan}
    assert by_name["big"]["hidden"] == 48
    assert by_name["big"]["heads"] == 6
    assert by_name["moe"]["family"] == "mixtral"
    assert by_name["moe"]["params_total"] > by_name["big"]["params_total"]
    assert by_name["small"]["flops"] == 3 * 4096 * by_name["small"]["flops_per_token"]


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    text = """\
name: t
stages:
  - stage: prepare
    sources: [{name: a, path: texts, wieght: 2}]
  - stage: train
    data: corpus
    init: {hidden_size: 30, num_layers: 2, num_heads: 4, ffn_size: 8}
    tokns: 5
    tokens: many
    optimizer: {lr: 3e-4, warmpu: 1}
  - stage: upcycle
    model: trian
    experts: 2
    top_k: 4
  - stage: grwo
"""
    assert problems(tmp_path, text) == [
        "recipe.yaml:4: stages[0].sources[0].wieght: unknown key; did you mean 'weight'?",
        "recipe.yaml:7: stages[1].init: hidden_size 30 does not divide by num_heads 4; "
        "give head_dim",
        "recipe.yaml:9: stages[1].tokens: input should be a valid integer, not 'many'",
        "recipe.yaml:10: stages[1].optimizer.warmpu: unknown key; did you mean 'warmup'?",
        "recipe.yaml:8: stages[1].tokns: unknown key; did you mean 'tokens'?",
        "recipe.yaml:11: stages[2]: experts (2) are fewer than top_k (4)",
        "recipe.yaml:15: stages[3]: unknown stage 'grwo'; did you mean 'grow'?",
        "recipe.yaml:12: stages[2].model: 'trian' is neither an earlier stage nor an existing path"
        "; did you mean 'train'?",
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("hidden: 48", "hidden: 16", "recipe.yaml:10: stages[2]: cannot grow: hidden_size 16 is "
         "smaller than the source's 32; num_heads 2 is smaller than the source's 4; "
         "num_kv_heads 2 is smaller than the source's 4"),
        ("hidden: 48", "hidden: 50", "recipe.yaml:10: stages[2]: cannot grow: hidden 50 is not a "
         "multiple of head_dim 8; name the heads"),
        ("layers: 3", "layers: 1", "recipe.yaml:10: stages[2]: cannot grow: layers 1 is smaller "
         "than the source's 2"),
        ("model: big", "model: moe", "recipe.yaml:17: stages[3].model: 'moe' is neither an earlier "
         "stage nor an existing path; it comes later"),
        ("model: big", "model: corpus", "recipe.yaml:17: stages[3].model: 'corpus' is a prepare "
         "stage, not train or grow or upcycle or export"),
        ("name: big", "name: small", "recipe.yaml:11: stages[2].name: two stages are called "
         "'small'"),
        ("name: t\n", "", "recipe.yaml:1: name: this key is required"),
        ("name: t\n", "name: t\nname: u\n", "recipe.yaml:2: name is given twice"),
        ("tokens: 1000", "tokens: -1", "recipe.yaml:9: stages[1].tokens: input should be greater "
         "than or equal to 1, not -1"),
        ("tokens: 1000", "tokens: 1000\n    model: x", "recipe.yaml:5: stages[1]: give exactly one "
         "of model, init and preset, not ['model', 'init']"),
    ],
)  # fmt: skip
def test_one_mistake(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in GOOD
    assert expected in problems(tmp_path, GOOD.replace(old, new, 1))


def test_a_generate_stage_says_how_to_sample(tmp_path: Path) -> None:
    """Every field of Sampling can be given, but token ids: a recipe speaks in texts."""
    given = {
        "max_tokens": 9, "temperature": 0.5, "top_k": 7, "top_p": 0.5, "min_p": 0.1,
        "repetition_penalty": 1.2, "seed": 3, "n": 2, "stop": ["x"], "ignore_eos": True,
        "logprobs": 4,
    }  # fmt: skip
    stage = {"stage": "generate", "model": "big", "prompts": ["a"], "weights": "int8", **given}
    text = GOOD + "  - " + yaml.safe_dump(stage, default_flow_style=True, width=1000)
    spec = load_recipe(write(tmp_path, text)).stages[-1]
    sampling = Sampling.of(spec)
    assert dataclasses.asdict(sampling) == {**given, "stop": ("x",), "stop_token_ids": ()}
    wrong = {**stage, "top_k": -1, "min_p": 2, "logprobs": 101, "weights": "int3", "stop": [""]}
    text = GOOD + "  - " + yaml.safe_dump(wrong, default_flow_style=True, width=1000)
    found = problems(tmp_path, text)
    for name in ("top_k", "min_p", "logprobs", "weights", "stop"):
        assert any(f".{name}" in line for line in found), (name, found)


def test_overrides_by_name_and_number(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    recipe = load_recipe(
        path, ["small.tokens=5e3", "stages.big.hidden=64", "2.layers=4", "output=elsewhere"]
    )
    assert recipe.stages[1].tokens == 5000
    assert (recipe.stages[2].hidden, recipe.stages[2].layers) == (64, 4)
    assert recipe.folder == Path("elsewhere")
    found = problems(tmp_path, GOOD, "small.tokens=x", "big.hiden=3")
    assert found[0].startswith("override 'small.tokens=x': stages[1].tokens: ")
    assert "override 'big.hiden=3': stages[2].hiden: unknown key; did you mean 'hidden'?" in found
    assert "did you mean 'small'?" in problems(tmp_path, GOOD, "smal.tokens=3")[0]
    assert "not of the form" in problems(tmp_path, GOOD, "small.tokens")[0]


def test_mistakes_are_found_before_torch_is_imported(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("tokens: 1000", "tokns: 1000"))
    done = growmoe("run", path, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.code == 2
    assert "unknown key; did you mean 'tokens'?" in done.err
    assert "| torch\n" not in done.err.replace("|   torch", "| torch")
    assert not any(line.split("|")[-1].strip() == "torch" for line in done.err.splitlines())


def test_a_stage_may_start_from_an_existing_model(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model")
    text = f"name: t\nstages:\n  - {{stage: upcycle, model: '{model}', experts: 4}}\n"
    assert plan_recipe(load_recipe(write(tmp_path, text)))[0]["experts"] == 4


@pytest.mark.parametrize("text", ["", "[]", "name: [", "a: b: c", "\x00", "stages: 3", "- x"])
def test_files_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    assert all(line.startswith("recipe.yaml") for line in problems(tmp_path, text))


leaves = st.none() | st.booleans() | st.integers(-3, 300) | st.text(max_size=6) | st.floats()
keys = st.sampled_from(
    ["stage", "name", "model", "data", "tokens", "init", "stages", "experts", "x"]
)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4)
)


@given(trees)
@settings(max_examples=150, deadline=None)
def test_no_yaml_makes_a_traceback(tmp_path_factory: pytest.TempPathFactory, tree) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "recipe.yaml"
    stages = [{"stage": "train", "data": "corpus", **tree}] if isinstance(tree, dict) else tree
    path.write_text(yaml.safe_dump({"name": "t", "stages": stages}), encoding="utf-8")
    try:
        plan_recipe(load_recipe(path))
    except GrowmoeError as error:
        assert str(error)
