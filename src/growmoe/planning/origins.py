"""Which tensors of a grown or upcycled model come from where, before any is read. No torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from growmoe.models.config import ModelConfig, tensor_shapes
from growmoe.models.families import hf_names, pick_family
from growmoe.models.growing import Growth
from growmoe.models.upcycling import dense_origin

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Origin:
    """One tensor of the new model (canonical names) and the source's tensors it is made from;
    none for a new one."""

    name: str
    shape: Shape
    sources: tuple[str, ...]


def growth_origins(source: ModelConfig, growth: Growth) -> Iterator[Origin]:
    """Every tensor of a grown model."""
    for name, shape in tensor_shapes(growth.config).items():
        yield Origin(name, shape, growth.origins(name, source.num_layers))


def upcycling_origins(config: ModelConfig) -> Iterator[Origin]:
    """Every tensor of an upcycled model with this config."""
    for name, shape in tensor_shapes(config).items():
        origin = dense_origin(name)
        yield Origin(name, shape, () if origin is None else (origin,))


def origin_table(
    source: ModelConfig, target: ModelConfig, origins: Iterator[Origin]
) -> list[dict[str, Any]]:
    """One row per kind of tensor, under the names on disk, with layers and experts as `*`:
    tensor, count, shape, from, source_shape (None for new ones)."""
    names, old_names = (hf_names(config, pick_family(config)) for config in (target, source))
    old_shapes = tensor_shapes(source)
    rows: dict[tuple[str, Shape, str], dict[str, Any]] = {}
    for origin in origins:
        made_of = " and ".join(_pattern(old_names[name]) for name in origin.sources)
        if len(origin.sources) == 2:
            made_of = f"{_pattern(old_names[origin.sources[0]])} and the layer above"
        key = (_pattern(names[origin.name]), origin.shape, made_of)
        if key not in rows:
            rows[key] = {
                "tensor": key[0], "count": 0, "shape": list(origin.shape),
                "from": made_of or "new",
                "source_shape": list(old_shapes[origin.sources[0]]) if origin.sources else None,
            }  # fmt: skip
        rows[key]["count"] += 1
    return list(rows.values())


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", re.sub(r"\.\d+\.", ".*.", name))
