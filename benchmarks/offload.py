"""Experts on disk: hit rate and tokens per second against the memory given to them.

    python benchmarks/offload.py [--model DIR] [--out OUT.json] [--plot OUT.png]

One text is decoded token by token (given tokens, so that every run routes alike), with experts in
five budgets from one token's to all, with and without reading ahead, with the kernel's page cache
and with every page dropped after it was read (posix_fadvise), so that each read goes to the disk; a
disk may have a cache of its own behind it. Every run must give the same bits as all experts in
memory, else it stops.

Without --model the model is random, and so is its routing (`uniform`). `skewed` routing has what
trained routers have more or less of: some experts are wanted more (selection biases fall with the
logarithm of a random rank), and texts repeat themselves (each token is one of the last 16 with
probability 0.7). How well the next layer's experts are predicted depends on the model too; it is
reported (`prefetch_used`). Prints a table and ends in one JSON line.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growmoe.inference.offloaded import Offload, PackedRecord
from growmoe.inference.packing import build_packed
from growmoe.models.attention import Cache
from growmoe.models.checkpoint import open_source, write_model
from growmoe.models.config import ModelConfig, MoEConfig, tensor_shapes
from growmoe.models.transformer import Transformer, fresh_weights
from growmoe.ops.native import FORMS

ROUTINGS = ("uniform", "skewed")


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("--model", type=Path, help="a MODEL directory with experts")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--init-std", type=float, default=0.06, help="of the random weights")
    parser.add_argument("--form", choices=FORMS, default="bfloat16")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--warm-up", type=int, default=32, help="tokens before measuring")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where the scratch file lies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("--plot", type=Path, help="write a PNG here")
    return parser.parse_args()


def random_model(out: Path, args: argparse.Namespace) -> Path:
    """A MODEL directory of random weights in bfloat16."""
    moe = MoEConfig(
        experts=(args.experts,) * args.layers, top_k=args.top_k, ffn_size=args.ffn,
        selection_bias=True, scoring="sigmoid",
    )  # fmt: skip
    config = ModelConfig(
        vocab_size=4096, hidden_size=args.hidden, num_layers=args.layers,
        num_heads=args.hidden // 64, num_kv_heads=max(1, args.hidden // 256), head_dim=64,
        ffn_size=args.ffn, init_std=args.init_std, moe=moe,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(args.seed)
    shapes = tensor_shapes(config)

    def load(name: str) -> Tensor:
        mean, std = fresh_weights(config, name)
        return torch.empty(shapes[name]).normal_(mean, std or 1e-12, generator=generator)

    out.mkdir()
    write_model(out, config, load, "bfloat16")
    return out


class Skewed:
    """A source whose routers prefer some experts."""

    def __init__(self, source: Any, seed: int) -> None:
        self.source, self.config, self.dtype = source, source.config, source.dtype
        self.seed = seed

    def load(self, name: str) -> Tensor:
        """As the source's, but for the selection biases."""
        tensor = self.source.load(name)
        if not name.endswith("router.bias"):
            return tensor
        generator = torch.Generator().manual_seed(self.seed + int(name.split(".")[1]))
        ranks_E = torch.randperm(len(tensor), generator=generator) + 1
        return -0.08 * ranks_E.float().log()


def text(routing: str, vocab: int, count: int, seed: int) -> Tensor:
    """Token ids: independent, or repeating what was said shortly before."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (count,), generator=generator).tolist()
    if routing == "skewed":
        for at in range(1, count):
            if torch.rand((), generator=generator) < 0.7:
                back = int(torch.randint(1, min(at, 16) + 1, (), generator=generator))
                ids[at] = ids[at - back]
    return torch.tensor(ids)


@torch.inference_mode()
def decode(model: Transformer, ids: Tensor, cache: Cache) -> Tensor:
    """Logits [T,V] of the tokens, given one by one."""
    return torch.cat([model(token.view(1, 1), cache=cache).logits[0] for token in ids])


def measured(
    source: Any, slots: int, prefetch: bool, page_cache: bool, ids: Tensor, args: Any
) -> tuple[dict[str, Any], Tensor]:
    """One row, and the logits."""
    config = source.config
    each = PackedRecord(config, args.form).record.nbytes
    offload = Offload(config, args.form, slots * each, args.folder, prefetch, page_cache)
    with offload.store as store:
        model = build_packed(source, args.form, offload)
        cache = Cache()
        decode(model, ids[: args.warm_up], cache)
        store.reset()
        start = time.perf_counter()
        logits = decode(model, ids[args.warm_up :], cache)
        seconds = time.perf_counter() - start
        stats = store.stats.report()
    count = len(ids) - args.warm_up
    ahead = stats["prefetched"]
    row = {
        "slots": slots, "share": slots / sum(config.moe.experts),
        "expert_memory": slots * each, "prefetch": prefetch, "page_cache": page_cache,
        "tokens_per_s": round(count / seconds, 2), "hit_rate": round(stats["hit_rate"], 4),
        "prefetch_used": round(1 - stats["wasted"] / ahead, 4) if ahead else None,
        "mb_read_per_token": round(stats["bytes_read"] / count / 1e6, 2),
        "stall_share": round(stats["stall_seconds"] / seconds, 4),
    }  # fmt: skip
    return row, logits


def budgets(config: ModelConfig) -> list[int]:
    """Slots: one token's experts of one layer, and quarters of all."""
    assert config.moe is not None
    count = sum(config.moe.experts)
    fewest = config.moe.top_k
    return sorted({fewest, *(max(fewest, count * quarters // 4) for quarters in (1, 2, 3, 4))})


def run(path: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows; stops when a budget changes a bit."""
    rows = []
    head = ("routing", "experts in memory", "ahead", "pages", "hits", "read", "stall", "tok/s")
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for routing in ROUTINGS if args.model is None else ("model",):
        source: Any = open_source(path, mapped=True)
        if routing == "skewed":
            source = Skewed(source, args.seed)
        count = args.warm_up + args.tokens
        ids = text("skewed" if routing != "uniform" else routing, source.config.vocab_size, count,
                   args.seed)  # fmt: skip
        wanted = None
        for slots in reversed(budgets(source.config)):
            whole = slots == sum(source.config.moe.experts)
            for page_cache in (True,) if whole else (True, False):
                for prefetch in (False,) if whole else (False, True):
                    row, logits = measured(source, slots, prefetch, page_cache, ids, args)
                    wanted = logits if wanted is None else wanted
                    if not torch.equal(logits, wanted):
                        raise SystemExit(f"error: results differ with {slots} slots")
                    rows.append({"routing": routing, **row})
                    print(
                        f"| {routing} | {row['share']:.0%} | {'yes' if prefetch else 'no'} | "
                        f"{'kept' if page_cache else 'dropped'} | {row['hit_rate']:.0%} | "
                        f"{row['mb_read_per_token']:.1f} MB | {row['stall_share']:.0%} | "
                        f"{row['tokens_per_s']:.1f} |", flush=True,
                    )  # fmt: skip
    return rows


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """Hit rate and speed against the share of experts in memory, one column per routing."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    routings = list(dict.fromkeys(row["routing"] for row in rows))
    figure, axes = plt.subplots(
        2, len(routings), figsize=(4.6 * len(routings), 6.4), sharex=True, sharey="row",
        squeeze=False,
    )  # fmt: skip
    lines = [(False, True), (True, True), (False, False), (True, False)]
    for column, routing in enumerate(routings):
        mine = [row for row in rows if row["routing"] == routing]
        whole = [row for row in mine if row["share"] == 1]
        for prefetch, kept in lines:
            chosen = [r for r in mine if (r["prefetch"], r["page_cache"]) == (prefetch, kept)]
            chosen = sorted(chosen + (whole if whole[0] not in chosen else []), key=_share)
            style = {
                "color": "tab:orange" if prefetch else "tab:blue",
                "linestyle": "-" if kept else "--", "marker": "o" if kept else "s",
                "label": f"{'reading ahead' if prefetch else 'on demand'}, "
                f"pages {'kept' if kept else 'dropped'}",
                "markersize": 4.5, "linewidth": 1.6,
            }  # fmt: skip
            shares = [100 * _share(row) for row in chosen]
            if kept:  # hits do not depend on where a read ends
                axes[0][column].plot(shares, [100 * r["hit_rate"] for r in chosen], **style)
            axes[1][column].plot(shares, [r["tokens_per_s"] for r in chosen], **style)
        axes[0][column].set_title(f"{routing} routing", fontsize=11)
        axes[1][column].set_xlabel("experts in memory (%)")
    axes[0][0].set_ylabel("experts found in memory (%)")
    axes[1][0].set_ylabel("tokens per second")
    axes[0][0].set_ylim(-3, 103)
    axes[1][0].set_ylim(bottom=0)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(out, dpi=130)


def _share(row: dict[str, Any]) -> float:
    return row["share"]


def main() -> None:
    """Measure, plot, print."""
    args = options()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = args.model or random_model(Path(folder) / "model", args)
        rows = run(path, args)
    document = {
        "benchmark": "offload", "config": {
            **{k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
            "load_average": os.getloadavg()[0],
        }, "rows": rows,
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
