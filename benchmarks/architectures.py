"""Dense and MoE architectures of DeepSpeed-MoE against one another, from runs of recipes/moe/.

    python benchmarks/architectures.py runs/moe [MORE...] --out OUT
    python benchmarks/architectures.py --step-time [recipes/moe/top2-vs-residual.yaml]

The first form reads the train stages `VARIANT-sSEED` of run directories and prints a Markdown table
per comparison of at least two variants, on the seeds that all of them have. It writes plots
(OUT/moe_differences.svg, OUT/moe_five_ways.svg) and OUT/architectures.json, and ends in one JSON
line.

The second form needs no runs: it builds the models of a recipe in one process and times training
steps on random tokens in turn, one step of each model per round, on one thread.
"""

import argparse
import json
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import nn

from growmoe.models.transformer import Transformer
from growmoe.planning.recipes import initial_config
from growmoe.recipe import PrepareStage, TrainStage
from growmoe.recipe_yaml import load_recipe
from growmoe.training.losses import LossWeights, language_model_loss
from growmoe.training.optimizer import make_optimizer
from growmoe.training.trainer import read_metrics
from growmoe.training.validation import mean_loss

COMPARISONS: dict[str, list[str]] = {
    "Dense and MoE at equal FLOPs": ["dense", "moe4", "moe16"],
    "First half, second half": ["first-half", "second-half", "moe4"],
    "Top-2 and Residual": ["moe4-top2", "residual4", "dense-wide"],
    "Five ways": ["moe4", "moe16", "pyramid4-8", "residual4", "pr-moe4-8"],
}
"""The first variant of each is what the others are subtracted from."""
LABELS = {
    "dense": "dense",
    "dense-wide": "dense, feed-forward 1.5 times as wide",
    "moe4": "MoE-4",
    "moe16": "MoE-16",
    "first-half": "MoE-4, first half",
    "second-half": "MoE-4, second half",
    "moe4-top2": "MoE-4, top-2",
    "residual4": "Residual-4",
    "pyramid4-8": "Pyramid-4/8",
    "pr-moe4-8": "PR-MoE-4/8",
}
NAME = re.compile(r"(.+)-s(\d+)")
FREE = ("name", "init", "seed", "validate_every", "checkpoint_every")
"""Options in which the runs of a comparison may differ."""


@dataclass(frozen=True)
class Run:
    """One finished train stage."""

    variant: str
    seed: int
    shared: dict[str, Any]
    """Its options but FREE ones, and the corpus's hash."""
    init: dict[str, Any]
    params: int
    active: int
    flops: int
    """Forward FLOPs per token."""
    curve: list[tuple[int, float]]
    """(tokens, validation loss)."""
    by_source: dict[str, float]
    step_seconds: float
    load: list[float]
    """Per MoE layer, the share of the most chosen expert times the number of experts."""


def read_run(folder: Path) -> Run | None:
    """The run in `folder`, or None where that is no `VARIANT-sSEED`."""
    file, name = folder / "stage.json", NAME.fullmatch(folder.name)
    if name is None or not file.exists():
        return None
    record = json.loads(file.read_text())
    options, result = record["options"], record["result"]
    if options["stage"] != "train" or options["init"] is None:
        return None
    manifest = json.loads((Path(options["data"]) / "manifest.json").read_text())
    metrics = read_metrics(folder.with_name(folder.name + ".run") / "metrics.jsonl")
    ends = [record["seconds"] for record in metrics if "seconds" in record]
    shared = {key: value for key, value in options.items() if key not in (*FREE, "data")}
    return Run(
        name[1], int(name[2]), {**shared, "corpus_hash": manifest["hash"]}, options["init"],
        result["params_total"], result["params_active"], result["flops"] // (3 * result["tokens"]),
        [(r["tokens"], mean_loss(r["validation"])) for r in metrics if "validation" in r],
        result["validation_after"],
        statistics.median(b - a for a, b in zip(ends, ends[1:])),
        [max(shares) * len(shares) for shares in result["expert_load"]],
    )  # fmt: skip


def read_runs(folders: list[Path]) -> dict[str, list[Run]]:
    """Runs by variant, in the order of their seeds. A run that stands in several folders counts
    once; runs that differ in more than FREE options stop the work."""
    found: dict[tuple[str, int], Run] = {}
    for folder in folders:
        for path in sorted(folder.iterdir()):
            run = read_run(path) if path.is_dir() else None
            if run is not None:
                found.setdefault((run.variant, run.seed), run)
    if not found:
        raise SystemExit(f"no train stage called VARIANT-sSEED in {', '.join(map(str, folders))}")
    first = next(iter(found.values()))
    for run in found.values():
        if run.shared != first.shared:
            wrong = [key for key in first.shared if run.shared.get(key) != first.shared[key]]
            raise SystemExit(
                f"{run.variant}-s{run.seed} and {first.variant}-s{first.seed} differ in "
                + ", ".join(wrong)
            )
    runs: dict[str, list[Run]] = {}
    for (variant, _), run in sorted(found.items(), key=lambda item: item[0][1]):
        runs.setdefault(variant, []).append(run)
    return runs


def row_of(runs: list[Run], base: list[Run]) -> dict[str, Any]:
    """Mean and spread over seeds, and per seed the difference to `base`: runs with one seed see
    the same batches in the same order."""
    ends = [run.curve[-1][1] for run in runs]
    return {
        "variant": runs[0].variant,
        "init": {key: value for key, value in runs[0].init.items() if value is not None},
        "params": runs[0].params,
        "active": runs[0].active,
        "flops_per_token": runs[0].flops,
        "seeds": [run.seed for run in runs],
        "losses": ends,
        "loss": statistics.mean(ends),
        "spread": max(ends) - min(ends),
        "differences": [end - run.curve[-1][1] for end, run in zip(ends, base)],
        "by_source": {
            name: statistics.mean(run.by_source[name] for run in runs) for name in runs[0].by_source
        },
        "step_seconds": statistics.median(run.step_seconds for run in runs),
        "fullest_expert": max((max(run.load) for run in runs if run.load), default=None),
    }


def tables(runs: dict[str, list[Run]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of every comparison that has at least two variants, on the seeds that all have."""
    found = {}
    for title in COMPARISONS:
        chosen = compared(runs, title)
        if len(chosen) > 1:
            base = next(iter(chosen.values()))
            found[title] = [row_of(many, base) for many in chosen.values()]
    return found


def compared(runs: dict[str, list[Run]], title: str) -> dict[str, list[Run]]:
    """The runs of one comparison: variants in its order, each with the seeds that all of them
    have."""
    present = [variant for variant in COMPARISONS[title] if variant in runs]
    seeds = [{run.seed for run in runs[variant]} for variant in present]
    common = set.intersection(*seeds) if seeds else set()
    return {
        variant: [run for run in runs[variant] if run.seed in common]
        for variant in present
        if common
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """One comparison as a Markdown table."""
    first = LABELS.get(rows[0]["variant"], rows[0]["variant"])
    print(f"\n### {title}\n")
    print(
        "| variant | parameters | active | FLOPs per token | validation loss | seeds | "
        f"minus {first}, per seed | s per step |\n|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        differences = ", ".join(f"{value:+.3f}" for value in row["differences"])
        print(
            f"| {LABELS.get(row['variant'], row['variant'])} | {row['params'] / 1e6:.2f}M "
            f"| {row['active'] / 1e6:.2f}M | {row['flops_per_token'] / 1e6:.2f}M "
            f"| {row['loss']:.3f} ± {row['spread'] / 2:.3f} | {len(row['seeds'])} "
            f"| {'' if row is rows[0] else differences} | {row['step_seconds']:.3f} |"
        )


def draw_differences(runs: dict[str, list[Run]], titles: list[str], file: Path) -> None:
    """One panel per comparison: the difference to its first variant over the run, thin lines for
    seeds and a thick one for their mean."""
    import matplotlib.pyplot as plt

    columns = min(2, len(titles))
    rows = -(-len(titles) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(5 * columns, 3.5 * rows), layout="constrained", squeeze=False
    )
    for axes in list(panels.flat)[len(titles) :]:
        axes.set_visible(False)
    for axes, title in zip(panels.flat, titles):
        chosen = compared(runs, title)
        first, *others = chosen
        base = {run.seed: dict(run.curve) for run in chosen[first]}
        axes.axhline(0, color=colour(first), lw=1.8, label=LABELS[first])
        for variant in others:
            lines = [
                [(tokens, loss - base[run.seed][tokens]) for tokens, loss in run.curve[1:]]
                for run in chosen[variant]
            ]
            xs = [tokens / 1000 for tokens, _ in lines[0]]
            for line in lines:
                ys = [loss for _, loss in line]
                axes.plot(xs, ys, color=colour(variant), lw=0.6, alpha=0.6)
            mean = [statistics.mean(loss for _, loss in points) for points in zip(*lines)]
            axes.plot(xs, mean, "o-", color=colour(variant), lw=1.8, ms=3, label=LABELS[variant])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("training tokens (thousands)", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    for row in panels:
        row[0].set_ylabel("validation loss minus the first's", fontsize=9)
    figure.savefig(file, metadata={"Date": None})


def draw_losses(runs: dict[str, list[Run]], title: str, file: Path) -> None:
    """Left: mean loss over the run. Right: loss at its end against all parameters, with a bar from
    the lowest to the highest seed."""
    import matplotlib.pyplot as plt

    figure, (curves, ends) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    chosen = compared(runs, title)
    places: dict[str, tuple[float, float]] = {}
    for variant, many in chosen.items():
        points = list(zip(*[run.curve[1:] for run in many]))
        xs = [point[0][0] / 1000 for point in points]
        means = [statistics.mean(loss for _, loss in point) for point in points]
        curves.plot(xs, means, "o-", color=colour(variant), lw=1.5, ms=3, label=LABELS[variant])
        x, losses = many[0].params / 1e6, [run.curve[-1][1] for run in many]
        places[variant] = x, means[-1]
        ends.plot([x, x], [min(losses), max(losses)], color=colour(variant), lw=1)
        ends.plot(x, means[-1], "o", color=colour(variant), ms=6)
    for variant, (x, y) in places.items():
        left = any(x < other < x + 3 and abs(y - level) < 0.03 for other, level in places.values())
        ends.annotate(
            LABELS[variant], (x, y), xytext=(-7 if left else 7, 3), textcoords="offset points",
            ha="right" if left else "left", fontsize=9,
        )  # fmt: skip
    curves.set(xlabel="training tokens (thousands)", ylabel="validation loss (nats)")
    curves.legend(frameon=False, fontsize=8)
    ends.margins(x=0.25, y=0.1)
    ends.set(xlabel="parameters in all (millions)", ylabel="validation loss at the end (nats)")
    for axes in (curves, ends):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})


def colour(variant: str) -> str:
    """The same in every plot."""
    return f"C{list(LABELS).index(variant)}"


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Tables and plots from finished runs; returns what the JSON line says."""
    runs = read_runs(options.runs)
    found = tables(runs)
    for title, rows in found.items():
        show(title, rows)
    options.out.mkdir(parents=True, exist_ok=True)
    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "growmoe"
    draw_differences(runs, list(found), options.out / "moe_differences.svg")
    if "Five ways" in found:
        draw_losses(runs, "Five ways", options.out / "moe_five_ways.svg")
    shared = next(iter(runs.values()))[0].shared
    summary = {
        "benchmark": "architectures", "runs": sum(map(len, runs.values())),
        "seeds": sorted({run.seed for many in runs.values() for run in many}),
        **{key: shared[key] for key in ("tokens", "sequence_length", "batch_size", "accumulation",
                                        "dtype", "optimizer", "losses", "routing", "corpus_hash")},
        "torch": torch.__version__, "comparisons": found,
    }  # fmt: skip
    curves = {f"{run.variant}-s{run.seed}": run.curve for many in runs.values() for run in many}
    full = json.dumps({**summary, "curves": curves}, indent=1)
    (options.out / "architectures.json").write_text(full)
    return summary


class Stepper:
    """Training steps of one model on random tokens, as the training loop makes them."""

    def __init__(self, spec: TrainStage, vocab_size: int) -> None:
        assert spec.init is not None
        self.spec, self.config = spec, initial_config(spec.init, vocab_size)
        self.model = Transformer(self.config)
        self.model.init_weights(spec.seed)
        self.optimizer = make_optimizer(self.model, spec.optimizer)
        losses = spec.losses
        self.weights = LossWeights(losses.balance, losses.balance_scope, {**losses.z})
        self.generator = torch.Generator().manual_seed(0)

    def step(self) -> float:
        """Wall seconds of one step."""
        shape = (self.spec.batch_size, self.spec.sequence_length + 1)
        batch = torch.randint(self.config.vocab_size, shape, generator=self.generator)
        begun = time.perf_counter()
        output = self.model(batch[:, :-1])
        language_model_loss(output, batch[:, 1:], self.weights).total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.optimizer.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - begun


def step_times(options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step of every model of a recipe, measured in turn in this process."""
    torch.set_num_threads(1)
    steppers: dict[str, Stepper] = {}
    vocab_size = 0
    for stage in load_recipe(options.step_time).stages:
        name = NAME.fullmatch(stage.name)
        if isinstance(stage, PrepareStage):
            vocab_size = stage.tokenizer.vocab_size
        if isinstance(stage, TrainStage) and name and name[1] not in steppers:
            steppers[name[1]] = Stepper(stage, vocab_size)
    for stepper in steppers.values():
        stepper.step(), stepper.step()  # the first steps allocate
    times: dict[str, list[float]] = {variant: [] for variant in steppers}
    for number in range(options.rounds):
        order = list(steppers)
        for variant in order if number % 2 else order[::-1]:
            times[variant].append(steppers[variant].step())
    rows = []
    print("\n| variant | FLOPs per token | median s per step | quartiles | times the first |")
    print("|---|---|---|---|---|")
    base = next(iter(times))
    for variant, seconds in times.items():
        low, median, high = statistics.quantiles(seconds, n=4)
        ratio = statistics.median(a / b for a, b in zip(seconds, times[base]))
        config, length = steppers[variant].config, steppers[variant].spec.sequence_length
        flops = config.flops_per_token(length)
        print(f"| {LABELS.get(variant, variant)} | {flops / 1e6:.2f}M | {median:.4f} | "
              f"{low:.4f} to {high:.4f} | {ratio:.3f} |")  # fmt: skip
        rows.append({"variant": variant, "params": config.params_total(), "flops_per_token": flops,
                     "median": median, "quartiles": [low, high], "ratio": ratio})  # fmt: skip
    spec = steppers[base].spec
    return {
        "benchmark": "architectures --step-time", "recipe": str(options.step_time),
        "rounds": options.rounds, "threads": 1, "batch_size": spec.batch_size,
        "sequence_length": spec.sequence_length, "vocab": vocab_size, "dtype": "float32",
        "torch": torch.__version__, "rows": rows,
    }  # fmt: skip


def main() -> None:
    """Compare finished runs, or time steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, help="where plots and architectures.json go")
    recipe = Path(__file__).parent.parent / "recipes/moe/top2-vs-residual.yaml"
    parser.add_argument("--step-time", type=Path, nargs="?", const=recipe, metavar="RECIPE")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    if (options.step_time is None) == (not options.runs) or (options.runs and not options.out):
        parser.error("give run directories and --out, or --step-time")
    print(json.dumps(step_times(options) if options.step_time else compare(options)))


if __name__ == "__main__":
    main()
