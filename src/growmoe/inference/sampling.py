"""From logits to a token: each row by itself, so that a batch changes nothing.

Letters: V vocabulary, S rows.
"""

import math

import numpy as np
import torch
from torch import Tensor

from growmoe.inference.requests import Logprobs, Sampling

FIRST_GUESS = 64
"""Likeliest tokens that top-p looks at before it looks at more."""


def peaks(logits_SV: Tensor) -> tuple[list[float], list[int]]:
    """(largest logit, its token) of every row: one copy, wherever the logits are. A row with NaN
    gives NaN."""
    if logits_SV.device.type == "cpu":  # numpy's search is nine times as fast as torch's
        rows = logits_SV.numpy()
        tokens_S = rows.argmax(-1)
        return rows[np.arange(len(rows)), tokens_S].tolist(), tokens_S.tolist()
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
        # of the two, the lower one is l / p for positive logits and l * p for negative ones
        further = torch.minimum if p > 1 else torch.maximum
        logits_V = torch.where(seen_V, further(logits_V / p, logits_V * p), logits_V)
    if sampling.greedy:
        return int(logits_V.argmax())
    scores, ids = _candidates((logits_V - logits_V.max()) / sampling.temperature, sampling)
    reached = scores.exp().cumsum(0, dtype=torch.float64)
    draw = torch.rand((), generator=rng, dtype=torch.float64) * reached[-1]
    place = min(int(torch.searchsorted(reached, draw, right=True)), len(reached) - 1)
    return place if ids is None else int(ids[place])


def _candidates(scores_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """(scores, token ids) of the tokens that may be drawn; ids None: all, in order of ids. Scores
    are logits over temperature, the largest 0."""
    ids = None
    if 0 < sampling.top_k < len(scores_V):
        scores_V, ids = scores_V.topk(sampling.top_k)
        if sampling.top_p < 1:
            count = _reaching(scores_V, sampling.top_p * float(scores_V.exp().sum()))
            scores_V, ids = scores_V[:count], ids[:count]
    elif sampling.top_p < 1:
        ids = _top_p(scores_V, sampling.top_p)
        scores_V = scores_V[ids]
    if sampling.min_p:
        likely = scores_V >= math.log(sampling.min_p)
        scores_V = torch.where(likely, scores_V, -torch.inf)
    return scores_V, ids


def _top_p(scores_V: Tensor, top_p: float) -> Tensor:
    """Ids of the smallest set of likeliest tokens with this part of the mass.

    Mostly it is among the first few, which a partial selection finds: when their mass reaches it,
    no later token belongs to the set. Otherwise the least score of the set is found among all.
    """
    enough = top_p * float(scores_V.exp().sum())
    scores, ids = scores_V.topk(min(FIRST_GUESS, len(scores_V)))
    count = _reaching(scores, enough)
    if count < len(ids):
        return ids[:count]
    # values alone: numpy sorts them much faster than torch sorts values and places
    ranked = torch.from_numpy(np.sort(scores_V.numpy())).flip(0)
    count = _reaching(ranked, enough)
    least = ranked[count - 1]
    ids = torch.nonzero(scores_V >= least).flatten()
    if len(ids) > count:  # of equal scores at the end, the first ids are in the set
        equal = torch.nonzero(scores_V == least).flatten()[count - len(ids) :]
        ids = ids[~torch.isin(ids, equal)]
    return ids


def _reaching(ranked: Tensor, enough: float) -> int:
    """How many of the scores, largest first, it takes until their mass is `enough`."""
    mass = ranked.exp()
    before = mass.cumsum(0, dtype=torch.float64) - mass
    return int((before < enough).sum())


def logprobs_of(logits_V: Tensor, token: int, top: int) -> Logprobs:
    """Log-softmax of the raw logits at `token` and at the `top` likeliest tokens."""
    logs_V = logits_V.log_softmax(-1)
    values, ids = logs_V.topk(min(top, len(logs_V)))
    return Logprobs(token, float(logs_V[token]), list(zip(ids.tolist(), values.tolist())))
