"""The implementations that `moe_layer.py` compares, all on one set of weights.

Each builder takes the shared weights and k and returns a `Layer`. Experts exist once per dtype:
our layer and transformers' use the very Parameters, DeepSpeed's experts views of them; ScatterMoE
and MegaBlocks want another layout, so theirs are copies. Every layer routes with its own router.

Letters: T tokens, D hidden, F expert width, R=2F rows of gate and up, E experts, K experts per
token.
"""

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe.models.config import ModelConfig, MoEConfig
from growmoe.models.moe import MoE
from growmoe.ops.experts import Activation, ExpertWeights, grouped_experts
from growmoe.ops.linear import linear
from growmoe.ops.mapping import MappingTable, inverse, mapping_table
from growmoe.ops.onehot import onehot_moe

ROUTER_SCALE = 2.0
"""The router is this times the first E unit vectors, so x[:, :E] are the logits (exact in bf16)."""

Gradients = dict[str, Sequence[Tensor | None]]


@dataclass
class Shared:
    """The weights that every implementation computes with."""

    router: nn.Parameter
    """[E,D]"""
    up: nn.Parameter
    """[E,2F,D], gate rows first"""
    down: nn.Parameter
    """[E,D,F]"""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(E, D, F)."""
        return self.down.shape[0], self.down.shape[1], self.down.shape[2]

    def gradients(self) -> Gradients:
        """Of the router as one tensor, of the experts one by one."""
        found: Gradients = {"router": [self.router.grad]}
        for name, parameter in (("up", self.up), ("down", self.down)):
            found[name] = [None] if parameter.grad is None else parameter.grad.unbind(0)
        return found

    def parameters(self) -> list[nn.Parameter]:
        """Router, up, down."""
        return [self.router, self.up, self.down]


def shared_weights(
    E: int, D: int, width: int, dtype: torch.dtype, device: str, seed: int
) -> Shared:
    """Random experts whose outputs are of the size of their input."""
    generator = torch.Generator().manual_seed(seed)

    def stacked(rows: int, columns: int) -> nn.Parameter:
        weight = torch.empty(E, rows, columns, dtype=dtype, device=device)
        for expert in weight:
            expert.copy_(torch.randn(rows, columns, generator=generator) * columns**-0.5)
        return nn.Parameter(weight)

    router = torch.eye(E, D, dtype=dtype, device=device) * ROUTER_SCALE
    return Shared(nn.Parameter(router), stacked(2 * width, D), stacked(D, width))


@dataclass
class Layer:
    """One implementation, built."""

    name: str
    forward: Callable[[Tensor], Tensor]
    """x_TD -> y_TD"""
    parameters: list[nn.Parameter]
    gradients: Callable[[], Gradients]
    module: nn.Module | None = None
    raw: bool = False
    """Its routing weights are raw probabilities, not divided by their sum."""


def routed(x_TD: Tensor, router_ED: Tensor, k: int, raw: bool) -> tuple[Tensor, Tensor]:
    """(experts_TK, weights_TK): softmax in float32, top-k, renormalised unless `raw`."""
    probs_TE = F.linear(x_TD.float(), router_ED.float()).softmax(-1)
    weights_TK, experts_TK = probs_TE.topk(k, dim=-1)
    return experts_TK, weights_TK if raw else weights_TK / weights_TK.sum(-1, keepdim=True)


def layer_config(shared: Shared, k: int) -> ModelConfig:
    """Of a model with these experts in its one layer."""
    E, D, width = shared.sizes
    return ModelConfig(
        vocab_size=8, hidden_size=D, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2,
        ffn_size=width, moe=MoEConfig(experts=(E,), top_k=k, ffn_size=width),
    )  # fmt: skip


def grown(shared: Shared, k: int) -> Layer:
    """This project's layer, as a model runs it."""
    moe = MoE(layer_config(shared, k), shared.sizes[0])
    moe.router.weight, moe.experts.up, moe.experts.down = shared.parameters()
    return Layer(
        "growmoe", lambda x: moe(x.unsqueeze(0), None)[0].squeeze(0), shared.parameters(),
        shared.gradients, moe,
    )  # fmt: skip


def by_table(experts: Callable[..., Tensor], name: str, raw: bool = False) -> Any:
    """A builder: our mapping table around an `experts` function of torch operations."""

    def build(shared: Shared, k: int) -> Layer:
        def forward(x_TD: Tensor) -> Tensor:
            experts_TK, weights_TK = routed(x_TD, shared.router, k, raw)
            table = mapping_table(experts_TK, shared.sizes[0])
            weights = ExpertWeights(shared.up, shared.down)
            return experts(x_TD, table, weights_TK, weights, "swiglu")

        return Layer(name, forward, shared.parameters(), shared.gradients, raw=raw)

    return build


def looped_experts(
    x_TD: Tensor, table: MappingTable, weights_TK: Tensor, w: ExpertWeights, activation: Activation
) -> Tensor:
    """A loop over experts as anybody would write it with autograd: gather, F.linear, unsort."""
    T, K = weights_TK.shape
    groups = x_TD.index_select(0, table.order_S // K).split(table.counts_E.tolist())
    parts = []
    for rows, up, down in zip(groups, w.up_ERD.unbind(0), w.down_EDF.unbind(0)):
        gate, value = F.linear(rows, up).chunk(2, dim=-1)
        parts.append(F.linear(F.silu(gate) * value, down))
    y_TKD = torch.cat(parts).index_select(0, inverse(table.order_S)).view(T, K, -1)
    return torch.einsum("tkd,tk->td", y_TKD, weights_TK.to(y_TKD.dtype))


def onehot(shared: Shared, k: int) -> Layer:
    """GShard's einsum; its capacity is the largest load, so it drops nothing."""

    def forward(x_TD: Tensor) -> Tensor:
        experts_TK, weights_TK = routed(x_TD, shared.router, k, raw=False)
        load = int(torch.bincount(experts_TK.reshape(-1), minlength=shared.sizes[0]).max())
        return onehot_moe(x_TD, experts_TK, weights_TK, shared.up, shared.down, load)

    return Layer("onehot", forward, shared.parameters(), shared.gradients)


def transformers_mixtral(implementation: str) -> Any:
    """A builder: MixtralSparseMoeBlock with one of transformers' experts functions."""

    def build(shared: Shared, k: int) -> Layer:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        E, D, width = shared.sizes
        config = MixtralConfig(
            hidden_size=D, intermediate_size=width, num_local_experts=E, num_experts_per_tok=k,
            router_jitter_noise=0.0, hidden_act="silu",
        )  # fmt: skip
        config._experts_implementation = implementation
        with torch.device("meta"):
            block = MixtralSparseMoeBlock(config)
        block.gate.weight = shared.router
        block.experts.gate_up_proj, block.experts.down_proj = shared.up, shared.down
        return Layer(
            f"hf_{implementation}", lambda x: block(x.unsqueeze(0)).squeeze(0),
            shared.parameters(), shared.gradients, block,
        )  # fmt: skip

    return build


class SwiGLU(nn.Module):
    """One expert, or the dense limit: a fused gate and up product, and down."""

    def __init__(
        self, up: Tensor, down: Tensor, product: Callable[[Tensor, Tensor], Tensor] = F.linear
    ) -> None:
        super().__init__()
        self.up, self.down, self.product = nn.Parameter(up), nn.Parameter(down), product

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        gate, up = self.product(x, self.up).chunk(2, dim=-1)
        return self.product(F.silu(gate) * up, self.down)


def deepspeed(shared: Shared, k: int) -> Layer:
    """DeepSpeed's MoE without drops or noise; for k = 1 it knows only raw probabilities."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if shared.up.is_cuda else "cpu")
    from deepspeed.moe.layer import MoE as DeepSpeedMoE

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # without it a process group would compile a shared-memory operation on first use
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    E, D, _ = shared.sizes
    moe = DeepSpeedMoE(
        D, SwiGLU(torch.empty(1, device="meta"), torch.empty(1, device="meta")), num_experts=E,
        ep_size=1, k=k, drop_tokens=False, use_rts=False, top2_2nd_expert_sampling=False,
        min_capacity=0,
    )  # fmt: skip
    experts = moe.deepspeed_moe.experts.deepspeed_experts
    moe.deepspeed_moe.gate.wg.weight = shared.router
    for expert, up, down in zip(experts, shared.up.detach(), shared.down.detach()):
        expert.up, expert.down = nn.Parameter(up), nn.Parameter(down)

    def gradients() -> Gradients:
        return {
            "router": [shared.router.grad],
            "up": [expert.up.grad for expert in experts],
            "down": [expert.down.grad for expert in experts],
        }

    parameters = list(moe.parameters())
    return Layer("deepspeed", lambda x: moe(x)[0], parameters, gradients, moe, raw=k == 1)


def scattermoe(shared: Shared, k: int) -> Layer:
    """ScatterMoE's GLUMLP (Triton), which wants the gate rows last. Written from its source."""
    glu = importlib.import_module("scattermoe.mlp").GLUMLP
    E, D, width = shared.sizes
    with torch.device("meta"):
        moe = glu(D, width, E, k)
    gate, up = shared.up.detach().chunk(2, dim=1)
    moe.experts.weight = nn.Parameter(torch.cat([up, gate], dim=1))
    moe.output_experts.weight = shared.down

    def forward(x_TD: Tensor) -> Tensor:
        experts_TK, weights_TK = routed(x_TD, shared.router, k, raw=False)
        return moe(x_TD, weights_TK.to(x_TD.dtype), experts_TK)

    def gradients() -> Gradients:
        swapped = [g.roll(width, 0) for g in moe.experts.weight.grad]
        return {**shared.gradients(), "up": swapped}

    parameters = [shared.router, moe.experts.weight, shared.down]
    return Layer("scattermoe", forward, parameters, gradients, moe)


def megablocks(shared: Shared, k: int) -> Layer:
    """MegaBlocks' dMoE with grouped GEMMs (bf16 only), whose w2 is transposed. Written from its
    source."""
    arguments = importlib.import_module("megablocks.layers.arguments").Arguments
    E, D, width = shared.sizes
    moe = importlib.import_module("megablocks.layers.dmoe").dMoE(
        arguments(
            hidden_size=D, ffn_hidden_size=width, moe_num_experts=E, moe_top_k=k, mlp_type="glu",
            mlp_impl="grouped", activation_fn=F.silu, bias=False, return_bias=False,
            moe_normalize_expert_weights=1, moe_loss_weight=0.0, fp16=False, bf16=True,
            device=shared.up.device,
        )
    )  # fmt: skip
    gate, up = shared.up.detach().chunk(2, dim=1)
    mlp = moe.experts.mlp
    moe.router.layer.weight = shared.router
    mlp.w1, mlp.v1 = (nn.Parameter(half.reshape(E * width, D)) for half in (gate, up))
    mlp.w2 = nn.Parameter(shared.down.detach().transpose(1, 2).reshape(E * width, D))

    def gradients() -> Gradients:
        w1, v1, w2 = (p.grad.view(E, width, D) for p in (mlp.w1, mlp.v1, mlp.w2))
        stacked = [torch.cat(pair) for pair in zip(w1, v1)]
        return {"router": [shared.router.grad], "up": stacked, "down": [g.t() for g in w2]}

    parameters = list(moe.parameters())
    return Layer("megablocks", lambda x: moe(x.unsqueeze(1)).squeeze(1), parameters, gradients, moe)


def dense_by(product: Callable[[Tensor, Tensor], Tensor], name: str) -> Any:
    """A builder of the limit: one SwiGLU MLP of width k*F, so of equal FLOPs, without a router."""

    def build(shared: Shared, k: int) -> Layer:
        E, D, width = shared.sizes
        up = shared.up.detach().view(E * 2 * width, D)[: 2 * k * width]
        down = torch.cat(list(shared.down.detach()[:k]), dim=1)
        mlp = SwiGLU(up, down, product)
        return Layer(name, mlp, list(mlp.parameters()), dict, mlp)

    return build


BUILDERS: dict[str, Callable[[Shared, int], Layer]] = {
    "growmoe": grown,
    "table": by_table(looped_experts, "table"),
    "onehot": onehot,
    "hf_eager": transformers_mixtral("eager"),
    "hf_grouped_mm": transformers_mixtral("grouped_mm"),
    "deepspeed": deepspeed,
    "torch_grouped_mm": by_table(grouped_experts, "torch_grouped_mm"),
    "scattermoe": scattermoe,
    "megablocks": megablocks,
    "dense": dense_by(F.linear, "dense"),
    "dense_onednn": dense_by(linear, "dense_onednn"),
}
PEERS = ("hf_eager", "hf_grouped_mm", "deepspeed", "torch_grouped_mm", "scattermoe", "megablocks")
"""Other people's: what ours is compared with in the summary, beside the limits and the baselines.
`dense` is the limit as torch computes it, `dense_onednn` by the products that ours uses (they are
the same in bfloat16)."""


def reference(shared: Shared, k: int, raw: bool) -> Layer:
    """What outputs are compared with: the mapping table and a loop over experts."""
    return by_table(looped_experts, "reference", raw)(shared, k)


def unavailable(name: str, device: str) -> str | None:
    """Why an implementation cannot run here, if it cannot."""
    if name in ("scattermoe", "megablocks"):
        if device != "cuda":
            return "needs a GPU"
        if importlib.util.find_spec(name) is None:
            return "not installed"
    if name == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        return "not installed"
    if name == "torch_grouped_mm" and device != "cuda":
        return "on a CPU it is left out unless asked for by --impl"
    return None


def refuses(name: str, shared: Shared, T: int, capacity: int, backward: bool, limit: float) -> str:
    """Why a cell is skipped: a dtype it does not know, or padding that would not fit `limit`
    bytes. Empty if it can run."""
    E, D, width = shared.sizes
    if name == "megablocks" and shared.up.dtype != torch.bfloat16:
        return "bf16 only"
    numbers = 0
    if name == "onehot":  # combine and dispatch masks, the buffers of E*C slots
        numbers = (
            E * capacity * ((3 if backward else 2) * T + 2 * D + (7 if backward else 4) * width)
        )
    elif name == "deepspeed":  # index gather since 2026, but still E*C slots
        numbers = E * capacity * (5 * D + 4 * width if backward else 4 * D)
    needed = numbers * shared.up.element_size()
    return f"would need {needed / 1e9:.1f} GB beside the weights" if needed > limit else ""
