"""From logits to a token: each row by itself, so that a batch changes nothing.

Letters: V vocabulary, S rows.
"""

import math

import torch
from torch import Tensor

from growmoe.inference.requests import Logprobs, Sampling

FIRST_GUESS = 64
"""Likeliest tokens that top-p looks at before it looks at more."""


def peaks(logits_SV: Tensor) -> tuple[list[float], list[int]]:
    """(largest logit, its token) of every row: one copy, wherever the logits are."""
    best_S, token_S = logits_SV.max(-1)
    best, tokens = torch.stack((best_S.double(), token_S.double())).tolist()
    return best, [int(token) for token in tokens]


def choose(
    logits_V: Tensor, sampling: Sampling, rng: torch.Generator | None, seen_V: Tensor | None = None
) -> int:
    """One token id. `seen_V` marks the tokens that the repetition penalty is for; `rng` gives one
    number per call, unless the choice is greedy."""
    if seen_V is not None:
        p = sampling.repetition_penalty
        lowered_V = torch.where(logits_V > 0, logits_V / p, logits_V * p)
        logits_V = torch.where(seen_V, lowered_V, logits_V)
    if sampling.greedy:
        return int(logits_V.argmax())
    scores, ids = _candidates((logits_V - logits_V.max()) / sampling.temperature, sampling)
    reached = scores.double().exp().cumsum(0)
    draw = torch.rand((), generator=rng, dtype=torch.float64) * reached[-1]
    place = min(int(torch.searchsorted(reached, draw, right=True)), len(reached) - 1)
    return place if ids is None else int(ids[place])


def _candidates(scores_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """(scores, token ids) of the tokens that may be drawn; ids None: all, in order of ids. Scores
    are logits over temperature, the largest 0."""
    V = len(scores_V)
    ids = None
    if 0 < sampling.top_k < V:
        scores_V, ids = scores_V.topk(sampling.top_k)
    if sampling.top_p < 1:
        enough = sampling.top_p * float(scores_V.double().exp().sum())
        if ids is None:
            scores_V, ids = _largest(scores_V, enough)
        mass = scores_V.double().exp()
        count = int((mass.cumsum(0) - mass < enough).sum())
        scores_V, ids = scores_V[:count], ids[:count]
    if sampling.min_p:
        likely = scores_V >= math.log(sampling.min_p)
        scores_V = torch.where(likely, scores_V, -torch.inf)
    return scores_V, ids


def _largest(scores_V: Tensor, enough: float) -> tuple[Tensor, Tensor]:
    """The largest scores with their ids, in order: so many that their mass reaches `enough`.
    Whoever comes after them cannot belong to the smallest set that reaches it."""
    V, width = len(scores_V), FIRST_GUESS
    while True:
        scores, ids = scores_V.topk(min(width, V))
        if width >= V or float(scores.double().exp().sum()) >= enough:
            return scores, ids
        width *= 8


def logprobs_of(logits_V: Tensor, token: int, top: int) -> Logprobs:
    """Log-softmax of the raw logits at `token` and at the `top` likeliest tokens."""
    logs_V = logits_V.log_softmax(-1)
    values, ids = logs_V.topk(min(top, len(logs_V)))
    return Logprobs(token, float(logs_V[token]), list(zip(ids.tolist(), values.tolist())))
