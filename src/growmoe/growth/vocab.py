"""A larger vocabulary: old logits stay exactly what they were; new tokens start at the mean."""

import torch
from torch import Tensor

from growmoe.models.checkpoint import Source
from growmoe.models.shapes import check_vocab


class GrownVocab:
    """`source` with `size` tokens; new rows of embedding and head are the mean of the old rows."""

    def __init__(self, source: Source, size: int) -> None:
        check_vocab(source.config, size)
        self.source, self.extra = source, size - source.config.vocab_size
        self.config = source.config.replace(vocab_size=size)
        self.dtype = source.dtype

    def load(self, name: str) -> Tensor:
        """The tensor of the source, with mean rows appended to embedding and head."""
        tensor = self.source.load(name)
        if name not in ("embed.weight", "head.weight") or not self.extra:
            return tensor
        mean_1D = tensor.mean(0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
        return torch.cat((tensor, mean_1D.expand(self.extra, -1)))
