"""What sparse upcycling makes of a dense model, and whether it keeps the function. No torch.

With identical experts a MoE layer gives (sum of the combine weights) * f(x). It is the dense layer
exactly when that sum, times a constant scale, is one for every token.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

from growmoe.errors import GrowmoeError, UsageError
from growmoe.models.config import Mix, ModelConfig, MoEConfig

_MOE_FAMILY = {
    "llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe",
    "growmoe": "",  # a public architecture may express the MoE where none does the dense model
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """Options of upcycling; see UpcycleStage for what each means."""

    experts: int | tuple[int, ...] = 8
    top_k: int = 2
    layers: str = "all"
    pyramid: int = 0
    groups: int = 1
    top_groups: int = 1
    combine: Literal["renorm", "softmax", "sigmoid"] = "renorm"
    router: Literal["normal", "zero", "virtual_group"] = "normal"
    router_std: float = 0.02
    expert_init: Literal["copy", "noise", "drop", "permute"] = "copy"
    noise: float = 0.01
    drop: float = 0.5
    granularity: int = 1
    residual: Mix = "none"
    shared: Literal["dense_plus_null", "half_half"] = "dense_plus_null"
    seed: int = 0

    @classmethod
    def of(cls, options: Any) -> "Upcycling":
        """From any object that has these fields, for example an UpcycleStage."""
        given = {field.name: getattr(options, field.name) for field in fields(cls)}
        if given["router"] is None:
            given["router"] = "virtual_group" if given["granularity"] > 1 else "normal"
        return cls(**given)

    @property
    def routed_share(self) -> float:
        """The part of the dense output that the routed experts start with."""
        if self.residual == "none" or (self.residual == "softmax2" and self.shared == "half_half"):
            return 1.0
        return 0.0 if self.shared == "dense_plus_null" else 0.5

    @property
    def fixed_share(self) -> float:
        """What the fixed branch's output is multiplied by, so that after its coefficient (1, or
        one half from a zero gate) it gives the rest of the dense output."""
        if self.residual == "softmax2":
            return 2.0 if self.shared == "dense_plus_null" else 1.0
        gate = 0.5 if self.residual == "sigmoid_gate" else 1.0
        return (1.0 - self.routed_share) / gate

    def combined_weight(self, experts: int) -> float:
        """Sum of a token's combine weights: 1 when renormalised, k/E for a flat softmax."""
        return self.top_k / experts if self.combine == "softmax" else 1.0


def expert_counts(
    layers: int, experts: int | tuple[int, ...], where: str, pyramid: int = 0
) -> tuple[int, ...]:
    """Experts per layer: one number for the layers `where` (`all`, `second` for 2, 4, ... counted
    from 1, `first_half`, `second_half`, or layer numbers from 0 separated by commas), twice as
    many in the last `pyramid` of them; or a number for every layer."""
    if not isinstance(experts, int):
        if where != "all":
            raise UsageError(
                "layers and a list of experts contradict each other; 0 is a dense layer"
            )
        if len(experts) != layers:
            raise UsageError(f"{len(experts)} expert counts are given for {layers} layers")
        return experts
    chosen = _moe_layers(layers, where)
    if pyramid > len(chosen):
        raise UsageError(f"pyramid {pyramid} is more than the {len(chosen)} layers with experts")
    doubled = chosen[len(chosen) - pyramid :]
    counts = [0] * layers
    for layer in chosen:
        counts[layer] = 2 * experts if layer in doubled else experts
    return tuple(counts)


def _moe_layers(layers: int, where: str) -> list[int]:
    named = {
        "all": range(layers),
        "second": range(1, layers, 2),
        "first_half": range(layers // 2),
        "second_half": range(layers // 2, layers),
    }
    if where in named:
        return list(named[where])
    try:
        chosen = sorted({int(part) for part in where.split(",")})
    except ValueError:
        raise UsageError(
            f"layers '{where}' is neither {', '.join(named)} nor a list like '3,5,7'"
        ) from None
    if outside := [layer for layer in chosen if not 0 <= layer < layers]:
        raise UsageError(f"layer {outside[0]} is not one of the layers 0 to {layers - 1}")
    return chosen


def upcycled_config(source: ModelConfig, up: Upcycling) -> ModelConfig:
    """The shape after upcycling; raises UsageError that names every obstacle."""
    if source.moe is not None:
        raise UsageError("the source is a mixture of experts already")
    counts = expert_counts(source.num_layers, up.experts, up.layers, up.pyramid)
    G = up.granularity
    problems = []
    if up.top_k < 1:
        problems.append(f"top-k must be at least 1, not {up.top_k}")
    if not any(counts):
        problems.append("no layer would have experts")
    for count in sorted({count for count in counts if count}):
        if count < up.top_k:
            problems.append(f"experts ({count}) are fewer than top-k ({up.top_k})")
        if count % G:
            problems.append(f"{count} experts are not a multiple of granularity {G}")
    if source.ffn_size % G:
        problems.append(f"the feed-forward width {source.ffn_size} does not divide by {G}")
    if up.router == "virtual_group" and up.top_k % G:
        problems.append(f"virtual groups are chosen whole: top-k {up.top_k} is no multiple of {G}")
    if up.router == "virtual_group" and not up.router_std:
        problems.append("virtual groups of a zero router cannot be told apart; give router_std")
    if problems:
        raise UsageError("cannot upcycle: " + "; ".join(problems))
    moe = MoEConfig(
        experts=counts, top_k=up.top_k, ffn_size=source.ffn_size // G,
        renormalize=up.combine != "softmax",
        scoring="sigmoid" if up.combine == "sigmoid" else "softmax",
        groups=up.groups, top_groups=up.top_groups,
        mix=up.residual, fixed_ffn_size=source.ffn_size if up.residual != "none" else 0,
    )  # fmt: skip
    try:
        return source.replace(moe=moe, family=_MOE_FAMILY.get(source.family, source.family))
    except GrowmoeError as error:
        raise UsageError(f"cannot upcycle: {error}") from None


def why_lossy(up: Upcycling, experts: tuple[int, ...]) -> str | None:
    """Why the upcycled model is not the same function, or None when it is."""
    if up.routed_share == 0.0:
        return None
    if (up.expert_init == "noise" and up.noise) or (up.expert_init == "drop" and up.drop):
        return f"expert_init {up.expert_init} changes the experts"
    if up.granularity > 1 and up.router != "virtual_group":
        return "slices of a feed-forward add up only when virtual groups are chosen whole"
    everywhere = all(count in (0, up.top_k) for count in experts)
    if up.combine == "softmax" and up.router != "zero" and not everywhere:
        return (
            "softmax weights that are not renormalised add up to another number for every token "
            "(router: zero would be exact)"
        )
    return None


def dense_origin(name: str) -> str | None:
    """The dense tensor that the tensor `name` of an upcycled model comes from; None for routers
    and mixing coefficients, which are new."""
    if ".moe.router." in name or ".moe.mix." in name:
        return None
    before, routed, expert = name.partition("moe.experts.")
    return f"{before}mlp.{expert.partition('.')[2]}" if routed else name
