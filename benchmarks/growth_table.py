"""Every growth and upcycling operation on one model: largest logit difference, loss before/after.

    python benchmarks/growth_table.py MODEL [--tokens 512] [--text FILE]

MODEL is a directory or .gguf file (the tables in docs/growth.md: SmolLM2-135M). Nothing is written:
the grown model is run layer by layer from its lazy source. Prints Markdown and one JSON line.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from growmoe.artifacts import check_sequences
from growmoe.growth.compose import grow
from growmoe.growth.upcycle import Upcycled
from growmoe.models.checkpoint import Source, open_source
from growmoe.models.config import ModelConfig
from growmoe.models.streamed import streamed_logits
from growmoe.models.upcycling import Upcycling, why_lossy
from growmoe.recipe import GrowStage


def growths(c: ModelConfig) -> dict[str, dict[str, dict[str, Any]]]:
    """{section: {name: options of a grow stage}} for a model of this shape."""
    D, F_, H, K, C, L = (
        c.hidden_size, c.ffn_size, c.num_heads, c.num_kv_heads, c.head_dim, c.num_layers
    )  # fmt: skip
    wide = D * 4 // 3 // C * C
    width = {"hidden": wide, "ffn": F_ * 4 // 3}
    more = L * 4 // 3
    guarded = {"layers": more, "depth": "interpolate", "guard": [3, 3]}
    return {
        "Width": {
            f"hidden {D} to {wide}, duplicates, random split": {"hidden": wide},
            "the same, even split": {"hidden": wide, "split": "even"},
            "the same, zero-padded": {"hidden": wide, "units": "zero_pad"},
            "the same, noise on what reads copies, 20 dB": {"hidden": wide, "noise_db": 20},
            f"hidden {D} to {2 * D}": {"hidden": 2 * D},
            f"ffn {F_} to {F_ * 4 // 3}, duplicates": {"ffn": F_ * 4 // 3},
            "ffn, new units with zero output": {"ffn": F_ * 4 // 3, "units": "zero_pad"},
            f"heads {H} to {H * 4 // 3} inside {K} groups": {"heads": H * 4 // 3},
            f"kv heads {K} to {H}": {"kv_heads": H},
            f"kv heads {K} to 1, averaged": {"kv_heads": 1, "merge_kv": "mean"},
            f"head dim {C} to {2 * C}": {"head_dim": 2 * C, "heads": H},
            f"FPI as published (hidden {wide}, ffn {F_ * 4 // 3})": {**width, "method": "fpi"},
            "AKI as published, the same sizes": {**width, "method": "aki"},
            "noise on every matrix, 30 dB": {"noise_db": 30, "noise": "everywhere"},
        },
        "Depth": {
            f"layers {L} to {more}, identity blocks": {"layers": more},
            "stacked": {"layers": more, "depth": "stack"},
            "interpolated": {"layers": more, "depth": "interpolate"},
            "up-scaled (SOLAR)": {"layers": more, "depth": "dus"},
            "interpolated, branches / count": {
                "layers": more, "depth": "interpolate", "branch_scale": "count"
            },
            "interpolated, guard 3,3": guarded,
            "interpolated, guard 3,3, branches / count": {**guarded, "branch_scale": "count"},
            "layer 0 twice": {"depth": [0, *range(L)]},
        },
        "Width and depth": {
            "exact width, identity blocks": {**width, "layers": more},
            "exact width, guard 3,3, branches / count": {
                **width, **guarded, "branch_scale": "count"
            },
            "FPI, stacked": {**width, "layers": more, "method": "fpi"},
            "AKI, stacked": {**width, "layers": more, "method": "aki"},
            "AKI-Pro (interpolated)": {**width, "layers": more, "method": "aki-pro"},
        },
        "Vocabulary": {
            "128 new tokens, mean": {"vocab": c.vocab_size + 128},
            "128 new tokens, mean and covariance": {
                "vocab": c.vocab_size + 128, "vocab_init": "mean_cov"
            },
            "128 new tokens, zeros": {"vocab": c.vocab_size + 128, "vocab_init": "zeros"},
        },
    }  # fmt: skip


def upcyclings(c: ModelConfig) -> dict[str, dict[str, Any]]:
    """{name: options of Upcycling}."""
    half = c.num_layers // 2
    pyramid = (4,) * half + (8,) * (c.num_layers - half)
    return {
        "4 copies, top-2, renormalised": {},
        "sigmoid router, renormalised": {"combine": "sigmoid"},
        "raw softmax, scaled by E/k, router 0.02": {"combine": "softmax"},
        "raw softmax, scaled, zero router": {"combine": "softmax", "router": "zero"},
        "every second layer": {"layers": "second"},
        "pyramid 4/8, top-1, residual (sum), half and half": {
            "experts": pyramid, "top_k": 1, "combine": "softmax", "router": "zero",
            "residual": "sum", "shared": "half_half",
        },
        "pyramid 4/8, top-1, residual (softmax2), experts from zero": {
            "experts": pyramid, "top_k": 1, "combine": "softmax", "residual": "softmax2",
        },
        "shared expert (sigmoid gate), half and half": {
            "residual": "sigmoid_gate", "shared": "half_half"
        },
        "fine-grained: 16 quarters, top-8, virtual groups": {
            "experts": 16, "top_k": 8, "granularity": 4, "router": "virtual_group",
        },
        "fine-grained, plain router": {"experts": 16, "top_k": 8, "granularity": 4},
        "permuted copies": {"expert_init": "permute"},
        "noisy copies (1%)": {"expert_init": "noise"},
        "Drop-Upcycling, r = 0.5": {"expert_init": "drop"},
    }  # fmt: skip


class Judge:
    """Compares models with the source on one text."""

    def __init__(self, source: Source, sequences: list[Tensor]) -> None:
        self.sequences, self.V = sequences, source.config.vocab_size
        self.own = streamed_logits(source, sequences, "float32")
        wide = streamed_logits(source, sequences, "float64")
        self.floor = max(float((x - y).abs().max()) for x, y in zip(self.own, wide))
        self.loss = self.cross_entropy(self.own)

    def cross_entropy(self, logits: list[Tensor]) -> float:
        """Nats per token."""
        pairs = list(zip(logits, self.sequences))
        total = sum(float(F.cross_entropy(x[:-1], ids[1:], reduction="sum")) for x, ids in pairs)
        return total / sum(len(ids) - 1 for ids in self.sequences)

    def row(self, section: str, name: str, grown: Source, lossy: bool) -> dict[str, Any]:
        """One line of the table."""
        started = time.monotonic()
        logits = streamed_logits(grown, self.sequences, "float32")
        diff = max(float((x - y[:, : self.V]).abs().max()) for x, y in zip(self.own, logits))
        row = {
            "section": section, "operation": name, "declared": "lossy" if lossy else "exact",
            "params": grown.config.params_total(), "max_abs_logit_diff": diff,
            "loss_before": self.loss, "loss_after": self.cross_entropy(logits),
            "seconds": round(time.monotonic() - started, 1),
        }  # fmt: skip
        print(f"{row['seconds']:>6}s {row['declared']} {diff:.2g} {row['loss_after']:.4f} {name}",
              flush=True)  # fmt: skip
        return row


def main() -> None:
    """All rows, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--text")
    options = parser.parse_args()
    source = open_source(options.model)
    sequences, origin = check_sequences(
        options.model, source.config, options.text, None, 0, options.tokens
    )
    judge = Judge(source, sequences)
    rows = []
    for section, members in growths(source.config).items():
        for name, given in members.items():
            spec = GrowStage(stage="grow", model=str(options.model), **given)
            grown, plan = grow(source, spec)
            rows.append(judge.row(section, name, grown, bool(plan.lossy)))
    for name, given in upcyclings(source.config).items():
        upcycled = Upcycled(source, Upcycling(**{"experts": 4, **given}))
        assert upcycled.config.moe is not None
        lossy = why_lossy(upcycled.up, upcycled.config.moe.experts) is not None
        rows.append(judge.row("Upcycling", name, upcycled, lossy))
    print(
        f"\nSource: loss {judge.loss:.4f}, noise floor (float32 against float64) {judge.floor:.2g}"
    )
    section = ""
    for row in rows:
        if row["section"] != section:
            section = row["section"]
            print(f"\n| {section} | parameters | declared | largest logit diff | loss after |")
            print("|---|---|---|---|---|")
        print(
            f"| {row['operation']} | {row['params'] / 1e6:.0f}M | {row['declared']} | "
            f"{row['max_abs_logit_diff']:.2g} | {row['loss_after']:.4f} |"
        )
    found = {
        "benchmark": "growth_table", "model": options.model.name, "text": origin,
        "tokens": sum(map(len, sequences)), "noise_floor": judge.floor,
        "torch": torch.__version__, "rows": rows,
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
