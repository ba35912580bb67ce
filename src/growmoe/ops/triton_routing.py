"""Routing in two launches: scores, top-k, weights and counts; then a stable sort by expert.

Letters: T tokens, K experts per token, S=T*K routed rows, E experts, B blocks of tokens.
Importing this module imports triton, so callers import it late. Checked under the interpreter;
not yet run on a GPU.
"""
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of one program's [tokens, experts] tile, and its largest number of tokens. One program
# serves every T up to the tile; more tokens make more blocks.
TILE_ELEMENTS = 4096
MAX_BLOCK_TOKENS = 256
SCAN_BLOCKS = 16  # blocks whose histograms the scan holds at once
MAX_EXPERTS = 4096


class Routed(NamedTuple):
    """What `route` returns.

    scores_TE and weights_TK are float32 and differentiable; experts_TK and counts_E are int64;
    offsets_E (int32) is the inclusive cumulative sum of the counts; starts_BE (int32) says where
    the rows of a block of tokens begin in the order sorted by expert, for `mapping_table`.
    """

    scores_TE: Tensor
    weights_TK: Tensor
    experts_TK: Tensor
    counts_E: Tensor
    offsets_E: Tensor
    starts_BE: Tensor


def supported(logits_TE: Tensor) -> bool:
    """Whether these logits can be routed here: float32, on CUDA (or interpreted), E <= 4096."""
    ready = INTERPRETED or (logits_TE.is_cuda and torch.version.hip is None)
    return ready and logits_TE.dtype == torch.float32 and 1 <= logits_TE.shape[1] <= MAX_EXPERTS


def route(
    logits_TE: Tensor,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    bias_E: Tensor | None = None,
) -> Routed:
    """Choose K of E experts for every token, and count, in one launch.

    logits_TE is float32. Experts are chosen by score (+ bias_E, which moves the choice only and
    gets no gradient), ties going to the lower index; a NaN counts as the largest, as in
    `torch.topk`. Weights are the unbiased scores of the chosen, in the order of the choice,
    divided by their sum if `renormalize` (zeros if all of them underflow to zero). Gradients flow
    to logits_TE from scores_TE and weights_TK. Raises ValueError on an unknown scoring, a top_k
    outside 1..E, other dtypes or shapes, or more than 2^31 - 1 rows.
    """
    if logits_TE.dim() != 2 or logits_TE.dtype != torch.float32:
        raise ValueError(f"logits must be float32 [T, E], not {logits_TE.dtype} {logits_TE.shape}")
    T, E = logits_TE.shape
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring must be softmax or sigmoid, not {scoring!r}")
    if not 1 <= top_k <= E <= MAX_EXPERTS:
        raise ValueError(f"top_k {top_k} must lie in 1..E, and E ({E}) in 1..{MAX_EXPERTS}")
    if bias_E is not None and bias_E.shape != (E,):
        raise ValueError(f"the bias must have shape [{E}], not {list(bias_E.shape)}")
    if T * top_k >= 2**31:
        raise ValueError(f"{T} x {top_k} routed rows do not fit 32-bit row numbers")
    bias = None if bias_E is None else bias_E.detach().to(logits_TE.dtype).contiguous()
    return Routed(*_Route.apply(logits_TE, bias, top_k, scoring == "softmax", renormalize))


def route_reference(
    logits_TE: Tensor,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    bias_E: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`route` in plain torch, without starts_BE."""
    scores_TE = logits_TE.softmax(-1) if scoring == "softmax" else logits_TE.sigmoid()
    keys_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    # a stable sort, because topk leaves the order of ties open
    experts_TK = keys_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights_TK = scores_TE.gather(1, experts_TK)
    if renormalize:
        sum_T1 = weights_TK.sum(-1, keepdim=True)
        weights_TK = weights_TK / torch.where(sum_T1 == 0, 1.0, sum_T1)
    counts_E = torch.bincount(experts_TK.reshape(-1), minlength=logits_TE.shape[1])
    return scores_TE, weights_TK, experts_TK, counts_E, counts_E.cumsum(0).to(torch.int32)


def mapping_table(experts_TK: Tensor, starts_BE: Tensor) -> Tensor:
    """order_S (int64): the flat index t*K+j of the i-th row once rows are sorted by expert.

    A stable counting sort: within an expert the rows keep the order of their tokens, and no
    atomic decides anything. experts_TK and starts_BE come from one call of `route`; experts_TK
    must name an expert at most once per token, as `route` does.
    """
    T, K = experts_TK.shape
    B, E = starts_BE.shape
    order_S = torch.empty(T * K, dtype=torch.int64, device=experts_TK.device)
    block_T = _block_tokens(T, E)
    if max(1, triton.cdiv(T, block_T)) != B:
        raise ValueError(f"{B} blocks do not belong to {T} tokens")
    with torch.cuda.device_of(experts_TK):
        _scatter_kernel[(B,)](
            experts_TK.contiguous(), starts_BE, order_S, T, K, E,
            **_tile(block_T, E),
        )  # fmt: skip
    return order_S


def mapping_table_reference(experts_TK: Tensor) -> Tensor:
    """`mapping_table` in plain torch."""
    return torch.argsort(experts_TK.reshape(-1), stable=True)


class _Route(torch.autograd.Function):
    """The routing kernel and its backward as one function of the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, bias_E: Tensor | None, top_k: int, softmax: bool, norm: bool
    ) -> tuple[Tensor, ...]:
        T, E = logits_TE.shape
        block_T = _block_tokens(T, E)
        blocks = max(1, triton.cdiv(T, block_T))
        new = logits_TE.new_empty
        scores_TE, weights_TK = new(T, E), new(T, top_k)
        experts_TK = new(T, top_k, dtype=torch.int64)
        counts_E, offsets_E = new(E, dtype=torch.int64), new(E, dtype=torch.int32)
        histograms_BE, starts_BE = new(2, blocks, E, dtype=torch.int32).unbind(0)
        with torch.cuda.device_of(logits_TE):
            _route_kernel[(blocks,)](
                logits_TE.contiguous(), counts_E if bias_E is None else bias_E, scores_TE,
                weights_TK, experts_TK, histograms_BE, starts_BE, counts_E, offsets_E,
                counts_E if blocks == 1 else _ticket(logits_TE.device), T, top_k, E, blocks,
                SOFTMAX=softmax, RENORMALIZE=norm, HAS_BIAS=bias_E is not None,
                SINGLE=blocks == 1, BLOCK_B=SCAN_BLOCKS, **_tile(block_T, E),
            )  # fmt: skip
        ctx.mark_non_differentiable(experts_TK, counts_E, offsets_E, starts_BE)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scores_TE, experts_TK)
        ctx.softmax, ctx.norm = softmax, norm
        return scores_TE, weights_TK, experts_TK, counts_E, offsets_E, starts_BE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dscores_TE, dweights_TK = grads[0], grads[1]
        scores_TE, experts_TK = ctx.saved_tensors
        T, E = scores_TE.shape
        dlogits_TE = torch.empty_like(scores_TE)
        block_T = _block_tokens(T, E)
        with torch.cuda.device_of(scores_TE):
            _route_backward_kernel[(max(1, triton.cdiv(T, block_T)),)](
                scores_TE, experts_TK,
                scores_TE if dscores_TE is None else dscores_TE.contiguous(),
                scores_TE if dweights_TK is None else dweights_TK.contiguous(),
                dlogits_TE, T, experts_TK.shape[1], E,
                SOFTMAX=ctx.softmax, RENORMALIZE=ctx.norm, HAS_SCORES=dscores_TE is not None,
                HAS_WEIGHTS=dweights_TK is not None, **_tile(block_T, E),
            )  # fmt: skip
        return dlogits_TE, None, None, None, None


def _block_tokens(T: int, E: int) -> int:
    """Tokens per program: a power of two, few for many experts."""
    most = min(MAX_BLOCK_TOKENS, max(1, TILE_ELEMENTS // triton.next_power_of_2(E)))
    return min(most, max(16, triton.next_power_of_2(max(T, 1))))


def _tile(block_T: int, E: int) -> dict[str, int]:
    """The tile of one program and the warps that hold it: 16 elements a thread, so none spill."""
    block_E = triton.next_power_of_2(E)
    return {
        "BLOCK_T": block_T,
        "BLOCK_E": block_E,
        "num_warps": 8 if block_T * block_E > 2048 else 4,
    }


_TICKETS: dict[tuple[torch.device, int], Tensor] = {}


def _ticket(device: torch.device) -> Tensor:
    """A zero that the last block sets back to zero, so that no call pays for clearing it.

    One per stream: launches of one stream never overlap. A captured graph may be replayed on any
    stream, so it gets a zero of its own (and clears it in the graph).
    """
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _TICKETS:
        _TICKETS[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _TICKETS[key]


@triton.jit
def _scan_blocks(
    histograms_ptr, starts_ptr, counts_ptr, offsets_ptr, E, blocks,
    BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """From the histograms of all blocks: counts, offsets, and where each block's rows start."""
    e = tl.arange(0, BLOCK_E)
    in_E = e < E
    counts_E = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, blocks, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        at_BE = b[:, None] * E + e[None, :]
        mask_BE = (b < blocks)[:, None] & in_E[None, :]
        # .cg: other SMs wrote these, and L1 is not coherent
        chunk_BE = tl.load(histograms_ptr + at_BE, mask=mask_BE, other=0, cache_modifier=".cg")
        counts_E += tl.sum(chunk_BE, axis=0)
    offsets_E = tl.cumsum(counts_E, axis=0)
    tl.store(counts_ptr + e, counts_E.to(tl.int64), mask=in_E)
    tl.store(offsets_ptr + e, offsets_E, mask=in_E)
    next_E = offsets_E - counts_E
    for first in range(0, blocks, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        at_BE = b[:, None] * E + e[None, :]
        mask_BE = (b < blocks)[:, None] & in_E[None, :]
        chunk_BE = tl.load(histograms_ptr + at_BE, mask=mask_BE, other=0, cache_modifier=".cg")
        before_BE = tl.cumsum(chunk_BE, axis=0) - chunk_BE
        tl.store(starts_ptr + at_BE, next_E[None, :] + before_BE, mask=mask_BE)
        next_E += tl.sum(chunk_BE, axis=0)


@triton.jit(do_not_specialize=["T", "blocks"])
def _route_kernel(
    logits_ptr, bias_ptr, scores_ptr, weights_ptr, experts_ptr, histograms_ptr, starts_ptr,
    counts_ptr, offsets_ptr, ticket_ptr, T, K, E, blocks,
    SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
    SINGLE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One program routes BLOCK_T tokens; the last one to finish scans all histograms."""
    block = tl.program_id(0)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    in_T, in_E = t < T, e < E
    mask_TE = in_T[:, None] & in_E[None, :]
    at_TE = t.to(tl.int64)[:, None] * E + e[None, :]
    # tokens past the end read zeros, so that no row of a softmax is all -inf
    logits_TE = tl.load(logits_ptr + at_TE, mask=mask_TE, other=0.0)
    if SOFTMAX:
        logits_TE = tl.where(in_E[None, :], logits_TE, -float("inf"))
        exp_TE = tl.exp(logits_TE - tl.max(logits_TE, axis=1)[:, None])
        scores_TE = exp_TE / tl.sum(exp_TE, axis=1)[:, None]
    else:
        scores_TE = tl.where(in_E[None, :], 1.0 / (1.0 + tl.exp(-logits_TE)), 0.0)
    tl.store(scores_ptr + at_TE, scores_TE, mask=mask_TE)

    keys_TE = scores_TE
    if HAS_BIAS:
        keys_TE += tl.load(bias_ptr + e, mask=in_E, other=0.0)[None, :]
    # as topk does; also, a NaN would equal no maximum and leave its row without a choice
    keys_TE = tl.where(keys_TE != keys_TE, float("inf"), keys_TE)
    # slot: K while an expert is free, then its place among the chosen. A mark of its own rather
    # than a key of -inf, because a bias may be -inf
    slot_TE = tl.zeros([BLOCK_T, BLOCK_E], tl.int32) + K
    for k in range(0, K):
        free_TE = (slot_TE == K) & in_E[None, :]
        best_T = tl.max(tl.where(free_TE, keys_TE, -float("inf")), axis=1)
        ties_TE = free_TE & (keys_TE == best_T[:, None])
        choice_T = tl.min(tl.where(ties_TE, e[None, :], BLOCK_E), axis=1)
        slot_TE = tl.where(e[None, :] == choice_T[:, None], k, slot_TE)
    chosen_TE = (slot_TE < K) & mask_TE
    weights_TE = scores_TE
    if RENORMALIZE:
        sum_T = tl.sum(tl.where(chosen_TE, scores_TE, 0.0), axis=1)
        weights_TE = scores_TE / tl.where(sum_T == 0.0, 1.0, sum_T)[:, None]
    at_slot_TE = t.to(tl.int64)[:, None] * K + slot_TE
    tl.store(weights_ptr + at_slot_TE, weights_TE, mask=chosen_TE)
    experts_TE = tl.zeros([BLOCK_T, BLOCK_E], tl.int64) + e[None, :]
    tl.store(experts_ptr + at_slot_TE, experts_TE, mask=chosen_TE)
    histogram_E = tl.sum(chosen_TE.to(tl.int32), axis=0)
    tl.store(histograms_ptr + block * E + e, histogram_E, mask=in_E)

    tl.debug_barrier()  # all threads have stored before one of them draws the ticket
    last = True
    if not SINGLE:
        # acq_rel: our histogram is visible to who draws later, theirs to us if we are last
        last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == blocks - 1
    if last:
        if not SINGLE:
            tl.store(ticket_ptr, 0)
        _scan_blocks(
            histograms_ptr, starts_ptr, counts_ptr, offsets_ptr, E, blocks, BLOCK_B, BLOCK_E
        )


@triton.jit(do_not_specialize=["T"])
def _scatter_kernel(
    experts_ptr, starts_ptr, order_ptr, T, K, E, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """A row's place: where its block starts in its expert, plus earlier rows of its block."""
    block = tl.program_id(0)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    in_T = t < T
    row_T = t.to(tl.int64) * K
    slot_TE = tl.zeros([BLOCK_T, BLOCK_E], tl.int32) + K
    for k in range(0, K):
        expert_T = tl.load(experts_ptr + row_T + k, mask=in_T, other=-1)
        slot_TE = tl.where(e[None, :] == expert_T[:, None], k, slot_TE)
    chosen_TE = slot_TE < K
    ones_TE = chosen_TE.to(tl.int32)
    start_E = tl.load(starts_ptr + block * E + e, mask=e < E, other=0)
    # a token names an expert at most once: counting tokens counts rows
    place_TE = start_E[None, :] + tl.cumsum(ones_TE, axis=0) - ones_TE
    tl.store(order_ptr + place_TE, row_T[:, None] + slot_TE, mask=chosen_TE)


@triton.jit(do_not_specialize=["T"])
def _route_backward_kernel(
    scores_ptr, experts_ptr, dscores_ptr, dweights_ptr, dlogits_ptr, T, K, E,
    SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, HAS_SCORES: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dlogits from dscores and dweights, with the weights recomputed from the scores."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    in_T = t < T
    mask_TE = in_T[:, None] & (e < E)[None, :]
    at_TE = t.to(tl.int64)[:, None] * E + e[None, :]
    scores_TE = tl.load(scores_ptr + at_TE, mask=mask_TE, other=0.0)
    d_TE = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    if HAS_SCORES:
        d_TE += tl.load(dscores_ptr + at_TE, mask=mask_TE, other=0.0)
    if HAS_WEIGHTS:
        row_T = t.to(tl.int64) * K
        dweights_TE = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        chosen_TE = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
        for k in range(0, K):
            expert_T = tl.load(experts_ptr + row_T + k, mask=in_T, other=-1)
            dweight_T = tl.load(dweights_ptr + row_T + k, mask=in_T, other=0.0)
            here_TE = e[None, :] == expert_T[:, None]
            dweights_TE = tl.where(here_TE, dweight_T[:, None], dweights_TE)
            chosen_TE = tl.where(here_TE, 1, chosen_TE)
        if RENORMALIZE:  # w = s / sum(s): dw/ds = (1 - w ...) / sum
            chosen_scores_TE = tl.where(chosen_TE == 1, scores_TE, 0.0)
            sum_T = tl.sum(chosen_scores_TE, axis=1)
            sum_T = tl.where(sum_T == 0.0, 1.0, sum_T)
            mean_T = tl.sum(dweights_TE * chosen_scores_TE, axis=1) / sum_T
            dweights_TE = (dweights_TE - mean_T[:, None]) / sum_T[:, None]
        d_TE += tl.where(chosen_TE == 1, dweights_TE, 0.0)
    if SOFTMAX:
        d_TE = scores_TE * (d_TE - tl.sum(d_TE * scores_TE, axis=1)[:, None])
    else:
        d_TE = d_TE * scores_TE * (1.0 - scores_TE)
    tl.store(dlogits_ptr + at_TE, d_TE, mask=mask_TE)


INTERPRETED = not isinstance(_route_kernel, triton.JITFunction)
