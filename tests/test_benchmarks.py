"""Benchmarks run on tiny sizes, and refuse implementations that differ. No timing here."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("--hidden", "32", "--ffn", "48", "--experts", "4", "8", "--tokens", "1", "9")
FAST = ("--top-k", "2", "--threads", "1", "--repeats", "2", "--sample-ms", "1")


def bench(
    *options: str, program: str = "", script: str = "moe_layer.py"
) -> subprocess.CompletedProcess:
    """The script in its own process, or `program` beside its modules."""
    folder = str(ROOT / "benchmarks")
    paths = os.pathsep.join([str(ROOT / "src"), folder, os.environ.get("PYTHONPATH", "")])
    run = ["-c", program] if program else [f"{folder}/{script}"]
    return subprocess.run(
        [sys.executable, *run, *options], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip


def test_moe_layer_measures_every_cell(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    done = bench(*SIZES, *FAST, "--out", str(out))
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(out.read_text()) == document
    config, rows = document["config"], document["rows"]
    assert config["versions"]["torch"] == torch.__version__
    assert {"commit", "cpu", "load_average", "seed", "hidden", "ffn"} <= config.keys()
    cells = set(itertools.product((1, 9), (4, 8), ("uniform", "zipf"), ("fp32", "bf16"),
                                  ("forward", "forward+backward")))  # fmt: skip
    fields = ("T", "E", "routing", "dtype", "pass")
    for name in ("growmoe", "table", "onehot", "hf_eager", "hf_grouped_mm", "dense"):
        own = [row for row in rows if row["impl"] == name]
        assert {tuple(row[field] for field in fields) for row in own} == cells
        assert len(own) == len(cells)
        for row in own:
            assert row["k"] == 2
            assert row["threads"] == 1
            assert row["seconds"] > 0
            assert row["ratio_to_dense"] > 0
            assert "peak_mb" in row
            checked = {"output", "x", "router", "up", "down"}
            if row["dtype"] == "bf16" or row["pass"] == "forward":
                checked = {"output"}
            assert set(row.get("difference", {})) == (checked if name != "dense" else set())
    assert "Slower than the best peer" in done.stdout

    begun = [row for row in rows if row["E"] == 4]
    out.write_text(json.dumps({**document, "rows": begun}))
    again = bench(*SIZES, *FAST, "--out", str(out), "--resume")
    resumed = json.loads(again.stdout.splitlines()[-1])["rows"]
    assert resumed[: len(begun)] == begun
    assert len(resumed) == len(rows)


BROKEN = """
import sys, moe_layer, moe_peers
build = moe_peers.BUILDERS["hf_eager"]
def broken(shared, k):
    layer = build(shared, k)
    forward = layer.forward
    layer.forward = lambda x: {change}
    return layer
moe_peers.BUILDERS["hf_eager"] = broken
sys.exit(moe_layer.main())
"""


@pytest.mark.parametrize(
    ("change", "passes", "what"),
    [
        ("forward(x) * 1.001", "forward", "output"),
        ("forward(x.detach()) + 0 * x", "forward+backward", "x"),
    ],
)
def test_moe_layer_stops_at_a_difference(change: str, passes: str, what: str) -> None:
    options = ("--dtype", "fp32", "--routing", "zipf", "--impl", "growmoe", "hf_eager")
    done = bench(*SIZES, *FAST, *options, program=BROKEN.format(change=change))
    assert done.returncode == 1
    place = f"T 1, E 4, k 2, routing zipf, dtype fp32, pass {passes}, threads 1"
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: hf_eager differs from the reference in {place}: {what} by")


def test_moe_layer_refuses_what_it_cannot_route() -> None:
    done = bench("--hidden", "4", "--experts", "8")
    assert done.returncode == 2
    assert "--hidden 4 must be at least the number of experts, 8" in done.stderr


# ---- whole engines ----

TINY = (
    "--hidden", "64", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--ffn", "96",
    "--vocab", "400",
)  # fmt: skip


def test_decode_measures_engines_in_turns(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    done = bench(
        *TINY, "--cache", str(tmp_path), "--probe-mib", "4", "--threads", "1", "--tokens", "4",
        "--batches", "1", "3", "--prefill", "40", "--repeats", "2", "--forms", "float32", "int4",
        "--engines", "growmoe", "llama.cpp",
        script="decode.py",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert {"commit", "load_average", "engines_are", "hidden", "seed"} <= document["config"].keys()
    assert "AVX2" in document["config"]["engines_are"]["llama.cpp"]["system_info"]
    rows = document["rows"]
    cases = {("decode", 1, None), ("decode", 3, None), ("prefill", 1, 40)}
    for engine in ("growmoe", "llama.cpp"):
        own = [row for row in rows if (row["engine"], row["form"]) == (engine, "float32")]
        assert {(row["pass"], row["batch"], row["prompt_tokens"]) for row in own} == cases
        for row in own:
            assert len(row["samples"]) == 2
            assert row["best"] >= row["tokens_per_s"] > 0
            assert row["cpu_s_per_token"] > 0
            assert row["fraction_of_ceiling"] > 0
    assert "llama.cpp" in {row["engine"] for row in rows if row["form"] == "int4"}
    greedy = {e["engine"]: e["ids"] for e in document["greedy"] if e["form"] == "float32"}
    assert len(greedy["growmoe"]) == 8
    for ids in greedy.values():  # llama.cpp leaves a token with half a character out
        assert ids[:4] == greedy["growmoe"][:4]


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts can be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.usefixtures("beside")
def test_ours_is_compared_with_the_best_peer_of_each_round() -> None:
    import decode

    def row(engine: str, rates: list[int]) -> dict:
        case = {"form": "bfloat16", "pass": "decode", "batch": 8, "threads": 2}
        return {"engine": engine, "samples": rates, "best": max(rates), **case}

    rows = [row("growmoe", [10, 30, 60]), row("llama.cpp", [10, 10, 40]), row("vllm", [5, 20, 20])]
    (found,) = decode.ratios(rows, 2)
    assert found["target"] == "bf16 batch 8 / best peer"
    assert (found["ratio"], found["ratio_of_best"]) == (1.5, 1.5)
    assert found["met"] is True
    assert decode.ratios(rows[1:], 2) == decode.ratios(rows, 1) == []


@pytest.mark.usefixtures("beside")
def test_an_engine_that_ends_is_left_out_with_its_reason(tmp_path: Path) -> None:
    from engine_pool import Key, Pool

    script = tmp_path / "worker.py"
    script.write_text(
        "import sys\n"
        """print('{"ready": "x", "versions": {}, "facts": {}}', flush=True)\n"""
        "input(); sys.exit('lost a wheel')\n"
    )

    class Models:
        def of(self, kind: str, form: str) -> Path:
            return tmp_path

    (tmp_path / "log").write_text("")
    with Pool(Models(), {}, 2, {}, tmp_path / "log", script) as pool:
        assert pool.measure(Key("x", "float32", 1), "decode") is None
        assert pool.measure(Key("x", "float32", 1), "decode") is None
        assert "lost a wheel" in pool.missing["x", "float32"]


@pytest.mark.usefixtures("beside")
def test_the_bytes_of_a_step_are_those_of_the_active_weights() -> None:
    from random_mixtral import Sizes

    sizes = Sizes()
    attention, head = 1024 * (2 * 1024 + 2 * 256 + 8), 32000 * 1024
    assert sizes.step_bytes(1, "float32") / 4 == 12 * (attention + 2 * 3 * 1024 * 2048) + head
    assert sizes.step_bytes(1, "int4") > sizes.step_bytes(1, "int8") / 2
    assert sizes.distinct_experts(1) == pytest.approx(2)
    assert sizes.distinct_experts(32) == pytest.approx(8 * (1 - 0.75**32))


# ---- one layer three ways ----

LAYER = (
    "--hidden", "64", "--ffn", "32", "--experts", "4", "8", "--tokens", "1", "9", "--threads", "1",
    "--repeats", "2", "--sample-ms", "1", "--probe-mib", "4",
)  # fmt: skip


def test_baseline_compares_every_cell() -> None:
    done = bench(*LAYER, script="baseline.py")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert {"commit", "load_average", "ours", "hidden"} <= document["config"].keys()
    cells = set(itertools.product((1, 9), (4, 8), (1, 2)))
    dropped = 0.0
    for name in ("onehot", "onehot_cf1", "table", "growmoe", "hf_grouped_mm"):
        own = [row for row in document["rows"] if row["impl"] == name]
        assert sorted((row["T"], row["E"], row["k"]) for row in own) == sorted(cells)
        for row in own:
            assert row["seconds"] >= row["best_seconds"] > 0
            assert row["fraction_of_ceiling"] > 0
            assert row["distinct_experts"] <= min(row["E"], row["T"] * row["k"])
            assert ("dropped" in row) == (name == "onehot_cf1")
            dropped += row.get("dropped", 0)
            if name != "onehot_cf1":
                assert row["difference"] <= document["config"]["tolerance"]
    assert dropped > 0


LOSING = """
import sys, baseline
build = baseline.builders
def broken():
    found, by = build()
    found["growmoe"] = baseline.onehot_cf1
    return found, by
baseline.builders = broken
sys.exit(baseline.main())
"""


def test_baseline_stops_when_ours_drops_tokens() -> None:
    done = bench(*LAYER, "--tokens", "9", "--top-k", "2", program=LOSING)
    assert done.returncode == 1
    assert "onehot_cf1 differs from the reference" in done.stderr.splitlines()[-1]


# ---- experts inside of transformers ----

MODELS = (
    "--hidden", "32", "--ffn", "32", "--layers", "1", "--heads", "2", "--experts", "3", "--vocab",
    "50", "--threads", "1", "--tokens", "1", "6", "--train-tokens", "6", "--repeats", "2",
    "--sample-ms", "1",
)  # fmt: skip


def test_hf_experts_measures_forward_and_backward() -> None:
    done = bench(*MODELS, script="hf_experts.py")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    passes = {(1, "forward"), (6, "forward"), (6, "forward+backward")}
    cells = set(itertools.product(("mixtral", "qwen2_moe"), ("fp32", "bf16"), passes))
    for experts in ("growmoe", "grouped_mm", "eager"):
        own = [row for row in document["rows"] if row["experts"] == experts]
        assert {(r["model"], r["dtype"], (r["T"], r["pass"])) for r in own} == cells
        assert all(row["seconds"] >= row["best_seconds"] > 0 for row in own)


WRONG = """
import sys, hf_experts, growmoe.hf_experts as ours
real = ours.expert_mlp
half = lambda weights: 0.5 * weights + 0.5 * weights.detach()  # right outputs, wrong gradients
ours.expert_mlp = lambda x, table, weights, *rest: real(x, table, half(weights), *rest)
sys.exit(hf_experts.main())
"""


def test_hf_experts_stops_at_a_difference() -> None:
    one = ("--dtype", "fp32", "--models", "mixtral", "--tokens", "6")
    done = bench(*MODELS, *one, program=WRONG)
    assert done.returncode == 1
    assert "growmoe differs from eager" in done.stderr.splitlines()[-1]


# ---- traffic ----


def test_serving_plays_the_same_requests_to_every_engine(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    picture = tmp_path / "serving.png"
    done = bench(
        *TINY, "--cache", str(tmp_path), "--rates", "4", "8", "--seconds", "0.8", "--threads", "1",
        "--prompt-tokens", "4", "24", "--output-tokens", "2", "6", "--shared-tokens", "32",
        "--slots", "2", "--plot", str(picture), script="serving.py",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    rows = {(row["engine"], row["rate"]): row for row in document["rows"]}
    engines = ("growmoe", "growmoe_whole_prompts", "growmoe_no_reuse", "llama.cpp")
    assert set(rows) == set(itertools.product(engines, (4.0, 8.0)))
    for row in rows.values():
        assert row["requests"] == rows["growmoe", row["rate"]]["requests"]
        for name in ("ttft_s", "between_tokens_s", "whole_s"):
            assert 0 <= row[name]["p50"] <= row[name]["p90"] <= row[name]["p99"]
        assert row["whole_s"]["p50"] >= row["ttft_s"]["p50"] > 0
        assert row["output_tokens_per_s"] > 0
    assert rows["growmoe_no_reuse", 8.0]["cached_tokens"] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("beside")
def test_goodput_counts_requests_within_both_limits() -> None:
    import serving

    options = serving.arguments(["--ttft-limit", "1", "--token-limit", "0.5"])
    schedule = [(0.0, [1], 3), (1.0, [1], 3), (2.0, [1], 1)]
    times = [[0.5, 1.0, 1.5], [1.5, 2.5, 3.5], [4.0]]
    row = serving.summary(schedule, times, options)
    assert row["good"] == pytest.approx(1 / 3)  # the second is slow, the third came late
    assert row["output_tokens_per_s"] == 7 / 4
    assert row["ttft_s"] == {"p50": 0.5, "p90": 2.0, "p99": 2.0}
    assert row["whole_s"]["p50"] == 2.0
