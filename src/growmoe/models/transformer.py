"""The decoder: embedding, blocks of attention and feed-forward, norm, head."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from growmoe.errors import GrowmoeError
from growmoe.models.attention import Attention, Cache, make_norm, rotary_tables
from growmoe.models.config import ModelConfig
from growmoe.models.moe import MLP, MoE
from growmoe.models.router import Routing, routers
from growmoe.ops.linear import Linear, linear


@dataclass
class Output:
    """Logits [B,T,V] and, per MoE layer in order, what its router decided."""

    logits: Tensor
    routing: list[Routing] = field(default_factory=list)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = make_norm(config, config.hidden_size)
        self.attn = Attention(config, layer)
        self.mlp_norm = make_norm(config, config.hidden_size)
        self.mlp: MLP | None = None
        self.moe: MoE | None = None
        experts = config.experts_in(layer)
        if not experts:
            self.mlp = MLP(config, config.ffn_size)
            return
        assert config.moe is not None
        if config.moe.mix != "none":
            self.mlp = MLP(config, config.moe.fixed_ffn_size)
        self.moe = MoE(config, experts)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: Tensor | None,
        cache: Cache | None,
        real_BS: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Returns the new residual stream and the routing of this layer, if it routes."""
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), rotary, cache, real_BS)
        h_BTD = self.mlp_norm(x_BTD)
        if self.moe is None:
            assert self.mlp is not None
            return x_BTD + self.mlp(h_BTD), None
        y_BTD, routing = self.moe(h_BTD, self.mlp)
        return x_BTD + y_BTD, routing


class Transformer(nn.Module):
    """A dense or MoE decoder-only language model on one device."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        """In training, keep only what enters each block and run it again in backward."""
        self.embed: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.positions: nn.Module = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = make_norm(config, config.hidden_size)
        self.head: nn.Module | None = None
        """None where the embedding is the head."""
        if not config.tied_head:
            self.head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        tokens_BT: Tensor,
        cache: Cache | None = None,
        real_BS: Tensor | None = None,
        rows_N: Tensor | None = None,
    ) -> Output:
        """Logits for every position; with a cache the tokens follow those it holds.

        `rows_N` picks the positions whose logits are wanted: they come as [B,N,V].

        `real_BS` is False where a token, held or new, is padding: such tokens take no position and
        no real one attends to them. Raises GrowmoeError when learned positions run out.
        """
        T, held = tokens_BT.shape[1], Cache() if cache is None else cache
        if real_BS is None:
            positions, last = held.positions(T, tokens_BT.device), held.last_position(T)
        else:
            positions = (real_BS.cumsum(1) - 1).clamp(min=0)[:, -T:]
            last = -1 if self.config.positions == "rope" else int(positions.max())
        x_BTD = self.embed(tokens_BT)
        rotary = None
        if self.config.positions == "rope":
            rotary = rotary_tables(self.config, positions, x_BTD.dtype)
            rotary = rotary if real_BS is None else rotary[:, :, None]  # the same for every head
        elif last >= self.config.max_positions:
            raise GrowmoeError(f"the model has only {self.config.max_positions} positions")
        else:
            x_BTD = x_BTD + self.positions(positions)
        routing = []
        for block in self.layers:
            if self.recompute and self.training and torch.is_grad_enabled():
                x_BTD, routed = checkpoint(
                    block, x_BTD, rotary, cache, real_BS, use_reentrant=False
                )  # fmt: skip
            else:
                x_BTD, routed = block(x_BTD, rotary, cache, real_BS)
            if routed is not None:
                routing.append(routed)
        x_BTD = self.norm(x_BTD if rows_N is None else x_BTD[:, rows_N])
        if self.head is None:
            return Output(linear(x_BTD, self.embed.get_parameter("weight")), routing)
        return Output(self.head(x_BTD), routing)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fresh weights from `seed`, as `fresh_weights` says."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            mean, std = fresh_weights(self.config, name)
            if std:
                parameter.normal_(mean, std, generator=generator)
            else:
                parameter.fill_(mean)


def fresh_weights(config: ModelConfig, name: str) -> tuple[float, float]:
    """(mean, standard deviation) of the new parameter `name`: N(0, init_std) for matrices, and for
    the projections that write into the residual stream divided by sqrt(2 L) (GPT-2); biases 0,
    norms 1."""
    if name.endswith("bias"):
        return 0.0, 0.0
    if "norm" in name.rsplit(".", 2)[-2]:
        return 1.0, 0.0
    writes = name.endswith((".o.weight", ".down.weight", ".experts.down"))
    return 0.0, config.init_std / ((2 * config.num_layers) ** 0.5 if writes else 1.0)


def adopt(model: Transformer, config: ModelConfig) -> None:
    """Give `model` a config that differs from its own in what has no weights yet: routers get a
    selection bias of zeros, which leaves the function as it is."""
    model.config = config
    if config.moe is None or not config.moe.selection_bias:
        return
    for router in routers(model):
        router.config = config.moe
        if router.bias is None:
            zeros_E = torch.zeros(len(router.weight), device=router.weight.device)
            router.bias = nn.Parameter(zeros_E, requires_grad=False)
