"""A larger vocabulary: old logits stay exactly what they were; the loss moves by what new tokens
take from the softmax."""

from typing import Literal

import torch
from torch import Tensor

from growmoe.growth.axes import generator
from growmoe.models.checkpoint import Source
from growmoe.models.shapes import check_vocab

Init = Literal["mean", "mean_cov", "zeros", "from_tokens"]
_ROWS = 1024
_BLOCK = 256


class GrownVocab:
    """`source` with `size` tokens. New rows of embedding and head start as

    - mean: the mean of the old rows;
    - mean_cov: drawn from the normal distribution with their mean and covariance (Hewitt 2021);
    - zeros;
    - from_tokens: the mean of the old rows that spelled the token so far; `pieces[id]` lists them
      (also for ids below the old size: padding rows that the new tokenizer takes into use).
    """

    def __init__(
        self, source: Source, size: int, init: Init = "mean", *, seed: int = 0,
        pieces: dict[int, list[int]] | None = None,
    ) -> None:  # fmt: skip
        check_vocab(source.config, size)
        self.source, self.init, self.seed = source, init, seed
        self.old, self.pieces = source.config.vocab_size, pieces or {}
        self.config = source.config.replace(vocab_size=size)
        self.dtype = source.dtype

    def load(self, name: str) -> Tensor:
        """The tensor of the source, with new rows appended to embedding and head."""
        tensor = self.source.load(name)
        if name not in ("embed.weight", "head.weight"):
            return tensor
        if self.config.vocab_size == self.old and not self.pieces:
            return tensor
        result = torch.empty(self.config.vocab_size, tensor.shape[1], dtype=tensor.dtype)
        result[: self.old] = tensor
        self._fill(name, tensor, result[self.old :])
        for token, spelled in self.pieces.items():
            row_D = tensor[torch.tensor(spelled)].mean(0, dtype=torch.float32)
            result[token] = row_D.to(tensor.dtype)
        return result

    def _fill(self, name: str, w_VD: Tensor, new_ND: Tensor) -> None:
        """Set the new rows, a block at a time."""
        V = w_VD.shape[0]
        if self.init == "zeros":
            new_ND.zero_()
            return
        mean_D = torch.zeros(w_VD.shape[1], dtype=torch.float64)
        for part in w_VD.split(_ROWS):
            mean_D += part.sum(0, dtype=torch.float64) / V
        for number, block_ND in enumerate(new_ND.split(_BLOCK)):
            if self.init != "mean_cov":
                block_ND.copy_(mean_D)
                continue
            # a random combination of centred rows has exactly their covariance
            rng = generator(self.seed ^ 4, f"{name}/{number}")
            rows_ND = mean_D.repeat(len(block_ND), 1)
            for part in w_VD.split(_ROWS):
                z_NV = torch.randn(len(block_ND), len(part), generator=rng, dtype=torch.float64)
                rows_ND += z_NV @ (part.to(torch.float64) - mean_D) / V**0.5
            block_ND.copy_(rows_ND)
