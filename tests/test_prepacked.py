"""Weights for inference without the native kernels."""

import pytest
import torch

from conftest import InMemory, tiny_model
from growmoe.errors import UsageError
from growmoe.inference.prepacked import build_prepacked, prepacking
from growmoe.inference.weights import build_for_inference
from growmoe.models.checkpoint import build_model
from growmoe.ops.native import Form
from growmoe.ops.quantized import dequantize, quantize
from test_native import MODELS

IDS = (torch.arange(60) * 31 % 97)[None]
LIMITS = {"float32": 1e-5, "bfloat16": 0.08, "int8": 0.08, "int4": 0.6}


@pytest.mark.parametrize("form", LIMITS)
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model(name: str, form: Form) -> None:
    source = InMemory(tiny_model(3, **MODELS[name]))
    with torch.inference_mode():
        expected = build_model(source)(IDS).logits
        found = build_prepacked(source, form)(IDS).logits.float()
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    flips = "moe" in MODELS[name] and form != "float32"  # of experts that are close
    assert error < LIMITS[form] + 0.4 * flips, float(error)


def test_integers_are_what_quantising_gives() -> None:
    source = InMemory(tiny_model(3))
    layer = build_prepacked(source, "int8").layers[0].attn.q
    w = source.load("layers.0.attn.q.weight")
    x = torch.randn(2, w.shape[1]).bfloat16()
    expected = x @ dequantize(quantize(w, 8)).bfloat16().t()
    assert torch.equal(layer(x), expected)


def test_without_onednn_the_weight_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("growmoe.inference.prepacked.prepacking", lambda: False)
    source = InMemory(tiny_model(3))
    with torch.inference_mode():
        model = build_prepacked(source, "bfloat16")
        assert model.layers[0].attn.q.reordered is None
        assert torch.allclose(
            model(IDS).logits, build_model(source, "bfloat16")(IDS).logits, atol=0.5
        )


def test_onednn_is_there() -> None:
    """On the processors of the tests it is; where it goes away, that should be seen."""
    assert prepacking()


def test_forms_that_there_are_not() -> None:
    source = InMemory(tiny_model(3))
    with pytest.raises(UsageError, match="none of float32"):
        build_for_inference(source, "float16")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="CPUs only"):
        build_for_inference(source, "int4", "cuda")
