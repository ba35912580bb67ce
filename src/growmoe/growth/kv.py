"""Fewer key/value heads (MHA to GQA, or GQA with fewer groups): never exact, on request only."""

import torch
from torch import Tensor

from growmoe.models.checkpoint import Source
from growmoe.models.shapes import merged_kv_config


class MergedKV:
    """`source` with neighbouring key/value heads averaged (Ainslie et al., GQA, section 2.1)."""

    def __init__(self, source: Source, kv_heads: int) -> None:
        self.source = source
        self.config = merged_kv_config(source.config, kv_heads)
        self.dtype = source.dtype

    def load(self, name: str) -> Tensor:
        """Means of the rows of merged heads for k and v; all else as it is."""
        tensor = self.source.load(name)
        if not name.startswith("layers.") or name.split(".")[-2] not in ("k", "v"):
            return tensor
        groups, C = self.config.num_kv_heads, self.config.head_dim
        rows = tensor.reshape(groups, -1, C, *tensor.shape[1:])
        return rows.mean(1, dtype=torch.float32).to(tensor.dtype).flatten(0, 1)
