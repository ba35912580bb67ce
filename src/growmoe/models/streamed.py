"""A forward pass that holds one layer's weights at a time, for models larger than memory."""

import torch
from torch import Tensor

from growmoe.models.attention import make_norm, rotary_tables
from growmoe.models.checkpoint import Source, load_into, named_views
from growmoe.models.config import ModelConfig, tensor_shapes
from growmoe.models.safetensors_io import DTYPES, numel
from growmoe.models.transformer import Block
from growmoe.ops.linear import linear


@torch.no_grad()
def streamed_logits(source: Source, sequences: list[Tensor], dtype: str) -> list[Tensor]:
    """Logits [T,V] of every sequence (token ids, 1-D), run one by one through one layer after the
    other; the same arithmetic as `Transformer.forward` in `dtype`."""
    config, wide = source.config, DTYPES[dtype]
    embed_VD = source.load("embed.weight")
    hidden = [embed_VD[ids].to(wide)[None] for ids in sequences]
    if not config.tied_head:
        del embed_VD
    rotary: list[Tensor | None] = [None] * len(sequences)
    if config.positions == "rope":
        rotary = [rotary_tables(config, torch.arange(len(ids)), wide) for ids in sequences]
    else:
        positions_PD = source.load("positions.weight").to(wide)
        hidden = [x + positions_PD[: x.shape[1]] for x in hidden]
    for layer in range(config.num_layers):
        block = _block(source, layer, wide)
        hidden = [block(x, tables, None)[0] for x, tables in zip(hidden, rotary)]
        del block
    with torch.device("meta"):
        norm = make_norm(config, config.hidden_size)
    norm.to(dtype=wide).to_empty(device="cpu")
    load_into({f"norm.{name}": p.data for name, p in norm.named_parameters()}, source.load)
    head_VD = embed_VD if config.tied_head else source.load("head.weight")
    head_VD = head_VD.to(wide)
    return [linear(norm(x), head_VD)[0] for x in hidden]


def _block(source: Source, layer: int, dtype: torch.dtype) -> Block:
    with torch.device("meta"):
        block = Block(source.config, layer)
    block.to(dtype=dtype).to_empty(device="cpu")
    views = dict(named_views(block.named_parameters(), source.config))
    prefix = f"layers.{layer}."
    load_into(views, lambda name: source.load(prefix + name))
    return block.eval()


def largest_part(config: ModelConfig) -> int:
    """Elements that a streamed pass holds at once: the largest layer, or the embedding and what
    else is outside the layers."""
    sizes: dict[str, int] = {}
    for name, shape in tensor_shapes(config).items():
        part = name.split(".")[1] if name.startswith("layers.") else "outside"
        sizes[part] = sizes.get(part, 0) + numel(shape)
    return sizes.pop("outside") + max(sizes.values())
