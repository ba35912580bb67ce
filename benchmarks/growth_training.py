"""What a growth costs at first and brings after training: curves at equal tokens.

Every variant makes the same target shape from one small trained model (scratch: from nothing) and
trains it on the same tokens with the same options; several seeds (of new weights and data order).

    python benchmarks/growth_training.py MODEL CORPUS OUT [--tokens 120000] [--seeds 2]

Writes OUT/growth_training.json and .svg; prints a Markdown table and ends in one JSON line.
"""

import argparse
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch

from growmoe.data.corpus import Corpus
from growmoe.growth.compose import grow
from growmoe.models.checkpoint import build_model, open_source
from growmoe.models.config import ModelConfig
from growmoe.models.transformer import Transformer
from growmoe.recipe import GrowStage, TrainStage
from growmoe.training.trainer import Trainer, read_metrics
from growmoe.training.validation import domain_losses, mean_loss

VARIANTS: dict[str, dict[str, Any] | None] = {
    "scratch": None,
    "exact, even split": {"split": "even"},
    "exact, random split": {"split": "random"},
    "exact, zero-pad": {"units": "zero_pad"},
    "FPI + stacked layers": {"method": "fpi"},
    "AKI-Pro": {"method": "aki-pro"},
    "exact width + stacked layers": {"depth": "stack"},
    "exact width + guarded interpolation, branches / count": {
        "depth": "interpolate", "guard": [1, 1], "branch_scale": "count",
    },
}  # fmt: skip


def started(
    variant: dict[str, Any] | None, model: Path, target: dict[str, int], seed: int
) -> tuple[Transformer, ModelConfig]:
    """The grown (or, for None, new) model of one variant."""
    source = open_source(model)
    grown, plan = grow(
        source, GrowStage(stage="grow", model=str(model), seed=seed, **target, **(variant or {}))
    )  # fmt: skip
    if variant is None:
        fresh = Transformer(plan.config)
        fresh.init_weights(seed)
        return fresh, plan.config
    return build_model(grown), plan.config


def run_one(
    model: Transformer, corpus: Corpus, options: argparse.Namespace, seed: int, work: Path
) -> list[tuple[int, float]]:
    """Train; returns [(tokens, validation loss)]."""
    spec = TrainStage(
        stage="train", name=work.name, model=str(options.model), data=str(options.corpus),
        tokens=options.tokens, sequence_length=256, batch_size=4, dtype="float32", seed=seed,
        optimizer={"lr": options.lr, "schedule": "constant", "warmup": 0.05},
        validate_every=options.every, checkpoint_every=10**6,
    )  # fmt: skip
    Trainer(model, corpus, spec, work).train()
    return [
        (record["tokens"], mean_loss(record["validation"]))
        for record in read_metrics(work / "metrics.jsonl")
        if "validation" in record
    ]


def draw(results: dict[str, list[list[tuple[int, float]]]], source: float, file: Path) -> None:
    """Curves of all variants; one colour each, a line per seed."""
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, (whole, near) = plt.subplots(
        1, 2, figsize=(11, 5), width_ratios=(1, 2), layout="constrained"
    )  # fmt: skip
    for number, (name, runs) in enumerate(results.items()):
        for seed, points in enumerate(runs):
            style = {"color": f"C{number}", "lw": 1.5, "ls": ("-", "--", ":", "-.")[seed % 4]}
            xs, ys = [tokens / 1000 for tokens, _ in points], [loss for _, loss in points]
            whole.plot(xs, ys, **style)
            if name != "scratch":
                near.plot(xs, ys, **style, label=name if seed == 0 else None)
    for axes in (whole, near):
        axes.axhline(source, color="grey", lw=1, ls=":")
        axes.set_xlabel("training tokens after growth (thousands)")
        axes.spines[["top", "right"]].set_visible(False)
    near.plot([], [], color="grey", lw=1, ls=":", label="the small model")
    whole.set(ylabel="validation loss (nats)", title="all (the high pair: from scratch)")
    near.set(title="grown models; a line style per seed")
    near.legend(frameon=False, fontsize=8)
    figure.savefig(file, metadata={"Date": None})


def table(results: dict[str, list[list[tuple[int, float]]]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds, right after growth, at the middle and at the end."""
    rows = []
    for name, runs in results.items():
        row: dict[str, Any] = {"variant": name, "seeds": len(runs)}
        for label, at in (("start", 0), ("middle", len(runs[0]) // 2), ("end", -1)):
            losses = [points[at][1] for points in runs]
            row[label] = statistics.mean(losses)
            row[f"{label}_spread"] = max(losses) - min(losses)
            row[f"{label}_tokens"] = runs[0][at][0]
        rows.append(row)
    return rows


def main() -> None:
    """Run every variant with every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=120_000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0, help="runs that exist are kept")
    parser.add_argument("--every", type=int, default=10, help="steps between validations")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--target", default='{"hidden": 256, "layers": 6, "ffn": 704}')
    parser.add_argument("--only", nargs="*", help="names of variants")
    options = parser.parse_args()
    target, corpus = json.loads(options.target), Corpus(options.corpus)
    source = open_source(options.model)
    small = mean_loss(domain_losses(build_model(source), corpus.validation_windows()))
    results: dict[str, list[list[tuple[int, float]]]] = {}
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in range(options.first_seed, options.seeds):
        for name, variant in VARIANTS.items():
            if options.only and name not in options.only:
                continue
            begun = time.monotonic()
            model, _ = started(variant, options.model, target, seed)
            work = options.out / f"{re.sub('[^A-Za-z]+', '-', name)}-{seed}"
            points = run_one(model, corpus, options, seed, work)
            results.setdefault(name, []).append(points)
            print(f"{name} seed {seed}: {points[0][1]:.4f} -> {points[-1][1]:.4f} "
                  f"in {time.monotonic() - begun:.0f}s", flush=True)  # fmt: skip
    rows = table(results)
    draw(results, small, options.out / "growth_training.svg")
    print(f"\nThe small model: {small:.4f}\n")
    print("| variant | right after | middle | end |\n|---|---|---|---|")
    for row in sorted(rows, key=lambda row: row["end"]):
        cells = [f"{row[k]:.3f} ± {row[f'{k}_spread'] / 2:.3f}" for k in ("start", "middle", "end")]
        print(f"| {row['variant']} | " + " | ".join(cells) + " |")
    summary = {
        "benchmark": "growth_training", "source_loss": small, "target": target,
        "tokens": options.tokens, "lr": options.lr, "corpus_hash": corpus.manifest["hash"],
        "torch": torch.__version__, "rows": rows, "curves": results,
    }  # fmt: skip
    (options.out / "growth_training.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps({key: value for key, value in summary.items() if key != "curves"}))


if __name__ == "__main__":
    main()
