"""How equal are a grown model's copies, and which optimizer state lets them part?

Trains MODEL a little further on CORPUS to have moments, doubles its width in several ways, and
reports for each (a) the share of new units whose gradients equal their original's after one
backward pass, and (b) how far copies have moved apart after some AdamW steps under every
`optimizer.state`: |a - b| / (|a| + |b|) for the movements a and b of a new unit and its original,
0 for equal movements, about 0.7 for unrelated ones. Ends in one JSON line.

    python benchmarks/symmetry.py runs/demo/small runs/demo/corpus [--steps 20] [--lr 5e-4]
"""

import argparse
import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growmoe.data.corpus import Corpus
from growmoe.growth.compose import widening_of
from growmoe.growth.width import Widened
from growmoe.models.checkpoint import Directory, load_model
from growmoe.models.transformer import Transformer
from growmoe.recipe import GrowStage, TrainStage
from growmoe.stages import grow as grow_stage
from growmoe.stages import train as train_stage
from growmoe.training.losses import cross_entropy
from growmoe.training.trainer import Trainer

INITIALISATIONS: dict[str, dict[str, Any]] = {
    "even duplicate": {"split": "even"},
    "random-split duplicate": {"split": "random"},
    "zero_pad": {"units": "zero_pad"},
    "even + noise on copies (20 dB)": {"split": "even", "noise_db": 20.0},
    "AKI-Pro": {"method": "aki-pro"},
    "FPI": {"method": "fpi"},
}
POLICIES: dict[str, dict[str, Any]] = {
    "reset": {"state": "reset"},
    "keep_old_zero_new": {"state": "keep_old_zero_new"},
    "keep + new_warmup": {"state": "keep_old_zero_new", "new_warmup": 0.5},
    "copy": {"state": "copy"},
}
SITES = {
    # what a unit writes with: (tensor of a layer, axis, dimension of the units)
    "ffn": ("mlp.gate.weight", "ffn", 0),
    "heads": ("attn.q.weight", "q", 0),
    "residual": ("mlp.down.weight", "residual", 0),
    "reads": ("mlp.gate.weight", "residual", 1),
}
EQUAL = 1e-3


class Pairs:
    """New units of a doubled axis and their originals; a fresh unit is put beside unit i mod N."""

    def __init__(self, small: Directory, spec: GrowStage) -> None:
        self.wide, self.layers = Widened(small, widening_of(spec)), small.config.num_layers
        self.head_dim = small.config.head_dim

    def of(self, tensors: dict[str, Tensor], site: str) -> tuple[Tensor, Tensor]:
        """(new units, originals) as rows, all layers together."""
        part, axis_name, dim = SITES[site]
        axis = self.wide.axes[axis_name]
        new_N = axis.new_N()
        old = int((~new_N).sum())
        first_N = (~new_N).nonzero().view(-1)
        index_N = torch.where(axis.index_N >= 0, axis.index_N, torch.arange(len(axis)) % old)
        size = self.head_dim if site == "heads" else 1
        pairs: tuple[list[Tensor], list[Tensor]] = ([], [])
        for layer in range(self.layers):
            tensor = tensors[f"layers.{layer}.{part}"].transpose(0, dim).float()
            pairs[0].append(tensor[new_N].reshape(int(new_N.sum()) // size, -1))
            pairs[1].append(tensor[first_N[index_N[new_N]]].reshape(len(pairs[0][-1]), -1))
        return torch.cat(pairs[0]), torch.cat(pairs[1])


def equal_share(new: Tensor, old: Tensor) -> float:
    """Part of the pairs that differ by less than rounding explains, or are both 0."""
    return float(((new - old).norm(dim=1) <= EQUAL * old.norm(dim=1)).float().mean())


def apart(new: Tensor, old: Tensor) -> float:
    """Mean relative difference of two movements."""
    length = (new.norm(dim=1) + old.norm(dim=1)).clamp(min=1e-12)
    return float(((new - old).norm(dim=1) / length).mean())


def train_spec(model: Path, options: argparse.Namespace, steps: int, **rest: Any) -> TrainStage:
    """The same batches and rate for every run."""
    optimizer = {"lr": options.lr, "schedule": "constant", "warmup": 0.0, **rest.pop("policy", {})}
    tokens = steps * options.batch * options.length
    return TrainStage(
        stage="train", model=str(model), data=str(options.corpus), tokens=tokens,
        sequence_length=options.length, batch_size=options.batch, dtype="float32", seed=1,
        validate_every=10**9, checkpoint_every=10**9, optimizer=optimizer, **rest,
    )  # fmt: skip


def made(stage: Any, spec: Any, out: Path) -> Path:
    """The directory `out` as a stage writes it."""
    work = out.with_name(f"{out.name}.run")
    out.mkdir()
    work.mkdir()
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        stage.run(spec, out, work)
    return out


def gradients(model: Transformer, batch: Tensor) -> dict[str, Tensor]:
    """Of the mean loss of a batch."""
    cross_entropy(model(batch[:, :-1]).logits, batch[:, 1:]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def measure(name: str, small: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One initialisation: equal gradients, then movements under every policy."""
    source = Directory(small)
    heads = {"heads": 2 * source.config.num_heads, "kv_heads": source.config.num_kv_heads}
    spec = GrowStage(
        stage="grow", model=str(small), verify=False, hidden=2 * source.config.hidden_size,
        ffn=2 * source.config.ffn_size, **heads, **INITIALISATIONS[name],
    )  # fmt: skip
    large, pairs = made(grow_stage, spec, folder / "large"), Pairs(source, spec)
    corpus = Corpus(options.corpus)
    row: dict[str, Any] = {"init": name, "equal_gradients": {}, "apart": {}, "cosine": {}}
    begun = {key: p.detach() for key, p in load_model(large).named_parameters()}
    loader = Trainer(load_model(large), corpus, train_spec(large, options, 1), folder / "x").loader
    found = gradients(load_model(large), torch.from_numpy(loader.next_batch(options.batch)))
    row["equal_gradients"] = {site: equal_share(*pairs.of(found, site)) for site in SITES}
    row["loss"] = {}
    for policy, state in POLICIES.items():
        train = train_spec(large, options, options.steps, policy=state)
        model = load_model(large)
        trainer = Trainer(model, corpus, train, folder / "y", train_stage.start_of(train, model))
        losses = [trainer._step(step)["loss"] for step in range(options.steps)]
        ended = {key: p.detach() for key, p in model.named_parameters()}
        moved = {key: ended[key] - begun[key] for key in ended}
        row["apart"][policy] = {s: apart(*pairs.of(moved, s)) for s in SITES}
        cosine = torch.nn.functional.cosine_similarity(*pairs.of(ended, "ffn"), dim=1)
        row["cosine"][policy] = float(cosine.mean())
        row["loss"][policy] = sum(losses[-5:]) / len(losses[-5:])
    return row


def show(rows: list[dict[str, Any]]) -> None:
    """Two Markdown tables."""
    print("| initialisation | " + " | ".join(f"{site}: equal gradients" for site in SITES) + " |")
    print("|---|" + "---|" * len(SITES))
    for row in rows:
        shares = (f"{100 * row['equal_gradients'][site]:.0f} %" for site in SITES)
        print(f"| {row['init']} | " + " | ".join(shares) + " |")
    print("\n| initialisation | state | ffn apart | heads apart | residual apart | ffn cosine "
          "| loss |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for row in rows:
        for policy in POLICIES:
            numbers = [row["apart"][policy][site] for site in ("ffn", "heads", "residual")]
            shown = " | ".join(f"{number:.3f}" for number in numbers)
            cosine, loss = row["cosine"][policy], row["loss"][policy]
            print(f"| {row['init']} | {policy} | {shown} | {cosine:.5f} | {loss:.4f} |")


def main() -> None:
    """Moments, then every initialisation under every policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--before", type=int, default=30, help="steps that make the moments")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        before = train_spec(options.model, options, options.before, keep_optimizer=True)
        small = made(train_stage, before, folder / "small")
        rows = []
        for number, name in enumerate(INITIALISATIONS):
            (folder / str(number)).mkdir()
            rows.append(measure(name, small, folder / str(number), options))
    show(rows)
    settings = {key: str(value) for key, value in vars(options).items()}
    print(json.dumps({"benchmark": "symmetry", "settings": settings, "rows": rows}))


if __name__ == "__main__":
    main()
