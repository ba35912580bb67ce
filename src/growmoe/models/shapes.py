"""What growth does to the shape of a model, and what it refuses. Imports no torch.

The planner checks a whole recipe with these functions before any weight is read; `growth` uses the
same ones, so a plan and the work cannot disagree.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from growmoe.errors import UsageError
from growmoe.models.config import ModelConfig

Method = Literal["identity", "stack", "interpolate", "dus"]


def head_maps(H: int, K: int, new_H: int, new_K: int) -> tuple[list[int], list[int]]:
    """Which old query head and which old key/value head each new one copies.

    The group rule: new head h uses new kv head h // (H'/K'), which must be a copy of the kv head
    its source used. So copies are inserted inside their group, never appended at the end.
    Raises UsageError when K' < K (never exact) or when a group has no room for its heads.
    """
    if new_K < K:
        raise UsageError(
            f"{new_K} kv heads cannot hold {K}: merging kv heads is never exact; ask for it with "
            "merge_kv: mean"
        )
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
            f"{sizes['num_heads']} heads do not divide by {sizes['num_kv_heads']} kv heads "
            f"(heads follow hidden unless they are named; the source has {source.num_heads})"
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

    def is_silent(self, name: str) -> bool:
        """Whether the tensor `name` of the deeper model is zero, so that its layer adds nothing."""
        if not name.startswith("layers.") or name.split(".")[-2] not in ("o", "down"):
            return False
        return int(name.split(".")[1]) in self.silent

    def origin(self, name: str) -> str:
        """The source's tensor that the tensor `name` of the deeper model comes from."""
        if not name.startswith("layers."):
            return name
        _, layer, rest = name.split(".", 2)
        return f"layers.{self.source[int(layer)]}.{rest}"


def depth_map(old: int, new: int, method: Method, guard: tuple[int, int] = (0, 0)) -> DepthMap:
    """The map from `old` to `new` layers; `guard` keeps that many first and last layers single.

    - identity: copies with silent branches, spread evenly (LLaMA-Pro);
    - stack: layer l copies l mod L (StackBERT);
    - interpolate: layer l copies floor(l L / L'), the formula of AquilaMoE's eq. (3) with the
      printed fraction turned over (as printed it indexes past the source);
    - dus: the model twice, without the last m layers of the first and the first m of the second
      copy, m = L - L'/2 (SOLAR's depth up-scaling).
    """
    if new < old:
        raise UsageError(f"cannot grow: layers {new} is smaller than the source's {old}")
    first, last = guard
    middle, grown = old - first - last, new - first - last
    if min(first, last) < 0 or middle < 1:
        raise UsageError(f"guard {first}+{last} leaves none of {old} layers to duplicate")
    if method == "identity":
        return _identity_map(old, new)
    if method == "dus":
        if new % 2 or new > 2 * old:
            raise UsageError(
                f"depth dus makes an even number of at most {2 * old} layers, not {new}"
            )
        return DepthMap((*range(new // 2), *range(old - new // 2, old)))
    if method == "stack":
        inner = [layer % middle for layer in range(grown)]
    else:
        inner = [layer * middle // grown for layer in range(grown)]
    layers = [*range(first), *(first + layer for layer in inner), *range(old - last, old)]
    return DepthMap(tuple(layers))


def custom_depth_map(old: int, layers: tuple[int, ...]) -> DepthMap:
    """Layer i copies `layers[i]`; raises UsageError for a layer that does not exist."""
    if outside := [layer for layer in layers if not 0 <= layer < old]:
        raise UsageError(f"depth: layer {outside[0]} is not one of the layers 0 to {old - 1}")
    return DepthMap(layers)


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


def merged_kv_config(source: ModelConfig, kv_heads: int) -> ModelConfig:
    """The shape after averaging neighbouring key/value heads (lossy); raises UsageError when they
    cannot be averaged in groups of one size."""
    if source.num_kv_heads % kv_heads:
        raise UsageError(
            f"merge_kv: {source.num_kv_heads} kv heads do not divide into {kv_heads} groups"
        )
    if source.qk_norm and source.qk_norm_scope == "all":
        raise UsageError(
            "merge_kv: kv heads cannot be merged in a model that normalises keys over all heads "
            "together"
        )
    return source.replace(num_kv_heads=kv_heads)


def aki_origins(name: str, layers: int) -> tuple[str, ...]:
    """The source tensors of a tensor under AKI: its own, and for every projection that is not in
    the last layer the one of the layer above."""
    if not name.startswith("layers.") or "norm" in name:
        return (name,)
    _, layer, rest = name.split(".", 2)
    above = int(layer) + 1
    return (name,) if above == layers else (name, f"layers.{above}.{rest}")
