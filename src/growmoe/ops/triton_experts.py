"""SwiGLU experts over a mapping table: gather on load, weighted scatter, a fixed-order sum.

Three launches forward, six backward; no host sync, no float atomics, no [T,E,C] tensor. Row
tiles find their expert on the device from counts_E, so grids have the worst-case size and spare
programs leave at once. Letters: T tokens, K experts per token, S=T*K routed rows, N kept rows
(N <= S, less under a capacity), D hidden, F expert width, R=2F gate and up rows, E experts.
Importing this module imports triton, so callers import it late. Checked under the interpreter;
not yet run on a GPU.
"""
# mypy: allow-untyped-defs

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as nnf
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor
from torch.autograd.function import once_differentiable

from growmoe.ops.tuning import Tile, tuned_tile

MAX_EXPERTS = 4096
SHARED_BYTES = 96 * 1024  # fits every card since Ampere; an H100 has 228 KB
GROUP_ROWS = 8  # row tiles that walk the columns together, so that weights stay in L2


# To tune: by kernel and dtype, one tile per height. "gated" has two right operands. float32
# multiplies on the plain cores (no TF32), where large tiles would spill.
_FLOAT32 = (Tile(16, 32, 32, 4, 2), Tile(32, 32, 32, 4, 2), Tile(64, 64, 32, 8, 2))
TILES: dict[tuple[str, torch.dtype], tuple[Tile, ...]] = {
    ("gated", torch.bfloat16): (
        Tile(16, 64, 64, 4, 4), Tile(32, 64, 64, 4, 4), Tile(64, 64, 64, 4, 3),
        Tile(128, 64, 64, 8, 3),
    ),
    ("rows", torch.bfloat16): (
        Tile(16, 64, 128, 4, 4), Tile(32, 64, 128, 4, 3), Tile(64, 128, 64, 4, 3),
        Tile(128, 128, 64, 8, 3),
    ),
    ("weights", torch.bfloat16): (Tile(128, 128, 64, 8, 3),),
    ("gated", torch.float32): _FLOAT32,
    ("rows", torch.float32): _FLOAT32,
    ("weights", torch.float32): (Tile(64, 64, 32, 8, 2),),
}  # fmt: skip


def choose_tile(
    kernel: str, dtype: torch.dtype, rows_per_expert: float, cols: int, inner: int
) -> Tile:
    """The lowest tile that holds an expert's expected rows, else the highest; never wider than
    the next power of two of the matrix. `kernel` is "gated", "rows" or "weights"."""
    tiles = TILES[kernel, dtype]
    tile = next((tile for tile in tiles if tile.rows >= rows_per_expert), tiles[-1])
    return replace(tile, cols=_at_most(tile.cols, cols), inner=_at_most(tile.inner, inner))


def _at_most(block: int, size: int) -> int:
    return min(block, max(16, triton.next_power_of_2(size)))


def supported(x_TD: Tensor, up_ERD: Tensor, down_EDF: Tensor) -> bool:
    """Whether `moe_experts` takes these: all float32 or all bfloat16, on one CUDA device of
    capability 8.0 or more (or interpreted), sizes that agree, E <= 4096."""
    E, R, D = up_ERD.shape
    if x_TD.dtype not in (torch.float32, torch.bfloat16) or E > MAX_EXPERTS:
        return False
    if not x_TD.dtype == up_ERD.dtype == down_EDF.dtype or min(E, R, D) == 0:
        return False
    if x_TD.shape[1] != D or R % 2 or tuple(down_EDF.shape) != (E, D, R // 2):
        return False
    if not x_TD.device == up_ERD.device == down_EDF.device:
        return False
    if INTERPRETED:
        return True
    if not x_TD.is_cuda or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(x_TD.device) >= (8, 0)


def moe_experts(
    x_TD: Tensor,
    order_S: Tensor,
    counts_E: Tensor,
    weights_TK: Tensor,
    up_ERD: Tensor,
    down_EDF: Tensor,
) -> Tensor:
    """y_TD: for every token the weighted sum of its experts' down(silu(gate x) * up x).

    order_S and counts_E (int64) are a mapping table: order_S[i] is the flat index t*K+j of the
    i-th row, sorted by expert; expert e has counts_E[e] of them. The table may hold fewer than
    T*K rows (a capacity): what lies in order_S past the sum of the counts is never read, and
    routed rows that it does not name add nothing and get zero gradient. up_ERD is [E, 2F, D],
    gate rows first; down_EDF is [E, D, F]. Gradients flow to x_TD, weights_TK, up_ERD and
    down_EDF, the same bits on every run; sums are float32, y has x's dtype. Inputs that are not
    contiguous are copied. Raises ValueError where `supported` says no, or if shapes disagree.
    """
    if not supported(x_TD, up_ERD, down_EDF):
        raise ValueError(
            f"no kernel for x {list(x_TD.shape)} {x_TD.dtype}, up {list(up_ERD.shape)}"
            f" {up_ERD.dtype}, down {list(down_EDF.shape)} {down_EDF.dtype} on {x_TD.device}"
        )
    T, K = weights_TK.shape
    if x_TD.shape[0] != T or order_S.numel() > T * K or counts_E.shape != up_ERD.shape[:1]:
        raise ValueError(
            f"weights {[T, K]}, order {list(order_S.shape)} and counts {list(counts_E.shape)} do"
            f" not belong to {x_TD.shape[0]} tokens and {up_ERD.shape[0]} experts"
        )
    if order_S.dtype != torch.int64 or counts_E.dtype != torch.int64 or T * K >= 2**31:
        raise ValueError("order and counts must be int64, and rows fewer than 2^31")
    inputs = (x_TD, order_S, counts_E, weights_TK, up_ERD, down_EDF)
    tensors = tuple(tensor.contiguous() for tensor in inputs)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _MoEExperts.apply(*tensors)
    return _forward(tensors, keep=False)[0]


def gated_rows_reference(
    x_TD: Tensor, order_N: Tensor, counts_E: Tensor, up_ERD: Tensor, top_k: int
) -> Tensor:
    """h_NF = silu(gate x) * up x of the kept rows, in plain torch."""
    rows = x_TD.index_select(0, order_N // top_k).split(counts_E.tolist())
    pre = [nnf.linear(x_MD, up_RD).chunk(2, -1) for x_MD, up_RD in zip(rows, up_ERD.unbind(0))]
    return torch.cat([nnf.silu(gate_MF) * up_MF for gate_MF, up_MF in pre])


def weighted_sum_reference(
    h_NF: Tensor, order_N: Tensor, counts_E: Tensor, weights_TK: Tensor, down_EDF: Tensor
) -> Tensor:
    """y_TD: the sum over a token's kept rows of weight times down h, in plain torch."""
    groups = zip(h_NF.split(counts_E.tolist()), down_EDF.unbind(0))
    y_ND = torch.cat([nnf.linear(h_MF, down_DF) for h_MF, down_DF in groups])
    y_ND = y_ND * weights_TK.reshape(-1)[order_N, None].to(y_ND.dtype)
    T, K = weights_TK.shape
    return y_ND.new_zeros(T, y_ND.shape[1]).index_add(0, order_N // K, y_ND)


def moe_experts_reference(
    x_TD: Tensor,
    order_S: Tensor,
    counts_E: Tensor,
    weights_TK: Tensor,
    up_ERD: Tensor,
    down_EDF: Tensor,
) -> Tensor:
    """`moe_experts` in plain torch; its autograd is the reference of the backward kernels."""
    order_N = order_S[: int(counts_E.sum())]
    h_NF = gated_rows_reference(x_TD, order_N, counts_E, up_ERD, weights_TK.shape[1])
    return weighted_sum_reference(h_NF, order_N, counts_E, weights_TK, down_EDF)


class _MoEExperts(torch.autograd.Function):
    """Keeps the pre-activations only: the activation is computed again, and the gradient of a
    weight comes from (dy @ down) . activation, so expert outputs need not be kept."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        y_TD, pre_NR, inverse_S = _forward(tensors, keep=True)
        ctx.save_for_backward(*tensors, pre_NR, inverse_S)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, order_S, counts_E, weights_TK, up_ERD, down_EDF, pre_NR, inverse_S = ctx.saved_tensors
        need_x, _, _, need_weights, need_up, need_down = ctx.needs_input_grad
        dy_TD, top_k = dy_TD.contiguous(), weights_TK.shape[1]
        dx_TD = dweights_TK = dup_ERD = ddown_EDF = None
        with torch.cuda.device_of(x_TD):
            dpre_NR, h_NF, partial_CS = _gated_backward(
                dy_TD, order_S, counts_E, weights_TK, down_EDF, pre_NR
            )
            if need_x:
                dx_SD = _scattered_rows(dpre_NR, order_S, counts_E, None, up_ERD, weights_TK)
                dx_TD = _sum_rows(dx_SD, order_S, counts_E, inverse_S, weights_TK.shape)
            if need_weights:
                dweights_TK = _sum_partials(partial_CS, order_S, counts_E, inverse_S, weights_TK)
            if need_up:
                dup_ERD = _expert_weight_grad(
                    dpre_NR, x_TD, order_S, counts_E, up_ERD, top_k, False
                )
            if need_down:
                ddown_EDF = _expert_weight_grad(
                    dy_TD, h_NF, order_S, counts_E, down_EDF, top_k, gather_left=True
                )
        return dx_TD, None, None, dweights_TK, dup_ERD, ddown_EDF


def _forward(tensors: tuple[Tensor, ...], keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y_TD, the pre-activations [N, 2F] (none unless `keep`), and the inverse of the order."""
    x_TD, order_S, counts_E, weights_TK, up_ERD, down_EDF = tensors
    E, D, F = down_EDF.shape
    gated, down = (
        tuned_tile(kernel, x_TD.device, x_TD.dtype, (E, D, F), order_S.numel())
        for kernel in ("gated", "rows")
    )
    with torch.cuda.device_of(x_TD):
        h_NF, pre_NR, inverse_S = _gated_rows(
            x_TD, order_S, counts_E, up_ERD, weights_TK.shape, keep, gated
        )
        y_SD = _scattered_rows(h_NF, order_S, counts_E, weights_TK, down_EDF, weights_TK, down)
        y_TD = _sum_rows(y_SD, order_S, counts_E, inverse_S, weights_TK.shape)
    return y_TD, pre_NR, inverse_S


def _options(tile: Tile, E: int, dtype: torch.dtype) -> dict[str, Any]:
    # The interpreter multiplies the bit patterns of bfloat16; a GPU must keep its tensor cores
    upcast = INTERPRETED and dtype == torch.bfloat16
    return {
        "BLOCK_M": tile.rows, "BLOCK_N": tile.cols, "BLOCK_K": tile.inner,
        "BLOCK_E": triton.next_power_of_2(E), "UPCAST": upcast,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _row_grid(N: int, E: int, cols: int, tile: Tile) -> tuple[int]:
    """Enough programs for any counts: every expert with rows has at most one partial tile."""
    return ((N // tile.rows + min(E, N)) * triton.cdiv(cols, tile.cols),)


def _gated_rows(
    x_TD: Tensor, order_S: Tensor, counts_E: Tensor, up_ERD: Tensor, slots: torch.Size, keep: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (E, R, D), (T, K), N = up_ERD.shape, slots, order_S.numel()
    F = R // 2
    h_NF, pre_NR = x_TD.new_empty(N, F), x_TD.new_empty(N if keep else 0, R)
    inverse_S = order_S.new_empty(T * K, dtype=torch.int32)
    tile = tile or choose_tile("gated", x_TD.dtype, N / E, F, D)
    if N:
        _gated_rows_kernel[_row_grid(N, E, F, tile)](
            x_TD, up_ERD, order_S, counts_E, h_NF, pre_NR, inverse_S, D, F, E,
            TOP_K=K, KEEP=keep, GROUP=GROUP_ROWS, **_options(tile, E, x_TD.dtype),
        )  # fmt: skip
    return h_NF, pre_NR, inverse_S


def _scattered_rows(
    left_NI: Tensor, order_S: Tensor, counts_E: Tensor, scale_TK: Tensor | None, w: Tensor,
    slots_TK: Tensor, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """out_SD (row t*K+j): left @ w_e^T for w [E, D, I] with scales, left @ w_e for w [E, I, D]
    without. Rows that the table does not name stay uninitialised: `_sum_rows` skips them."""
    (N, inner), E = left_NI.shape, w.shape[0]
    D, strides = (w.shape[2], (1, w.shape[2])) if scale_TK is None else (w.shape[1], (inner, 1))
    out_SD = left_NI.new_empty(slots_TK.numel(), D)
    tile = tile or choose_tile("rows", w.dtype, N / E, D, inner)
    if N:
        _scattered_rows_kernel[_row_grid(N, E, D, tile)](
            left_NI, w, order_S, counts_E, slots_TK, out_SD, D, inner, *strides, E,
            SCALE=scale_TK is not None, GROUP=GROUP_ROWS, **_options(tile, E, w.dtype),
        )  # fmt: skip
    return out_SD


def _sum_rows(
    rows_SD: Tensor, order_S: Tensor, counts_E: Tensor, inverse_S: Tensor, slots: torch.Size
) -> Tensor:
    (T, K), D, E = slots, rows_SD.shape[1], counts_E.numel()
    y_TD = rows_SD.new_empty(T, D)
    block_D = min(512, triton.next_power_of_2(D))
    if T:
        _sum_rows_kernel[(triton.cdiv(T, 4) * triton.cdiv(D, block_D),)](
            rows_SD, order_S, counts_E, inverse_S, y_TD, T, D, E,
            TOP_K=K, BLOCK_T=4, BLOCK_D=block_D, BLOCK_E=triton.next_power_of_2(E),
        )  # fmt: skip
    return y_TD


def _gated_backward(
    dy_TD: Tensor, order_S: Tensor, counts_E: Tensor, weights_TK: Tensor, down_EDF: Tensor,
    pre_NR: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dpre_NR; w * h as h_NF; and per tile of F columns the parts of dweights, partial_CS."""
    (E, D, F), N = down_EDF.shape, order_S.numel()
    dpre_NR, h_NF = torch.empty_like(pre_NR), pre_NR.new_empty(N, F)
    tile = choose_tile("gated", dy_TD.dtype, N / E, F, D)
    parts = triton.cdiv(F, tile.cols)
    partial_CS = dy_TD.new_empty(parts, weights_TK.numel(), dtype=torch.float32)
    if N:
        _gated_backward_kernel[_row_grid(N, E, F, tile)](
            dy_TD, down_EDF, pre_NR, order_S, counts_E, weights_TK, dpre_NR, h_NF, partial_CS,
            D, F, E, weights_TK.numel(), TOP_K=weights_TK.shape[1], GROUP=GROUP_ROWS,
            **_options(tile, E, dy_TD.dtype),
        )  # fmt: skip
    return dpre_NR, h_NF, partial_CS


def _sum_partials(
    partial_CS: Tensor, order_S: Tensor, counts_E: Tensor, inverse_S: Tensor, weights_TK: Tensor
) -> Tensor:
    dweights_TK = torch.empty_like(weights_TK)
    (C, S), E = partial_CS.shape, counts_E.numel()
    if S:
        _sum_partials_kernel[(triton.cdiv(S, 256),)](
            partial_CS, order_S, counts_E, inverse_S, dweights_TK, C, S, E,
            BLOCK_S=256, BLOCK_E=triton.next_power_of_2(E),
        )  # fmt: skip
    return dweights_TK


def _expert_weight_grad(
    left: Tensor, right: Tensor, order_S: Tensor, counts_E: Tensor, w_EMN: Tensor, top_k: int,
    gather_left: bool,
) -> Tensor:  # fmt: skip
    """dw_e = left_e^T @ right_e over the rows of expert e. One operand has a row per kept row,
    the other (`gather_left` says which) a row per token."""
    E, M, N = w_EMN.shape
    dw_EMN = torch.empty_like(w_EMN)
    tile = choose_tile("weights", w_EMN.dtype, M, N, TILES["weights", w_EMN.dtype][0].inner)
    tile = replace(tile, rows=_at_most(tile.rows, M))
    _expert_weight_grad_kernel[(E * triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.cols),)](
        left, right, order_S, counts_E, dw_EMN, M, N, E, TOP_K=top_k, GATHER_LEFT=gather_left,
        **_options(tile, E, w_EMN.dtype),
    )  # fmt: skip
    return dw_EMN


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision="ieee")


@triton.jit
def _tile_place(pid, col_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles take a column before the next."""
    row_tiles = tl.num_programs(0) // col_tiles
    group = pid // (GROUP * col_tiles)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = pid % (GROUP * col_tiles)
    return group * GROUP + within % height, within // height


@triton.jit
def _find_expert(counts_ptr, tile, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a row tile; expert >= E if it is spare."""
    e = tl.arange(0, BLOCK_E)
    count_E = tl.load(counts_ptr + e, mask=e < E, other=0).to(tl.int32)
    tiles_E = (count_E + (BLOCK_M - 1)) // BLOCK_M
    expert = tl.sum((tl.cumsum(tiles_E, axis=0) <= tile).to(tl.int32), axis=0)
    earlier_E = e < expert
    skipped = tl.sum(tl.where(earlier_E, tiles_E, 0), axis=0)
    start = tl.sum(tl.where(earlier_E, count_E, 0), axis=0)
    end = start + tl.sum(tl.where(e == expert, count_E, 0), axis=0)
    return expert, start + (tile - skipped) * BLOCK_M, end


@triton.jit
def _kept_rows(flat, mask, order_ptr, counts_ptr, inverse_ptr, E, BLOCK_E: tl.constexpr):
    """Which flat indices the table names. The inverse is written for kept rows only and never
    cleared; an entry counts if the order, up to its end, points back."""
    e = tl.arange(0, BLOCK_E)
    kept = tl.sum(tl.load(counts_ptr + e, mask=e < E, other=0), axis=0)
    row = tl.load(inverse_ptr + flat, mask=mask, other=-1)
    inside = (row >= 0) & (row < kept)
    return tl.load(order_ptr + row, mask=inside, other=-1) == flat


@triton.jit
def _gated_rows_kernel(
    x_ptr, up_ptr, order_ptr, counts_ptr, h_ptr, pre_ptr, inverse_ptr, D, F, E,
    TOP_K: tl.constexpr, KEEP: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """h = silu(x @ gate^T) * (x @ up^T) for rows of one expert, x gathered as it is loaded."""
    row_tile, col_tile = _tile_place(tl.program_id(0), tl.cdiv(F, BLOCK_N), GROUP)
    expert, first, end = _find_expert(counts_ptr, row_tile, E, BLOCK_M, BLOCK_E)
    if expert >= E:
        return
    row = first + tl.arange(0, BLOCK_M)
    in_M = row < end
    flat = tl.load(order_ptr + row, mask=in_M, other=0)
    if col_tile == 0:
        tl.store(inverse_ptr + flat, row, mask=in_M)
    col = (col_tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_N = col < F
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + (flat // TOP_K)[:, None] * D + k[None, :]
    w_ptr = up_ptr + expert.to(tl.int64) * 2 * F * D
    gate_at = w_ptr + col[None, :] * D + k[:, None]
    up_at = w_ptr + (col + F)[None, :] * D + k[:, None]
    gate_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for done in range(0, D, BLOCK_K):
        in_K = k < D - done
        mask_KN = in_K[:, None] & in_N[None, :]
        x_MK = tl.load(x_at, mask=in_M[:, None] & in_K[None, :], other=0.0)
        gate_MN = _dot(x_MK, tl.load(gate_at, mask=mask_KN, other=0.0), gate_MN, UPCAST)
        up_MN = _dot(x_MK, tl.load(up_at, mask=mask_KN, other=0.0), up_MN, UPCAST)
        x_at += BLOCK_K
        gate_at += BLOCK_K
        up_at += BLOCK_K
    mask_MN = in_M[:, None] & in_N[None, :]
    h_MN = gate_MN * tl.sigmoid(gate_MN) * up_MN
    h_at = h_ptr + row.to(tl.int64)[:, None] * F + col[None, :]
    tl.store(h_at, h_MN.to(h_ptr.dtype.element_ty), mask=mask_MN)
    if KEEP:
        pre_at = pre_ptr + row.to(tl.int64)[:, None] * 2 * F + col[None, :]
        tl.store(pre_at, gate_MN.to(pre_ptr.dtype.element_ty), mask=mask_MN)
        tl.store(pre_at + F, up_MN.to(pre_ptr.dtype.element_ty), mask=mask_MN)


@triton.jit
def _scattered_rows_kernel(
    left_ptr, w_ptr, order_ptr, counts_ptr, scale_ptr, out_ptr, cols, inner, stride_col,
    stride_inner, E, SCALE: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Rows of one expert times its matrix (and their scale), stored at their flat indices."""
    row_tile, col_tile = _tile_place(tl.program_id(0), tl.cdiv(cols, BLOCK_N), GROUP)
    expert, first, end = _find_expert(counts_ptr, row_tile, E, BLOCK_M, BLOCK_E)
    if expert >= E:
        return
    row = first + tl.arange(0, BLOCK_M)
    in_M = row < end
    flat = tl.load(order_ptr + row, mask=in_M, other=0)
    col = (col_tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_N = col < cols
    k = tl.arange(0, BLOCK_K)
    left_at = left_ptr + row.to(tl.int64)[:, None] * inner + k[None, :]
    w_at = w_ptr + expert.to(tl.int64) * cols * inner
    w_at += col[None, :] * stride_col + k.to(tl.int64)[:, None] * stride_inner
    out_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for done in range(0, inner, BLOCK_K):
        in_K = k < inner - done
        left_MK = tl.load(left_at, mask=in_M[:, None] & in_K[None, :], other=0.0)
        w_KN = tl.load(w_at, mask=in_K[:, None] & in_N[None, :], other=0.0)
        out_MN = _dot(left_MK, w_KN, out_MN, UPCAST)
        left_at += BLOCK_K
        w_at += BLOCK_K * stride_inner
    if SCALE:
        out_MN *= tl.load(scale_ptr + flat, mask=in_M, other=0.0).to(tl.float32)[:, None]
    out_at = out_ptr + flat[:, None] * cols + col[None, :]
    tl.store(out_at, out_MN.to(out_ptr.dtype.element_ty), mask=in_M[:, None] & in_N[None, :])


@triton.jit(do_not_specialize=["T"])
def _sum_rows_kernel(
    rows_ptr, order_ptr, counts_ptr, inverse_ptr, y_ptr, T, D, E,
    TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """y_TD: a token's kept rows added in the order of its slots."""
    col_tiles = tl.cdiv(D, BLOCK_D)
    t = (tl.program_id(0) // col_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = (tl.program_id(0) % col_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_T, in_D = t < T, d < D
    y_TD = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for k in range(TOP_K):
        flat = t.to(tl.int64) * TOP_K + k
        kept_T = _kept_rows(flat, in_T, order_ptr, counts_ptr, inverse_ptr, E, BLOCK_E)
        at_TD = rows_ptr + flat[:, None] * D + d[None, :]
        y_TD += tl.load(at_TD, mask=kept_T[:, None] & in_D[None, :], other=0.0).to(tl.float32)
    y_at = y_ptr + t.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(y_at, y_TD.to(y_ptr.dtype.element_ty), mask=in_T[:, None] & in_D[None, :])


@triton.jit(do_not_specialize=["slots"])
def _gated_backward_kernel(
    dy_ptr, down_ptr, pre_ptr, order_ptr, counts_ptr, weights_ptr, dpre_ptr, h_ptr, partial_ptr,
    D, F, E, slots, TOP_K: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dh = dy @ down for rows of one expert, dy gathered as it is loaded, through the gate."""
    row_tile, col_tile = _tile_place(tl.program_id(0), tl.cdiv(F, BLOCK_N), GROUP)
    expert, first, end = _find_expert(counts_ptr, row_tile, E, BLOCK_M, BLOCK_E)
    if expert >= E:
        return
    row = first + tl.arange(0, BLOCK_M)
    in_M = row < end
    flat = tl.load(order_ptr + row, mask=in_M, other=0)
    col = (col_tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_N = col < F
    k = tl.arange(0, BLOCK_K)
    dy_at = dy_ptr + (flat // TOP_K)[:, None] * D + k[None, :]
    w_at = down_ptr + expert.to(tl.int64) * D * F + k.to(tl.int64)[:, None] * F + col[None, :]
    dh_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for done in range(0, D, BLOCK_K):
        in_K = k < D - done
        dy_MK = tl.load(dy_at, mask=in_M[:, None] & in_K[None, :], other=0.0)
        w_KN = tl.load(w_at, mask=in_K[:, None] & in_N[None, :], other=0.0)
        dh_MN = _dot(dy_MK, w_KN, dh_MN, UPCAST)
        dy_at += BLOCK_K
        w_at += BLOCK_K * F
    mask_MN = in_M[:, None] & in_N[None, :]
    pre_at = row.to(tl.int64)[:, None] * 2 * F + col[None, :]
    gate_MN = tl.load(pre_ptr + pre_at, mask=mask_MN, other=0.0).to(tl.float32)
    up_MN = tl.load(pre_ptr + pre_at + F, mask=mask_MN, other=0.0).to(tl.float32)
    sigmoid_MN = tl.sigmoid(gate_MN)
    silu_MN = gate_MN * sigmoid_MN
    h_MN = silu_MN * up_MN
    # one slice per tile of columns, added later in a fixed order; an atomic would not be
    partial_at = partial_ptr + col_tile.to(tl.int64) * slots + flat
    tl.store(partial_at, tl.sum(dh_MN * h_MN, axis=1), mask=in_M)
    weight_M1 = tl.load(weights_ptr + flat, mask=in_M, other=0.0).to(tl.float32)[:, None]
    dh_MN *= weight_M1
    dgate_MN = dh_MN * up_MN * sigmoid_MN * (1.0 + gate_MN * (1.0 - sigmoid_MN))
    tl.store(dpre_ptr + pre_at, dgate_MN.to(dpre_ptr.dtype.element_ty), mask=mask_MN)
    dup_MN = dh_MN * silu_MN
    tl.store(dpre_ptr + pre_at + F, dup_MN.to(dpre_ptr.dtype.element_ty), mask=mask_MN)
    h_at = h_ptr + row.to(tl.int64)[:, None] * F + col[None, :]
    tl.store(h_at, (h_MN * weight_M1).to(h_ptr.dtype.element_ty), mask=mask_MN)


@triton.jit(do_not_specialize=["slots"])
def _sum_partials_kernel(
    partial_ptr, order_ptr, counts_ptr, inverse_ptr, dweights_ptr, parts, slots, E,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dweights: the parts of kept rows added in the order of the column tiles; others zero."""
    flat = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
    in_S = flat < slots
    kept_S = _kept_rows(flat, in_S, order_ptr, counts_ptr, inverse_ptr, E, BLOCK_E)
    sum_S = tl.zeros([BLOCK_S], tl.float32)
    for part in range(0, parts):
        part_ptr = partial_ptr + tl.cast(part, tl.int64) * slots
        sum_S += tl.load(part_ptr + flat, mask=kept_S, other=0.0)
    tl.store(dweights_ptr + flat, sum_S.to(dweights_ptr.dtype.element_ty), mask=in_S)


@triton.jit
def _expert_weight_grad_kernel(
    left_ptr, right_ptr, order_ptr, counts_ptr, dw_ptr, M, N, E,
    TOP_K: tl.constexpr, GATHER_LEFT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One tile of one expert's gradient, summed over all of its rows; zeros if it has none."""
    col_tiles = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * col_tiles
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    e = tl.arange(0, BLOCK_E)
    count_E = tl.load(counts_ptr + e, mask=e < E, other=0).to(tl.int32)
    start = tl.sum(tl.where(e < expert, count_E, 0), axis=0)
    end = start + tl.sum(tl.where(e == expert, count_E, 0), axis=0)
    m = ((tile // col_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = ((tile % col_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_M, in_N = m < M, n < N
    dw_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(start, end, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        in_K = row < end
        token = tl.load(order_ptr + row, mask=in_K, other=0) // TOP_K
        left_row = token if GATHER_LEFT else row.to(tl.int64)
        right_row = row.to(tl.int64) if GATHER_LEFT else token
        # both sides masked: zero times what lies there could be NaN
        left_MK = tl.load(
            left_ptr + left_row[None, :] * M + m[:, None],
            mask=in_M[:, None] & in_K[None, :], other=0.0,
        )  # fmt: skip
        right_KN = tl.load(
            right_ptr + right_row[:, None] * N + n[None, :],
            mask=in_K[:, None] & in_N[None, :], other=0.0,
        )  # fmt: skip
        dw_MN = _dot(left_MK, right_KN, dw_MN, UPCAST)
    dw_at = dw_ptr + expert.to(tl.int64) * M * N + m[:, None] * N + n[None, :]
    tl.store(dw_at, dw_MN.to(dw_ptr.dtype.element_ty), mask=in_M[:, None] & in_N[None, :])


INTERPRETED = not isinstance(_gated_rows_kernel, triton.JITFunction)
