"""inspect: what is in a directory, and what the experts of a model are of use for."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from growmoe.errors import UsageError
from growmoe.files import read_json
from growmoe.models.config import ModelConfig
from growmoe.planning.derived import describe

CAVEAT = (
    "A first-order measure of present use: what the loss would be without an expert's part in each "
    "token, all else equal. It does not say what an expert could learn, and it nears zero for all "
    "as training converges, which has then scaled every expert's output as the loss wants it."
)
_ALL_SHOWN = 16
"""Layers with more experts show the extremes only."""
_EXTREMES = 4
_NAMED = 8


@dataclass(frozen=True)
class ExpertsAsked:
    """`--experts`, and the corpus or text to measure on; with neither, what training left."""

    data: str | None = None
    text: str | None = None

    @property
    def origin(self) -> str:
        """Where the numbers come from."""
        if self.data is not None:
            return f"validation windows of {self.data}"
        return self.text or "training"


def asked_experts(experts: bool, data: str | None, text: str | None) -> ExpertsAsked | None:
    """What the options ask for; raises UsageError where they contradict each other."""
    for name, given in (("data", data), ("text", text)):
        if given is not None and not experts:
            raise UsageError(f"--{name} is for --experts")
        if given is not None and not Path(given).exists():
            raise UsageError(f"{given} does not exist")
    if data is not None and text is not None:
        raise UsageError("give --data or --text, not both")
    return ExpertsAsked(data, text) if experts else None


def run(
    path: Path, tensors: bool, experts: ExpertsAsked | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Shape, parameters and lineage of a model, on request the use of its experts; counts of a
    corpus; stages of a run."""
    for name, kind in (("summary.json", "run"), ("manifest.json", "corpus")):
        if (path / name).exists():
            if experts is not None:
                raise UsageError(f"{path} is a {kind} directory; experts are those of a model")
            found = read_json(path / name)
            return {"kind": "run", "stages": found} if kind == "run" else {"kind": kind, **found}
    if path.is_dir() and not (path / "config.json").exists():
        raise UsageError(f"{path} is neither a model, a corpus nor a run directory")
    from growmoe.models.checkpoint import Directory, open_source
    from growmoe.models.config import tensor_shapes
    from growmoe.models.stored import LEFT_DTYPE, stored_bytes

    source = open_source(path)
    result: dict[str, Any] = {"kind": "model", "dtype": source.dtype, **describe(source.config)}
    if isinstance(source, Directory) and source.quantized:
        size = stored_bytes(source.config, source.family, LEFT_DTYPE, source.quantized)
        result |= {"quantized": source.quantized, "bytes": size}
    if isinstance(source, Directory):
        result["lineage"] = source.lineage()
    if tensors:
        result["tensors"] = {k: list(shape) for k, shape in tensor_shapes(source.config).items()}
    if experts is not None:
        result["expert_use"] = _expert_use(path, source.config, experts, dry_run)
    return result


def _expert_use(
    path: Path, config: ModelConfig, asked: ExpertsAsked, dry_run: bool
) -> dict[str, Any]:
    if config.moe is None:
        raise UsageError(f"{path} has no experts: it is a dense model")
    if asked.data is None and asked.text is None:
        from growmoe.training.usefulness import EXPERTS_FILE

        file = path / EXPERTS_FILE
        if not file.exists():
            raise UsageError(
                f"{path} holds no {EXPERTS_FILE}, which training leaves; give a corpus (--data) or "
                "a text file (--text) to measure its experts on"
            )
        found = {} if dry_run else read_json(file)
    else:
        found = {} if dry_run else _measured(path, config, asked)
    use = {"measured_on": asked.origin, **found}
    if dry_run:
        return use
    return {**use, "suggestions": suggestions(config, use["layers"]), "caveat": CAVEAT}


def _measured(path: Path, config: ModelConfig, asked: ExpertsAsked) -> dict[str, Any]:
    from growmoe.artifacts import check_sequences, fitting_corpus
    from growmoe.evaluation.experts import TOKENS, batches_of, measure_experts
    from growmoe.models.checkpoint import load_model

    if asked.data is not None:
        batches = batches_of(fitting_corpus(path, config, asked.data).validation_windows())
    else:
        sequences, _ = check_sequences(path, config, asked.text, None, 0, tokens=TOKENS)
        batches = [ids[None] for ids in sequences]
    layers, tokens = measure_experts(load_model(path), batches)
    return {"tokens": tokens, "layers": layers}


# ---- what follows from it ----


def suggestions(config: ModelConfig, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Per layer the experts that could be pruned first, and the layers that deserve more.

    Pruned first: of the experts that take less than an even share of the choices or remove less
    than nothing, those of lowest rank; at most a quarter of a layer, and never so many that fewer
    than top_k remain. More experts: to layers whose experts remove more loss than those of the
    mean layer, if they are used: the load's entropy is not below nine tenths of the mean layer's.
    """
    assert config.moe is not None
    prune = {}
    for record in layers:
        E = record["experts"]
        weak = [
            e for e in range(E) if record["load"][e] < 1 / E or record["removes"][e] < 0
        ]  # fmt: skip
        weak.sort(key=lambda e: record["rank"][e])
        prune[str(record["layer"])] = weak[: min(max(1, E // 4), E - config.moe.top_k)]
    by_use = sorted(layers, key=lambda record: -record["removes_total"])
    more = []
    if len(layers) > 1:
        enough = mean(record["removes_total"] for record in layers)
        even = 0.9 * mean(record["load_entropy"] for record in layers)
        more = [
            record["layer"] for record in layers
            if record["removes_total"] > enough and record["load_entropy"] >= even
        ]  # fmt: skip
    counts = [E * (2 if layer in more else 1) for layer, E in enumerate(config.moe.experts)]
    return {
        "prune_first": prune,
        "layers_by_use": [record["layer"] for record in by_use],
        "more_experts": more,
        **({"pyramid": ",".join(map(str, counts))} if more else {}),
    }


# ---- for people ----


def expert_lines(use: dict[str, Any]) -> Iterator[str]:
    """The tables of `expert_use`, as people read them."""
    if "layers" not in use:
        yield f"experts: {use['measured_on']}"
        return
    origin = use["measured_on"]
    how = "as training left them" if origin == "training" else f"measured on {origin}"
    yield f"experts, {how} ({use['tokens']} tokens)"
    for record in use["layers"]:
        yield ""
        yield (
            f"layer {record['layer']}: {record['experts']} experts remove "
            f"{record['removes_total']:.4g} nats per token, load entropy "
            f"{record['load_entropy']:.3f}"
        )
        yield from _layer_lines(record)
        first = use["suggestions"]["prune_first"][str(record["layer"])]
        more = f" and {len(first) - _NAMED} more" if len(first) > _NAMED else ""
        yield f"  to prune first: {', '.join(map(str, first[:_NAMED])) or 'none'}{more}"
    advice = use["suggestions"]
    yield ""
    yield "layers by what their experts remove: " + ", ".join(map(str, advice["layers_by_use"]))
    if advice["more_experts"]:
        yield (
            f"for a pyramid, more experts to: {', '.join(map(str, advice['more_experts']))} "
            f"(upcycle --experts {advice['pyramid']})"
        )
    else:
        yield "for a pyramid: no layer stands out"
    yield use["caveat"]


def _layer_lines(record: dict[str, Any]) -> Iterator[str]:
    E = record["experts"]
    order = list(range(E))
    if E > _ALL_SHOWN:
        load = sorted(record["load"])
        yield (
            f"  load {load[0]:.2%} to {load[-1]:.2%}, median {median(load):.2%}, "
            f"{sum(share == 0 for share in load)} unused; "
            f"{sum(value < 0 for value in record['removes'])} raise the loss; "
            f"closest pair {max(record['cosine']):.3f}"
        )
        order.sort(key=lambda e: record["rank"][e])
        order = [*order[:_EXTREMES], *order[-_EXTREMES:]]
    yield (
        f"  {'expert':>6}{'load':>9}{'credit':>9}{'rank':>7}{'weight':>9}{'removes':>12}  most like"
    )
    for number, e in enumerate(order):
        if E > _ALL_SHOWN and number == _EXTREMES:
            yield f"  {'...':>6}"
        yield (
            f"  {e:>6}{record['load'][e]:>9.2%}{record['credit'][e]:>+9.2f}"
            f"{record['rank'][e]:>7g}{record['weight'][e]:>9.3f}{record['removes'][e]:>+12.2e}"
            f"  {record['like'][e]} ({record['cosine'][e]:.3f})"
        )
