"""The command line as a user meets it: codes, sentences, JSON, whole outputs, a full disk."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from conftest import ROOT, fresh_growmoe, growmoe, tiny_config, write_tiny
from growmoe.cli import main
from growmoe.models.checkpoint import load_model
from growmoe.models.footprint import block_bytes


@pytest.fixture(scope="module")
def dense(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama with the corpus's tokenizer."""
    out = tmp_path_factory.mktemp("dense") / "model"
    return write_tiny(out, tokenizer_from=corpus, vocab_size=320)


@pytest.fixture(scope="module")
def misfits(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose tokenizer does not fit the corpus: another one, and too few tokens."""
    folder = tmp_path_factory.mktemp("misfits")
    other = write_tiny(folder / "other", vocab_size=400)
    tokenizer = json.loads((corpus / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-5]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    return {"other": other, "small": write_tiny(folder / "small", vocab_size=97)}


VERBS = (
    "run", "prepare", "train", "grow", "upcycle", "verify", "evaluate", "chat", "generate", "bench",
    "inspect", "plan", "report", "doctor",
)  # fmt: skip


def test_help_lists_every_verb() -> None:
    done = growmoe("--help")
    assert done.code == 0
    for verb in VERBS:
        assert re.search(rf"^  {verb} ", done.out, re.MULTILINE), verb


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_refuses_unknown_options(verb: str) -> None:
    assert growmoe(verb, "--help").code == 0
    wrong = growmoe(verb, "--nonsense")
    assert wrong.code == 2
    assert "--nonsense" in wrong.err
    assert "Traceback" not in wrong.err


def test_grow_then_upcycle_then_verify(dense: Path, corpus: Path, tmp_path: Path) -> None:
    grown, moe = tmp_path / "grown", tmp_path / "moe"
    done = growmoe("grow", dense, grown, "--hidden", 48, "--layers", 4, "--ffn", 72,
                   "--vocab", 384, "--data", corpus)  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["exact"] is True
    # nothing but the new tokens' share of probability may move the loss
    assert done.json["check"]["max_abs_logit_diff"] < 1e-3
    done = growmoe("upcycle", grown, moe, "--experts", 4, "--top-k", 2, "--data", corpus, "--json")
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 1
    assert done.json["loss_before"] == pytest.approx(done.json["loss_after"], abs=5e-5)
    done = growmoe("verify", dense, moe, "--data", corpus)
    assert done.code == 0, done.err
    fields = {"max_abs_logit_diff", "noise_floor", "ce_a", "ce_b", "exact", "kl"}
    assert fields <= set(done.json)
    model = transformers.AutoModelForCausalLM.from_pretrained(moe).eval()
    assert type(model).__name__ == "MixtralForCausalLM"
    ids = torch.arange(60)[None]
    with torch.no_grad():
        difference = model(ids).logits[..., :320] - load_model(dense)(ids).logits
    assert difference.abs().max() < 1e-3
    lineage = json.loads((moe / "growmoe.json").read_text())
    assert [step["operation"] for step in lineage["history"]] == ["grow", "upcycle"]
    assert lineage["checks"]["exact"] is True
    assert (moe / "tokenizer.json").read_bytes() == (corpus / "tokenizer.json").read_bytes()
    assert "grow" in (grown / "README.md").read_text()


@pytest.mark.parametrize("layers", ["all", "1"])
def test_a_qwen2_upcycle_loads_in_transformers(layers: str, corpus: Path, tmp_path: Path) -> None:
    dense = write_tiny(
        tmp_path / "dense",
        tokenizer_from=corpus,
        vocab_size=320,
        qkv_bias=True,
        family="qwen2",
        ffn_size=52,
    )
    done = growmoe("upcycle", dense, tmp_path / "moe", "--experts", 4, "--layers", layers)
    assert done.code == 0, done.err
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    original = transformers.AutoModelForCausalLM.from_pretrained(dense).eval()
    ids = torch.arange(60)[None]
    with torch.no_grad():
        assert (model(ids).logits - original(ids).logits).abs().max() < 1e-3


def test_verify_says_when_models_differ(dense: Path, corpus: Path, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other", seed=5, tokenizer_from=corpus, vocab_size=320)
    done = growmoe("verify", dense, other)
    assert done.code == 1
    assert done.json["exact"] is False
    lossy = tmp_path / "lossy"
    done = growmoe("grow", dense, lossy, "--hidden", 48, "--method", "aki-pro", "--layers", 5)
    assert done.code == 0, done.err
    assert (done.json["exact"], done.json["declared_exact"]) == (False, False)
    assert "declared lossy" in done.err
    assert growmoe("verify", dense, lossy).code == 0  # it never claimed to be the same


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["grow", "{dense}", "{out}", "--hidden", "20"], 2, "smaller than the source's 36"),
        (["grow", "{dense}", "{out}", "--kv-heads", "2"], 2, "smaller than the source's 3"),
        (["grow", "{dense}", "{out}", "--hidden", "wide"], 2, "should be a valid integer"),
        (["grow", "{dense}", "{out}", "--method", "magic"], 2, "method: input should be 'exact'"),
        (["grow", "{dense}", "{dense}", "--layers", "4"], 2, "already exists"),
        (["grow", "absent", "{out}"], 2, "absent does not exist"),
        (["upcycle", "{dense}", "{out}", "--experts", "1"], 2, "fewer than top_k"),
        (["upcycle", "{corpus}", "{out}"], 2, "no config.json"),
        (["upcycle", "{dense}", "{out}", "--layers", "9"], 2, "layer 9 is not one of"),
        (["train", "{out}", "--data", "{dense}", "--tokens", "9", "--preset", "350M"], 2,
         "not a corpus directory"),
        (["train", "{out}", "--data", "{corpus}", "--tokens", "9"], 2, "exactly one of model"),
        (["train", "{out}", "--data", "{corpus}", "--tokens", "9", "--model", "{dense}", "--set",
          "sequence_lenth=3"], 2, "did you mean 'sequence_length'?"),
        (["evaluate", "{dense}"], 2, "nothing to evaluate on"),
        (["generate", "{dense}", "--prompt", ""], 2, "the prompt is empty"),
        (["generate", "{dense}", "--prompt", "{long}"], 2, "the model's context is 160"),
        (["generate", "{dense}", "--prompt", "a", "--top-p", "2"], 2, "top_p"),
        (["generate", "{dense}", "--prompt", "a", "--top-k", "-1"], 2, "top_k"),
        (["generate", "{dense}", "--prompt", "a", "--min-p", "1.5"], 2, "min_p"),
        (["generate", "{dense}", "--prompt", "a", "--repetition-penalty", "1e-39"], 2,
         "repetition_penalty"),
        (["generate", "{dense}", "--prompt", "a", "--stop", ""], 2, "stop"),
        (["generate", "{dense}", "--prompt", "a", "--device", "cuda", "--dry-run",
          "--expert-memory", "4X"], 2, "'4X' is no size"),
        (["generate", "{dense}", "--prompt", "a", "--device", "cuda", "--dry-run",
          "--expert-memory", "4G"], 2, "experts on disk run on CPUs only"),
        (["generate", "{dense}", "--prompt", "a", "--n", "0"], 2, "n: "),
        (["generate", "{dense}", "--prompt", "a", "--logprobs", "101"], 2, "logprobs"),
        (["generate", "{dense}", "--prompt", "a", "--weights", "int3"], 2, "weights"),
        (["bench", "{dense}", "--batch", "1,x"], 2, "batch '1,x' is not a list of numbers"),
        (["bench", "{dense}", "--batch", "0"], 2, "at least 1"),
        (["bench", "{dense}"], 2, "more than the context of"),
        (["bench", "{dense}", "--tokens", "1"], 2, "tokens must be at least 2, not 1"),
        (["bench", "{dense}", "--weights", "int3"], 2, "'int3' are none of"),
        (["bench", "{dense}", "--kv-dtype", "int8"], 2, "'int8' is not one of"),
        (["bench", "{dense}", "--step-tokens", "8"], 2, "more than the largest batch"),
        (["bench", "{corpus}"], 2, "no config.json"),
        (["inspect", "{tmp}"], 2, "neither a model, a corpus nor a run"),
        (["report", "{tmp}"], 2, "no summary.json"),
        (["plan"], 2, "exactly one of a recipe"),
        (["plan", "--config", "{corpus}"], 2, "no config.json"),
        (["run", "absent.yaml"], 2, "absent.yaml does not exist"),
        (["grow", "{dense}", "{out}"], 2, "nothing to grow"),
        (["grow", "{dense}", "{out}", "--hidden", "48", "--seed", "-1"], 2, "seed"),
        (["grow", "{dense}", "{out}", "--layers", "4", "--method", "fpi", "--units", "zero_pad"],
         2, "contradicts"),
        (["chat", "{dense}", "--top-p", "0"], 2, "top_p"),
        (["chat", "{dense}", "--temperature", "-1"], 2, "temperature"),
        (["evaluate", "{other}", "--data", "{corpus}"], 2, "another tokenizer"),
        (["upcycle", "{other}", "{out}", "--data", "{corpus}"], 2, "another tokenizer"),
        (["evaluate", "{small}", "--data", "{corpus}"], 2, "has only 97"),
        (["train", "{out}", "--data", "{corpus}", "--tokens", "9", "--model", "{dense}", "--set",
          "sequence_length=161"], 2, "longer than the model's context of 160"),
        (["train", "{out}", "--data", "{corpus}", "--tokens", "9", "--model", "{dense}", "--set",
          "optimizer.lr=.inf"], 2, "finite"),
        (["prepare", "package:numpy", "--out", "{out}"], 2, "write package:NAME/GLOB"),
        (["prepare", "package:no.such/x", "--out", "{out}"], 2, "package no.such is not installed"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)  # fmt: skip
def test_wrong_use(
    arguments, code, words, dense, corpus, misfits, tmp_path: Path, capsys
) -> None:  # fmt: skip
    places = {
        **misfits,
        "dense": dense, "corpus": corpus, "out": tmp_path / "out", "tmp": tmp_path,
        "long": "far " * 400,
    }  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main([argument.format(**places) for argument in arguments])
    err = capsys.readouterr().err
    assert (ended.value.code, words in err) == (code, True), err
    assert all(line.startswith("growmoe: ") for line in err.splitlines())
    assert not list(tmp_path.iterdir())


# ---- generate, chat, evaluate, inspect ----


def test_generate_streams_and_is_seeded(dense: Path) -> None:
    arguments = ["generate", dense, "--prompt", "The river", "--max-tokens", 12]
    first, again = growmoe(*arguments), growmoe(*arguments)
    assert first.code == 0, first.err
    assert first.out.splitlines()[:-1] == again.out.splitlines()[:-1]  # then come load times
    assert first.json["samples"] == again.json["samples"]
    assert first.out.startswith("The river")
    sample = first.json["samples"][0]
    assert f"The river{sample['text']}\n" in first.out
    other = growmoe(*arguments, "--seed", 1, "--json")
    assert len(other.out.splitlines()) == 1
    assert other.json["samples"][0]["text"] != sample["text"]


def test_generate_takes_every_option(dense: Path) -> None:
    prompts = ["--prompt", "The river", "--prompt", "When the"]
    options = ["--n", 2, "--max-tokens", 9, "--temperature", 1.2, "--top-k", 30, "--min-p", 0.01,
               "--repetition-penalty", 1.1, "--ignore-eos", "--logprobs", 3]  # fmt: skip
    done = growmoe("generate", dense, *prompts, *options, "--weights", "float32")
    assert done.code == 0, done.err
    samples = done.json["samples"]
    assert [s["prompt"] for s in samples] == ["The river"] * 2 + ["When the"] * 2
    assert len({s["text"] for s in samples}) == 4
    for sample in samples:
        assert (sample["tokens"], sample["finish_reason"]) == (9, "length")
        assert len(sample["logprobs"]) == 9
        assert all(len(found["top"]) == 3 for found in sample["logprobs"])
    # shown one after another, though they are computed together
    shown = "".join(f"{s['prompt']}{s['text']}\n" for s in samples)
    assert done.out.startswith(shown)
    stop = next(letter for letter in samples[0]["text"] if letter.isalpha())
    ended = growmoe("generate", dense, *prompts, *options, "--weights", "float32", "--stop", stop)
    text = ended.json["samples"][0]["text"]
    assert text == samples[0]["text"][: samples[0]["text"].index(stop)]
    assert ended.json["samples"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_generate_in_other_forms(dense: Path, weights: str) -> None:
    done = growmoe("generate", dense, "--prompt", "The river", "--weights", weights)
    assert done.code == 0, done.err
    assert done.json["samples"][0]["tokens"] > 0


def test_bench_measures_every_batch_size(dense: Path) -> None:
    options = ["--prompt-tokens", 20, "--tokens", 6, "--batch", "1,3", "--repeat", 2]
    done = growmoe("bench", dense, *options, "--weights", "int8")
    assert done.code == 0, done.err
    found = done.json
    assert [one["batch"] for one in found["runs"]] == [1, 3]
    for one in found["runs"]:
        assert len(one["prefill_runs"]) == len(one["decode_runs"]) == 2
        assert min(one["prefill_runs"] + one["decode_runs"]) > 0
    assert (found["weights"], found["kv_dtype"], found["repeat"]) == ("int8", "bfloat16", 2)
    assert found["load_seconds"] > 0
    assert found["threads"] >= 1
    rows = [line.split() for line in done.out.splitlines() if line.split()[:1] in (["1"], ["3"])]
    assert len(rows) == 2
    plan = growmoe("bench", dense, *options, "--dry-run", "--json").json
    assert (plan["dry_run"], plan["memory"]["kv_blocks"]) == (True, 3 * 10)


def chat(model: Path, typed: str, *options: object) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "growmoe", "chat", str(model), "--max-tokens=8", *map(str, options)],
        input=typed, capture_output=True, text=True, timeout=200, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_chat_answers_every_line(dense: Path) -> None:
    out, err = chat(dense, "hello\n\n你好\n/reset\nagain\n/quit\nnever\n", "--format", "plain")
    assert json.loads(out.splitlines()[-1])["turns"] == 3
    assert "plain continuation" in err
    long = "far " * 400
    out, err = chat(dense, f"{long}\nhello\n", "--format", "plain")
    assert json.loads(out.splitlines()[-1])["turns"] == 1  # the overlong line spoils no more
    assert "the model's context is 160" in err


def test_chat_forgets_old_turns_where_the_cache_ends(dense: Path) -> None:
    # a cache of four blocks, 64 tokens, in which a long answer keeps half
    kv_gb = 4.5 * block_bytes(tiny_config(vocab_size=320), "float32") / 2**30
    typed = "the river and the sea\n" * 6
    options = ("--format", "template", "--kv-gb", kv_gb, "--max-tokens", 1000)
    out, err = chat(dense, typed, *options, "--weights", "float32", "--json")
    assert (json.loads(out.splitlines()[-1])["turns"], "tokens" in err) == (6, False), err


def test_a_template_that_raises_spoils_one_turn(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(dense, tmp_path / "m")
    template = model / "chat_template.jinja"
    template.write_text("{% if messages[0]['content'] == 'bad' %}{{ 1 + 'a' }}{% endif %}hello")
    out, err = chat(model, "bad\nhello\n", "--format", "template")
    assert json.loads(out.splitlines()[-1])["turns"] == 1
    assert "the chat template of" in err
    template.write_text("{% if %}")
    monkeypatch.setattr("growmoe.inference.llm.load", None)  # nobody gets as far as that
    done = growmoe("chat", model, "--format", "template")
    assert (done.code, "the chat template of" in done.err) == (1, True), done.err


def test_chat_uses_the_template(dense: Path) -> None:
    out, err = chat(dense, "hello\nagain\n", "--format", "template")
    assert "its chat template" in err
    result = json.loads(out.splitlines()[-1])
    assert result["turns"] == 2
    # the second prompt starts with the first one and its answer, whose blocks are still there
    assert result["cached_tokens"] >= 16


def test_evaluate_scores_tasks(dense: Path, corpus: Path, tmp_path: Path) -> None:
    rows = [
        {
            "type": "multiple_choice",
            "question": f"q{i}",
            "choices": ["a", "bb", "ccc"],
            "gold": i % 3,
        }
        for i in range(12)
    ]
    task = tmp_path / "quiz.jsonl"
    task.write_text("\n".join(json.dumps(row) for row in rows))
    done = growmoe("evaluate", dense, "--data", corpus, "--task", task, "--limit", 10)
    assert done.code == 0, done.err
    assert set(done.json["validation"]) == {"english", "chinese"}
    quiz = done.json["tasks"]["quiz"]
    assert quiz["n"] == 10
    assert 0 <= quiz["sum"] <= 1
    assert quiz["sum_stderr"] == pytest.approx((quiz["sum"] * (1 - quiz["sum"]) / 10) ** 0.5)


def test_inspect(dense: Path, corpus: Path) -> None:
    found = growmoe("inspect", dense, "--tensors").json
    assert found["params_total"] == sum(
        p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(dense).parameters()
    )
    assert found["tensors"]["embed.weight"] == [320, 36]
    assert growmoe("inspect", corpus).json["kind"] == "corpus"


def test_doctor() -> None:
    found = growmoe("doctor").json
    assert found["torch"] == torch.__version__
    assert found["extras"]["data"] is True


def test_doctor_knows_that_kernels_were_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROWMOE_NATIVE", "0")
    advice = " ".join(growmoe("doctor").json["advice"])
    assert ("unset GROWMOE_NATIVE" in advice, "g++" in advice) == (True, False)


# ---- a recipe from end to end, and again ----

RECIPE = """\
name: road
output: {out}
stages:
  - stage: prepare
    sources:
      - {{name: english, path: {texts}/english.jsonl}}
      - {{name: chinese, path: {texts}/chinese.jsonl}}
    tokenizer: {{vocab_size: 320}}
    validation_fraction: 0.1
    validation_length: 32
    validation_tokens: 512
  - stage: train
    name: small
    data: corpus
    init: {{hidden_size: 24, num_layers: 2, num_heads: 3, num_kv_heads: 1, ffn_size: 48,
           max_positions: 256}}
    tokens: 12800
    sequence_length: 32
    batch_size: 4
    dtype: float32
    optimizer: {{lr: 1e-2, schedule: constant}}
  - {{stage: grow, name: grown, model: small, data: corpus, hidden: 32, layers: 3, ffn: 72}}
  - stage: train
    name: large
    model: grown
    data: corpus
    tokens: 7680
    sequence_length: 32
    batch_size: 4
    dtype: float32
    optimizer: {{lr: 5e-3, schedule: constant}}
  - {{stage: upcycle, name: sparse, model: large, data: corpus, experts: 4}}
  - stage: train
    name: moe
    model: sparse
    data: corpus
    tokens: 7680
    sequence_length: 32
    batch_size: 4
    dtype: float32
    optimizer: {{lr: 5e-3}}
  - {{stage: verify, name: same, a: large, b: sparse, data: corpus}}
  - {{stage: evaluate, name: scores, model: moe, data: corpus}}
  - {{stage: generate, name: samples, model: moe, prompts: [The river, "<b>这本书"], max_tokens: 8}}
"""


@pytest.fixture(scope="module")
def road(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(recipe, finished run directory) of the whole road on tiny models."""
    folder = tmp_path_factory.mktemp("road")
    recipe = folder / "road.yaml"
    recipe.write_text(RECIPE.format(out=folder / "run", texts=texts), encoding="utf-8")
    done = growmoe("run", recipe)
    assert done.code == 0, done.err
    return recipe, folder / "run"


def test_the_whole_road(road: tuple[Path, Path]) -> None:
    _, run = road
    summary = json.loads((run / "summary.json").read_text())
    wanted = {"stage", "name", "params_total", "params_active", "tokens", "flops", "loss_before",
              "loss_after", "seconds", "output"}  # fmt: skip
    assert all(wanted <= set(row) for row in summary)
    rows = {row["name"]: row for row in summary}
    for name in ("grown", "sparse"):
        assert rows[name]["loss_before"] == pytest.approx(rows[name]["loss_after"], abs=5e-5)
        assert rows[name]["exact"] is True
    chain = ["small", "grown", "large", "sparse", "moe"]
    for earlier, later in zip(chain, chain[1:]):
        assert rows[later]["loss_before"] == pytest.approx(rows[earlier]["loss_after"], abs=5e-5)
    assert rows["small"]["loss_after"] > rows["large"]["loss_after"] > rows["moe"]["loss_after"]
    assert rows["moe"]["params_total"] > rows["moe"]["params_active"]
    assert rows["small"]["flops"] == 3 * rows["small"]["tokens"] * load_model(
        run / "small"
    ).config.flops_per_token(32)


def test_a_finished_recipe_runs_nothing_again(road: tuple[Path, Path]) -> None:
    recipe, run = road
    before = {path: path.stat().st_mtime_ns for path in run.glob("*/stage.json")}
    done = growmoe("run", recipe)
    assert done.code == 0
    assert done.err.count("already done") == len(before) == 9
    assert {path: path.stat().st_mtime_ns for path in run.glob("*/stage.json")} == before
    changed = growmoe("run", recipe, "large.tokens=9999")
    assert (changed.code, "made with other options" in changed.err) == (2, True)


def test_only_what_is_missing_is_made_again(road: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = road
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "scores")
    done = growmoe("run", recipe, f"output={tmp_path / 'run'}")
    assert done.code == 0, done.err
    assert done.err.count("already done") == 8


def test_two_runs_in_one_directory_are_refused(road: tuple[Path, Path]) -> None:
    import fcntl

    recipe, run = road
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = growmoe("run", recipe)
    assert (done.code, "another growmoe is running" in done.err) == (2, True)


def test_the_report(road: tuple[Path, Path]) -> None:
    _, run = road
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;这本书" in page  # samples are text, never markup
    assert "<script" not in page
    assert not re.search(r"""(src|href)=["']?https?:""", page)
    for words in ("Loss against compute", "Expert load", "Lineage", "Transitions", "Stages",
                  "Routing", "Do the experts diverge?", "Layer by layer"):  # fmt: skip
        assert words in page


def test_the_report_in_a_browser(road: tuple[Path, Path], tmp_path: Path) -> None:
    """No request leaves the page, nothing is wider than a phone, the right figures show."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    _, run = road
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        for width, shown in ((1280, "wide"), (390, "narrow")):
            page = browser.new_page(viewport={"width": width, "height": 900})
            requests, problems = [], []
            page.on("request", lambda request, seen=requests: seen.append(request.url))
            page.on("console", lambda message, seen=problems: seen.append(message.text))
            page.goto((run / "report.html").as_uri())
            assert len(requests) == 1
            assert not problems
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            figures = page.locator(f"figure .{shown} svg")
            assert figures.count() == 7  # two of losses, five of routing
            assert all(figures.nth(i).is_visible() for i in range(7))
            hidden = {"wide": "narrow", "narrow": "wide"}[shown]
            assert not page.locator(f"figure .{hidden} svg").first.is_visible()
            assert page.locator("table").first.locator("tr").count() == 10
        browser.close()


# ---- a disk that is full ----


def limited(size: int):
    def apply() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return apply


@pytest.mark.parametrize("kind", ["upcycle", "prepare", "train"])
def test_a_file_size_limit(
    kind: str, dense: Path, corpus: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = {
        "upcycle": ["upcycle", dense, out],
        "prepare": ["prepare", texts, "--out", out, "--vocab", 300],
        "train": ["train", out, "--data", corpus, "--model", dense, "--tokens", 2000,
                  "--set", "sequence_length=32"],
    }[kind]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "growmoe", *map(str, arguments)], capture_output=True, text=True,
        preexec_fn=limited(20_000), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("growmoe: ")
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["upcycle", "prepare"])
def test_a_full_disk(kind: str, dense: Path, texts: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        arguments = {
            "upcycle": ["upcycle", dense, disk / "out"],
            "prepare": ["prepare", texts, "--out", disk / "out", "--vocab", 300],
        }[kind]
        done = fresh_growmoe(*arguments)
        assert done.code == 1, done.err
        assert "Traceback" not in done.err
        last = done.err.splitlines()[-1]
        assert "full" in last or "free on the disk" in last, last
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_read_only_place(dense: Path) -> None:
    done = growmoe("upcycle", dense, "/proc/growmoe-out")
    assert done.code == 1
    assert "cannot write in /proc" in done.err


def test_leftovers_of_a_killed_run_do_not_block(dense: Path, tmp_path: Path) -> None:
    """In a container every run may have the same process number."""
    from growmoe.files import staged_directory

    (tmp_path / f".out.{os.getpid()}.tmp").mkdir()
    (tmp_path / ".out.999999999.tmp").mkdir()
    with staged_directory(tmp_path / "out") as staged:
        (staged / "x").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_template_with_special_tokens(dense: Path, tmp_path: Path) -> None:
    model = shutil.copytree(dense, tmp_path / "m")
    (model / "chat_template.jinja").write_text("{{ eos_token }}{{ messages[0]['content'] }}")
    out, _ = chat(model, "hello\n", "--format", "template")
    assert json.loads(out.splitlines()[-1])["turns"] == 1


def test_a_lossy_step_is_remembered_through_exact_ones(dense: Path, tmp_path: Path) -> None:
    lossy, moe = tmp_path / "lossy", tmp_path / "moe"
    assert growmoe("grow", dense, lossy, "--layers", 4, "--depth", "stack").code == 0
    assert growmoe("upcycle", lossy, moe, "--experts", 2).code == 0
    done = growmoe("verify", dense, moe)
    assert (done.code, done.json["exact"], done.json["declared_exact"]) == (0, False, False)
    assert growmoe("verify", lossy, moe).json["exact"] is True
    assert "# upcycle\n" in (moe / "README.md").read_text()


def test_a_model_without_a_tokenizer_is_checked_on_random_tokens(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "m")
    (model / "generation_config.json").write_text('{"eos_token_id": 3}')  # save_pretrained's
    done = growmoe("upcycle", model, tmp_path / "out", "--experts", 2)
    assert done.code == 0, done.err
    assert "random tokens" in done.json["check"]["text"]
    assert (tmp_path / "out" / "generation_config.json").exists()
