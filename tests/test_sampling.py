"""Choosing tokens and turning them into text."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from torch import Tensor

from growmoe.data.tokenizer import load_tokenizer
from growmoe.errors import UsageError
from growmoe.inference.detokenize import MOST_HELD, Detokenizer, TextStream
from growmoe.inference.requests import Sampling
from growmoe.inference.sampling import _candidates, choose, logprobs_of, peaks


def row(V: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * spread


def allowed(logits_V: Tensor, sampling: Sampling) -> dict[int, float]:
    """Probabilities by the definition, with a full sort: top-k, then top-p, then min-p."""
    probs = (logits_V.double() / sampling.temperature).softmax(-1)
    ranked = sorted(range(len(probs)), key=lambda i: -float(probs[i]))
    if sampling.top_k:
        ranked = ranked[: sampling.top_k]
    total, kept, mass = sum(float(probs[i]) for i in ranked), [], 0.0
    for i in ranked:
        if sampling.top_p == 1 or mass < sampling.top_p * total:
            kept.append(i)
        mass += float(probs[i])
    kept = [i for i in kept if probs[i] >= sampling.min_p * probs[ranked[0]]]
    total = sum(float(probs[i]) for i in kept)
    return {i: float(probs[i]) / total for i in kept}


SETTINGS = [
    Sampling(temperature=0.7, top_p=1.0),
    Sampling(temperature=1.0, top_p=0.9),
    Sampling(temperature=40.0, top_p=0.97),  # nearly flat: top-p needs more than its first guess
    Sampling(temperature=4.0, top_p=0.6),
    Sampling(temperature=1.0, top_p=1.0, top_k=7),
    Sampling(temperature=1.0, top_p=1.0, top_k=10**6),
    Sampling(temperature=2.0, top_p=0.8, top_k=50),
    Sampling(temperature=1.5, top_p=1.0, min_p=0.05),
    Sampling(temperature=1.5, top_p=0.95, top_k=40, min_p=0.1),
    Sampling(temperature=1e-4, top_p=0.5),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=range(len(SETTINGS)))
@pytest.mark.parametrize("V", [5, 3000])
def test_candidates_are_those_of_the_definition(sampling: Sampling, V: int) -> None:
    logits_V = row(V)
    scores, ids = _candidates((logits_V - logits_V.max()) / sampling.temperature, sampling)
    ids = torch.arange(V) if ids is None else ids
    probs = scores.double().softmax(-1)
    found = {int(i): float(p) for i, p in zip(ids, probs) if p > 0}
    right = {i: p for i, p in allowed(logits_V, sampling).items() if p > 1e-300}
    assert set(right) <= set(found)
    assert all(found[i] < 1e-30 for i in set(found) - set(right))
    assert found == pytest.approx({**dict.fromkeys(found, 0.0), **right}, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("sampling", SETTINGS[:9], ids=range(9))
def test_frequencies_are_the_probabilities(sampling: Sampling) -> None:
    logits_V, rng, draws = row(8, 1, 1.0), torch.Generator().manual_seed(3), 4000
    counts = torch.zeros(8)
    for _ in range(draws):
        counts[choose(logits_V, sampling, rng)] += 1
    for token, probability in allowed(logits_V, sampling).items():
        deviation = (probability * (1 - probability) / draws) ** 0.5
        assert abs(float(counts[token]) / draws - probability) <= 4 * deviation + 1e-9
    assert counts.sum() == counts[list(allowed(logits_V, sampling))].sum()


def test_equal_scores_are_a_set_of_the_right_size() -> None:
    """Twelve tokens in three groups of equal logits; the first ids of a group come first."""
    logits_V = torch.tensor([0.0, 1.0, 2.0] * 4).repeat(20)  # more than the first guess
    sampling = Sampling(temperature=1.0, top_p=0.8)
    _, ids = _candidates(logits_V - 2.0, sampling)
    total = float(logits_V.exp().sum())
    twos = 80 * float(torch.tensor(2.0).exp())
    ones = -(-(0.8 * total - twos) // float(torch.tensor(1.0).exp()))
    right = [i for i in range(240) if i % 3 == 2]
    right += [i for i in range(240) if i % 3 == 1][: int(ones)]
    assert ids.tolist() == sorted(right)


def test_peaks_find_what_is_not_finite() -> None:
    rows = torch.stack([row(50), row(50, 1), row(50, 2), torch.full((50,), -torch.inf)])
    rows[1, 7], rows[2, 9] = torch.nan, torch.inf
    best, tokens = peaks(rows)
    assert (tokens[0], tokens[2]) == (int(rows[0].argmax()), 9)
    assert best[0] == float(rows[0].max())
    assert [math.isfinite(value) for value in best] == [True, False, False, False]


def test_one_draw_per_token() -> None:
    """So the place in the random stream does not depend on the logits."""
    rng, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for sampling in SETTINGS:
        choose(row(500), sampling, rng)
        torch.rand((), generator=other, dtype=torch.float64)
    assert rng.get_state().equal(other.get_state())


def test_greedy_penalty_and_infinity() -> None:
    logits_V = torch.tensor([1.0, 2.0, -1.0, 1.9])
    greedy = Sampling(temperature=0, repetition_penalty=2.0)
    assert choose(logits_V, Sampling(temperature=0), None) == 1
    seen_V = torch.tensor([False, True, False, False])
    assert choose(logits_V, greedy, None, seen_V) == 3  # 2.0 / 2
    negative = torch.tensor([-3.0, -2.0, -4.5, -5.0])
    assert choose(negative, greedy, None, seen_V) == 0  # -2.0 * 2
    barred = torch.tensor([-torch.inf, 0.5, -torch.inf, -torch.inf])
    for sampling in SETTINGS:
        assert choose(barred, sampling, torch.Generator()) == 1


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits_V = row(300)
    logs = logits_V.double().log_softmax(-1)
    found = logprobs_of(logits_V, 17, 5)
    assert (found.token, found.logprob) == (17, pytest.approx(float(logs[17]), abs=1e-5))
    assert [i for i, _ in found.top] == logs.topk(5).indices.tolist()
    assert [p for _, p in found.top] == pytest.approx(logs.topk(5).values.tolist(), abs=1e-5)
    assert logprobs_of(row(3), 1, 20).top[2:] != []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number, not 1.5"),
        ({"n": 0}, "n must be at least 1, not 0"),
        ({"n": True}, "n must be a whole number, not True"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"seed": 2**63}, "seed must be below"),
        ({"top_k": -1}, "top_k must be at least 0, not -1"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, not 0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, not 1.1"),
        ({"min_p": -0.1}, "min_p must be between 0 and 1, not -0.1"),
        ({"temperature": -1}, "temperature must not be negative, but is -1"),
        ({"temperature": float("nan")}, "temperature must be finite, not nan"),
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"repetition_penalty": 1e-39}, "repetition_penalty must be between 0.01 and 100, not 1e-"),
        ({"repetition_penalty": 101}, "repetition_penalty must be between 0.01 and 100, not 101"),
        ({"logprobs": -1}, "logprobs must be at least 0, not -1"),
        ({"logprobs": 101}, "logprobs must be at most 100, not 101"),
        ({"stop": "end"}, "stop must be a tuple of strings, not 'end'"),
        ({"stop": ("a", "")}, "a stop string is empty"),
        ({"stop_token_ids": [1]}, "stop_token_ids must be a tuple, not"),
        ({"stop_token_ids": (-1,)}, "a stop token id must be at least 0, not -1"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Sampling(**wrong)


# ---- text ----

TEXT = "Naïve café: 中文 and 🌱🌿, «quotes» 这本书很好 👩‍👩‍👧 end.\n\ttabs  and  spaces "


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Tokenizer:
    """A byte-level BPE so small that most characters outside ASCII are split."""
    return load_tokenizer(corpus)


def pieces_of(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream, pieces = TextStream(tokenizer, stop), []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


def test_pieces_add_up_and_never_hold_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces.count("") > 5  # some characters are several tokens
    assert pieces[-1] == ""  # nothing certain was held back


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 319), max_size=40))
def test_pieces_of_any_tokens_add_up(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_tokenizer_with_spaces_at_the_front_of_words() -> None:
    """Its decoder drops the space of the first word, so words cannot be decoded one by one."""
    words = ["\u2581The", "\u2581river", "s", "\u2581", "\u2581end", "<0xE4>", "<0xB8>", "<0xAD>"]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )  # fmt: skip
    ids = [0, 1, 2, 5, 6, 7, 3, 4, 0]
    assert tokenizer.decode(ids) == "The rivers中  end The"
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == "The rivers中  end The"
    assert pieces[:6] == ["The", " river", "s", "", "", "中"]


def test_the_work_per_token_does_not_grow(tokenizer: Tokenizer) -> None:
    sizes: list[int] = []

    class Counting:
        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            sizes.append(len(tokens))
            return str(tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    detokenizer = Detokenizer(Counting())
    for token in tokenizer.encode(TEXT * 20, add_special_tokens=False).ids:
        detokenizer.push(token)
    assert max(sizes) < 20
    broken = tokenizer.encode("中", add_special_tokens=False).ids[:1]
    for token in broken * 500:  # never becomes a character
        detokenizer.push(token)
    assert max(sizes) <= 2 * MOST_HELD + 20
    for _ in range(500):  # tokens without text
        detokenizer.push(tokenizer.token_to_id("<|endoftext|>"))
    assert max(sizes) <= 2 * MOST_HELD + 20


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("quotes",), TEXT[: TEXT.index("quotes")]),
        (("end.", "中文"), TEXT[: TEXT.index("中文")]),
        (("never", "spaces x"), TEXT),
        (("🌿",), TEXT[: TEXT.index("🌿")]),
        (("spaces ",), TEXT[: TEXT.index("spaces ")]),
        (("  and  s", "  a"), TEXT[: TEXT.index("  a")]),
        (("tabs  and", "s  "), TEXT[: TEXT.index("s  ")]),
    ],
    ids=["word", "first", "never", "half", "last", "both", "sooner"],
)
def test_text_ends_before_the_stop_string(
    tokenizer: Tokenizer, stop: tuple[str, ...], text: str
) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    pieces = pieces_of(tokenizer, ids, stop)
    assert "".join(pieces) == text
    # what was shown was never more than what stayed
    shown = ""
    for piece in pieces:
        shown += piece
        assert text.startswith(shown)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab ", max_size=30),
    stop=st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_over_any_cut(tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    ids = [tokenizer.encode(letter, add_special_tokens=False).ids[0] for letter in text]
    text = tokenizer.decode(ids)
    ends = [(text.find(one) + len(one), text.find(one)) for one in stop if one in text]
    right = text[: min(ends)[1]] if ends else text
    assert "".join(pieces_of(tokenizer, ids, tuple(stop))) == right


def test_options_can_be_compared_and_changed() -> None:
    assert dataclasses.replace(Sampling(), n=2) == Sampling(n=2)
