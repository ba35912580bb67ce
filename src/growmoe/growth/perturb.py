"""Noise on every matrix of a model, at a signal-to-noise ratio: lossy, and said so."""

import torch
from torch import Tensor

from growmoe.growth.axes import CHUNK_ELEMENTS, generator, root_mean_square
from growmoe.models.checkpoint import Source


def relative_noise(snr_db: float) -> float:
    """Root mean square of the noise relative to the signal: 10^(-dB/20)."""
    return float(10 ** (-snr_db / 20))


class Perturbed:
    """`source` with seeded Gaussian noise on all matrices but the embedding and the head."""

    def __init__(self, source: Source, snr_db: float, seed: int) -> None:
        self.source, self.relative, self.seed = source, relative_noise(snr_db), seed
        self.config, self.dtype = source.config, source.dtype

    def load(self, name: str) -> Tensor:
        """The tensor, with noise if it is a matrix of a layer."""
        tensor = self.source.load(name)
        if tensor.dim() < 2 or not name.startswith("layers."):
            return tensor
        return add_noise(tensor, self.relative, generator(self.seed ^ 3, name))


def add_noise(tensor: Tensor, relative: float, rng: torch.Generator) -> Tensor:
    """A copy of `tensor` with noise of `relative` times its root mean square."""
    std = relative * root_mean_square(tensor)
    noisy = tensor.clone(memory_format=torch.contiguous_format)
    for part in noisy.view(-1).split(CHUNK_ELEMENTS):
        drawn = torch.randn(part.shape, generator=rng)
        part.copy_(part.to(torch.float32) + drawn * std)
    return noisy
