"""Scores on local task files (jsonl, optionally gzip): multiple choice, schema, continuation.

Rules: `sum` takes the choice with the highest summed log-likelihood (lm-eval's acc), `per_char`
divides by its length in UTF-8 bytes (lm-eval's acc_norm). Every score carries n and its standard
error.
"""

import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from growmoe.errors import GrowmoeError, UsageError
from growmoe.models.transformer import Transformer


def read_rows(path: Path, limit: int | None) -> list[dict[str, Any]]:
    """Rows of a task file, split at newlines only. Raises GrowmoeError that names a broken line."""
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    opener = gzip.open if path.suffix == ".gz" else open
    rows = []
    with opener(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise GrowmoeError(f"{path}:{number} is not JSON: {error}") from None
            if not isinstance(rows[-1], dict):
                raise GrowmoeError(f"{path}:{number} is not a JSON object")
            if limit is not None and len(rows) >= limit:
                break
    if not rows:
        raise UsageError(f"{path} holds no rows")
    return rows


def _alternatives(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(context, continuation) pairs of which one is right."""
    kind = row.get("type")
    if kind == "multiple_choice":
        passage = f"{row['context']}\n" if row.get("context") else ""
        for choice in row["choices"]:
            yield f"{passage}Question: {row['question']}\nAnswer:", f" {choice}"
    elif kind == "schema":
        for context in row["contexts"]:
            yield context, f" {row['continuation']}"
    elif kind == "continuation":
        yield row["context"], f" {row['continuation']}"
    else:
        raise UsageError(
            f"task type '{kind}' cannot be scored; known are multiple_choice, schema, continuation"
        )


@torch.no_grad()
def log_likelihood(
    model: Transformer, tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[float, bool]:
    """Summed log-likelihood (nats) of `continuation`, and whether greedy decoding gives it.

    The two parts are tokenised together and cut where the context alone ends, as lm-eval does.
    """
    both = tokenizer.encode(context + continuation, add_special_tokens=False).ids
    start = len(tokenizer.encode(context, add_special_tokens=False).ids)
    start = max(1, min(start, len(both) - 1))
    ids = torch.tensor(both[-model.config.max_positions :])
    start -= len(both) - len(ids)
    if start < 1:
        raise UsageError(f"an answer is longer than the context of {model.config.max_positions}")
    logits = model(ids[None, :-1]).logits[0, start - 1 :].float()
    targets = ids[start:]
    chosen = logits.log_softmax(-1).gather(1, targets[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == targets).all())


def score(
    model: Transformer, tokenizer: Tokenizer, path: Path, limit: int | None
) -> dict[str, Any]:  # fmt: skip
    """Accuracy by rule on one task file, with n and standard error."""
    rows = read_rows(path, limit)
    hits: dict[str, list[float]] = {}
    for number, row in enumerate(rows, 1):
        try:
            pairs = list(_alternatives(row))
            if row["type"] == "continuation":
                _, greedy = log_likelihood(model, tokenizer, *pairs[0])
                hits.setdefault("greedy", []).append(float(greedy))
                continue
            gold = row["gold"] if isinstance(row["gold"], list) else [row["gold"]]
        except KeyError as error:
            raise GrowmoeError(f"{path}: row {number} has no key {error}") from None
        sums = [log_likelihood(model, tokenizer, *pair)[0] for pair in pairs]
        per_char = [s / max(1, len(pair[1].encode())) for s, pair in zip(sums, pairs)]
        hits.setdefault("sum", []).append(float(sums.index(max(sums)) in gold))
        hits.setdefault("per_char", []).append(float(per_char.index(max(per_char)) in gold))
    result: dict[str, Any] = {"n": len(rows), "file": path.name}
    for rule, values in hits.items():
        mean = sum(values) / len(values)
        result[rule] = mean
        result[f"{rule}_stderr"] = math.sqrt(mean * (1 - mean) / len(values))
    return result
