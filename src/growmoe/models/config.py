"""The shape of every model, dense or MoE, and its accounting. Imports no torch.

Tensors have one canonical name each, whatever the checkpoint on disk calls them:

    embed.weight [V,D]   positions.weight [P,D]   norm.weight [D]   head.weight [V,D]
    layers.N.attn_norm.weight   layers.N.attn.{q,k,v,o}.{weight,bias}
    layers.N.attn.{q,k}_norm.weight [C], or [H*C] and [K*C] with qk_norm_scope "all"
    layers.N.mlp_norm.weight
    layers.N.mlp.{gate,up,down}.{weight,bias}             a dense layer, or the fixed branch of a
                                                          residual MoE layer (a shared expert)
    layers.N.moe.router.weight [E,D]                      .bias [E]: selection only
    layers.N.moe.experts.K.{gate,up,down}.{weight,bias}
    layers.N.moe.mix.{weight,bias}                        how fixed branch and experts are mixed

Letters: B batch, T tokens, D hidden size, H query heads, K key/value heads, C head dim,
F feed-forward size, E experts, V vocabulary, P positions.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from growmoe.errors import GrowmoeError

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
Mix = Literal["none", "sum", "softmax2", "sigmoid_gate"]


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Routed experts of a model; `experts` has one entry per layer, 0 meaning a dense layer."""

    experts: tuple[int, ...]
    top_k: int
    ffn_size: int
    """Width F of one expert."""
    renormalize: bool = True
    """Divide the top-k weights by their sum (Mixtral); False keeps raw scores."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become scores (sigmoid: DeepSeek-V3)."""
    selection_bias: bool = False
    """Routers have a bias per expert that says who is chosen, never how much it counts (balancing
    without a loss, arXiv 2408.15664; DeepSeek-V3)."""
    groups: int = 1
    """Experts stand in this many groups; a token visits experts of the best `top_groups` only."""
    top_groups: int = 1
    mix: Mix = "none"
    """Fixed branch beside the experts: none, or added by `sum` (DeepSpeed-MoE paper), `softmax2`
    (DeepSpeed code: two softmax coefficients), `sigmoid_gate` (Qwen2-MoE shared expert)."""
    fixed_ffn_size: int = 0
    """Width of the fixed branch (residual MLP or shared expert)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer. See the module docstring for tensor names and letters."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_positions: int = 2048
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    sliding_window: int | None = None
    activation: Literal["swiglu", "gelu"] = "swiglu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_scope: Literal["head", "all"] = "head"
    """The mean square of a query or key: over each head (Qwen3), or over all of them (OLMoE)."""
    tied_head: bool = False
    moe: MoEConfig | None = None
    init_std: float = 0.02
    family: str = ""
    """Public architecture it is written as; empty lets `families.pick_family` choose."""
    token_ids: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """bos/eos/pad ids, carried through unchanged."""

    def __post_init__(self) -> None:
        problems = list(self.problems())
        if problems:
            raise GrowmoeError("impossible model: " + "; ".join(problems))

    def problems(self) -> Iterator[str]:
        """Yield one sentence per contradiction between the fields."""
        for field in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads",
                      "head_dim", "ffn_size", "max_positions"):  # fmt: skip
            if getattr(self, field) < 1:
                yield f"{field} must be at least 1, not {getattr(self, field)}"
                return
        if self.num_heads % self.num_kv_heads:
            yield (
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.positions == "rope" and self.head_dim % 2:
            yield f"head_dim {self.head_dim} must be even for rotary positions"
        if self.qk_norm_scope == "all" and not self.qk_norm:
            yield "qk_norm_scope 'all' contradicts qk_norm false"
        if self.moe is not None:
            yield from self._moe_problems(self.moe)

    def _moe_problems(self, moe: MoEConfig) -> Iterator[str]:
        if len(moe.experts) != self.num_layers:
            yield f"{len(moe.experts)} expert counts are given for {self.num_layers} layers"
        if moe.top_k < 1:
            yield f"top_k must be at least 1, not {moe.top_k}"
        if not any(moe.experts):
            yield "a MoE needs at least one layer with experts"
        fewest = min((count for count in moe.experts if count), default=moe.top_k)
        if fewest < moe.top_k:
            yield f"experts ({fewest}) are fewer than top_k ({moe.top_k})"
        if moe.ffn_size < 1:
            yield f"expert ffn_size must be at least 1, not {moe.ffn_size}"
        if moe.groups < 1 or not 1 <= moe.top_groups <= moe.groups:
            yield f"top_groups {moe.top_groups} is not between 1 and groups {moe.groups}"
        elif moe.groups > 1:
            for count in sorted({count for count in moe.experts if count}):
                if count % moe.groups:
                    yield f"{count} experts are not a multiple of groups {moe.groups}"
                elif count // moe.groups * moe.top_groups < moe.top_k:
                    yield (
                        f"{moe.top_groups} of {moe.groups} groups hold fewer than top_k "
                        f"{moe.top_k} of {count} experts"
                    )
        if (moe.mix == "none") != (moe.fixed_ffn_size == 0):
            yield f"mix '{moe.mix}' contradicts fixed_ffn_size {moe.fixed_ffn_size}"

    def experts_in(self, layer: int) -> int:
        """Number of routed experts in `layer`; 0 for a dense layer."""
        return self.moe.experts[layer] if self.moe else 0

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed (checked again)."""
        return dataclasses.replace(self, **changes)

    # ---- accounting: shared by trainer, planner and benchmarks ----

    def params_total(self) -> int:
        """Number of parameters; equals `sum(p.numel())` of the model."""
        return sum(math.prod(shape) for shape in tensor_shapes(self).values())

    def params_active(self) -> int:
        """Parameters that take part in computing one token: all but the unrouted experts."""
        idle = 0
        if self.moe:
            one = _mlp_params(self, self.moe.ffn_size)
            idle = sum((count - self.moe.top_k) * one for count in self.moe.experts if count)
        return self.params_total() - idle

    def flops_per_token(self, context: int | None = None) -> int:
        """Forward FLOPs for one token (2 per multiply-add); training costs three times as much.

        Matrix products of active parameters plus causal attention over an average of half of
        `context` earlier tokens (default: `max_positions`).
        """
        window = min(context or self.max_positions, self.sliding_window or self.max_positions)
        lookups = 0 if self.tied_head else self.vocab_size * self.hidden_size
        if self.positions == "learned":
            lookups += self.max_positions * self.hidden_size
        vectors = sum(shape[0] for shape in tensor_shapes(self).values() if len(shape) == 1)
        if self.moe and (self.mlp_bias):
            one = _mlp_biases(self, self.moe.ffn_size)
            vectors -= sum((n - self.moe.top_k) * one for n in self.moe.experts if n)
        products = self.params_active() - lookups - vectors
        attention = 4 * self.num_layers * self.num_heads * self.head_dim * window // 2
        return 2 * products + attention

    def bytes(self, dtype: str = "bfloat16") -> int:
        """Bytes of all weights stored in `dtype`."""
        return self.params_total() * DTYPE_BYTES[dtype]

    def kv_bytes_per_token(self, dtype: str = "bfloat16") -> int:
        """Bytes of KV cache that one token of context costs."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[dtype]


def moe_layers(config: ModelConfig) -> list[int]:
    """The layers with routed experts, in order."""
    return [layer for layer in range(config.num_layers) if config.experts_in(layer)]


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every canonical tensor of the model with its shape, in checkpoint order."""
    D = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (config.vocab_size, D)}
    if config.positions == "learned":
        shapes["positions.weight"] = (config.max_positions, D)
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        for name, shape in _layer_shapes(config, layer):
            shapes[prefix + name] = shape
    shapes.update(_norm_shapes(config, "norm", D))
    if not config.tied_head:
        shapes["head.weight"] = (config.vocab_size, D)
    return shapes


def _norm_shapes(config: ModelConfig, name: str, size: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (size,)}
    if config.norm == "layer":
        shapes[f"{name}.bias"] = (size,)
    return shapes


def _layer_shapes(config: ModelConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, C = config.hidden_size, config.head_dim
    q_rows, kv_rows = config.num_heads * C, config.num_kv_heads * C
    yield from _norm_shapes(config, "attn_norm", D).items()
    for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
        yield f"attn.{name}.weight", (rows, D)
        if config.qkv_bias:
            yield f"attn.{name}.bias", (rows,)
    yield "attn.o.weight", (D, q_rows)
    if config.o_bias:
        yield "attn.o.bias", (D,)
    if config.qk_norm:
        every = config.qk_norm_scope == "all"
        yield "attn.q_norm.weight", (q_rows if every else C,)
        yield "attn.k_norm.weight", (kv_rows if every else C,)
    yield from _norm_shapes(config, "mlp_norm", D).items()
    experts = config.experts_in(layer)
    if not experts:
        yield from _mlp_shapes(config, "mlp", config.ffn_size)
        return
    moe = config.moe
    assert moe is not None
    if moe.mix != "none":
        yield from _mlp_shapes(config, "mlp", moe.fixed_ffn_size)
    yield "moe.router.weight", (experts, D)
    if moe.selection_bias:
        yield "moe.router.bias", (experts,)
    for expert in range(experts):
        yield from _mlp_shapes(config, f"moe.experts.{expert}", moe.ffn_size)
    if moe.mix == "sigmoid_gate":
        yield "moe.mix.weight", (1, D)
    elif moe.mix == "softmax2":
        yield "moe.mix.weight", (2, D)
        yield "moe.mix.bias", (2,)


def _mlp_shapes(
    config: ModelConfig, name: str, F: int
) -> Iterator[tuple[str, tuple[int, ...]]]:  # fmt: skip
    D = config.hidden_size
    for part in ("gate", "up") if config.activation == "swiglu" else ("up",):
        yield f"{name}.{part}.weight", (F, D)
        if config.mlp_bias:
            yield f"{name}.{part}.bias", (F,)
    yield f"{name}.down.weight", (D, F)
    if config.mlp_bias:
        yield f"{name}.down.bias", (D,)


def _mlp_params(config: ModelConfig, F: int) -> int:
    return sum(math.prod(shape) for _, shape in _mlp_shapes(config, "", F))


def _mlp_biases(config: ModelConfig, F: int) -> int:
    return sum(shape[0] for _, shape in _mlp_shapes(config, "", F) if len(shape) == 1)
