"""The Transformer with its leaf modules exchanged for the native kernels of `ops.native`.

The skeleton stays that of `models.transformer`; norms, attention, feed-forwards and the head become
modules that hold packed weights (one copy) and add up in float32. Weights come from a Source one
by one, so that memory holds the packed model and one tensor.

Letters: T tokens, D hidden, H query heads, G key/value heads, C head dim, E experts, K experts per
token.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeGuard, cast

import torch
from torch import Tensor, nn

from growmoe.errors import UsageError
from growmoe.inference.offloaded import Offload
from growmoe.models.attention import Cache, LayerNorm, attend, rotate
from growmoe.models.checkpoint import Source
from growmoe.models.config import ModelConfig
from growmoe.models.moe import MLP
from growmoe.models.router import Routing
from growmoe.models.transformer import Block, Transformer
from growmoe.ops import native
from growmoe.ops.native import Form, Packed
from growmoe.ops.quantized import BITS, stored_or_made

Join = Callable[..., Tensor]


class RaggedCache(native.Ragged, Protocol):
    """What the native attention needs of a cache: see `paged.PagedBatch`."""

    cache: "_Blocks"


class _Blocks(Protocol):
    keys: list[Tensor]
    values: list[Tensor]


def is_ragged(cache: object) -> TypeGuard[RaggedCache]:
    """Whether keys and values lie in blocks, which the native attention reads."""
    return hasattr(cache, "tables_SM")


class Reader:
    """Weights of a source in one form: `packed` joins tensors by rows before packing them."""

    def __init__(self, source: Source, form: Form) -> None:
        self.source, self.form = source, form

    def exact(self, name: str) -> Tensor:
        """A copy of the tensor in float32."""
        return self.source.load(name).to(torch.float32, copy=True)

    def packed(
        self, names: Sequence[str], join: Join = lambda *rows: torch.cat(rows),
        bias: bool = False, form: Form | None = None,
    ) -> Packed:  # fmt: skip
        """`NAME.weight` of all names as one packed weight, and their biases as one."""
        form = form or self.form
        bias_N = join(*(self.exact(f"{name}.bias") for name in names)) if bias else None
        if form == "float32" or form == "bfloat16":
            tensors = [self.source.load(f"{name}.weight") for name in names]
            return native.pack(join(*tensors), form, bias_N)
        parts = [stored_or_made(self.source, f"{name}.weight", BITS[form]) for name in names]
        return native.pack_integers(
            join(*(part.values_NK for part in parts)), join(*(part.scales_NG for part in parts)),
            form, bias_N,
        )  # fmt: skip

    def expert(self, config: ModelConfig, name: str) -> native.PackedExpert:
        """The feed-forward `name`, with its gate and up rows interleaved."""
        if config.activation == "swiglu":
            up = self.packed((f"{name}.gate", f"{name}.up"), native.interleaved, config.mlp_bias)
        else:
            up = self.packed((f"{name}.up",), bias=config.mlp_bias)
        return native.PackedExpert(up, self.packed((f"{name}.down",), bias=config.mlp_bias))


def build_packed(source: Source, form: Form, offload: Offload | None = None) -> Transformer:
    """The model of `source` with packed weights in `form`: norms, routers and mixing coefficients
    stay as they are, the embedding stays a table, and the head of an int4 model has int8. With
    `offload` the routed experts lie there."""
    config, read = source.config, Reader(source, form)
    if config.head_dim > native.MOST_HEAD_DIM:
        raise UsageError(
            f"heads of {config.head_dim} are wider than {native.MOST_HEAD_DIM}, which is what the "
            "native kernels take; GROWMOE_NATIVE=0 serves this model without them"
        )
    with torch.device("meta"):
        model = Transformer(config)
    exchange(model, embed=PackedEmbedding(source.load("embed.weight"), form))
    if config.positions == "learned":
        exchange(model, positions=PackedEmbedding(source.load("positions.weight"), form))
    for layer, block in enumerate(model.layers):
        place = f"layers.{layer}"
        exchange(
            block,
            attn_norm=packed_norm(config, read, f"{place}.attn_norm"),
            attn=PackedAttention(config, layer, read),
            mlp_norm=packed_norm(config, read, f"{place}.mlp_norm"),
        )
        if config.experts_in(layer):
            exchange(block, moe=PackedMoE(config, layer, read, offload), mlp=None)
        else:
            exchange(block, mlp=PackedMLP(config, read.expert(config, f"{place}.mlp")))
        model.layers[layer] = PackedBlock(cast(Block, block))
    if offload is not None:
        offload.seal()
    head = "embed" if config.tied_head else "head"
    exchange(
        model,
        norm=packed_norm(config, read, "norm"),
        head=PackedLinear(read.packed((head,), form="int8" if form == "int4" else form)),
    )
    return model.eval()


def exchange(owner: nn.Module, **parts: nn.Module | None) -> None:
    """Put other modules in the place of children of `owner`."""
    for name, module in parts.items():
        setattr(owner, name, module)


class PackedEmbedding(nn.Module):
    """A table of rows, given out in float32."""

    def __init__(self, weight_VD: Tensor, form: Form) -> None:
        super().__init__()
        dtype = weight_VD.dtype if form == "float32" else torch.bfloat16
        self.weight_VD = weight_VD.to(dtype, copy=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """[...] -> [..., D]."""
        return self.weight_VD[tokens].to(torch.float32)


class PackedLinear(nn.Module):
    """A linear layer."""

    def __init__(self, weight: Packed) -> None:
        super().__init__()
        self.packed = weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., N]."""
        y_TN = native.linear(x.reshape(-1, x.shape[-1]), self.packed)
        return y_TN.view(*x.shape[:-1], -1)


class PackedNorm(nn.Module):
    """RMS norm."""

    def __init__(self, weight_D: Tensor, eps: float) -> None:
        super().__init__()
        self.weight_D, self.eps = weight_D.contiguous(), eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return native.rms_norm(x.contiguous(), self.weight_D, self.eps)


def packed_norm(config: ModelConfig, read: Reader, name: str) -> nn.Module:
    """The norm `name`; a LayerNorm stays torch's."""
    weight_D = read.exact(f"{name}.weight")
    if config.norm == "rms":
        return PackedNorm(weight_D, config.norm_eps)
    norm = LayerNorm(len(weight_D), config.norm_eps)
    norm.weight, norm.bias = nn.Parameter(weight_D), nn.Parameter(read.exact(f"{name}.bias"))
    return norm.requires_grad_(False)


class PackedAttention(nn.Module):
    """Attention of one layer: queries, keys and values from one product; over a ragged cache one
    native call does the rest."""

    def __init__(self, config: ModelConfig, layer: int, read: Reader) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        place = f"layers.{layer}.attn"
        qkv = [f"{place}.{part}" for part in ("q", "k", "v")]
        self.qkv = PackedLinear(read.packed(qkv, bias=config.qkv_bias))
        self.o = PackedLinear(read.packed((f"{place}.o",), bias=config.o_bias))
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = PackedNorm(read.exact(f"{place}.q_norm.weight"), config.norm_eps)
            self.k_norm = PackedNorm(read.exact(f"{place}.k_norm.weight"), config.norm_eps)
        self.over_all = config.qk_norm and config.qk_norm_scope == "all"
        inside = not self.over_all
        self.shape = native.AttentionShape(
            config.num_heads, config.num_kv_heads, config.head_dim, config.sliding_window or 0,
            self.q_norm.weight_D if self.q_norm and inside else None,
            self.k_norm.weight_D if self.k_norm and inside else None, config.norm_eps,
        )  # fmt: skip

    def forward(
        self, x_BTD: Tensor, rotary: Tensor | None, cache: Cache | None,
        real_BS: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `models.attention.Attention`."""
        qkv_BTX = self.qkv(x_BTD)
        if self.over_all:
            self._norm_all(qkv_BTX)
        if not is_ragged(cache):
            return self.o(self._plain(qkv_BTX, rotary, cache, real_BS))
        blocks = cache.cache
        y_TX = native.attention(
            qkv_BTX[0], rotary, blocks.keys[self.layer], blocks.values[self.layer], cache,
            self.shape,
        )  # fmt: skip
        return self.o(y_TX[None])

    def _norm_all(self, qkv_BTX: Tensor) -> None:
        q_width = self.config.num_heads * self.config.head_dim
        k_width = self.config.num_kv_heads * self.config.head_dim
        for norm, rows in ((self.q_norm, qkv_BTX[..., :q_width]),
                           (self.k_norm, qkv_BTX[..., q_width : q_width + k_width])):  # fmt: skip
            assert norm is not None
            rows.copy_(norm(rows))

    def _plain(
        self, qkv_BTX: Tensor, rotary: Tensor | None, cache: Cache | None, real_BS: Tensor | None
    ) -> Tensor:
        """Over whole sequences or an ordinary cache, by torch."""
        config, (B, T, _) = self.config, qkv_BTX.shape
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        q, k, v = qkv_BTX.view(B, T, -1, config.head_dim).split(heads, dim=2)
        if self.q_norm is not None and self.k_norm is not None and not self.over_all:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is None:
            y = attend(q, k, v, config.sliding_window, real_BS)
        else:
            y = cache.attend(self.layer, q, k, v, config.sliding_window, real_BS)
        return y.transpose(1, 2).reshape(B, T, -1)


class PackedMLP(nn.Module):
    """A dense feed-forward: one expert that every token has."""

    def __init__(self, config: ModelConfig, expert: native.PackedExpert) -> None:
        super().__init__()
        self.hidden = config.hidden_size
        self.table = native.ExpertTable([expert], config.activation == "gelu")

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        x_TD = x.reshape(-1, self.hidden)
        chosen_TK = torch.zeros(len(x_TD), 1, dtype=torch.int32)
        y_TD = native.experts(x_TD, chosen_TK, torch.ones(len(x_TD), 1), self.table, self.hidden)
        return y_TD.view_as(x)


class PackedMoE(nn.Module):
    """Router, experts and fixed branch of one layer; the fixed branch is one more expert, which
    every token has, with the share that the mixing coefficients give it."""

    def __init__(
        self, config: ModelConfig, layer: int, read: Reader, offload: Offload | None = None
    ) -> None:
        super().__init__()
        assert config.moe is not None
        self.moe, self.hidden, self.layer = config.moe, config.hidden_size, layer
        self.count = config.experts_in(layer)
        place = f"layers.{layer}.moe"
        router_ED = read.exact(f"{place}.router.weight")
        bias_E = read.exact(f"{place}.router.bias") if self.moe.selection_bias else None
        mix: Packed | None = None
        if self.moe.mix in ("softmax2", "sigmoid_gate"):
            mix_bias = read.exact(f"{place}.mix.bias") if self.moe.mix == "softmax2" else None
            mix = native.pack(read.exact(f"{place}.mix.weight"), "float32", mix_bias)
        self.router = native.PackedRouter(
            native.pack(router_ED, "float32"), bias_E, self.moe.top_k,
            self.moe.scoring == "sigmoid", self.moe.renormalize, self.moe.groups,
            self.moe.top_groups, self.moe.mix, mix,
        )  # fmt: skip
        experts: list[native.PackedExpert | None] = [None] * self.count
        for expert in range(self.count):
            packed = read.expert(config, f"{place}.experts.{expert}")
            if offload is None:
                experts[expert] = packed
            else:
                offload.put(layer, expert, packed)
        if self.moe.mix != "none":
            experts.append(read.expert(config, f"layers.{layer}.mlp"))
        self.table = native.ExpertTable(experts, config.activation == "gelu")
        self.offloaded = None if offload is None else offload.add(layer, self.table, self.router)
        self.observe = False
        """Whether the routing is returned, for whoever watches it; it costs a few operators."""

    def forward(self, x_BTD: Tensor, fixed: MLP | None = None) -> tuple[Tensor, Routing | None]:
        """As `models.moe.MoE`; the fixed branch is inside."""
        x_TD = x_BTD.reshape(-1, self.hidden)
        routed = native.route(x_TD, self.router)
        if self.offloaded is not None:
            y_TD = self.offloaded(x_TD, routed, self.hidden)
        else:
            y_TD = native.experts(x_TD, routed.chosen_TK, routed.shares_TK, self.table, self.hidden)
        return y_TD.view_as(x_BTD), self.observed(routed, len(x_BTD)) if self.observe else None

    def observed(self, routed: native.Routed, sequences: int) -> Routing:
        """What the router decided, as the model tells it."""
        experts_TK = routed.chosen_TK[:, : self.moe.top_k].long()
        counts_E = torch.bincount(experts_TK.flatten(), minlength=self.count)
        return Routing(
            routed.logits_TE, routed.scores_TE, experts_TK,
            routed.shares_TK[:, : self.moe.top_k], counts_E, counts_E, self.moe.scoring, sequences,
        )  # fmt: skip


class PackedBlock(nn.Module):
    """A block of packed modules; over a ragged cache it runs as one native call where norms are RMS
    norms (and those of queries and keys go over single heads) and no expert lies on disk, which
    changes no bit."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        self.layer: native.Layer | None = None
        attn, norms, ffn = block.attn, (block.attn_norm, block.mlp_norm), block.moe or block.mlp
        assert isinstance(attn, PackedAttention)
        assert isinstance(ffn, PackedMoE | PackedMLP)
        # outside torch's registry of children, which is slow to look things up in
        self._index: int = attn.layer
        self._moe: tuple[PackedMoE | None] = (ffn if isinstance(ffn, PackedMoE) else None,)
        on_disk = isinstance(ffn, PackedMoE) and ffn.offloaded is not None
        plain = attn.over_all or not all(isinstance(norm, PackedNorm) for norm in norms)
        if not plain and not on_disk:
            router = ffn.router if isinstance(ffn, PackedMoE) else None
            weights_D = (norms[0].weight_D, norms[1].weight_D)
            self.layer = native.Layer(
                weights_D, attn.qkv.packed, attn.o.packed, attn.shape, router, ffn.table
            )

    @property
    def moe(self) -> "PackedMoE | None":
        """The mixture of experts inside, if any."""
        return self._moe[0]

    def forward(
        self, x_BTD: Tensor, rotary: Tensor | None, cache: Cache | None,
        real_BS: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:  # fmt: skip
        """As `models.transformer.Block`."""
        if self.layer is None or not is_ragged(cache):
            return self.block(x_BTD, rotary, cache, real_BS)
        keys, values = cache.cache.keys[self._index], cache.cache.values[self._index]
        y_TD, routed = self.layer.run(x_BTD[0], rotary, keys, values, cache)
        moe = self._moe[0]
        observed = moe.observed(routed, 1) if moe and moe.observe and routed else None
        return y_TD[None], observed
