"""Training batches: sequences drawn from the sources of a corpus by weight, in a fixed order.

The order is a function of (seed, sequence number) alone, so resuming is skipping ahead.
"""

from typing import Any

import numpy as np

from growmoe.data.corpus import Corpus, TokenStream
from growmoe.errors import UsageError


class SourceSequences:
    """Windows of one source, shuffled anew every epoch."""

    def __init__(self, stream: TokenStream, length: int, seed: list[int]) -> None:
        self.stream, self.length, self.seed = stream, length, seed
        self.windows = (len(stream) - 1) // length
        self._epoch = -1
        self._order: np.ndarray[Any, Any] = np.empty(0, dtype=np.int64)

    def get(self, number: int) -> np.ndarray[Any, Any]:
        """The `number`-th sequence [length+1] drawn from this source, counted over all epochs."""
        epoch, place = divmod(number, self.windows)
        if epoch != self._epoch:
            self._order = np.random.default_rng([*self.seed, epoch]).permutation(self.windows)
            self._epoch = epoch
        return self.stream.read(int(self._order[place]) * self.length, self.length + 1)


class Loader:
    """Batches [B, length+1] of token ids. Sources are interleaved so that after any number of
    sequences each has had its share of them to within one."""

    def __init__(
        self, corpus: Corpus, length: int, seed: int, weights: dict[str, float] | None = None
    ) -> None:
        wanted = weights or corpus.weights
        if unknown := set(wanted) - set(corpus.sources):
            raise UsageError(
                f"{corpus.path} has no source '{sorted(unknown)[0]}'; "
                f"it has {', '.join(corpus.sources)}"
            )
        self.sources = []
        self.shares = []
        for index, name in enumerate(corpus.sources):
            if wanted.get(name, 0.0) <= 0:
                continue
            stream = corpus.streams["train"][name]
            sequences = SourceSequences(stream, length, [seed, index])
            if sequences.windows < 1:
                raise UsageError(
                    f"{corpus.path}: source {name} has {len(stream)} training tokens, fewer than "
                    f"one sequence of {length + 1}"
                )
            self.sources.append(sequences)
            self.shares.append(wanted[name])
        if not self.sources:
            raise UsageError(f"{corpus.path}: no source has a weight above 0")
        total = sum(self.shares)
        self.shares = [share / total for share in self.shares]
        self.taken = [0] * len(self.sources)

    def skip(self, sequences: int) -> None:
        """Move past `sequences` sequences without reading them."""
        for _ in range(sequences):
            self.taken[self._pick()] += 1

    def next_batch(self, size: int) -> np.ndarray[Any, Any]:
        """The next `size` sequences, int64 [size, length+1]."""
        rows = []
        for _ in range(size):
            source = self._pick()
            rows.append(self.sources[source].get(self.taken[source]))
            self.taken[source] += 1
        return np.stack(rows)

    def _pick(self) -> int:
        """The source that is furthest behind its share."""
        drawn = sum(self.taken) + 1
        behind = [share * drawn - taken for share, taken in zip(self.shares, self.taken)]
        return behind.index(max(behind))
