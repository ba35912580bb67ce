"""What a grown model inherits beside its weights: which elements are new, and AdamW's moments.

The same index maps as the growth's, applied to one tensor per canonical name of the model at the
start of a chain of growths: its moments, or ones to find out what is inherited at all.

Moments are scaled as the gradients are. A growth that keeps the function multiplies the gradient
of what writes a unit by 1 / (c s), for a unit written with s whose c copies share its reads evenly,
and leaves the gradient of what reads it alone; exp_avg follows with that factor, exp_avg_sq with
its square. (Without it, AdamW would take steps too small by the factor until exp_avg_sq has
forgotten: 1 / (1 - beta2) steps.) Random splits have it on average; a change of the function
(AKI, duplicated layers, merged heads, experts that see a part of the tokens) leaves it as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from growmoe.errors import GrowmoeError, UsageError
from growmoe.files import read_json
from growmoe.growth.axes import Axis
from growmoe.growth.compose import widening_of
from growmoe.growth.kv import MergedKV
from growmoe.growth.upcycle import Upcycled
from growmoe.growth.width import Widened
from growmoe.models.checkpoint import Source
from growmoe.models.config import ModelConfig, tensor_shapes
from growmoe.models.families import config_from_hf
from growmoe.models.growing import Growth, plan_growth
from growmoe.models.shapes import DepthMap, aki_origins, deepened_config
from growmoe.models.upcycling import Upcycling, dense_origin
from growmoe.recipe import GrowStage, UpcycleStage

_STAGES: dict[str, type[GrowStage] | type[UpcycleStage]] = {
    "grow": GrowStage, "upcycle": UpcycleStage,
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One growth or upcycling of a chain."""

    spec: GrowStage | UpcycleStage
    vocab: int
    """Tokens of the result."""
    shared_tokens: int | None = None
    """Tokens that a new tokenizer took over; padding rows behind them may have been put to use."""


def ancestry(path: Path) -> tuple[Path, list[Step]]:
    """(the model that the one in `path` was grown from, the steps that led here, oldest first).

    Follows consecutive grow and upcycle steps; a model that was made otherwise is its own ancestor.
    Raises GrowmoeError when one of the directories is gone.
    """
    steps: list[Step] = []
    while (path / "growmoe.json").exists():
        lineage = read_json(path / "growmoe.json")
        if lineage.get("operation") not in _STAGES:
            break
        vocab = config_from_hf(read_json(path / "config.json"), path / "config.json").vocab_size
        steps.append(Step(_options(path, lineage), vocab, lineage.get("shared_tokens")))
        child, path = path, Path(lineage["parent"])
        if not path.exists():
            raise UsageError(
                f"{child} was made from {path}, which is not there, so what is new in it is unknown"
            )
    return path, steps[::-1]


def _options(path: Path, lineage: dict[str, Any]) -> GrowStage | UpcycleStage:
    """The options as they were given: some defaults contradict others when they are spelled out."""
    stage = _STAGES[lineage["operation"]]
    fields = stage.model_fields
    options = lineage.get("options", {})
    given = {k: v for k, v in options.items() if k not in fields or v != fields[k].default}
    try:
        return stage(**given)
    except ValidationError as error:
        raise GrowmoeError(
            f"{path / 'growmoe.json'}: {error.errors()[0]['msg']} in the options of "
            f"{lineage['operation']}"
        ) from None


class Inherited:
    """Tensors of a model at one point of the chain, by canonical name; new elements are 0."""

    dtype = "float32"

    def __init__(self, config: ModelConfig, load: Callable[[str], Tensor]) -> None:
        self.config, self.load = config, load


def known(base: ModelConfig) -> Inherited:
    """Ones for every tensor of the first model: what is left of them later is not new."""
    shapes = tensor_shapes(base)
    return Inherited(base, lambda name: torch.ones(()).expand(shapes[name]))


def carried(source: Source, steps: list[Step], *, copies: bool = False, power: int = 0) -> Source:
    """The tensors of `source` after `steps`.

    Without `copies` they lie on the first copy of every unit, layer and feed-forward; with them on
    all copies. `power` is that of the gradient's factor: 1 for exp_avg, 2 for exp_avg_sq.
    """
    for step in steps:
        if isinstance(step.spec, UpcycleStage):
            source = _upcycled(source, Upcycling.of(step.spec), copies)
            continue
        plan = plan_growth(source.config, step.spec, step.vocab)
        source = _with_vocab(source, step)
        if plan.merged_kv is not None:
            source = MergedKV(source, plan.merged_kv)
        if plan.widens:
            source = _widened(source, step.spec, plan, copies, power)
        if plan.depth is not None:
            source = _deepened(source, plan.depth, copies)
    return source


def _with_vocab(source: Source, step: Step) -> Source:
    """New rows are means or draws, so copies of nothing; nor are padding rows put to use."""
    kept = source.config.vocab_size
    if isinstance(step.spec, GrowStage) and step.spec.vocab_init == "from_tokens":
        kept = min(kept, step.shared_tokens or kept)

    def load(name: str) -> Tensor:
        tensor = source.load(name)
        if name not in ("embed.weight", "head.weight") or kept == step.vocab:
            return tensor
        grown = tensor.new_zeros(step.vocab, tensor.shape[1])
        grown[:kept] = tensor[:kept]
        return grown

    return Inherited(source.config.replace(vocab_size=step.vocab), load)


def _widened(source: Source, spec: GrowStage, plan: Growth, copies: bool, power: int) -> Source:
    wide = Widened(source, widening_of(spec))

    def widen(name: str, origin: str) -> Tensor:
        tensor = source.load(origin)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            return tensor
        for dim, axis in enumerate(wide.roles(name)[: tensor.dim()]):
            tensor = _along(tensor, dim, axis, copies)
        if power:
            factor_N = (wide.gradient_N(name) ** power).to(torch.float32)
            columns = name in ("embed.weight", "positions.weight") or tensor.dim() == 1
            tensor = tensor * (factor_N if columns else factor_N[:, None])
        return tensor

    def load(name: str) -> Tensor:
        own = widen(name, name)
        above = aki_origins(name, source.config.num_layers)[1:] if plan.aki and copies else ()
        if above:
            new_R = wide.roles(name)[0].new_N()
            own = torch.where(new_R.view(-1, *[1] * (own.dim() - 1)), widen(name, above[0]), own)
        return own

    return Inherited(wide.config, load)


def _along(tensor: Tensor, dim: int, axis: Axis, copies: bool) -> Tensor:
    """`tensor` with the positions of `axis` along `dim`; 0 on fresh ones, and on copies unless
    they are wanted."""
    if torch.equal(axis.index_N, torch.arange(tensor.shape[dim])):
        return tensor
    wide = tensor.index_select(dim, axis.index_N.clamp(min=0))
    gone_N = axis.index_N < 0 if copies else axis.new_N()
    return wide.index_fill_(dim, gone_N.nonzero().view(-1), 0.0)


def _deepened(source: Source, depth: DepthMap, copies: bool) -> Source:
    """The first layer that copies an old one inherits from it; o and down of a silent layer are
    zeros, so copies of nothing."""

    def load(name: str) -> Tensor:
        tensor = source.load(depth.origin(name))
        if not name.startswith("layers."):
            return tensor
        layer = int(name.split(".")[1])
        if depth.source.index(depth.source[layer]) == layer:
            return tensor
        silent = layer in depth.silent and name.split(".")[-2] in ("o", "down")
        return tensor if copies and not silent else torch.zeros_like(tensor)

    return Inherited(deepened_config(source.config, depth.source), load)


def _upcycled(source: Source, up: Upcycling, copies: bool) -> Source:
    """Router and mix are new. The first copy of the dense feed-forward is the fixed branch where
    there is one, else expert 0 (with slices: experts 0 to G-1)."""
    moe = Upcycled(source, up)
    shapes = tensor_shapes(moe.config)

    def load(name: str) -> Tensor:
        origin = dense_origin(name)
        if origin is None:
            return torch.zeros(shapes[name])
        if ".moe.experts." not in name:
            return source.load(origin)
        first = up.residual == "none" and int(name.split(".")[4]) < up.granularity
        if not (first or copies):
            return torch.zeros(shapes[name])
        return moe.kept(name, source.load(origin))

    return Inherited(moe.config, load)
