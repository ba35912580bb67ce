"""Weights that pass through mapped pages: as read, checked as well, and gone afterwards."""

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import InMemory, tiny_model, write_tiny
from growmoe.errors import GrowmoeError
from growmoe.inference.packing import build_packed
from growmoe.inference.prepacked import build_prepacked
from growmoe.models import safetensors_io
from growmoe.models.checkpoint import Source, open_source, save_model, write_model
from growmoe.models.config import MoEConfig, tensor_shapes
from growmoe.models.safetensors_io import TensorFile, is_finite
from growmoe.models.transformer import Transformer
from growmoe.ops import native
from growmoe.ops.native import FORMS, Form


@pytest.fixture(autouse=True)
def _small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_io, "_WORTH_MAPPING", 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_mapped_weights_are_those_that_reading_gives(tmp_path: Path, dtype: str) -> None:
    save_model(tmp_path, tiny_model(), dtype)
    plain, mapped = open_source(tmp_path), open_source(tmp_path, mapped=True)
    for name in tensor_shapes(plain.config):
        assert torch.equal(mapped.load(name), plain.load(name))
    assert plain.file_bytes() == (tmp_path / "model.safetensors").stat().st_size


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("build", [build_packed, build_prepacked])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
def test_nothing_of_the_files_stays_mapped_in_a_model(
    tmp_path: Path, form: Form, build: Callable[[Source, Form], Transformer], stored: str
) -> None:
    if build is build_packed and not native.available():
        pytest.skip("the native kernels are missing")
    moe = MoEConfig(experts=(0, 4, 4), top_k=2, ffn_size=20, mix="softmax2", fixed_ffn_size=30)
    model = InMemory(tiny_model(moe=moe, mlp_bias=True, hidden_size=64))
    quantized = "int8" if stored == "int8" else None
    dtype = "bfloat16" if quantized else stored
    write_model(tmp_path, model.config, model.load, dtype, form=quantized)
    shard = str((tmp_path / "model.safetensors").resolve())
    source = open_source(tmp_path, mapped=True)
    passing = source.load("embed.weight")
    assert shard in Path("/proc/self/maps").read_text()
    del passing
    built = build(source, form)
    gc.collect()
    assert shard not in Path("/proc/self/maps").read_text()
    assert built(torch.tensor([[5]])).logits.isfinite().all()


def test_writing_into_a_mapped_tensor_leaves_the_file(tmp_path: Path) -> None:
    source = open_source(write_tiny(tmp_path / "m"), mapped=True)
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    source.load("embed.weight").zero_()
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_cut_short_after_it_was_opened_is_one_sentence(tmp_path: Path, mapped: bool) -> None:
    write_tiny(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    file = TensorFile(path, mapped)
    last = max(file.names(), key=lambda name: file._entries[name]["data_offsets"][1])
    with open(path, "r+b") as stream:
        stream.truncate(path.stat().st_size - 4)
    with pytest.raises(GrowmoeError, match="model.safetensors is not a whole safetensors file"):
        file.read(last)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named(tmp_path: Path, mapped: bool, value: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.head.weight[96, 35] = value
    save_model(tmp_path, model, "bfloat16")
    file = TensorFile(tmp_path / "model.safetensors", mapped)
    with pytest.raises(GrowmoeError, match="lm_head.weight holds NaN or infinite"):
        file.read("lm_head.weight")


def test_elements_at_odd_places_and_empty_tensors_are_read(tmp_path: Path) -> None:
    """Others write headers of any length."""
    data = torch.arange(6, dtype=torch.float32)
    header = {
        "none": {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]},
        "some": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4 + 1)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data.numpy().tobytes())
    file = TensorFile(path, mapped=True)
    assert torch.equal(file.read("some"), data.view(2, 3))
    assert file.read("none").shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_finite_is_told_from_the_extremes(dtype: torch.dtype) -> None:
    whole = torch.full((5, 7), torch.finfo(dtype).max, dtype=dtype)
    whole[0] = torch.finfo(dtype).min
    assert is_finite(whole)
    for value in (float("nan"), float("inf"), -float("inf")):
        broken = whole.clone()
        broken[3, 4] = value
        assert not is_finite(broken)
    assert is_finite(torch.empty(0, dtype=dtype))
