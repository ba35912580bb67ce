"""Models of the two papers by name; their parameter counts equal the printed sizes.

DeepSpeed-MoE (arXiv 2201.05596, section 3 and Table 2): GPT-3-like, MoE on every second layer,
top-1. PR-MoE doubles the experts of the last two MoE layers and keeps the dense MLP as a residual
branch; the Mixture-of-Students (MoS) keep 21 of 24 layers.

AquilaMoE (arXiv 2408.06567, Table 3). The sources disagree: the paper prints 32 key/value heads
for the 7B, its model card 8; we take 8, because AKI-Pro requires the groups of source and target
to be equal and the 16B has 8. The 16B's feed-forward size is 20480 in paper and card, 17920 in its
published config; we take 20480, which gives 8x16B its 104.7B parameters.
"""

from growmoe.errors import UsageError
from growmoe.models.config import ModelConfig, MoEConfig


def _gpt(layers: int, hidden: int, heads: int, init_std: float) -> ModelConfig:
    return ModelConfig(
        vocab_size=50257, hidden_size=hidden, num_layers=layers, num_heads=heads,
        num_kv_heads=heads, head_dim=hidden // heads, ffn_size=4 * hidden, max_positions=2048,
        norm="layer", positions="learned", activation="gelu", qkv_bias=True, o_bias=True,
        mlp_bias=True, tied_head=True, init_std=init_std, family="growmoe",
    )  # fmt: skip


def _gpt_moe(base: ModelConfig, few: int, many: int = 0, layers: int = 24) -> ModelConfig:
    """MoE on layers 2, 4, ... (counted from 1); `many` makes the last two wider, with residual."""
    places = [layer for layer in range(layers) if layer % 2 == 1]
    experts = [few if layer in places else 0 for layer in range(layers)]
    if many:
        for layer in places[-2:]:
            experts[layer] = many
    moe = MoEConfig(
        experts=tuple(experts), top_k=1, ffn_size=base.ffn_size, renormalize=False,
        mix="softmax2" if many else "none", fixed_ffn_size=base.ffn_size if many else 0,
    )  # fmt: skip
    return base.replace(num_layers=layers, moe=moe)


def _aquila(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=151851, hidden_size=hidden, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=128, ffn_size=ffn, max_positions=4096, rope_theta=1e6,
        qkv_bias=True, family="qwen2",
    )  # fmt: skip


def _build() -> dict[str, ModelConfig]:
    small = _gpt(24, 1024, 16, 0.014)
    medium = _gpt(24, 2048, 16, 0.014)
    large = _gpt(32, 4096, 32, 0.01)
    aquila16 = _aquila(40, 5120, 40, 8, 20480)
    experts8 = MoEConfig(experts=(8,) * 40, top_k=2, ffn_size=20480)
    return {
        "350M": small,
        "1.3B": medium,
        "6.7B": large,
        "350M+MoE-128": _gpt_moe(small, 128),
        "1.3B+MoE-128": _gpt_moe(medium, 128),
        "350M+PR-MoE-32/64": _gpt_moe(small, 32, 64),
        "1.3B+PR-MoE-64/128": _gpt_moe(medium, 64, 128),
        "350M+PR-MoE-32/64+L21+MoS": _gpt_moe(small, 32, 64, layers=21),
        "1.3B+PR-MoE-64/128+L21+MoS": _gpt_moe(medium, 64, 128, layers=21),
        "aquila3-7b": _aquila(32, 4096, 32, 8, 14336),
        "aquila3-16b": aquila16,
        "aquila3-8x16b": aquila16.replace(moe=experts8, family="qwen2_moe"),
    }


PRESETS = _build()
ALIASES = {
    "350M+PR-MoE+L21+MoS": "350M+PR-MoE-32/64+L21+MoS",
    "1.3B+PR-MoE+L21+MoS": "1.3B+PR-MoE-64/128+L21+MoS",
}


def preset(name: str) -> ModelConfig:
    """The preset called `name`; raises UsageError that lists near names."""
    import difflib

    lookup = {key.lower(): key for key in (*PRESETS, *ALIASES)}
    key = lookup.get(name.lower())
    if key is None:
        near = difflib.get_close_matches(name.lower(), lookup, n=1, cutoff=0.4)
        hint = f"did you mean '{lookup[near[0]]}'?" if near else f"known: {', '.join(PRESETS)}"
        raise UsageError(f"no preset is called '{name}'; {hint}")
    return PRESETS[ALIASES.get(key, key)]
