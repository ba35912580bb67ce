"""The CPU kernels of `growmoe/native`, called through their plain C interface.

They are compiled when the package is built; where they are not, `available()` is False and callers
use torch. What goes in and comes out is float32, and sums are; weights are packed once, in float32,
bfloat16, int8 or int4, and all but the first are multiplied with inputs rounded to bfloat16. A row
of any result has the same bits alone and in any batch, because every kernel adds up in an order
that depends on the weights' shape only.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from growmoe.errors import GrowmoeError
from growmoe.ops.library import LIBRARY, installed

Form = Literal["float32", "bfloat16", "int8", "int4"]
FORMS: tuple[Form, ...] = ("float32", "bfloat16", "int8", "int4")
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")
MOST_HEAD_DIM = 512
"""The largest head that the attention kernel takes."""
GROUP = 32
"""Inputs that share a scale in int8 and int4."""

_VERSION = 2
"""GM_VERSION of the header that the structures below follow."""
_MIXES = ("none", "sum", "sigmoid_gate", "softmax2")
_Pointer = ctypes.c_void_p
_Int = ctypes.c_int32
_Long = ctypes.c_int64


class _Weight(ctypes.Structure):
    _fields_ = (
        ("form", _Int), ("n", _Int), ("k", _Int), ("reserved", _Int),
        ("data", _Pointer), ("bias", _Pointer),
    )  # fmt: skip


class _Expert(ctypes.Structure):
    _fields_ = (("up", _Weight), ("down", _Weight))


class _ExpertsCall(ctypes.Structure):
    _fields_ = (
        ("x", _Pointer), ("x_stride", _Long), ("y", _Pointer), ("chosen", _Pointer),
        ("shares", _Pointer), ("experts", _Pointer),
        ("tokens", _Int), ("top_k", _Int), ("count", _Int), ("activation", _Int),
        ("add", _Int), ("reserved", _Int),
    )  # fmt: skip


class _CombineCall(ctypes.Structure):
    _fields_ = (
        ("rows", _Pointer), ("shares", _Pointer), ("y", _Pointer),
        ("tokens", _Int), ("top_k", _Int), ("hidden", _Int), ("reserved", _Int),
    )  # fmt: skip


class _RouterCall(ctypes.Structure):
    _fields_ = (
        ("x", _Pointer), ("router", _Pointer), ("bias", _Pointer), ("logits", _Pointer),
        ("scores", _Pointer), ("mix", _Pointer), ("chosen", _Pointer), ("shares", _Pointer),
        ("tokens", _Int), ("top_k", _Int), ("sigmoid", _Int), ("renormalize", _Int),
        ("mixing", _Int), ("groups", _Int), ("top_groups", _Int), ("reserved", _Int),
    )  # fmt: skip


class _AttentionCall(ctypes.Structure):
    _fields_ = (
        ("qkv", _Pointer), ("q_norm", _Pointer), ("k_norm", _Pointer), ("cosines", _Pointer),
        ("sines", _Pointer), ("keys", _Pointer), ("values", _Pointer), ("y", _Pointer),
        ("starts", _Pointer), ("counts", _Pointer), ("rows", _Pointer), ("tables", _Pointer),
        ("spans", _Int), ("table_stride", _Int), ("heads", _Int), ("kv_heads", _Int),
        ("head_dim", _Int), ("bfloat16_cache", _Int), ("window", _Int), ("reserved", _Int),
        ("norm_eps", ctypes.c_float),
    )  # fmt: skip


class _PlainCall(ctypes.Structure):
    _fields_ = (
        ("x", _Pointer), ("up", _Pointer), ("down", _Pointer), ("y", _Pointer),
        ("chosen", _Pointer), ("shares", _Pointer), ("tokens", _Int), ("top_k", _Int),
        ("count", _Int), ("hidden", _Int), ("width", _Int), ("bfloat16", _Int),
    )  # fmt: skip


class _LayerCall(ctypes.Structure):
    _fields_ = (
        ("x", _Pointer), ("y", _Pointer), ("attn_norm", _Pointer), ("mlp_norm", _Pointer),
        ("qkv", _Pointer), ("o", _Pointer), ("attention", _AttentionCall),
        ("router", _RouterCall), ("experts", _ExpertsCall), ("tokens", _Int), ("hidden", _Int),
        ("norm_eps", ctypes.c_float), ("reserved", _Int),
    )  # fmt: skip


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels, unless there are none or GROWMOE_NATIVE=0 says to do without."""
    if not installed():
        return None
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:  # built for another system
        return None
    if not hasattr(library, "gm_version") or library.gm_version() != _VERSION:
        return None  # of another checkout: build it again
    for name in ("gm_best_level", "gm_level"):
        getattr(library, name).argtypes = ()
    library.gm_set_level.argtypes = (_Int,)
    library.gm_packed_bytes.argtypes = (_Int, _Int, _Int)
    library.gm_packed_bytes.restype = _Long
    library.gm_pack.argtypes = (_Int, _Int, _Int, _Pointer, _Pointer, _Pointer, _Int)
    library.gm_pack.restype = None
    library.gm_quantize.argtypes = (_Pointer, _Int, _Int, _Int, _Pointer, _Pointer, _Int)
    library.gm_linear.argtypes = (
        _Pointer, _Pointer, _Long, _Pointer, _Long, _Int, _Int, _Int
    )  # fmt: skip
    library.gm_rms_norm.argtypes = (
        _Pointer, _Pointer, _Pointer, _Int, _Int, ctypes.c_float, _Int
    )  # fmt: skip
    for name in (
        "gm_route",
        "gm_experts",
        "gm_combine",
        "gm_attention",
        "gm_layer",
        "gm_plain_experts",
    ):
        getattr(library, name).argtypes = (_Pointer, _Int)
    library.gm_read_bandwidth.argtypes = (_Pointer, _Long, _Int)
    library.gm_read_bandwidth.restype = ctypes.c_double
    return library


def available() -> bool:
    """Whether the kernels were compiled and can be loaded."""
    return _library() is not None


def level() -> str | None:
    """The instruction set in use, one of LEVELS; None without the library."""
    library = _library()
    return None if library is None else LEVELS[library.gm_level()]


def set_level(name: str) -> str:
    """Use the instruction set `name`, or the best this processor has below it; returns which."""
    return LEVELS[_loaded().gm_set_level(LEVELS.index(name))]


def read_bandwidth(memory: Tensor, threads: int) -> float:
    """Bytes per second at which `memory` is read once by so many threads."""
    size = memory.numel() * memory.element_size()
    return float(_loaded().gm_read_bandwidth(memory.data_ptr(), size, threads))


def _loaded() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise GrowmoeError("the native kernels are not installed; see `growmoe doctor`")
    return library


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("out of memory in a native kernel")


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight [N,K] as the kernels read it; `bias` [N] is added to the product."""

    data: Tensor
    """uint8, private layout."""
    form: Form
    outputs: int
    inputs: int
    bias: Tensor | None
    call: _Weight
    """What the kernels are given."""

    @property
    def bytes(self) -> int:
        """Memory of the packed weight."""
        return self.data.numel()


def packed_bytes(form: Form, outputs: int, inputs: int) -> int:
    """Memory that a weight [N,K] takes when packed."""
    return int(_loaded().gm_packed_bytes(FORMS.index(form), outputs, inputs))


def pack(
    w_NK: Tensor, form: Literal["float32", "bfloat16"], bias_N: Tensor | None = None
) -> Packed:
    """A weight in floating point, packed."""
    source = w_NK.to(torch.float32).contiguous()
    return _pack(source, None, form, bias_N)


def pack_integers(
    values_NK: Tensor, scales_NG: Tensor, form: Literal["int8", "int4"],
    bias_N: Tensor | None = None,
) -> Packed:  # fmt: skip
    """Quantised weights: int8 values and a bfloat16 scale per 32 inputs, packed."""
    return _pack(values_NK.contiguous(), scales_NG.to(torch.bfloat16).contiguous(), form, bias_N)


def _pack(source: Tensor, scales: Tensor | None, form: Form, bias_N: Tensor | None) -> Packed:
    N, K = source.shape
    data = torch.empty(packed_bytes(form, N, K), dtype=torch.uint8)
    _loaded().gm_pack(
        FORMS.index(form), N, K, source.data_ptr(), None if scales is None else scales.data_ptr(),
        data.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return packed_from(data, form, N, K, bias_N)


def quantize(w_NK: Tensor, bits: int) -> tuple[Tensor, Tensor] | None:
    """Integers and scales as `ops.quantized.quantize` defines them, None if not all are finite."""
    w_NK = w_NK.to(torch.float32).contiguous()
    N, K = w_NK.shape
    values_NK = torch.empty(N, K, dtype=torch.int8)
    scales_NG = torch.empty(N, -(-K // GROUP), dtype=torch.bfloat16)
    bad = _loaded().gm_quantize(
        w_NK.data_ptr(), N, K, bits, values_NK.data_ptr(), scales_NG.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return None if bad else (values_NK, scales_NG)


def packed_from(
    data: Tensor, form: Form, outputs: int, inputs: int, bias_N: Tensor | None = None
) -> Packed:
    """Bytes that were packed before, as a weight again."""
    bias_N = None if bias_N is None else bias_N.to(torch.float32).contiguous()
    pointer = None if bias_N is None else bias_N.data_ptr()
    call = _Weight(FORMS.index(form), outputs, inputs, 0, data.data_ptr(), pointer)
    return Packed(data, form, outputs, inputs, bias_N, call)


def linear(x_TK: Tensor, w: Packed) -> Tensor:
    """y_TN = x_TK W^T + bias, float32; x_TK has contiguous rows."""
    T, N = x_TK.shape[0], w.outputs
    y_TN = torch.empty(T, N)
    _check(
        _loaded().gm_linear(
            ctypes.byref(w.call), x_TK.data_ptr(), x_TK.stride(0), y_TN.data_ptr(), N, T, 0,
            torch.get_num_threads(),
        )
    )  # fmt: skip
    return y_TN


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over contiguous float32 rows."""
    y_TD = torch.empty_like(x_TD)
    D = x_TD.shape[-1]
    _check(
        _loaded().gm_rms_norm(
            x_TD.data_ptr(), weight_D.data_ptr(), y_TD.data_ptr(), x_TD.numel() // D, D, eps,
            torch.get_num_threads(),
        )
    )  # fmt: skip
    return y_TD


class PackedExpert:
    """One feed-forward expert: `up` (for SwiGLU 16 gate rows, then their 16 up rows, and so on, see
    `interleaved`) and `down`."""

    def __init__(self, up: Packed, down: Packed) -> None:
        self.up, self.down = up, down
        self.call = _Expert(up.call, down.call)

    @property
    def bytes(self) -> int:
        """Memory of both weights."""
        return self.up.bytes + self.down.bytes


def interleaved(gate_FX: Tensor, up_FX: Tensor) -> Tensor:
    """Rows of gate and up in turns of 16, with zeros where F is no multiple of 16."""
    missing = -gate_FX.shape[0] % 16
    if missing:
        zeros = gate_FX.new_zeros(missing, *gate_FX.shape[1:])
        gate_FX, up_FX = torch.cat((gate_FX, zeros)), torch.cat((up_FX, zeros))
    return torch.stack((gate_FX.unflatten(0, (-1, 16)), up_FX.unflatten(0, (-1, 16))), 1).flatten(
        0, 2
    )


class ExpertTable:
    """Pointers to the experts of a layer; those that are not in memory are null and must not be
    chosen."""

    def __init__(self, experts: Sequence[PackedExpert | None], gelu: bool) -> None:
        self.experts = list(experts)
        self.activation = int(gelu)
        addresses = [None if e is None else ctypes.addressof(e.call) for e in experts]
        self.pointers = (_Pointer * len(experts))(*addresses)

    def put(self, index: int, expert: PackedExpert | None) -> None:
        """Exchange expert number `index`."""
        self.experts[index] = expert
        self.pointers[index] = None if expert is None else ctypes.addressof(expert.call)


def experts(
    x_TD: Tensor, chosen_TK: Tensor, shares_TK: Tensor, table: ExpertTable, hidden: int
) -> Tensor:
    """y_TD: the sum over each token's experts, in order, of share * expert(x). int32 choices,
    float32 shares, both contiguous."""
    T, K = chosen_TK.shape
    y_TD = torch.empty(T, hidden)
    call = _ExpertsCall(
        x_TD.data_ptr(), x_TD.stride(0), y_TD.data_ptr(), chosen_TK.data_ptr(),
        shares_TK.data_ptr(), ctypes.addressof(table.pointers), T, K, len(table.experts),
        table.activation, 0, 0,
    )  # fmt: skip
    _check(_loaded().gm_experts(ctypes.byref(call), torch.get_num_threads()))
    return y_TD


def combine(rows_TKD: Tensor, shares_TK: Tensor) -> Tensor:
    """y_TD: the sum over each token's rows, in order, of share * row, with the bits that `experts`
    gives; contiguous float32."""
    T, K, D = rows_TKD.shape
    y_TD = torch.empty(T, D)
    call = _CombineCall(
        rows_TKD.data_ptr(), shares_TK.data_ptr(), y_TD.data_ptr(), T, K, D, 0
    )  # fmt: skip
    _check(_loaded().gm_combine(ctypes.byref(call), torch.get_num_threads()))
    return y_TD


def plain_experts(
    x_TD: Tensor, chosen_TK: Tensor, shares_TK: Tensor, up_ERD: Tensor, down_EDF: Tensor
) -> Tensor:
    """As `experts`, for SwiGLU experts in ordinary contiguous weights of x's dtype, float32 or
    bfloat16 (gate rows of `up` first). Returns float32 [T,D]. Meant for a few rows per expert."""
    (T, K), (E, D, width) = chosen_TK.shape, down_EDF.shape
    x_TD, chosen_TK = x_TD.contiguous(), chosen_TK.to(torch.int32).contiguous()
    shares_TK, y_TD = shares_TK.to(torch.float32).contiguous(), torch.empty(T, D)
    call = _PlainCall(
        x_TD.data_ptr(), up_ERD.data_ptr(), down_EDF.data_ptr(), y_TD.data_ptr(),
        chosen_TK.data_ptr(), shares_TK.data_ptr(), T, K, E, D, width,
        int(x_TD.dtype is torch.bfloat16),
    )  # fmt: skip
    _check(_loaded().gm_plain_experts(ctypes.byref(call), torch.get_num_threads()))
    return y_TD


@dataclass(frozen=True)
class Routed:
    """What a router decided: logits and scores [T,E], choices and shares [T,K]; with a fixed expert
    [T,K+1], it being number E."""

    logits_TE: Tensor
    scores_TE: Tensor
    chosen_TK: Tensor
    shares_TK: Tensor


@dataclass(frozen=True, eq=False)
class PackedRouter:
    """How a layer routes; see `models.router.Router` and `models.config.MoEConfig`."""

    weight: Packed
    bias_E: Tensor | None
    top_k: int
    sigmoid: bool
    renormalize: bool
    groups: int = 1
    top_groups: int = 1
    mix: Literal["none", "sum", "sigmoid_gate", "softmax2"] = "none"
    mix_weight: Packed | None = None


def route(x_TD: Tensor, router: PackedRouter) -> Routed:
    """Top-k routing of contiguous float32 rows, and the fixed expert's share."""
    routed, call = _room(x_TD.shape[0], router), _RouterCall()
    _describe(call, router)
    _point(call, routed)
    call.x, call.tokens = x_TD.data_ptr(), x_TD.shape[0]
    _check(_loaded().gm_route(ctypes.byref(call), torch.get_num_threads()))
    return routed


def _room(T: int, router: PackedRouter) -> Routed:
    E, wide = router.weight.outputs, router.top_k + (router.mix != "none")
    return Routed(
        torch.empty(T, E), torch.empty(T, E), torch.empty(T, wide, dtype=torch.int32),
        torch.empty(T, wide),
    )  # fmt: skip


def _describe(call: _RouterCall, router: PackedRouter) -> None:
    call.router = ctypes.addressof(router.weight.call)
    call.bias = None if router.bias_E is None else router.bias_E.data_ptr()
    call.mix = None if router.mix_weight is None else ctypes.addressof(router.mix_weight.call)
    call.top_k, call.sigmoid, call.renormalize = router.top_k, router.sigmoid, router.renormalize
    call.mixing, call.groups, call.top_groups = (
        _MIXES.index(router.mix), router.groups, router.top_groups
    )  # fmt: skip


def _point(call: _RouterCall, routed: Routed) -> None:
    call.logits, call.scores = routed.logits_TE.data_ptr(), routed.scores_TE.data_ptr()
    call.chosen, call.shares = routed.chosen_TK.data_ptr(), routed.shares_TK.data_ptr()


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of the attention of one layer; norms are over each head."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0
    q_norm_C: Tensor | None = None
    k_norm_C: Tensor | None = None
    norm_eps: float = 0.0


class Ragged(Protocol):
    """A step of several sequences: int32 tensors as `inference.paged.PagedBatch` holds them."""

    starts_S: Tensor
    counts_S: Tensor
    rows_S1: Tensor
    tables_SM: Tensor


def attention(
    qkv_TX: Tensor, rotary_2TC: Tensor | None, keys: Tensor, values: Tensor, ragged: Ragged,
    shape: AttentionShape,
) -> Tensor:  # fmt: skip
    """Rotate queries and keys, write keys and values into their blocks, attend: [T, H C].

    `qkv_TX` [T, (H+2G) C] float32, keys [blocks,G,C,16] and values [blocks,G,16,C] in float32 or
    bfloat16; query t of a span sees the positions up to its own, at most `window` of them.
    """
    T, width = qkv_TX.shape[0], shape.heads * shape.head_dim
    y_TX = torch.empty(T, width)
    cosines = sines = None
    if rotary_2TC is not None:
        cosines, sines = rotary_2TC[0].data_ptr(), rotary_2TC[1].data_ptr()
    norms = [None if n is None else n.data_ptr() for n in (shape.q_norm_C, shape.k_norm_C)]
    call = _AttentionCall(
        qkv_TX.data_ptr(), *norms, cosines, sines, keys.data_ptr(), values.data_ptr(),
        y_TX.data_ptr(), ragged.starts_S.data_ptr(), ragged.counts_S.data_ptr(),
        ragged.rows_S1.data_ptr(), ragged.tables_SM.data_ptr(), len(ragged.starts_S),
        ragged.tables_SM.shape[1], shape.heads, shape.kv_heads, shape.head_dim,
        int(keys.dtype is torch.bfloat16), shape.window, 0, shape.norm_eps,
    )  # fmt: skip
    _check(_loaded().gm_attention(ctypes.byref(call), torch.get_num_threads()))
    return y_TX


class Layer:
    """A whole block with RMS norms in one call; holds what the call points to."""

    def __init__(
        self, norms_D: tuple[Tensor, Tensor], qkv: Packed, o: Packed, shape: AttentionShape,
        router: PackedRouter | None, table: ExpertTable,
    ) -> None:  # fmt: skip
        self.held = (norms_D, qkv, o, shape, router, table)
        self.router = router
        call = self.call = _LayerCall()
        call.attn_norm, call.mlp_norm = (norm.data_ptr() for norm in norms_D)
        call.qkv, call.o = ctypes.addressof(qkv.call), ctypes.addressof(o.call)
        call.hidden, call.norm_eps = o.outputs, shape.norm_eps
        attention = call.attention
        attention.heads, attention.kv_heads = shape.heads, shape.kv_heads
        attention.head_dim, attention.window = shape.head_dim, shape.window
        attention.norm_eps = shape.norm_eps
        attention.q_norm, attention.k_norm = (
            None if n is None else n.data_ptr() for n in (shape.q_norm_C, shape.k_norm_C)
        )
        call.experts.experts = ctypes.addressof(table.pointers)
        call.experts.count, call.experts.activation = len(table.experts), table.activation
        if router is not None:
            _describe(call.router, router)

    def run(
        self, x_TD: Tensor, rotary_2TC: Tensor | None, keys: Tensor, values: Tensor, ragged: Ragged
    ) -> tuple[Tensor, Routed | None]:
        """The new residual stream [T,D], and what the router decided."""
        # a copy: another thread may run the same layer
        T, call = x_TD.shape[0], _LayerCall.from_buffer_copy(self.call)
        y_TD = torch.empty_like(x_TD)
        call.x, call.y, call.tokens = x_TD.data_ptr(), y_TD.data_ptr(), T
        attention = call.attention
        if rotary_2TC is not None:
            start = rotary_2TC.data_ptr()
            attention.cosines, attention.sines = start, start + rotary_2TC.stride(0) * 4
        attention.keys, attention.values = keys.data_ptr(), values.data_ptr()
        attention.bfloat16_cache = keys.dtype is torch.bfloat16
        attention.starts, attention.counts = ragged.starts_S.data_ptr(), ragged.counts_S.data_ptr()
        attention.rows, attention.tables = ragged.rows_S1.data_ptr(), ragged.tables_SM.data_ptr()
        attention.spans, attention.table_stride = ragged.tables_SM.shape
        routed = None
        if self.router is not None:
            routed = _room(T, self.router)
            _point(call.router, routed)
        _check(_loaded().gm_layer(ctypes.byref(call), torch.get_num_threads()))
        return y_TD, routed
