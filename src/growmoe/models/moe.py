"""Feed-forward blocks: the dense MLP, and routed experts with an optional fixed branch.

Letters: T tokens, D hidden, F width, E experts, K experts per token, S=T*K routed rows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe.models.config import ModelConfig
from growmoe.ops import experts as ops


@dataclass
class Routing:
    """What a router decided for T tokens; the losses and the metrics are computed from it."""

    logits_TE: Tensor
    probs_TE: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    counts_E: Tensor


class MLP(nn.Module):
    """SwiGLU (down(silu(gate x) * up x)) or GELU (down(gelu(up x))) feed-forward."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.swiglu = config.activation == "swiglu"
        D, bias = config.hidden_size, config.mlp_bias
        if self.swiglu:
            self.gate = nn.Linear(D, width, bias=bias)
        self.up = nn.Linear(D, width, bias=bias)
        self.down = nn.Linear(width, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        up = self.up(x)
        h = F.silu(self.gate(x)) * up if self.swiglu else F.gelu(up, approximate="tanh")
        return self.down(h)


class Router(nn.Module):
    """Softmax or sigmoid top-k router, always in float32 or wider."""

    def __init__(self, config: ModelConfig, experts: int) -> None:
        super().__init__()
        assert config.moe is not None
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.top_k, self.renormalize = config.moe.top_k, config.moe.renormalize
        self.scoring = config.moe.scoring

    def forward(self, x_TD: Tensor) -> Routing:
        """Choose K of E experts for every token."""
        with torch.autocast(x_TD.device.type, enabled=False):
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            logits_TE = F.linear(x_TD.to(wide), self.weight.to(wide))
        scores_TE = logits_TE.softmax(-1) if self.scoring == "softmax" else logits_TE.sigmoid()
        weights_TK, experts_TK = scores_TE.topk(self.top_k, dim=-1)
        probs_TE = scores_TE  # the balance loss wants probabilities: they add up to one
        if self.scoring == "sigmoid":
            probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        if self.renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        counts_E = torch.bincount(experts_TK.reshape(-1), minlength=logits_TE.shape[1])
        return Routing(logits_TE, probs_TE, experts_TK, weights_TK, counts_E)


class Experts(nn.Module):
    """E feed-forward experts in stacked parameters: gate_up [E,2F,D] (gate rows first) or up
    [E,F,D], and down [E,D,F]; biases as [E,...]."""

    def __init__(self, config: ModelConfig, experts: int) -> None:
        super().__init__()
        assert config.moe is not None
        D, width = config.hidden_size, config.moe.ffn_size
        self.swiglu = config.activation == "swiglu"
        rows = 2 * width if self.swiglu else width
        self.up = nn.Parameter(torch.empty(experts, rows, D))
        self.down = nn.Parameter(torch.empty(experts, D, width))
        self.up_bias = nn.Parameter(torch.zeros(experts, rows)) if config.mlp_bias else None
        self.down_bias = nn.Parameter(torch.zeros(experts, D)) if config.mlp_bias else None

    def forward(self, x_SD: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert in, rows in the same order out."""
        dtype = x_SD.dtype
        if torch.is_autocast_enabled(x_SD.device.type):  # grouped_mm does not know autocast
            dtype = torch.get_autocast_dtype(x_SD.device.type)
        h = ops.grouped_linear(x_SD.to(dtype), self.up.to(dtype), counts_E)
        if self.up_bias is not None:
            h = h + self.up_bias.to(dtype).repeat_interleave(counts_E, dim=0)
        if self.swiglu:
            gate, up = h.chunk(2, dim=-1)
            h = F.silu(gate) * up
        else:
            h = F.gelu(h, approximate="tanh")
        y = ops.grouped_linear(h, self.down.to(dtype), counts_E)
        if self.down_bias is not None:
            y = y + self.down_bias.to(dtype).repeat_interleave(counts_E, dim=0)
        return y


class MoE(nn.Module):
    """Router, experts and the coefficients that mix them with the fixed branch."""

    def __init__(self, config: ModelConfig, experts: int) -> None:
        super().__init__()
        assert config.moe is not None
        self.config = config.moe
        self.router = Router(config, experts)
        self.experts = Experts(config, experts)
        if config.moe.mix in ("softmax2", "sigmoid_gate"):
            rows = 2 if config.moe.mix == "softmax2" else 1
            self.mix = nn.Linear(config.hidden_size, rows, bias=rows == 2)

    def forward(self, x_BTD: Tensor, fixed: MLP | None) -> tuple[Tensor, Routing]:
        """Returns ([B,T,D], routing); `fixed` is the residual MLP or shared expert, if any."""
        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        routing = self.router(x_TD)
        order_S, _ = ops.mapping_table(routing.experts_TK, routing.logits_TE.shape[1])
        rows_SD = ops.routed_rows(x_TD, order_S, self.config.top_k)
        y_SD = self.experts(rows_SD, routing.counts_E)
        y_TD = ops.combine(y_SD, order_S, routing.weights_TK)
        if fixed is not None:
            y_TD = self._mixed(x_TD, y_TD, fixed(x_TD))
        return y_TD.view_as(x_BTD), routing

    def _mixed(self, x_TD: Tensor, routed_TD: Tensor, fixed_TD: Tensor) -> Tensor:
        if self.config.mix == "sum":
            return routed_TD + fixed_TD
        coefficients = self.mix(x_TD)
        if self.config.mix == "sigmoid_gate":
            return routed_TD + coefficients.sigmoid() * fixed_TD
        routed_share, fixed_share = coefficients.softmax(-1).chunk(2, dim=-1)
        return routed_share * routed_TD + fixed_share * fixed_TD
