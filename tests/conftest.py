"""Fixtures: tiny random models, a tiny corpus, and the command line in a subprocess."""

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

# One BLAS thread per test worker; two workers share two cores.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from growmoe.cli import main
from growmoe.models.checkpoint import copy_tokenizer, parameter_views, save_model
from growmoe.models.config import ModelConfig
from growmoe.models.transformer import Transformer

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


@dataclass
class Finished:
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The JSON document in the last line of stdout."""
        return json.loads(self.out.splitlines()[-1])


def growmoe(*arguments: object, env: dict[str, str] | None = None) -> Finished:
    """Run the command line; in this process, which is seconds faster, unless `env` is given."""
    if env is not None:
        return fresh_growmoe(*arguments, env=env)
    out, err = io.StringIO(), io.StringIO()
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    finally:
        os.chdir(before)
    return Finished(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


def fresh_growmoe(
    *arguments: object, timeout: float = 240, env: dict[str, str] | None = None
) -> Finished:
    """Run the command line in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "growmoe", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        cwd=ROOT,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def tiny_config(**changes: Any) -> ModelConfig:
    """A model of a few thousand parameters, with odd sizes."""
    base: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 36, "num_layers": 3, "num_heads": 9, "num_kv_heads": 3,
        "head_dim": 4, "ffn_size": 50, "max_positions": 160, "family": "llama",
    }  # fmt: skip
    return ModelConfig(**{**base, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> Transformer:
    """A random model whose weights are large enough for every mistake to show in the logits."""
    model = Transformer(tiny_config(**changes))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25, generator=rng)
            else:
                parameter.uniform_(0.5, 1.5, generator=rng)
    return model.eval()


class InMemory:
    """A model in memory as a Source."""

    dtype = "float32"

    def __init__(self, model: Transformer) -> None:
        self.config = model.config
        self.views = dict(parameter_views(model))

    def load(self, name: str) -> torch.Tensor:
        return self.views[name]


def write_tiny(out: Path, tokenizer_from: Path | None = None, **changes: Any) -> Path:
    """A tiny random model as a MODEL directory."""
    out.mkdir(parents=True)
    save_model(out, tiny_model(**changes), "float32")
    if tokenizer_from is not None:
        copy_tokenizer(tokenizer_from, out)
    return out


ENGLISH = (
    "The river carries {0} boats past the old mill, and number {0} is always late.",
    "When the {0}th bell rings, the children of the valley run home for soup.",
    "A careful reader keeps {0} notes about every chapter and loses half of them.",
)
CHINESE = (
    "第{0}号房间很干净，服务员态度也不错，下次还会再来。",
    "这本书一共有{0}页，读起来很轻松，适合周末的下午。",
    "手机用了{0}天，电池很好，就是声音有点小。",
)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small English and a small Chinese jsonl file."""
    folder = tmp_path_factory.mktemp("texts")
    for name, sentences in (("english", ENGLISH), ("chinese", CHINESE)):
        lines = [
            json.dumps({"text": " ".join(s.format(i) for s in sentences)}, ensure_ascii=False)
            for i in range(150)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of two sources with a vocabulary of 320."""
    out = tmp_path_factory.mktemp("corpora") / "corpus"
    done = growmoe(
        "prepare", f"english={texts / 'english.jsonl'}", f"chinese={texts / 'chinese.jsonl'}",
        "--out", out, "--vocab", 320, "--set", "validation_fraction=0.1",
        "--set", "validation_length=32", "--set", "validation_tokens=512",
    )  # fmt: skip
    assert done.code == 0, done.err
    return out
