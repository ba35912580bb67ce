"""Keys and values in blocks, and the cache that a step of many sequences sees.

Letters: N new tokens of all sequences, S sequences, M blocks of the longest, K key/value heads,
H query heads, C head dim.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from growmoe.inference.blocks import BLOCK
from growmoe.models.attention import Cache, attend
from growmoe.models.config import ModelConfig
from growmoe.ops.device import on_triton


class PagedCache:
    """Memory for keys and values: per layer `keys` [blocks,K,C,16] (inside a block transposed, so
    that the same place of 16 tokens is contiguous) and `values` [blocks,K,16,C]."""

    def __init__(
        self, config: ModelConfig, blocks: int, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        self.blocks, self.dtype, self.device = blocks, dtype, torch.device(device)
        K, C = config.num_kv_heads, config.head_dim
        layers = range(config.num_layers)
        self.keys = [self._zeros((blocks, K, C, BLOCK)) for _ in layers]
        self.values = [self._zeros((blocks, K, BLOCK, C)) for _ in layers]

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        # numpy's zeros take no memory before they are written to
        count = int(np.prod(shape)) * self.dtype.itemsize
        return torch.from_numpy(np.zeros(count, np.uint8)).view(self.dtype).view(shape)

    def copy(self, source: int, target: int) -> None:
        """Block `target` becomes a copy of block `source`."""
        for layers in (self.keys, self.values):
            for blocks in layers:
                blocks[target] = blocks[source]


@dataclass(slots=True)
class Span:
    """One sequence's part of a step: `count` new tokens at positions start, start + 1, ...

    `table` are the blocks of its tokens, new ones included.
    """

    start: int
    count: int
    table: list[int]


class PagedBatch(Cache):
    """The new tokens of several sequences, one after another, as one ragged row [1,N].

    `positions_N` (int64), and in int32: `starts_S`, `counts_S`, `rows_S1` (where each span begins,
    and the end), `tables_SM` (padded with 0). `longest` is the largest count.
    """

    def __init__(self, cache: PagedCache, spans: list[Span]) -> None:
        self.cache, self.spans = cache, spans
        starts = np.array([span.start for span in spans], np.int32)
        counts = np.array([span.count for span in spans], np.int32)
        rows = np.zeros(len(spans) + 1, np.int32)
        np.cumsum(counts, out=rows[1:])
        if rows[-1] == len(spans):
            positions = starts.astype(np.int64)
        else:
            shift = np.repeat(starts - rows[:-1], counts)
            positions = np.arange(rows[-1], dtype=np.int64) + shift
        longest = max(len(span.table) for span in spans)
        tables = np.zeros((len(spans), longest), np.int32)
        for row, span in zip(tables, spans):
            row[: len(span.table)] = span.table
        self.longest, self._last = int(counts.max()), int((starts + counts).max()) - 1
        self.starts_S, self.counts_S = self._tensor(starts), self._tensor(counts)
        self.rows_S1, self.tables_SM = self._tensor(rows), self._tensor(tables)
        self.positions_N = self._tensor(positions)

    def _tensor(self, found: np.ndarray) -> Tensor:
        return torch.from_numpy(found).to(self.cache.device)

    @property
    def length(self) -> int:
        """Not a number here: every sequence has its own."""
        raise NotImplementedError("sequences of a batch differ in length")

    def positions(self, new: int, device: torch.device) -> Tensor:
        """Positions [N] of the new tokens, each in its own sequence."""
        return self.positions_N

    def last_position(self, new: int) -> int:
        """The largest of them."""
        return self._last

    @cached_property
    def last_rows_S(self) -> Tensor:
        """The row of each span's last token."""
        return self.rows_S1[1:].long() - 1

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """(block, place inside it) of every new token."""
        sequences = torch.arange(len(self.spans), device=self.cache.device)
        sequence_N = sequences.repeat_interleave(self.counts_S)
        block_N = self.tables_SM[sequence_N, self.positions_N // BLOCK].long()
        return block_N, self.positions_N % BLOCK

    def attend(
        self,
        layer: int,
        q_BHTC: Tensor,
        k_BKTC: Tensor,
        v_BKTC: Tensor,
        window: int | None,
        real_BS: Tensor | None,
    ) -> Tensor:
        """Keep the new keys and values of `layer` in their blocks; returns what the queries of
        every sequence find in its own tokens [1,H,N,C]."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if on_triton(q_BHTC):
            from growmoe.ops import triton_paged

            if triton_paged.supported(q_BHTC, keys):
                spans = triton_paged.Spans(
                    self.starts_S, self.counts_S, self.rows_S1, self.tables_SM, self.longest
                )
                return triton_paged.paged_attention(
                    q_BHTC, k_BKTC, v_BKTC, keys, values, spans, window
                )
        block_N, place_N = self._places
        keys[block_N, :, :, place_N] = k_BKTC[0].transpose(0, 1).to(keys.dtype)
        values[block_N, :, place_N] = v_BKTC[0].transpose(0, 1).to(values.dtype)
        found, first = [], 0
        for span, table_M in zip(self.spans, self.tables_SM):
            held = span.start + span.count
            blocks = table_M[: -(-held // BLOCK)]
            k_KSC = keys[blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, :held]
            v_KSC = values[blocks].transpose(0, 1).flatten(1, 2)[:, :held]
            q_HTC = q_BHTC[:, :, first : first + span.count]
            k_BKSC, v_BKSC = k_KSC[None].to(q_HTC.dtype), v_KSC[None].to(q_HTC.dtype)
            found.append(attend(q_HTC, k_BKSC, v_BKSC, window, None))
            first += span.count
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)
