"""Does loss-ranked routing lower the loss of an upcycled model? An ablation at equal tokens.

A dense MODEL is upcycled once per seed and trained on the same batches by every variant: with the
balance loss alone (plain), with the selection bias in its place (aux-free), with loss-ranked
routing on top of the bias (ranking), and with ranks drawn at random in place of those by loss
(random ranks: the control, for any shift of the routers may act as noise does). Variants take
turns seed by seed.

    python benchmarks/ranking.py MODEL CORPUS [--tokens 200000] [--seeds 2] [--eta 0.02]

Prints a Markdown table and ends in one JSON line.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growmoe.data.corpus import Corpus
from growmoe.growth.upcycle import Upcycled
from growmoe.models.checkpoint import build_model, open_source
from growmoe.models.config import moe_layers
from growmoe.models.transformer import Transformer, adopt
from growmoe.models.upcycling import Upcycling
from growmoe.planning.recipes import trained_config
from growmoe.recipe import TrainStage
from growmoe.training.ranking import ExpertRanking
from growmoe.training.trainer import Trainer, read_metrics
from growmoe.training.validation import mean_loss

VARIANTS = ("plain", "aux-free", "ranking", "random ranks")


class RandomRanks(ExpertRanking):
    """The control: every layer's ranks are one permutation, drawn once, whatever the loss says."""

    def __init__(self, experts: list[int], spec: TrainStage) -> None:
        super().__init__(experts, spec.routing.ranking, spec.steps)
        rng = torch.Generator().manual_seed(1000 + spec.seed)
        self.drawn = [torch.randperm(E, generator=rng).double() + 1.0 for E in experts]

    def rank(self, layer: int) -> Tensor:
        """Those that were drawn."""
        return self.drawn[layer]


def upcycled(model: Path, options: argparse.Namespace, seed: int) -> Transformer:
    """The dense model with experts; `drop` makes them differ from the first step."""
    up = Upcycling(
        experts=options.experts, top_k=options.top_k, expert_init=options.init, seed=seed
    )
    made = Upcycled(open_source(model), up)
    return build_model(made)


def spec_of(variant: str, options: argparse.Namespace, seed: int) -> TrainStage:
    """What the variants share, and where they part."""
    routing: dict[str, Any] = {} if variant == "plain" else {"bias_rate": options.bias_rate}
    if variant in ("ranking", "random ranks"):
        routing["ranking"] = {"eta": options.eta}
    return TrainStage(
        stage="train", name="ablation", model=str(options.model), data=str(options.corpus),
        tokens=options.tokens, sequence_length=options.length, batch_size=options.batch,
        dtype="float32", seed=seed, routing=routing,
        optimizer={"lr": options.lr, "schedule": "cosine", "warmup": 0.05},
        losses={"balance": 0.001 if variant == "plain" else 0.0},
        validate_every=10**6, checkpoint_every=10**6,
    )  # fmt: skip


def run_one(
    variant: str, model: Transformer, corpus: Corpus, options: argparse.Namespace, seed: int
) -> dict[str, float]:
    """Train; returns validation losses, and how uneven the load of the last quarter was."""
    spec = spec_of(variant, options, seed)
    adopt(model, trained_config(spec, model.config))
    with tempfile.TemporaryDirectory() as work:
        trainer = Trainer(model, corpus, spec, Path(work))
        if variant == "random ranks":
            experts = [model.config.experts_in(layer) for layer in moe_layers(model.config)]
            trainer.routing.ranking = RandomRanks(experts, spec)
        outcome = trainer.train()
        steps = [r for r in read_metrics(Path(work) / "metrics.jsonl") if "loss" in r]
    last = steps[-max(1, len(steps) // 4) :]
    brakes = [float(credit.brake) for credit in trainer.routing.ranking.layers]
    return {
        "before": mean_loss(outcome.before),
        "after": mean_loss(outcome.after),
        "max_load": 1.0 + statistics.mean(statistics.mean(r["routing"]["max_vio"]) for r in last),
        "brake": statistics.mean(brakes),
    }


def rows_of(results: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Means and half spreads over seeds; differences are to aux-free with the same seed."""
    rows = []
    for name, runs in results.items():
        after = [run["after"] for run in runs]
        apart = [run["after"] - base["after"] for run, base in zip(runs, results["aux-free"])]
        rows.append({
            "variant": name, "seeds": len(runs),
            "before": statistics.mean(run["before"] for run in runs),
            "after": statistics.mean(after), "after_spread": (max(after) - min(after)) / 2,
            "apart": statistics.mean(apart), "apart_spread": (max(apart) - min(apart)) / 2,
            "max_load": statistics.mean(run["max_load"] for run in runs),
            "brake": statistics.mean(run["brake"] for run in runs),
        })  # fmt: skip
    return rows


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a dense model")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--init", default="drop", help="expert_init of the upcycling")
    parser.add_argument("--eta", type=float, default=0.02)
    parser.add_argument("--bias-rate", type=float, default=0.001)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    return parser.parse_args()


def main() -> None:
    """Run every variant with every seed."""
    options = arguments()
    corpus = Corpus(options.corpus)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for seed in range(options.seeds):
        for name in VARIANTS if seed % 2 == 0 else VARIANTS[::-1]:
            begun = time.monotonic()
            found = run_one(name, upcycled(options.model, options, seed), corpus, options, seed)
            results[name].append(found)
            print(f"{name} seed {seed}: {found['before']:.4f} -> {found['after']:.4f} "
                  f"in {time.monotonic() - begun:.0f}s", flush=True)  # fmt: skip
    rows = rows_of(results)
    print("\n| variant | validation loss | against aux-free | largest load / mean | brake |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['variant']} | {row['after']:.4f} ± {row['after_spread']:.4f} "
              f"| {row['apart']:+.4f} ± {row['apart_spread']:.4f} | {row['max_load']:.2f} "
              f"| {row['brake']:.2f} |")  # fmt: skip
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    shape = dataclasses.asdict(open_source(options.model).config)
    kept = ("hidden_size", "num_layers", "ffn_size", "vocab_size")
    print(json.dumps({
        "benchmark": "ranking", "options": given, "dense": {k: shape[k] for k in kept},
        "corpus_hash": corpus.manifest["hash"], "torch": torch.__version__,
        "threads": torch.get_num_threads(), "rows": rows, "runs": results,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
