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


RATIOS = """
import json, decode
def row(engine, rates, **more):
    return {"engine": engine, "form": "bfloat16", "pass": "decode", "batch": 8, "threads": 2,
            "samples": rates, "best": max(rates), **more}
rows = [row("growmoe", [10, 30, 60]), row("llama.cpp", [10, 10, 40]), row("vllm", [5, 20, 20])]
print(json.dumps(decode.ratios(rows, 2)))
"""


def test_ours_is_compared_with_the_best_peer_of_each_round() -> None:
    done = bench(program=RATIOS)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert found["target"] == "bf16 batch 8 / best peer"
    assert (found["ratio"], found["ratio_of_best"]) == (1.5, 1.5)
    assert found["met"] is True


STEP = """
from random_mixtral import Sizes
sizes = Sizes()
print(sizes.step_bytes(1, "float32") / 4, sizes.distinct_experts(1), sizes.distinct_experts(32))
"""


def test_the_bytes_of_a_step_are_those_of_the_active_weights() -> None:
    done = bench(program=STEP)
    weights, one, many = map(float, done.stdout.split())
    attention = 1024 * (2 * 1024 + 2 * 256 + 8)
    assert weights == 12 * (attention + 2 * 3 * 1024 * 2048) + 32000 * 1024
    assert one == pytest.approx(2)
    assert many == pytest.approx(8 * (1 - 0.75**32))
