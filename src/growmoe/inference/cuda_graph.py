"""Decoding steps recorded once and replayed: a CUDA graph per batch size of `BUCKETS`.

A step in which every sequence has one new token is padded to the next bucket. Its inputs are
copied into tensors that stay in place, then the recorded work runs again; nothing in it asks the
device for a value, so the whole model is one launch. Padding rows are a text of one token in a
block of their own, the last of the cache, which the engine must not give away.

`record` says what recording is: `cuda_graphs()` on a GPU; `as_it_is` runs the function itself, so
everything else can be checked without one. Not yet run on a GPU.

Letters: S sequences, N rows of a bucket, M blocks of a table row, V vocabulary.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from growmoe.errors import GrowmoeError
from growmoe.inference.blocks import blocks_for
from growmoe.inference.paged import PagedBatch, PagedCache, Span
from growmoe.inference.runner import Runner
from growmoe.inference.scheduler import Step
from growmoe.models.transformer import Transformer
from growmoe.ops.device import on_triton

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
MAX_HEAD_DIM = 256  # of the attention kernel
Work = Callable[[], None]
Record = Callable[[Work], Work]


def runner_for(model: Transformer, cache: PagedCache) -> Runner:
    """A GraphRunner where the kernels are, else a Runner. Either way the last block of `cache` must
    not belong to a sequence."""
    if on_triton(cache.keys[0]) and model.config.head_dim <= MAX_HEAD_DIM:
        return GraphRunner(model, cache, cuda_graphs())
    return Runner(model, cache)


def as_it_is(work: Work) -> Work:
    """No recording: every replay runs the work anew."""
    work()
    return work


def cuda_graphs() -> Record:
    """Records into CUDA graphs that share their memory: one is replayed at a time."""
    pool = torch.cuda.graph_pool_handle()

    def record(work: Work) -> Work:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # compiles kernels and fills caches, outside of the graph
            for _ in range(2):
                work()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            work()
        return graph.replay

    return record


class StaticBatch(PagedBatch):
    """A batch of N sequences with one new token each, whose tensors are filled again and again."""

    def __init__(self, cache: PagedCache, rows: int, width: int) -> None:
        device = cache.device
        self.cache, self.spans, self.longest = cache, [], 1
        self.positions_N = torch.zeros(rows, dtype=torch.int64, device=device)
        self.starts_S = torch.zeros(rows, dtype=torch.int32, device=device)
        self.counts_S = torch.ones(rows, dtype=torch.int32, device=device)
        self.rows_S1 = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.tables_SM = torch.full(
            (rows, width), cache.blocks - 1, dtype=torch.int32, device=device
        )

    def first(self, rows: int) -> "StaticBatch":
        """The first `rows` sequences, sharing this one's memory."""
        part = StaticBatch.__new__(StaticBatch)
        part.cache, part.spans, part.longest = self.cache, [], 1
        for name in ("positions_N", "starts_S", "counts_S", "tables_SM"):
            setattr(part, name, getattr(self, name)[:rows])
        part.rows_S1 = self.rows_S1[: rows + 1]
        return part

    def last_position(self, new: int) -> int:
        """`GraphRunner` looks at positions before every replay; recording sees padding."""
        return 0


class GraphRunner(Runner):
    """A Runner that replays decoding steps of up to 64 sequences; other steps run as they are."""

    def __init__(self, model: Transformer, cache: PagedCache, record: Record) -> None:
        super().__init__(model, cache)
        config, rows = model.config, BUCKETS[-1]
        self.width = min(blocks_for(config.max_positions), cache.blocks - 1)
        self._record = record
        self._recorded: dict[int, Work] = {}
        self._batch = StaticBatch(cache, rows, self.width)
        self._tokens_N = torch.zeros(rows, dtype=torch.int64, device=cache.device)
        self._logits_NV = torch.zeros(rows, config.vocab_size, device=cache.device)
        # what is copied from: page-locked, so that the copy is one command in the device's queue
        pinned = cache.device.type == "cuda"
        self._host_2N = torch.zeros(2, rows, dtype=torch.int64, pin_memory=pinned)
        self._host_NM = torch.zeros(rows, self.width, dtype=torch.int32, pin_memory=pinned)

    @torch.inference_mode()
    def run(self, step: Step) -> Tensor:
        """As `Runner.run`; of a replayed step the logits are overwritten by the next one."""
        rows = len(step.spans)
        if rows > BUCKETS[-1] or any(span.count != 1 for span in step.spans):
            return super().run(step)
        bucket = next(size for size in BUCKETS if size >= rows)
        replay = self._recorded.get(bucket)
        if replay is None:
            self._load([], [], bucket)  # recording runs on padding, which harms nobody
            replay = self._recorded[bucket] = self._record(self._work(bucket))
        self._load(step.tokens(), step.spans, bucket)
        replay()
        return self._logits_NV[:rows]

    def _work(self, bucket: int) -> Work:
        batch = self._batch.first(bucket)
        tokens_1N, logits_NV = self._tokens_N[None, :bucket], self._logits_NV[:bucket]

        def work() -> None:
            batch.starts_S.copy_(batch.positions_N)
            logits_NV.copy_(self.model(tokens_1N, cache=batch).logits[0])

        return work

    def _load(self, tokens: list[int], spans: list[Span], bucket: int) -> None:
        """Fill the inputs of the first `bucket` rows. The copies need not be waited for: whoever
        reads the logits has waited for them before the next call."""
        last = max((span.start for span in spans), default=0)
        if last >= self.model.config.max_positions:
            raise GrowmoeError(f"the model has only {self.model.config.max_positions} positions")
        rows = len(spans)
        numbers, tables = self._host_2N.numpy(), self._host_NM.numpy()
        numbers[:, rows:bucket] = 0
        numbers[0, :rows] = tokens
        numbers[1, :rows] = [span.start for span in spans]
        tables[rows:bucket, 0] = self.cache.blocks - 1
        for table_M, span in zip(tables, spans):
            table_M[: len(span.table)] = np.array(span.table[: self.width], np.int32)
        sources = (self._host_2N[0], self._host_2N[1], self._host_NM)
        targets = (self._tokens_N, self._batch.positions_N, self._batch.tables_SM)
        for source, target in zip(sources, targets):
            target[:bucket].copy_(source[:bucket], non_blocking=True)
