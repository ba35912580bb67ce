"""The engine on tiny models in float64: what is asked for alone is what comes in any company."""

from typing import Any

import pytest
import torch

from conftest import tiny_model
from growmoe.inference.blocks import BLOCK
from growmoe.inference.llm import LLM
from growmoe.inference.loading import Loaded
from growmoe.inference.requests import Sampling
from growmoe.models.attention import Cache
from growmoe.models.config import MoEConfig
from growmoe.models.transformer import Transformer

FIXED: dict[str, Any] = {"ffn_size": 12, "fixed_ffn_size": 20}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "window": {"sliding_window": 21, "qkv_bias": True, "qk_norm": True},
    "learned": {
        "positions": "learned", "norm": "layer", "activation": "gelu", "mlp_bias": True,
        "qkv_bias": True, "o_bias": True,
    },
    "moe": {"moe": MoEConfig(experts=(4, 4, 4), top_k=2, ffn_size=12)},
    "pyramid-sum": {"moe": MoEConfig(experts=(0, 2, 4), top_k=1, mix="sum", **FIXED)},
    "softmax2": {"moe": MoEConfig(experts=(2, 0, 4), top_k=2, mix="softmax2", **FIXED)},
    "shared": {
        "moe": MoEConfig(
            experts=(4, 4, 8), top_k=2, mix="sigmoid_gate", scoring="sigmoid", groups=2, **FIXED
        ),
        "tied_head": True,
    },
}  # fmt: skip


def float64(seed: int = 0, **changes: Any) -> Transformer:
    return tiny_model(seed, **changes).double()


def llm(model: Transformer, blocks: int = 64, tokenizer: Any = None, **options: Any) -> LLM:
    """An LLM around a model in memory, with that many blocks."""
    config = model.config
    dtype = next(model.parameters()).dtype
    block = 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize * BLOCK
    loaded = Loaded("tiny", model, tokenizer, frozenset(), dtype)
    return LLM(loaded, kv_gb=blocks * block / 2**30, **options)


def plain(model: Transformer, prompt: list[int], count: int) -> list[tuple[int, float]]:
    """Greedy continuation with the model's own cache: tokens and their log-probabilities."""
    cache, new, found = Cache(), prompt, []
    with torch.no_grad():
        for _ in range(count):
            logs = model(torch.tensor([new]), cache).logits[0, -1].log_softmax(-1)
            new = [int(logs.argmax())]
            found.append((new[0], float(logs[new[0]])))
    return found


def prompts(seed: int, *lengths: int) -> list[list[int]]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 97, (length,), generator=rng).tolist() for length in lengths]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_in_chunks_is_what_the_model_says(kind: str) -> None:
    """Prompts of 1 to 70 tokens together, chunks of at most 23 tokens, some of them preempted."""
    model = float64(**KINDS[kind])
    asked = prompts(1, 1, 15, 16, 17, 70, 33)
    engine = llm(model, blocks=8, max_sequences=5, step_tokens=23)
    answers = engine.generate(asked, Sampling(max_tokens=20, temperature=0, logprobs=0))
    for prompt, answer in zip(asked, answers):
        tokens, logs = zip(*plain(model, prompt, 20))
        assert answer.token_ids == list(tokens)
        assert [found.logprob for found in answer.logprobs] == pytest.approx(logs, abs=1e-4)
        assert (answer.finish_reason, answer.error) == ("length", None)
    assert engine.engine.stats().preemptions > 0
    assert engine.engine.stats().blocks_used == 0
