"""Attention over keys and values that lie in blocks of 16 tokens, for decoding and for prompts.

Every span of a step (one sequence's new tokens) reads its own blocks through its own row of the
block table; starts, counts and tables are tensors on the device, so nothing is asked of it and a
CUDA graph can be replayed with other contents. Sums and softmax are float32. Long contexts are
split over several programs by the width of the table: where that is fixed (CUDA graphs), what a
sequence gets does not depend on its neighbours, else up to rounding. Inference only.

Letters: N new tokens of all sequences, S sequences, M blocks a table row can name, H query heads,
K key/value heads, C head dim. Keys of a layer are [blocks,K,C,16], values [blocks,K,16,C].
Importing this module imports triton, so callers import it late. Checked under the interpreter and
compiled for sm_90; not yet run on a GPU.
"""
# mypy: allow-untyped-defs

from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

BLOCK = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
# To tune.
TILE_ROWS = 64  # queries times heads of one program in a prompt
SPLIT_TOKENS = 512  # a table this much wider gets one more program per sequence and head
MAX_SPLITS = 16


@dataclass(frozen=True)
class Spans:
    """Where the sequences of a step stand: new tokens starts_S ... starts_S + counts_S - 1, in
    rows rows_S1[s] ... of the step; blocks tables_SM. All int32. `longest` is the largest count (or
    more), which the host knows."""

    starts_S: Tensor
    counts_S: Tensor
    rows_S1: Tensor
    tables_SM: Tensor
    longest: int


def supported(q_BHNC: Tensor, keys: Tensor) -> bool:
    """Whether `paged_attention` takes these."""
    if q_BHNC.dtype not in DTYPES or keys.dtype not in DTYPES or keys.shape[2] > MAX_HEAD_DIM:
        return False
    if q_BHNC.device != keys.device or (torch.is_grad_enabled() and q_BHNC.requires_grad):
        return False
    return INTERPRETED or (q_BHNC.is_cuda and torch.version.hip is None)


def paged_attention(
    q_BHNC: Tensor, k_BKNC: Tensor, v_BKNC: Tensor, keys: Tensor, values: Tensor, spans: Spans,
    window: int | None,
) -> Tensor:  # fmt: skip
    """Write the new keys and values into their blocks, then attend causally: [1,H,N,C].

    Query head h reads key/value head h // (H/K); with a `window` only the last so many tokens,
    itself included.
    """
    write(k_BKNC, v_BKNC, keys, values, spans)
    return attend(q_BHNC, keys, values, spans, window)


def write(k_BKNC: Tensor, v_BKNC: Tensor, keys: Tensor, values: Tensor, spans: Spans) -> None:
    """Put every new token's key and value at its place in the blocks of its sequence."""
    _, K, N, C = k_BKNC.shape
    k_BKNC, v_BKNC = _rows(k_BKNC), _rows(v_BKNC)
    S, M = spans.tables_SM.shape
    with torch.cuda.device_of(k_BKNC):
        _write_kernel[(N, K)](
            k_BKNC, v_BKNC, keys, values, spans.starts_S, spans.rows_S1, spans.tables_SM,
            k_BKNC.stride(1), k_BKNC.stride(2), v_BKNC.stride(1), v_BKNC.stride(2), S, M, K, C,
            BLOCK=BLOCK, BLOCK_S=triton.next_power_of_2(S), BLOCK_C=triton.next_power_of_2(C),
            num_warps=1,
        )  # fmt: skip


def attend(
    q_BHNC: Tensor, keys: Tensor, values: Tensor, spans: Spans, window: int | None
) -> Tensor:
    """What the queries of every span find in their own blocks: [1,H,N,C]."""
    _, H, N, C = q_BHNC.shape
    K, (S, M) = keys.shape[1], spans.tables_SM.shape
    q_BHNC = _rows(q_BHNC)
    group = H // K
    queries = 1 if spans.longest <= 1 else max(1, TILE_ROWS // group)
    splits = _splits(M) if queries == 1 else 1
    out_NHC = q_BHNC.new_empty(N, H, C)
    parts = N if splits > 1 else 0
    sums = out_NHC.new_empty(parts, H, splits, C, dtype=torch.float32)
    stats = out_NHC.new_empty(parts, H, splits, 2, dtype=torch.float32)
    block_C = max(16, triton.next_power_of_2(C))
    with torch.cuda.device_of(q_BHNC):
        _attend_kernel[(S, triton.cdiv(max(1, spans.longest), queries) * K, splits)](
            q_BHNC, keys, values, spans.starts_S, spans.counts_S, spans.rows_S1, spans.tables_SM,
            out_NHC, sums, stats, q_BHNC.stride(1), q_BHNC.stride(2), M, H, K, C,
            0 if window is None else window, C**-0.5 * 1.4426950408889634,
            GROUP=group, QUERIES=queries, WINDOW=window is not None, SPLITS=splits,
            BLOCK=BLOCK, BLOCK_M=max(16, triton.next_power_of_2(queries * group)),
            BLOCKS=2 if block_C > 128 else 4, BLOCK_C=block_C,
            **_options(q_BHNC.dtype, block_C),
        )  # fmt: skip
        if splits > 1:
            _combine_kernel[(N, H)](
                sums, stats, out_NHC, H, C, SPLITS=splits, BLOCK_C=block_C, num_warps=1
            )
    return out_NHC.transpose(0, 1)[None]


def paged_attention_reference(
    q_BHNC: Tensor, k_BKNC: Tensor, v_BKNC: Tensor, keys: Tensor, values: Tensor, spans: Spans,
    window: int | None,
) -> Tensor:  # fmt: skip
    """`paged_attention` in plain torch, one token at a time."""
    group = q_BHNC.shape[1] // keys.shape[1]
    out_BHNC = torch.empty_like(q_BHNC)
    steps = zip(spans.starts_S.tolist(), spans.counts_S.tolist(), spans.rows_S1.tolist())
    for (start, count, first), table_M in zip(steps, spans.tables_SM.long()):
        for position, row in enumerate(range(first, first + count), start):
            block, place = table_M[position // BLOCK], position % BLOCK
            keys[block, :, :, place] = k_BKNC[0, :, row].to(keys.dtype)
            values[block, :, place] = v_BKNC[0, :, row].to(values.dtype)
            begin = 0 if window is None else max(0, position + 1 - window)
            seen = slice(begin, position + 1)
            blocks_M = table_M[: position // BLOCK + 1]
            k_KCT = keys[blocks_M].float().permute(1, 2, 0, 3).flatten(2)[..., seen]
            v_KTC = values[blocks_M].float().transpose(0, 1).flatten(1, 2)[:, seen]
            q_HC = q_BHNC[0, :, row].float().unflatten(0, (-1, group)) * q_BHNC.shape[-1] ** -0.5
            out_BHNC[0, :, row] = ((q_HC @ k_KCT).softmax(-1) @ v_KTC).flatten(0, 1).to(q_BHNC)
    return out_BHNC


def _rows(x_BHNC: Tensor) -> Tensor:
    """The kernels want the head dim without gaps."""
    return x_BHNC if x_BHNC.stride(3) == 1 else x_BHNC.contiguous()


def _splits(M: int) -> int:
    """Programs that share the context of one sequence: a power of two, by the table's width."""
    return min(MAX_SPLITS, triton.next_power_of_2(max(1, M * BLOCK // SPLIT_TOKENS)))


def _options(dtype: torch.dtype, block_C: int) -> dict[str, Any]:
    # The interpreter multiplies the bit patterns of bfloat16; a GPU must keep its tensor cores
    upcast = INTERPRETED and dtype == torch.bfloat16
    narrow = dtype.itemsize == 2 and block_C <= 128
    return {"UPCAST": upcast, "num_warps": 4, "num_stages": 3 if narrow else 2}


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _write_kernel(
    k_ptr, v_ptr, keys_ptr, values_ptr, starts_ptr, rows_ptr, tables_ptr, k_head, k_row, v_head,
    v_row, S, M, K, C, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One new token and one head."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    s = tl.arange(0, BLOCK_S)
    first_S = tl.load(rows_ptr + s, mask=s < S, other=2147483647)
    span = tl.sum((first_S <= row).to(tl.int32), axis=0) - 1  # the last that begins here or before
    position = tl.load(starts_ptr + span) + row - tl.load(rows_ptr + span)
    block = tl.load(tables_ptr + span.to(tl.int64) * M + position // BLOCK).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    in_C = c < C
    wide = row.to(tl.int64)
    k_C = tl.load(k_ptr + wide * k_row + head * k_head + c, mask=in_C, other=0.0)
    v_C = tl.load(v_ptr + wide * v_row + head * v_head + c, mask=in_C, other=0.0)
    at = (block * K + head) * C * BLOCK
    place = position % BLOCK
    tl.store(keys_ptr + at + c * BLOCK + place, k_C.to(keys_ptr.dtype.element_ty), mask=in_C)
    tl.store(values_ptr + at + place * C + c, v_C.to(values_ptr.dtype.element_ty), mask=in_C)


@triton.jit
def _load_blocks(
    keys_ptr, values_ptr, table_ptr, tokens, head, K, C,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Keys [C,T] and values [T,C] of the next BLOCKS blocks of a table, `tokens` being left."""
    b = tl.arange(0, BLOCKS)
    place = tl.arange(0, BLOCK)
    c = tl.arange(0, BLOCK_C)
    in_C = c < C
    block_B = tl.load(table_ptr + b, mask=b * BLOCK < tokens, other=0).to(tl.int64)
    block_B = (block_B * K + head) * C * BLOCK
    # in three dimensions, so that the compiler sees 16 neighbours in every block
    k_at = keys_ptr + block_B[None, :, None] + c[:, None, None] * BLOCK + place[None, None, :]
    k_CBT = tl.load(k_at, mask=in_C[:, None, None] & (b >= 0)[None, :, None], other=0.0)
    v_at = values_ptr + block_B[:, None, None] + place[None, :, None] * C + c[None, None, :]
    # masked by token: what an unwritten place holds may be NaN, and zero times that too
    in_BT = b[:, None] * BLOCK + place[None, :] < tokens
    v_BTC = tl.load(v_at, mask=in_BT[:, :, None] & in_C[None, None, :], other=0.0)
    STEP: tl.constexpr = BLOCKS * BLOCK
    return tl.reshape(k_CBT, [BLOCK_C, STEP]), tl.reshape(v_BTC, [STEP, BLOCK_C])


@triton.jit
def _attend_kernel(
    q_ptr, keys_ptr, values_ptr, starts_ptr, counts_ptr, rows_ptr, tables_ptr, out_ptr, sums_ptr,
    stats_ptr, q_head, q_row, M, H, K, C, window, scale,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """QUERIES new tokens of one span, all query heads of one key/value head, one split."""
    STEP: tl.constexpr = BLOCKS * BLOCK
    span = tl.program_id(0)
    head = tl.program_id(1) % K
    first = (tl.program_id(1) // K) * QUERIES
    split = tl.program_id(2)
    count = tl.load(counts_ptr + span)
    if first >= count:
        return
    start = tl.load(starts_ptr + span)
    m = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    in_C = c < C
    query_M = first + m // GROUP
    in_M = (m < QUERIES * GROUP) & (query_M < count)
    position_M = start + query_M
    row_M = (tl.load(rows_ptr + span) + query_M).to(tl.int64)
    head_M = head * GROUP + m % GROUP
    mask_MC = in_M[:, None] & in_C[None, :]
    q_at = q_ptr + (row_M * q_row + head_M * q_head)[:, None] + c[None, :]
    q_MC = tl.load(q_at, mask=mask_MC, other=0.0)

    end = start + tl.minimum(first + QUERIES, count)
    begin = 0
    if WINDOW:  # of the earliest query
        begin = tl.maximum(start + first + 1 - window, 0) // STEP * STEP
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(end - begin, STEP), SPLITS) * STEP
        begin += split * share
        end = tl.minimum(begin + share, end)

    max_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    out_MC = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    tables_ptr += span.to(tl.int64) * M
    t = tl.arange(0, STEP)
    for at in range(begin, end, STEP):
        k_CT, v_TC = _load_blocks(
            keys_ptr, values_ptr, tables_ptr + at // BLOCK, end - at, head, K, C,
            BLOCK, BLOCKS, BLOCK_C,
        )  # fmt: skip
        k_CT, v_TC = k_CT.to(q_MC.dtype), v_TC.to(q_MC.dtype)
        token_T = at + t
        allowed_MT = token_T[None, :] <= position_M[:, None]
        if WINDOW:
            allowed_MT &= token_T[None, :] > position_M[:, None] - window
        score_MT = tl.where(allowed_MT, _dot(q_MC, k_CT, UPCAST) * scale, -float("inf"))
        new_M = tl.maximum(max_M, tl.max(score_MT, axis=1))
        shift_M = tl.where(new_M == -float("inf"), 0.0, new_M)  # nothing allowed so far
        p_MT = tl.exp2(score_MT - shift_M[:, None])
        fade_M = tl.exp2(max_M - shift_M)
        sum_M = sum_M * fade_M + tl.sum(p_MT, axis=1)
        out_MC = out_MC * fade_M[:, None] + _dot(p_MT.to(q_MC.dtype), v_TC, UPCAST)
        max_M = new_M

    place_M = row_M * H + head_M
    if SPLITS > 1:
        place_M = place_M * SPLITS + split
        tl.store(sums_ptr + place_M[:, None] * C + c[None, :], out_MC, mask=mask_MC)
        tl.store(stats_ptr + place_M * 2, max_M, mask=in_M)
        tl.store(stats_ptr + place_M * 2 + 1, sum_M, mask=in_M)
    else:
        out_at = out_ptr + place_M[:, None] * C + c[None, :]
        out_MC = out_MC / tl.where(in_M, sum_M, 1.0)[:, None]
        tl.store(out_at, out_MC.to(out_ptr.dtype.element_ty), mask=mask_MC)


@triton.jit
def _combine_kernel(
    sums_ptr, stats_ptr, out_ptr, H, C, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """One token and one head: the splits brought to one maximum and added."""
    place = tl.program_id(0).to(tl.int64) * H + tl.program_id(1)
    i = tl.arange(0, SPLITS)
    c = tl.arange(0, BLOCK_C)
    in_C = c < C
    max_I = tl.load(stats_ptr + (place * SPLITS + i) * 2)
    sum_I = tl.load(stats_ptr + (place * SPLITS + i) * 2 + 1)
    weight_I = tl.exp2(max_I - tl.max(max_I, axis=0))
    at_IC = (place * SPLITS + i)[:, None] * C + c[None, :]
    out_IC = tl.load(sums_ptr + at_IC, mask=in_C[None, :], other=0.0)
    out_C = tl.sum(out_IC * weight_I[:, None], axis=0) / tl.sum(sum_I * weight_I, axis=0)
    tl.store(out_ptr + place * C + c, out_C.to(out_ptr.dtype.element_ty), mask=in_C)


INTERPRETED = not isinstance(_write_kernel, triton.JITFunction)
