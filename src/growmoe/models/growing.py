"""A growth put together: the steps, the shape they lead to, and whether they keep the function.

The planner and `growth.compose` both work from this, so a plan and the work cannot disagree.
Imports no torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from growmoe.errors import GrowmoeError, UsageError
from growmoe.models.config import ModelConfig, tensor_shapes
from growmoe.models.shapes import (
    DepthMap,
    aki_origins,
    check_vocab,
    custom_depth_map,
    deepened_config,
    depth_map,
    merged_kv_config,
    widened_config,
)
from growmoe.recipe import GrowStage


@dataclass(frozen=True)
class Growth:
    """Order: vocabulary, merged kv heads, width, depth, noise. None leaves a step out."""

    config: ModelConfig
    """The shape at the end."""
    vocab: int | None
    merged_kv: int | None
    widens: bool
    aki: bool
    depth: DepthMap | None
    lossy: tuple[str, ...]
    """Why it is not the same function; empty when it is declared exact."""
    more_rows: frozenset[str] = frozenset()
    """The tensors of a layer that get new rows in width (without `layers.N.`)."""

    def origins(self, name: str, old_layers: int) -> tuple[str, ...]:
        """The source tensors that the tensor `name` is made from: one, two for what gets new rows
        under AKI, none for the zeros of silent layers."""
        if self.depth is not None and self.depth.is_silent(name):
            return ()
        before = self.depth.origin(name) if self.depth else name
        if not self.aki or before.partition(".")[2].partition(".")[2] not in self.more_rows:
            return (before,)
        return aki_origins(before, old_layers)


def plan_growth(source: ModelConfig, spec: GrowStage, vocab: int | None = None) -> Growth:
    """The growth that `spec` asks for; `vocab` stands in for a vocabulary that only the tokenizer
    knows. Raises UsageError that names every obstacle at once."""
    vocab = spec.vocab or vocab
    problems: list[str] = []

    def attempt(step: Callable[[ModelConfig], ModelConfig], config: ModelConfig) -> ModelConfig:
        try:
            return step(config)
        except GrowmoeError as error:
            problems.append(str(error).removeprefix("cannot grow: "))
            return config

    def larger_vocab(config: ModelConfig) -> ModelConfig:
        check_vocab(config, vocab or config.vocab_size)
        return config.replace(vocab_size=vocab or config.vocab_size)

    merged = None
    if spec.merge_kv and spec.kv_heads and spec.kv_heads < source.num_kv_heads:
        merged = spec.kv_heads
    config = attempt(larger_vocab, source)
    if merged:
        config = attempt(lambda c: merged_kv_config(c, merged), config)
    widens = any((spec.hidden, spec.heads, spec.head_dim, spec.ffn)) or (
        bool(spec.kv_heads) and not merged
    )
    narrow = config
    if widens:
        config = attempt(lambda c: _widened(c, spec), config)
        widens = config != narrow
    aki = widens and spec.method in ("aki", "aki-pro")
    if aki and source.moe is not None:
        problems.append("AKI is defined for dense models only")
    depth = None
    try:
        depth = _depth(source, spec)
    except UsageError as error:
        problems.append(str(error).removeprefix("cannot grow: "))
    if problems:
        raise UsageError("cannot grow: " + "; ".join(problems))
    more_rows = frozenset(_more_rows(narrow, config))
    lossy = tuple(_lossy(source, config, spec, merged, widens, depth))
    if depth is not None:
        config = deepened_config(config, depth.source)
    return Growth(config, vocab, merged, widens, aki, depth, lossy, more_rows)


def _more_rows(narrow: ModelConfig, wide: ModelConfig) -> Iterator[str]:
    old = tensor_shapes(narrow)
    for name, shape in tensor_shapes(wide).items():
        if name.startswith("layers.0.") and shape[0] != old[name][0]:
            yield name.removeprefix("layers.0.")


def _widened(config: ModelConfig, spec: GrowStage) -> ModelConfig:
    return widened_config(
        config, hidden=spec.hidden, heads=spec.heads, kv_heads=spec.kv_heads,
        head_dim=spec.head_dim, ffn=spec.ffn, zero_pad=spec.units == "zero_pad",
    )  # fmt: skip


def _depth(source: ModelConfig, spec: GrowStage) -> DepthMap | None:
    method, old = spec.depth_method, source.num_layers
    if isinstance(method, list):
        return custom_depth_map(old, tuple(method))
    if spec.layers is None or spec.layers == old:
        return None
    return depth_map(old, spec.layers, method, spec.guard)


def _lossy(
    source: ModelConfig, wide: ModelConfig, spec: GrowStage, merged: int | None, widens: bool,
    depth: DepthMap | None,
) -> Iterator[str]:  # fmt: skip
    if merged:
        yield f"{source.num_kv_heads} kv heads are averaged into {merged}"
    if widens and spec.method in ("aki", "aki-pro"):
        yield "AKI takes new units from the next layer"
    elif widens and spec.method == "fpi" and wide.hidden_size % source.hidden_size:
        yield "FPI does not correct the norms at a ratio that is no whole number"
    if depth is not None and not depth.silent and depth.source != tuple(range(source.num_layers)):
        yield "layers that occur twice, or not at all, change the function"
    if spec.noise == "everywhere" and spec.noise_db is not None:
        yield "noise is added to every matrix"
