"""How weights come from disk when a model is loaded for serving, and how fast.

Shards pass through memory-mapped pages, tensor by tensor: what is kept is packed or copied from
there, so no second copy is made, and after loading nothing points into the files: who overwrites
them later does not touch a running model.
"""

import time
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from growmoe.models.checkpoint import Directory, Source
from growmoe.models.config import ModelConfig


@dataclass
class LoadReport:
    """What loading read, and in what time."""

    bytes_read: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def stop(self) -> "LoadReport":
        """Take the time."""
        self.seconds = time.perf_counter() - self.started
        return self

    def report(self) -> dict[str, Any]:
        """For a JSON line."""
        speed = self.bytes_read / self.seconds / 1e9 if self.seconds else 0.0
        return {
            "load_seconds": round(self.seconds, 3), "load_bytes": self.bytes_read,
            "load_gb_per_s": round(speed, 3),
        }  # fmt: skip


class Streamed:
    """A source whose tensors pass through: valid until they are packed or copied, not to be kept.

    A directory's come as mapped pages, those of other sources (GGUF: dequantised) as they load.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.config: ModelConfig = source.config
        self.dtype: str = source.dtype
        self.report = LoadReport()

    def load(self, name: str) -> Tensor:
        """The tensor with the canonical `name`, counted."""
        if isinstance(self.source, Directory):
            self.report.bytes_read += self.source.stored_bytes(name)
            return self.source.map(name)
        tensor = self.source.load(name)
        self.report.bytes_read += tensor.nbytes
        return tensor
