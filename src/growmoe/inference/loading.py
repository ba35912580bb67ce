"""From a path to a model that can run, its tokenizer and the tokens that end a text."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer

from growmoe.data.tokenizer import load_tokenizer
from growmoe.errors import UsageError
from growmoe.files import read_json
from growmoe.models.checkpoint import build_model, open_source
from growmoe.models.gguf import export_tokenizer
from growmoe.models.transformer import Transformer

Form = Literal["float32", "bfloat16"]
"""How weights lie in memory."""


@dataclass(frozen=True)
class Loaded:
    """A model, ready to run. `kv_dtype` is what keys and values are kept in by default."""

    name: str
    model: Transformer
    tokenizer: Tokenizer | None
    ends: frozenset[int]
    kv_dtype: torch.dtype


def load(path: Path, form: Form) -> Loaded:
    """Read a MODEL directory or .gguf file with its weights in `form`.

    A directory without tokenizer.json gives a model for token ids only.
    """
    if form not in get_args(Form):
        raise UsageError(f"form '{form}' is not one of {', '.join(get_args(Form))}")
    model = build_model(open_source(path), form)
    tokenizer = _tokenizer(path)
    kv_dtype = torch.float32 if form == "float32" else torch.bfloat16
    return Loaded(
        str(path), model, tokenizer, _ends(path, model.config.token_ids, tokenizer), kv_dtype
    )


def _tokenizer(path: Path) -> Tokenizer | None:
    if path.suffix == ".gguf":
        with tempfile.TemporaryDirectory() as folder:
            export_tokenizer(path, Path(folder))
            return load_tokenizer(Path(folder))
    return load_tokenizer(path) if (path / "tokenizer.json").exists() else None


def _ends(path: Path, token_ids: Any, tokenizer: Tokenizer | None) -> frozenset[int]:
    """What config and generation_config.json call the end, and the usual names for it."""
    ids: set[int] = set()
    extra = path / "generation_config.json"
    for found in (token_ids, read_json(extra) if extra.exists() else {}):
        eos = found.get("eos_token_id")
        ids |= set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    for name in ("<|im_end|>", "<|endoftext|>"):
        token = tokenizer.token_to_id(name) if tokenizer is not None else None
        if token is not None:
            ids.add(token)
    return frozenset(ids)
