"""What growth does to the shape of a model, and what it refuses. Imports no torch.

The planner checks a whole recipe with these functions before any weight is read; `growth` uses the
same ones, so a plan and the work cannot disagree.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from growmoe.errors import UsageError
from growmoe.models.config import ModelConfig, MoEConfig

Method = Literal["identity", "stack", "interpolate"]
_MOE_FAMILY = {
    "llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe",
    "growmoe": "",  # a public architecture may express the MoE where none does the dense model
}  # fmt: skip


def head_maps(H: int, K: int, new_H: int, new_K: int) -> tuple[list[int], list[int]]:
    """Which old query head and which old key/value head each new one copies.

    The group rule: new head h uses new kv head h // (H'/K'), which must be a copy of the kv head
    its source used. So copies are inserted inside their group, never appended at the end.
    Raises UsageError when K' < K (never exact) or when a group has no room for its heads.
    """
    if new_K < K:
        raise UsageError(f"{new_K} kv heads cannot hold {K}: merging kv heads is never exact")
    if new_H % new_K:
        raise UsageError(f"{new_H} heads are not a multiple of {new_K} kv heads")
    group, new_group = H // K, new_H // new_K
    kv_map = [slot * K // new_K for slot in range(new_K)]
    used = [0] * K
    head_map = []
    for kv in kv_map:
        for _ in range(new_group):
            head_map.append(kv * group + used[kv] % group)
            used[kv] += 1
    short = [kv for kv in range(K) if used[kv] < group]
    if short:
        raise UsageError(
            f"{H} heads in {K} groups do not fit into {new_H} heads in {new_K} groups: "
            f"group {short[0]} has {used[short[0]]} places for {group} heads"
        )
    return head_map, kv_map


def widened_config(
    source: ModelConfig,
    *,
    hidden: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    ffn: int | None = None,
    zero_pad: bool = False,
) -> ModelConfig:
    """The shape of a wider model; None keeps a size, and heads follow hidden where the source has
    hidden = heads * head_dim and may grow heads. Raises UsageError that names every obstacle."""
    head_dim = head_dim or source.head_dim
    if heads is None:
        heads = source.num_heads
        together = source.qk_norm and source.qk_norm_scope == "all"  # such heads stay as they are
        if hidden and source.hidden_size == source.num_heads * head_dim and not together:
            if hidden % head_dim:
                raise UsageError(
                    f"hidden {hidden} is not a multiple of head_dim {head_dim}; name the heads"
                )
            heads = hidden // head_dim
    mha = source.num_heads == source.num_kv_heads
    sizes = {
        "hidden_size": hidden or source.hidden_size,
        "num_heads": heads,
        "num_kv_heads": kv_heads or (heads if mha else source.num_kv_heads),
        "head_dim": head_dim,
        "ffn_size": ffn or source.ffn_size,
    }
    problems = [
        f"{name} {new} is smaller than the source's {getattr(source, name)}"
        for name, new in sizes.items()
        if new < getattr(source, name)
    ]
    problems += _width_obstacles(source, sizes, zero_pad)
    if problems:
        raise UsageError("cannot grow: " + "; ".join(problems))
    head_maps(source.num_heads, source.num_kv_heads, sizes["num_heads"], sizes["num_kv_heads"])
    return source.replace(**sizes)


def _width_obstacles(source: ModelConfig, sizes: dict[str, int], zero_pad: bool) -> list[str]:
    found = []
    if sizes["num_heads"] % sizes["num_kv_heads"]:
        found.append(
            f"{sizes['num_heads']} heads do not divide by {sizes['num_kv_heads']} kv heads"
        )
    if sizes["head_dim"] % source.head_dim:
        found.append(f"head_dim {sizes['head_dim']} is not a multiple of {source.head_dim}")
    if sizes["head_dim"] != source.head_dim and source.qk_norm:
        found.append("head_dim cannot grow in a model that normalises queries and keys")
    if source.qk_norm and source.qk_norm_scope == "all":
        found += [
            f"{name} cannot grow from {getattr(source, name)} to {sizes[name]} in a model that "
            "normalises queries and keys over all heads together"
            for name in ("num_heads", "num_kv_heads")
            if sizes[name] != getattr(source, name)
        ]
    wider = sizes["hidden_size"] != source.hidden_size
    if source.norm == "layer" and wider and (zero_pad or sizes["hidden_size"] % source.hidden_size):
        found.append(
            "a LayerNorm model grows its hidden size by whole multiples of duplicates only"
        )
    if source.moe and sizes["ffn_size"] != source.ffn_size:
        found.append("the feed-forward of a MoE does not grow; grow first, then upcycle")
    return found


def deepened_config(source: ModelConfig, layers: tuple[int, ...]) -> ModelConfig:
    """The shape of a model whose layer i is a copy of the source's layer `layers[i]`."""
    moe = source.moe
    if moe is not None:
        moe = dataclasses.replace(moe, experts=tuple(moe.experts[old] for old in layers))
    return source.replace(num_layers=len(layers), moe=moe)


@dataclass(frozen=True)
class DepthMap:
    """For every new layer the old layer it copies, and whether its branches start at zero."""

    source: tuple[int, ...]
    silent: frozenset[int] = frozenset()


def depth_map(old: int, new: int, method: Method, guard: tuple[int, int] = (0, 0)) -> DepthMap:
    """The map from `old` to `new` layers; `guard` keeps that many first and last layers single.

    - identity: copies with silent branches, spread evenly (LLaMA-Pro);
    - stack: layer l copies l mod L (StackBERT);
    - interpolate: layer l copies floor(l L / L'), the formula of AquilaMoE's eq. (3) with the
      printed fraction turned over (as printed it indexes past the source).
    """
    if new < old:
        raise UsageError(f"cannot grow: layers {new} is smaller than the source's {old}")
    first, last = guard
    middle, grown = old - first - last, new - first - last
    if min(first, last) < 0 or middle < 1:
        raise UsageError(f"guard {first}+{last} leaves none of {old} layers to duplicate")
    if method == "identity":
        return _identity_map(old, new)
    if method == "stack":
        inner = [layer % middle for layer in range(grown)]
    else:
        inner = [layer * middle // grown for layer in range(grown)]
    layers = [*range(first), *(first + layer for layer in inner), *range(old - last, old)]
    return DepthMap(tuple(layers))


def _identity_map(old: int, new: int) -> DepthMap:
    extra = new - old
    after = [(copy + 1) * old // extra - 1 for copy in range(extra)] if extra else []
    layers: list[int] = []
    silent = set()
    for layer in range(old):
        layers.append(layer)
        for _ in range(sum(1 for place in after if max(place, 0) == layer)):
            silent.add(len(layers))
            layers.append(layer)
    return DepthMap(tuple(layers), frozenset(silent))


def check_vocab(source: ModelConfig, vocab: int) -> None:
    """Raises UsageError when a model would lose tokens."""
    if vocab < source.vocab_size:
        raise UsageError(
            f"cannot grow: vocab {vocab} is smaller than the source's {source.vocab_size}"
        )


def expert_counts(layers: int, experts: int, where: str) -> tuple[int, ...]:
    """Experts per layer: `all`, `second` (every second layer, 2, 4, ... counted from 1), or a
    comma-separated list of layer numbers counted from 0."""
    if where == "all":
        return (experts,) * layers
    if where == "second":
        return tuple(experts if layer % 2 else 0 for layer in range(layers))
    try:
        chosen = {int(part) for part in where.split(",")}
    except ValueError:
        raise UsageError(
            f"layers '{where}' is neither 'all', 'second' nor a list like '3,5,7'"
        ) from None
    if outside := sorted(layer for layer in chosen if not 0 <= layer < layers):
        raise UsageError(f"layer {outside[0]} is not one of the layers 0 to {layers - 1}")
    return tuple(experts if layer in chosen else 0 for layer in range(layers))


def upcycled_config(
    source: ModelConfig, experts: int, top_k: int, layers: str = "all", renormalize: bool = True
) -> ModelConfig:
    """The shape after sparse upcycling; raises UsageError when the source is a MoE already, or
    experts < top_k."""
    if source.moe is not None:
        raise UsageError("the source is a mixture of experts already")
    if top_k < 1:
        raise UsageError(f"top-k must be at least 1, not {top_k}")
    if experts < top_k:
        raise UsageError(f"experts ({experts}) are fewer than top-k ({top_k})")
    moe = MoEConfig(
        experts=expert_counts(source.num_layers, experts, layers),
        top_k=top_k,
        ffn_size=source.ffn_size,
        renormalize=renormalize,
    )
    return source.replace(moe=moe, family=_MOE_FAMILY.get(source.family, source.family))
