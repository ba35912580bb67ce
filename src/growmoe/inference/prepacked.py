"""The engine's weights without the native kernels: oneDNN's own layout for bfloat16, integers that
torch multiplies out at every use for int8 and int4.

oneDNN reorders plain bfloat16 weights at every call, which costs more than reading them; reordered
once, the same product reads at the speed of memory. torch has that as two operators that its
compiler uses (`mkldnn::_reorder_linear_weight`, `mkldnn::_linear_pointwise`); nothing promises that
they stay, so they are tried once and F.linear is used where they fail.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe.models.checkpoint import Source
from growmoe.models.moe import Experts
from growmoe.models.transformer import Transformer
from growmoe.ops.experts import Activation, activate
from growmoe.ops.mapping import MappingTable
from growmoe.ops.native import Form
from growmoe.ops.quantized import BITS, dequantize, stored_or_made


@functools.cache
def prepacking() -> bool:
    """Whether oneDNN's prepacked product is there and gives what F.linear gives."""
    try:
        x, w = torch.randn(3, 40).bfloat16(), torch.randn(24, 40).bfloat16()
        found = torch.ops.mkldnn._linear_pointwise(x, _reordered(w), None, "none", [], "")
        return bool(torch.allclose(found.float(), F.linear(x, w).float(), atol=0.1))
    except (AttributeError, RuntimeError):
        return False


def _reordered(w_NK: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(w_NK.contiguous(), 1)


class PrepackedLinear(nn.Module):
    """A linear layer whose weight is one copy: oneDNN's, integers, or a plain tensor."""

    def __init__(self, source: Source, name: str, form: Form, bias: bool) -> None:
        super().__init__()
        dtype = torch.float32 if form == "float32" else torch.bfloat16
        self.bias_N = source.load(f"{name}.bias").to(dtype, copy=True) if bias else None
        self.quantized = self.plain_NK = self.reordered = None
        if form in BITS:
            self.quantized = stored_or_made(source, f"{name}.weight", BITS[form])
            return
        weight_NK = source.load(f"{name}.weight").to(dtype)
        if dtype is torch.bfloat16 and prepacking():
            self.reordered = _reordered(weight_NK)
        else:
            self.plain_NK = weight_NK.clone()  # the source may lend its tensors

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        if self.reordered is not None:
            return torch.ops.mkldnn._linear_pointwise(
                x, self.reordered, self.bias_N, "none", [], ""
            )
        weight_NK = self.plain_NK
        if self.quantized is not None:
            weight_NK = dequantize(self.quantized).to(x.dtype)
        assert weight_NK is not None
        return F.linear(x, weight_NK, self.bias_N)


class PrepackedExperts(nn.Module):
    """`models.moe.Experts` as a loop over the experts that have rows."""

    def __init__(self, source: Source, place: str, count: int, form: Form) -> None:
        super().__init__()
        config = source.config
        parts = ("gate", "up", "down") if config.activation == "swiglu" else ("up", "down")
        self.activation: Activation = "swiglu" if config.activation == "swiglu" else "gelu"
        self.experts = [
            [
                PrepackedLinear(source, f"{place}.{e}.{part}", form, config.mlp_bias)
                for part in parts
            ]
            for e in range(count)
        ]

    def forward(self, x_TD: Tensor, table: MappingTable, weights_TK: Tensor) -> Tensor:
        """y_TD: what the experts of each token give, weighted and added up."""
        T, K = weights_TK.shape
        counts = table.counts_E.tolist()
        y_SD = x_TD.new_zeros(T * K, x_TD.shape[1])
        for rows_S, expert in zip(table.order_S[: sum(counts)].split(counts), self.experts):
            if len(rows_S):
                x_SD = x_TD[rows_S // K]
                h_SR = torch.cat([part(x_SD) for part in expert[:-1]], dim=-1)
                y_SD[rows_S] = expert[-1](activate(h_SR, self.activation))
        return torch.einsum("tkd,tk->td", y_SD.view(T, K, -1), weights_TK.to(y_SD.dtype))


def build_prepacked(source: Source, form: Form) -> Transformer:
    """The model of `source`, read tensor by tensor; activations in bfloat16 unless the form is
    float32. The head of an int4 model has int8."""
    config, dtype = source.config, torch.float32 if form == "float32" else torch.bfloat16
    with torch.device("meta"):
        model = Transformer(config)
    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Linear):
            own: Form = "int8" if name == "head" and form == "int4" else form
            if name.endswith(".moe.mix"):  # read by every token, and tiny
                own = "float32" if form == "float32" else "bfloat16"
            setattr(parent, leaf, PrepackedLinear(source, name, own, module.bias is not None))
        elif isinstance(module, Experts):
            setattr(parent, leaf, PrepackedExperts(source, name, len(module.up), form))
    for name, parameter in list(model.named_parameters()):
        module_name, _, leaf = name.rpartition(".")
        data = source.load(name).to(dtype, copy=True)
        owner = model.get_submodule(module_name)
        setattr(owner, leaf, nn.Parameter(data, requires_grad=False))
        del parameter
    return model.eval()
