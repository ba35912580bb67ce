"""From a path to a model that can run, its tokenizer and the tokens that end a text."""

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from growmoe.data.tokenizer import load_tokenizer
from growmoe.errors import UsageError
from growmoe.files import read_json
from growmoe.inference.offloaded import Offload
from growmoe.inference.weights import build_for_inference
from growmoe.memory import free_memory
from growmoe.models.checkpoint import open_source
from growmoe.models.footprint import Footprint, Wanted, admit, check_device
from growmoe.models.gguf import export_tokenizer
from growmoe.models.stored import serving_form
from growmoe.models.transformer import Transformer
from growmoe.ops import native
from growmoe.ops.native import FORMS, Form


@dataclass(frozen=True)
class LoadReport:
    """How long the weights took, and what they were read from."""

    seconds: float
    bytes_read: int

    def report(self) -> dict[str, float]:
        """For a JSON line."""
        speed = self.bytes_read / self.seconds / 1e9 if self.seconds else 0.0
        return {
            "load_seconds": round(self.seconds, 3), "load_bytes": self.bytes_read,
            "load_gb_per_s": round(speed, 3),
        }  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A model, ready to run. `kv_dtype` is what keys and values are kept in by default; the
    footprint, the report and the form say what `load` admitted and did."""

    name: str
    model: Transformer
    tokenizer: Tokenizer | None
    ends: frozenset[int]
    kv_dtype: torch.dtype
    experts: Offload | None = None
    """Where the routed experts lie, if not in the model."""
    footprint: Footprint | None = None
    report: LoadReport | None = None
    form: Form | None = None


def load(
    path: Path, form: Form | None, wanted: Wanted | None = None, device: str = "cpu"
) -> Loaded:
    """Read a MODEL directory or .gguf file with its weights in `form` on `device`.

    A directory without tokenizer.json gives a model for token ids only. Raises UsageError before a
    weight is read when serving it as `wanted` does not fit into the memory that is free, and
    GrowmoeError when experts that are to lie on disk do not fit there.
    """
    form = serving_form(path, form)
    if form not in FORMS:
        raise UsageError(f"weights '{form}' are none of {', '.join(FORMS)}")
    source = open_source(path, mapped=True)
    kv_dtype = default_kv_dtype(form)
    wanted = dataclasses.replace(
        wanted or Wanted(kv_dtype=kv_name(kv_dtype)), form=form, native=native.available()
    )
    check_device(device, form, wanted.expert_memory is not None)
    found = admit(source.config, wanted, free_on(device), str(path))
    tokenizer = _tokenizer(path)
    ends = _ends(path, source.config.token_ids, tokenizer)
    started = time.perf_counter()
    experts = None
    if wanted.expert_memory is not None:
        experts = Offload(source.config, form, wanted.expert_memory)
    try:
        model = build_for_inference(source, form, device, experts)
    except BaseException:
        if experts is not None:
            experts.store.close()
        raise
    report = LoadReport(time.perf_counter() - started, source.file_bytes())
    return Loaded(str(path), model, tokenizer, ends, kv_dtype, experts, found, report, form)


def free_on(device: str) -> int:
    """Bytes that are free where the model will be."""
    return free_memory() if device == "cpu" else torch.cuda.mem_get_info()[0]


def default_kv_dtype(form: Form | None) -> torch.dtype:
    """What keys and values are kept in when nobody says."""
    return torch.float32 if form == "float32" else torch.bfloat16


def kv_name(dtype: torch.dtype) -> str:
    """A dtype as `models.config` spells it."""
    return str(dtype).removeprefix("torch.")


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
