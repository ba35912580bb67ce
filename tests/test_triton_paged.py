"""Paged attention by Triton against its reference and against the model's own attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

# the first import of growmoe's kernels: it turns the interpreter on
from test_triton import DEVICE, GPU

# isort: split

from growmoe.models.attention import attend
from growmoe.ops import triton_paged as paged
from growmoe.ops.triton_paged import Spans
from test_triton_decode import compiled

CLOSE = {
    torch.float32: {"rtol": 1e-4, "atol": 2e-5},
    torch.float16: {"rtol": 5e-3, "atol": 5e-3},
    torch.bfloat16: {"rtol": 4e-2, "atol": 4e-2},
}
Cells = list[tuple[int, int]]


def spans_of(cells: Cells, width: int, blocks: int) -> Spans:
    """Sequences (start, count) with random blocks, none of them used twice."""
    free = torch.randperm(blocks).tolist()
    tables = torch.zeros(len(cells), width, dtype=torch.int32)
    for row, (start, count) in zip(tables, cells):
        for place in range(-(-(start + count) // 16)):
            row[place] = free.pop()
    starts, counts = (torch.tensor(column, dtype=torch.int32) for column in zip(*cells))
    rows = torch.zeros(len(cells) + 1, dtype=torch.int32)
    rows[1:] = counts.cumsum(0)
    tensors = (t.to(DEVICE) for t in (starts, counts, rows, tables))
    return Spans(*tensors, longest=max(count for _, count in cells))


def step(
    cells: Cells, H: int, K: int, C: int, dtype: torch.dtype, width: int
) -> tuple[list[Tensor], Spans]:
    """Random q, k, v as a model makes them (head and row exchanged), and blocks full of tokens."""
    N, blocks = sum(count for _, count in cells), width * len(cells)
    made = [torch.randn(1, N, heads, C).to(DEVICE, dtype).transpose(1, 2) for heads in (H, K, K)]
    keys, values = torch.randn(blocks, K, C, 16), torch.randn(blocks, K, 16, C)
    return [*made, keys.to(DEVICE, dtype), values.to(DEVICE, dtype)], spans_of(cells, width, blocks)


def check(
    cells: Cells, H: int = 4, K: int = 2, C: int = 16, dtype: torch.dtype = torch.float32,
    window: int | None = None, width: int = 0,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    width = width or max(-(-sum(cell) // 16) for cell in cells)
    (q, k, v, keys, values), spans = step(cells, H, K, C, dtype, width)
    caches = [(keys.clone(), values.clone()) for _ in range(2)]
    found = paged.paged_attention(q, k, v, *caches[0], spans, window)
    right = paged.paged_attention_reference(q, k, v, *caches[1], spans, window)
    assert found.shape == q.shape
    torch.testing.assert_close(found, right, **CLOSE[dtype])
    for one, two in zip(*caches):
        assert torch.equal(one, two)
    first = 0
    for (start, count), table in zip(cells, spans.tables_SM.long()):
        blocks, held = table[: -(-(start + count) // 16)], start + count
        k_all = caches[0][0][blocks].permute(1, 0, 3, 2).flatten(1, 2)[None, :, :held]
        v_all = caches[0][1][blocks].transpose(0, 1).flatten(1, 2)[None, :, :held]
        rows = slice(first, first + count)
        own = attend(q[:, :, rows].float(), k_all.float(), v_all.float(), window, None)
        torch.testing.assert_close(found[:, :, rows].float(), own, **CLOSE[dtype])
        first += count


@pytest.mark.parametrize(
    "cells",
    [
        [(0, 1)],  # the first token of all
        [(15, 1), (16, 1), (70, 1)],  # around a block's edge, over one step of the loop
        [(0, 20)],  # a prompt
        [(33, 40), (5, 1), (16, 16)],  # a later piece of a prompt, a decoding text, a full block
    ],
)
@pytest.mark.parametrize("window", [None, 1, 19])
def test_equals_the_reference_and_the_model(cells: Cells, window: int | None) -> None:
    check(cells, window=window)


@pytest.mark.parametrize(("H", "K", "C"), [(9, 3, 4), (4, 4, 20), (8, 1, 16), (2, 2, 130)])
def test_heads_of_all_kinds(H: int, K: int, C: int) -> None:
    check([(40, 1), (3, 1)], H, K, C)
    check([(17, 5), (3, 1)], H, K, C)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    check([(90, 1), (3, 1)], dtype=dtype)
    check([(17, 5), (3, 1)], dtype=dtype)


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), min_size=1, max_size=3),
    st.one_of(st.none(), st.integers(1, 60)),
)
@settings(max_examples=8, deadline=None)
def test_any_step_equals_the_reference(cells: Cells, window: int | None) -> None:
    check(cells, H=2, K=1, window=window)


@pytest.mark.parametrize("window", [None, 3, 70])
def test_a_long_context_is_split(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four splits; for short texts and narrow windows some of them have nothing to read."""
    monkeypatch.setattr(paged, "SPLIT_TOKENS", 64)
    launched = []
    combine = paged._combine_kernel
    fake = {"__getitem__": lambda _, grid: launched.append(grid) or combine[grid]}
    monkeypatch.setattr(paged, "_combine_kernel", type("Seen", (), fake)())
    check([(200, 1), (255, 1), (0, 1), (64, 1)], window=window, width=16)
    assert launched == [(4, 4)]


def test_neighbours_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of one text alone and among others, with the same width of table."""
    monkeypatch.setattr(paged, "SPLIT_TOKENS", 64)
    torch.manual_seed(0)
    tensors, spans = step([(9, 1), (150, 1), (77, 1)], 4, 2, 16, torch.float32, 10)
    q, keys, values = tensors[0], *tensors[3:]
    together = paged.attend(q, keys, values, spans, None)
    for s in range(3):
        rows = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
        one = slice(s, s + 1)
        alone = Spans(spans.starts_S[one], spans.counts_S[one], rows, spans.tables_SM[one], 1)
        found = paged.attend(q[:, :, one], keys, values, alone, None)
        assert torch.equal(found, together[:, :, one])


def test_what_no_text_wrote_is_not_read() -> None:
    """Everything but the context is NaN: rest of the last block, other blocks, table's end."""
    torch.manual_seed(0)
    tensors, spans = step([(20, 1), (40, 3)], 4, 2, 16, torch.float32, 5)
    q, k, v, keys, values = tensors
    known = torch.zeros(10, 16, dtype=torch.bool, device=DEVICE)
    for (start, count), table in zip([(20, 1), (40, 3)], spans.tables_SM.long()):
        for position in range(start + count):
            known[table[position // 16], position % 16] = True
    keys = keys.masked_fill(~known[:, None, None, :], float("nan"))
    values = values.masked_fill(~known[:, None, :, None], float("nan"))
    assert paged.paged_attention(q, k, v, keys, values, spans, None).isfinite().all()


def test_spans_without_tokens_are_passed_over() -> None:
    torch.manual_seed(0)
    tensors, spans = step([(20, 2), (5, 1)], 4, 2, 16, torch.float32, 2)
    right = paged.paged_attention(*tensors, spans, None)
    zero = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    padded = Spans(
        torch.cat([spans.starts_S, zero]), torch.cat([spans.counts_S, zero]),
        torch.cat([spans.rows_S1, spans.rows_S1[-1:]]),
        torch.cat([spans.tables_SM, spans.tables_SM[:1]]), spans.longest,
    )  # fmt: skip
    assert torch.equal(paged.paged_attention(*tensors, padded, None), right)


def test_what_it_takes() -> None:
    q, keys = torch.zeros(1, 2, 1, 8, device=DEVICE), torch.zeros(1, 2, 8, 16, device=DEVICE)
    assert paged.supported(q, keys)
    assert not paged.supported(q.double(), keys)
    assert not paged.supported(q.clone().requires_grad_(), keys)
    assert not paged.supported(q, torch.zeros(1, 2, 512, 16, device=DEVICE))


def test_paged_attention_compiles_for_sm90() -> None:
    data = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "keys_ptr", "values_ptr", "out_ptr"), "*bf16")
    integers = dict.fromkeys(("starts_ptr", "counts_ptr", "rows_ptr", "tables_ptr"), "*i32")
    floats = dict.fromkeys(("sums_ptr", "stats_ptr"), "*fp32")
    sizes = dict.fromkeys(("S", "M", "H", "K", "C", "window"), "i32")
    strides = dict.fromkeys(("k_head", "k_row", "v_head", "v_row", "q_head", "q_row"), "i32")
    types = {**data, **integers, **floats, **sizes, **strides, "scale": "fp32"}
    kernels = [
        ("triton_paged", "_write_kernel", types, {"BLOCK": 16, "BLOCK_S": 64, "BLOCK_C": 64}, 1, 2),
        ("triton_paged", "_combine_kernel", types, {"SPLITS": 16, "BLOCK_C": 64}, 1, 2),
    ]
    for queries, splits, block_m in ((1, 16, 16), (16, 1, 64)):
        constants = {
            "GROUP": 4, "QUERIES": queries, "WINDOW": splits == 1, "SPLITS": splits, "BLOCK": 16,
            "BLOCK_M": block_m, "BLOCKS": 4, "BLOCK_C": 64, "UPCAST": False,
        }  # fmt: skip
        kernels.append(("triton_paged", "_attend_kernel", types, constants, 4, 3))
    lines = compiled(*kernels)
    assert [line[2] for line in lines] == ["False", "False", "True", "True"]  # tensor cores
    assert all(int(line[1]) <= 96 * 1024 and line[3] == "0" for line in lines)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 100])
def test_bfloat16_on_a_gpu(window: int | None) -> None:
    check([(700, 1), (3, 1), (1023, 1)], 16, 4, 128, torch.bfloat16, window)
    check([(64, 200), (3, 1), (0, 129)], 16, 4, 64, torch.bfloat16, window)
