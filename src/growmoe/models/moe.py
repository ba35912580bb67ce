"""Feed-forward blocks: the dense MLP, and routed experts with an optional fixed branch.

Letters: T tokens, D hidden, F width, E experts, K experts per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe.models.config import ModelConfig
from growmoe.models.router import Router, Routing
from growmoe.ops.experts import Activation, ExpertWeights, expert_mlp
from growmoe.ops.linear import Linear
from growmoe.ops.mapping import MappingTable


class MLP(nn.Module):
    """SwiGLU (down(silu(gate x) * up x)) or GELU (down(gelu(up x))) feed-forward."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.swiglu = config.activation == "swiglu"
        D, bias = config.hidden_size, config.mlp_bias
        if self.swiglu:
            self.gate = Linear(D, width, bias=bias)
        self.up = Linear(D, width, bias=bias)
        self.down = Linear(width, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        up = self.up(x)
        h = F.silu(self.gate(x)) * up if self.swiglu else F.gelu(up, approximate="tanh")
        return self.down(h)


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

    def forward(self, x_TD: Tensor, table: MappingTable, weights_TK: Tensor) -> Tensor:
        """y_TD: what the experts of each token give, weighted and added up."""
        dtype = x_TD.dtype
        if torch.is_autocast_enabled(x_TD.device.type):  # the products do not know autocast
            dtype = torch.get_autocast_dtype(x_TD.device.type)
        biases = [None if b is None else b.to(dtype) for b in (self.up_bias, self.down_bias)]
        weights = ExpertWeights(self.up.to(dtype), self.down.to(dtype), *biases)
        activation: Activation = "swiglu" if self.swiglu else "gelu"
        with torch.autocast(x_TD.device.type, enabled=False):
            return expert_mlp(x_TD.to(dtype), table, weights_TK, weights, activation)


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
            self.mix = Linear(config.hidden_size, rows, bias=rows == 2)

    def forward(self, x_BTD: Tensor, fixed: MLP | None) -> tuple[Tensor, Routing]:
        """Returns ([B,T,D], routing); `fixed` is the residual MLP or shared expert, if any."""
        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        routing, table = self.router(x_TD, x_BTD.shape[0])
        y_TD = self.experts(x_TD, table, routing.weights_TK)
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
