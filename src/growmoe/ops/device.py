"""Which implementation a tensor gets: the plain CPU's, Triton's, or torch's for everything else."""

import contextlib
import functools
import importlib.util

import torch
from torch import Tensor, nn


def plain_cpu(x: Tensor) -> bool:
    """Whether this is real data in the processor's memory: no meta, fake or traced tensor."""
    return x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Inside, products keep the dtype they are given; free where autocast is off anyway."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def on_triton(x: Tensor) -> bool:
    """Whether Triton kernels may be tried for this tensor."""
    return x.is_cuda and _triton_installed()


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
