"""When would training the mixture from scratch win? A warning, not a verdict. Imports no torch.

Skywork-MoE: upcycle when the MoE's compute is far below what the dense model cost; from twice that
on, train from scratch. OLMoE (section 4.1.5): a MoE from scratch caught up with the upcycled one
after 25% of the dense model's tokens.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from growmoe.files import read_json
from growmoe.models.config import ModelConfig

FLOPS_RATIO = 2.0
TOKEN_SHARE = 0.25


@dataclass(frozen=True)
class Spent:
    """Training tokens and FLOPs of a model while it was dense, and since it is a MoE; None where
    nobody said."""

    dense_tokens: int | None = None
    dense_flops: int | None = None
    moe_tokens: int = 0
    moe_flops: int = 0

    def trained(self, tokens: int, flops: int, moe: bool) -> "Spent":
        """After another training stage."""
        if moe:
            return dataclasses.replace(
                self, moe_tokens=self.moe_tokens + tokens, moe_flops=self.moe_flops + flops
            )
        return dataclasses.replace(
            self,
            dense_tokens=(self.dense_tokens or 0) + tokens,
            dense_flops=(self.dense_flops or 0) + flops,
        )

    def with_dense(self, tokens: int, config: ModelConfig) -> "Spent":
        """With the dense training tokens that somebody said, at the cost of the dense model."""
        flops = 3 * tokens * config.replace(moe=None).flops_per_token()
        return dataclasses.replace(self, dense_tokens=tokens, dense_flops=flops)


def spent_on(path: Path, config: ModelConfig, said: int | None = None) -> Spent:
    """What the lineage of a model directory says; `said` are training tokens of the dense model."""
    lineage = path / "growmoe.json"
    record = read_json(lineage) if lineage.is_file() else {}
    tokens, flops = record.get("tokens_total", 0), record.get("flops_total", 0)
    operations = [step.get("operation") for step in record.get("history", [])]
    if "upcycle" not in operations:
        found = Spent(tokens or None, flops or None)
    else:
        at = record.get("dense_spent") or {}
        found = Spent(
            at.get("tokens"), at.get("flops"), tokens - at.get("tokens_before", 0),
            flops - at.get("flops_before", 0),
        )  # fmt: skip
    return found if said is None else found.with_dense(said, config)


def scratch_warning(before: Spent, planned: Spent, name: str) -> list[str]:
    """Warnings for MoE training `planned` on top of `before`; says so when nothing is known."""
    if not before.dense_tokens:
        return [
            f"how many tokens {name} was trained on is unknown, so nothing can be said about "
            "training from scratch instead (pretrained_tokens tells it)"
        ]
    tokens = before.moe_tokens + planned.moe_tokens
    flops = before.moe_flops + planned.moe_flops
    if not tokens:
        limit = int(TOKEN_SHARE * before.dense_tokens)
        return [
            f"from about {limit:.3g} MoE training tokens on (25% of the dense model's "
            f"{before.dense_tokens:.3g}), training from scratch may win (OLMoE)"
        ]
    found = []
    if tokens > TOKEN_SHARE * before.dense_tokens:
        found.append(
            f"{tokens:.3g} MoE tokens are {tokens / before.dense_tokens:.0%} of the dense model's "
            f"{before.dense_tokens:.3g}: above 25% a MoE from scratch may win (OLMoE)"
        )
    if before.dense_flops and flops >= FLOPS_RATIO * before.dense_flops:
        found.append(
            f"the MoE's {flops:.3g} FLOPs are {flops / before.dense_flops:.1f} times the dense "
            "model's: from 2 times on, from scratch may win (Skywork-MoE)"
        )
    return found
