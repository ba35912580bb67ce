"""The three matrix products of a linear layer on a CPU, each by the fastest kernel torch has.

In float32 that is oneDNN, which uses the whole vector width of every x86 processor; torch's own
`mm` goes to MKL, which on AMD does not: 104 against 233 GFLOP/s for 1024 rows on a Zen 5
(`benchmarks/products.py`). torch reaches oneDNN for float32 through an operator that its compiler
uses, `mkldnn::_linear_pointwise`; nothing promises that it stays, so it is tried once and `mm` is
used where it fails. No autograd here. Letters: S rows, D and F widths.
"""

import functools

import torch
from torch import Tensor

_FEW = 4
"""Rows up to which MKL's matrix-vector kernels are faster (same benchmark)."""


@functools.cache
def onednn() -> bool:
    """Whether oneDNN's float32 product is there and gives what `mm` gives."""
    try:
        x_SD, w_FD, b_F = torch.randn(5, 7), torch.randn(3, 7), torch.randn(3)
        found_SF = torch.ops.mkldnn._linear_pointwise(x_SD, w_FD, b_F, "none", [], "")
        return bool(torch.allclose(found_SF, torch.addmm(b_F, x_SD, w_FD.t()), atol=1e-4))
    except (AttributeError, RuntimeError):
        return False


def _by_onednn(x: Tensor) -> bool:
    return x.dtype is torch.float32 and x.device.type == "cpu" and onednn()


def times_transposed(
    x_SD: Tensor, w_FD: Tensor, bias_F: Tensor | None = None, out_SF: Tensor | None = None
) -> Tensor:
    """x_SD @ w_FD^T + bias: [S,F], in `out_SF` where it is given."""
    if _by_onednn(x_SD):
        y_SF = torch.ops.mkldnn._linear_pointwise(x_SD, w_FD, bias_F, "none", [], "")
        return y_SF if out_SF is None else out_SF.copy_(y_SF)
    y_SF = torch.mm(x_SD, w_FD.t(), out=out_SF)
    return y_SF if bias_F is None else y_SF.add_(bias_F)


def times(y_SF: Tensor, w_FD: Tensor, out_SD: Tensor | None = None) -> Tensor:
    """y_SF @ w_FD: [S,D], the gradient of the input of a linear layer."""
    if _by_onednn(y_SF) and y_SF.shape[0] > _FEW:
        x_SD = torch.ops.mkldnn._linear_pointwise(y_SF, w_FD.t(), None, "none", [], "")
        return x_SD if out_SD is None else out_SD.copy_(x_SD)
    return torch.mm(y_SF, w_FD, out=out_SD)


def outer(y_SF: Tensor, x_SD: Tensor, out_FD: Tensor | None = None) -> Tensor:
    """y_SF^T @ x_SD: [F,D], the gradient of the weight of a linear layer."""
    if _by_onednn(y_SF) and y_SF.shape[0] > 1:
        g_FD = torch.ops.mkldnn._linear_pointwise(y_SF.t(), x_SD.t(), None, "none", [], "")
        return g_FD if out_FD is None else out_FD.copy_(g_FD)
    return torch.mm(y_SF.t(), x_SD, out=out_FD)
