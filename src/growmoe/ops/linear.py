"""A linear layer whose three products in float32 on a CPU come from `products`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from growmoe.ops.device import plain_cpu
from growmoe.ops.products import onednn, outer, times, times_transposed


class Linear(nn.Linear):
    """nn.Linear with `linear` inside."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F]."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, w_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x @ w_FD^T + bias, as F.linear: [..., D] -> [..., F]. Differentiable once where it is not
    F.linear itself (float32 on a CPU, outside autocast)."""
    fast = x.dtype is w_FD.dtype is torch.float32 and plain_cpu(x) and plain_cpu(w_FD)
    if not fast or not x.numel() or torch.is_autocast_enabled("cpu") or not onednn():
        return F.linear(x, w_FD, bias_F)
    x_SD = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled():
        y_SF = _Linear.apply(x_SD, w_FD, bias_F)
    else:
        y_SF = times_transposed(x_SD, w_FD, bias_F)
    return y_SF.view(*x.shape[:-1], len(w_FD))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, w_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_SD, w_FD)
        return times_transposed(x_SD, w_FD, bias_F)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_SF: Tensor) -> tuple[Tensor | None, ...]:
        x_SD, w_FD = ctx.saved_tensors
        need_x, need_w, need_bias = ctx.needs_input_grad
        dy_SF = dy_SF.contiguous()
        dx_SD = times(dy_SF, w_FD) if need_x else None
        dw_FD = outer(dy_SF, x_SD) if need_w else None
        return dx_SD, dw_FD, dy_SF.sum(0) if need_bias else None
