"""Experts of a few rows without a mapping table: every (token, choice) reads its expert's matrix.

For decoding: where so few rows are routed that hardly any two share an expert, nothing is gained by
sorting them (the rule is vLLM's: `tokens * top_k * 4 <= experts`), and at one token no two do. Two
launches of matrix-times-vector products in float32: h = act(up x), then y with the weighted sum
over a token's choices in a fixed order. Inference only. Letters: T tokens, K experts per token,
S=T*K rows, D hidden, F expert width, R rows of `up`, E experts.
Importing this module imports triton, so callers import it late. Checked under the interpreter and
compiled for sm_90; not yet run on a GPU.
"""
# mypy: allow-untyped-defs

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from growmoe.ops.tuning import Tile, tuned_tile

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# To tune. A row of `inner` bfloat16 is what a warp loads at once, several times over.
TILE = Tile(rows=1, cols=8, inner=512, warps=4, stages=2)


def few_rows(T: int, K: int, E: int) -> bool:
    """Whether sorting the rows by expert would gain nothing."""
    return T <= 1 or T * K * 4 <= E


def supported(x_TD: Tensor, weights_TK: Tensor, *w: Tensor | None) -> bool:
    """Whether `direct_experts` takes these parameters `w`: one dtype of DTYPES, one device, no
    gradient asked for."""
    experts = [tensor for tensor in w if tensor is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, weights_TK, *experts)):
        return False
    if x_TD.dtype not in DTYPES or any(tensor.dtype != x_TD.dtype for tensor in experts):
        return False
    if any(tensor.device != x_TD.device for tensor in experts):
        return False
    return INTERPRETED or (x_TD.is_cuda and torch.version.hip is None)


def direct_experts(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    up_ERD: Tensor,
    down_EDF: Tensor,
    up_bias_ER: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
) -> Tensor:
    """y_TD: for every token the weighted sum of its experts' down(act(up x)); act is SwiGLU (gate
    rows first) where `up` has 2F rows, else GELU (tanh form). Sums are float32, y has x's dtype.
    """
    (T, K), (E, R, D), F = experts_TK.shape, up_ERD.shape, down_EDF.shape[2]
    sizes = (E, D, F)
    h_SF, y_TD = x_TD.new_empty(T * K, F), x_TD.new_empty(T, D)
    if not T:
        return y_TD
    up, down = (
        tuned_tile(kernel, x_TD.device, x_TD.dtype, sizes, T * K) or TILE
        for kernel in ("direct_up", "direct_down")
    )
    direct_up(x_TD, experts_TK, up_ERD, up_bias_ER, h_SF, up, swiglu=R == 2 * F)
    direct_down(h_SF, experts_TK, weights_TK, down_EDF, down_bias_ED, y_TD, down)
    return y_TD


def direct_up(
    x_TD: Tensor, experts_TK: Tensor, up_ERD: Tensor, bias_ER: Tensor | None, h_SF: Tensor,
    tile: Tile, swiglu: bool,
) -> None:  # fmt: skip
    """Write h_SF = act(up_e x + bias_e) of every choice e."""
    (S, F), (T, D) = h_SF.shape, x_TD.shape
    with torch.cuda.device_of(x_TD):
        _direct_up_kernel[(triton.cdiv(F, tile.cols), S)](
            x_TD.contiguous(), up_ERD.contiguous(), up_ERD if bias_ER is None else bias_ER,
            experts_TK.contiguous(), h_SF, D, F, TOP_K=S // T, SWIGLU=swiglu,
            HAS_BIAS=bias_ER is not None, BLOCK_N=tile.cols, BLOCK_K=tile.inner,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def direct_down(
    h_SF: Tensor, experts_TK: Tensor, weights_TK: Tensor, down_EDF: Tensor,
    bias_ED: Tensor | None, y_TD: Tensor, tile: Tile,
) -> None:  # fmt: skip
    """Write y_TD = the sum over a token's choices e of weight * (down_e h + bias_e)."""
    (T, D), F = y_TD.shape, h_SF.shape[1]
    with torch.cuda.device_of(h_SF):
        _direct_down_kernel[(triton.cdiv(D, tile.cols), T)](
            h_SF, down_EDF.contiguous(), down_EDF if bias_ED is None else bias_ED,
            experts_TK.contiguous(), weights_TK.contiguous(), y_TD, D, F,
            TOP_K=experts_TK.shape[1], HAS_BIAS=bias_ED is not None, BLOCK_N=tile.cols,
            BLOCK_K=tile.inner, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


@triton.jit
def _row_sums(x_ptr, w_ptr, col, in_N, inner, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N]: rows `col` of the matrix at w_ptr times the vector at x_ptr, in float32."""
    k = tl.arange(0, BLOCK_K)
    at_NK = w_ptr + col[:, None] * inner + k[None, :]
    sum_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for done in range(0, inner, BLOCK_K):
        in_K = k < inner - done
        x_K = tl.load(x_ptr + done + k, mask=in_K, other=0.0).to(tl.float32)
        w_NK = tl.load(at_NK + done, mask=in_N[:, None] & in_K[None, :], other=0.0)
        sum_NK += w_NK.to(tl.float32) * x_K[None, :]
    return tl.sum(sum_NK, axis=1)


@triton.jit
def _direct_up_kernel(
    x_ptr, up_ptr, bias_ptr, experts_ptr, h_ptr, D, F, TOP_K: tl.constexpr,
    SWIGLU: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    expert = tl.load(experts_ptr + row)
    col = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_N = col < F
    R = F
    if SWIGLU:
        R = 2 * F
    x_ptr += (row // TOP_K) * D
    up_ptr += expert * R * D
    first_N = _row_sums(x_ptr, up_ptr, col, in_N, D, BLOCK_N, BLOCK_K)
    if HAS_BIAS:
        first_N += tl.load(bias_ptr + expert * R + col, mask=in_N, other=0.0).to(tl.float32)
    if SWIGLU:
        up_N = _row_sums(x_ptr, up_ptr, col + F, in_N, D, BLOCK_N, BLOCK_K)
        if HAS_BIAS:
            up_N += tl.load(bias_ptr + expert * R + F + col, mask=in_N, other=0.0).to(tl.float32)
        h_N = first_N * tl.sigmoid(first_N) * up_N
    else:  # x * sigmoid(2 z) is x/2 * (1 + tanh z)
        z_N = 0.7978845608028654 * (first_N + 0.044715 * first_N * first_N * first_N)
        h_N = first_N * tl.sigmoid(2.0 * z_N)
    tl.store(h_ptr + row * F + col, h_N.to(h_ptr.dtype.element_ty), mask=in_N)


@triton.jit
def _direct_down_kernel(
    h_ptr, down_ptr, bias_ptr, experts_ptr, weights_ptr, y_ptr, D, F, TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1).to(tl.int64)
    col = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_N = col < D
    y_N = tl.zeros([BLOCK_N], tl.float32)
    for k in range(TOP_K):
        row = token * TOP_K + k
        expert = tl.load(experts_ptr + row)
        weight = tl.load(weights_ptr + row).to(tl.float32)
        out_N = _row_sums(
            h_ptr + row * F, down_ptr + expert * D * F, col, in_N, F, BLOCK_N, BLOCK_K
        )
        if HAS_BIAS:
            out_N += tl.load(bias_ptr + expert * D + col, mask=in_N, other=0.0).to(tl.float32)
        y_N += weight * out_N
    tl.store(y_ptr + token * D + col, y_N.to(y_ptr.dtype.element_ty), mask=in_N)


INTERPRETED = not isinstance(_direct_up_kernel, triton.JITFunction)
