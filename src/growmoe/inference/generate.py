"""Greedy or sampled continuation of one prompt, token by token, with a KV cache."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from growmoe.errors import UsageError
from growmoe.models.attention import Cache
from growmoe.models.transformer import Transformer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest."""

    max_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0


def choose(logits_V: Tensor, sampling: Sampling, rng: torch.Generator) -> int:
    """One token id. Top-p keeps the smallest set of tokens whose probability reaches `top_p`."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probs_V = (logits_V.float() / sampling.temperature).softmax(-1)
    sorted_V, order_V = probs_V.sort(descending=True, stable=True)
    before_V = sorted_V.cumsum(-1) - sorted_V
    sorted_V = torch.where(before_V < sampling.top_p, sorted_V, 0.0)
    return int(order_V[torch.multinomial(sorted_V, 1, generator=rng)])


@torch.no_grad()
def generate_tokens(
    model: Transformer, prompt: list[int], sampling: Sampling, stop: frozenset[int]
) -> Iterator[int]:
    """Token ids after `prompt`, until a stop token, `max_tokens` or the end of the context.

    Raises UsageError when the prompt is empty, holds an unknown id or fills the context.
    """
    config = model.config
    if not prompt:
        raise UsageError("the prompt is empty")
    if bad := [token for token in prompt if not 0 <= token < config.vocab_size]:
        raise UsageError(
            f"token {bad[0]} is outside the model's vocabulary of {config.vocab_size}; "
            "the tokenizer does not fit the model"
        )
    if len(prompt) >= config.max_positions:
        raise UsageError(
            f"the prompt has {len(prompt)} tokens; the model's context is {config.max_positions}"
        )
    rng = torch.Generator().manual_seed(sampling.seed)
    cache = Cache()
    new = torch.tensor([prompt])
    room = min(sampling.max_tokens, config.max_positions - len(prompt))
    for _ in range(room):
        logits = model(new, cache).logits[0, -1]
        token = choose(logits, sampling, rng)
        if token in stop:
            return
        yield token
        new = torch.tensor([[token]])


def stream_text(
    model: Transformer, tokenizer: Tokenizer, prompt: str, sampling: Sampling, stop: frozenset[int]
) -> Iterator[str]:
    """Pieces of text as they become certain; a character split over tokens is held back."""
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    tokens: list[int] = []
    shown = ""
    for token in generate_tokens(model, ids, sampling, stop):
        tokens.append(token)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if text.startswith(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(tokens, skip_special_tokens=True)[len(shown) :]
    if rest:
        yield rest
