"""How public architectures spell a model: their config keys and tensor names. Imports no torch.

With `checkpoint.py` the only place that knows Hugging Face names. A model is written as the public
architecture that can express it; `growmoe` (our own field names) is for what none can.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from growmoe.errors import GrowmoeError
from growmoe.models.config import ModelConfig, MoEConfig, tensor_shapes

ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Family:
    """One public architecture."""

    name: str
    architecture: str
    obstacle: Callable[[ModelConfig], str | None]
    """Returns why a model cannot be written as this architecture, or None when it can."""


def _obstacle(
    config: ModelConfig,
    *,
    moe: bool,
    qk_norm: Literal["none", "head", "all"] = "none",
    window: bool = False,
) -> str | None:
    """What every public family of the llama line shares."""
    if config.norm != "rms" or config.positions != "rope" or config.activation != "swiglu":
        return "it has RMSNorm, rotary positions and SwiGLU only"
    if (config.moe is not None) != moe:
        return "it has experts in no layer" if not moe else "it needs experts"
    if config.moe is not None and config.moe.scoring != "softmax":
        return "its router takes a softmax"
    if config.moe is not None and (config.moe.selection_bias or config.moe.groups > 1):
        return "its router has no selection bias and no groups of experts"
    if (config.qk_norm_scope if config.qk_norm else "none") != qk_norm:
        return {
            "none": "it has no QK-norm",
            "head": "it always normalises queries and keys, head by head",
            "all": "it always normalises queries and keys, all heads together",
        }[qk_norm]
    if config.sliding_window and not window:
        return "it has no sliding window over all layers"
    return None


def _llama(c: ModelConfig) -> str | None:
    if c.qkv_bias != c.o_bias:
        return "its attention biases are all on or all off"
    if c.hidden_size % c.num_heads:
        return "its hidden size is a multiple of its heads, whatever the head dim"
    return _obstacle(c, moe=False)


def _mistral(c: ModelConfig) -> str | None:
    biased = c.qkv_bias or c.o_bias or c.mlp_bias
    return _obstacle(c, moe=False, window=True) or ("it has no biases" if biased else None)


def _qwen2(c: ModelConfig) -> str | None:
    fits = c.qkv_bias and not c.o_bias and not c.mlp_bias
    return _obstacle(c, moe=False) or (None if fits else "it has exactly the Q, K and V biases")


def _qwen3(c: ModelConfig) -> str | None:
    fits = c.qkv_bias == c.o_bias and not c.mlp_bias
    wrong = None if fits else "its attention biases are all on or all off"
    return _obstacle(c, moe=False, qk_norm="head") or wrong


def _one_expert_count(c: ModelConfig) -> str | None:
    assert c.moe is not None
    if len({count for count in c.moe.experts if count}) > 1:
        return "all its MoE layers have the same number of experts"
    return None


def _mixtral(c: ModelConfig) -> str | None:
    if problem := _obstacle(c, moe=True, window=True) or _one_expert_count(c):
        return problem
    assert c.moe is not None
    if 0 in c.moe.experts or c.moe.mix != "none":
        return "every layer has routed experts and nothing else"
    if not c.moe.renormalize:
        return "it always renormalises the top-k weights"
    return "it has no biases" if c.qkv_bias or c.o_bias or c.mlp_bias else None


def _qwen2_moe(c: ModelConfig) -> str | None:
    if problem := _obstacle(c, moe=True) or _one_expert_count(c):
        return problem
    assert c.moe is not None
    if c.moe.mix not in ("none", "sigmoid_gate"):
        return "its shared expert is mixed by a sigmoid gate"
    return "it has biases on Q, K and V only" if c.o_bias or c.mlp_bias else None


def _qwen3_moe(c: ModelConfig) -> str | None:
    if problem := _obstacle(c, moe=True, qk_norm="head") or _one_expert_count(c):
        return problem
    assert c.moe is not None
    if c.moe.mix != "none":
        return "it has no shared expert"
    fits = c.qkv_bias == c.o_bias and not c.mlp_bias
    return None if fits else "its attention biases are all on or all off, and it has no others"


def _olmoe(c: ModelConfig) -> str | None:
    if problem := _obstacle(c, moe=True, qk_norm="all") or _one_expert_count(c):
        return problem
    assert c.moe is not None
    if 0 in c.moe.experts or c.moe.mix != "none":
        return "every layer has routed experts and nothing else"
    if c.num_heads * c.head_dim != c.hidden_size:
        return "its heads together are as wide as its hidden size"
    fits = c.qkv_bias == c.o_bias and not c.mlp_bias
    return None if fits else "its attention biases are all on or all off, and it has no others"


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "LlamaForCausalLM", _llama),
        Family("mistral", "MistralForCausalLM", _mistral),
        Family("qwen2", "Qwen2ForCausalLM", _qwen2),
        Family("qwen3", "Qwen3ForCausalLM", _qwen3),
        Family("mixtral", "MixtralForCausalLM", _mixtral),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_moe),
        Family("qwen2_moe", "Qwen2MoeForCausalLM", _qwen2_moe),
        Family("olmoe", "OlmoeForCausalLM", _olmoe),
        Family("growmoe", "GrowmoeForCausalLM", lambda _: None),
    )
}


def pick_family(config: ModelConfig) -> str:
    """The architecture to write `config` as: its own when it fits, else the first that does."""
    preferred = [config.family] if config.family in FAMILIES else []
    for name in (*preferred, *FAMILIES):
        if FAMILIES[name].obstacle(config) is None:
            return name
    raise AssertionError("growmoe expresses every model")


# ---- config.json ----


def config_from_hf(raw: Mapping[str, Any], where: Path) -> ModelConfig:
    """Translate a parsed `config.json` (read from `where`, named in errors) to a ModelConfig."""
    if not isinstance(raw, Mapping):
        raise GrowmoeError(f"{where} is not a JSON object")
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise GrowmoeError(
            f"{where}: model_type '{kind}' is not supported; known are {', '.join(FAMILIES)}"
        )
    try:
        return _from_growmoe(raw) if kind == "growmoe" else _from_llama_line(kind, raw, where)
    except KeyError as error:
        raise GrowmoeError(f"{where}: key {error} is missing") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise GrowmoeError(f"{where}: a value has the wrong type ({error})") from None
    except GrowmoeError as error:
        text = str(error)
        raise GrowmoeError(text if text.startswith(str(where)) else f"{where}: {text}") from None


def _from_growmoe(raw: Mapping[str, Any]) -> ModelConfig:
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    known = {key: value for key, value in raw.items() if key in names}
    if known.get("moe"):
        moe = dict(known["moe"])
        known["moe"] = MoEConfig(**{**moe, "experts": tuple(moe["experts"])})
    return ModelConfig(**{**known, "family": "growmoe"})


def _from_llama_line(kind: str, raw: Mapping[str, Any], where: Path) -> ModelConfig:
    raw = {**_DEFAULTS[kind], **raw}
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise GrowmoeError(f"{where}: hidden_act '{raw['hidden_act']}' is not SwiGLU's silu")
    D, H = int(raw["hidden_size"]), int(raw["num_attention_heads"])
    if raw.get("clip_qkv") is not None:
        raise GrowmoeError(
            f"{where}: clip_qkv {raw['clip_qkv']} is not supported; only models with null are read"
        )
    theta, scaling = _rope(raw, where)
    default_dim = 128 if kind == "qwen3" else D // H
    bias = bool(raw.get("attention_bias", False)) and kind in _BIASED
    # no key of transformers: the form for llama.cpp's converter, see targets._converter_family
    mixed = kind == "mixtral" and bool(raw.get("attention_bias"))
    return ModelConfig(
        vocab_size=int(raw["vocab_size"]),
        hidden_size=D,
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=H,
        num_kv_heads=int(raw.get("num_key_value_heads") or H),
        head_dim=int(raw.get("head_dim") or default_dim),
        ffn_size=int(raw["intermediate_size"]),
        max_positions=int(raw.get("max_position_embeddings", 2048)),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=_sliding_window(kind, raw, where),
        qkv_bias=bool(raw["qkv_bias"]) if kind == "qwen2_moe" else bias or kind == "qwen2" or mixed,
        o_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)) and kind == "llama",
        qk_norm=kind in ("qwen3", "qwen3_moe", "olmoe"),
        qk_norm_scope="all" if kind == "olmoe" else "head",
        tied_head=bool(raw.get("tie_word_embeddings", False)),
        moe=_moe_from_hf(kind, raw),
        init_std=float(raw.get("initializer_range", 0.02)),
        family=kind,
        token_ids={k: raw[k] for k in TOKEN_ID_KEYS if raw.get(k) is not None},
    )


# What transformers takes for a key that config.json leaves out (5.23), where it is not our default.
_LONG = {"max_position_embeddings": 4096 * 32}
_QWEN = {"max_position_embeddings": 32768}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {**_LONG, "num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {
        **_LONG, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "num_experts_per_tok": 2,
    },
    "qwen2": {**_QWEN, "num_key_value_heads": 32},
    "qwen3": {**_QWEN, "num_key_value_heads": 32},
    "qwen2_moe": {
        **_QWEN, "num_key_value_heads": 16, "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "qkv_bias": True,
    },
    "qwen3_moe": {
        **_QWEN, "num_key_value_heads": 4, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "olmoe": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts_per_tok": 8},
}  # fmt: skip
_EXPERTS = {"mixtral": 8, "qwen2_moe": 60, "qwen3_moe": 128, "olmoe": 64}
_BIASED = ("llama", "qwen3", "qwen3_moe", "olmoe")  # `attention_bias` on q, k, v and o
TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _rope(raw: Mapping[str, Any], where: Path) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) from `rope_parameters`, or from the older `rope_theta`/`rope_scaling`."""
    new, older = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    kinds = [kept.get("rope_type") or kept.get("type") or "default" for kept in (new, older)]
    factors = [kept.get("factor") for kept in (new, older)]
    if new and older and (kinds[0] != kinds[1] or factors[0] != factors[1]):
        raise GrowmoeError(f"{where}: rope_parameters and rope_scaling contradict each other")
    rope = dict(new or older)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    theta = float(rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0)
    needed = {"default": (), "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    )}  # fmt: skip
    for key in needed.get(kind, ("factor",)):
        if key not in rope:
            raise GrowmoeError(f"{where}: rope_type '{kind}' needs a {key}")
    if kind not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        raise GrowmoeError(f"{where}: rope_type '{kind}' is not supported; known are {known}")
    return theta, None if kind == "default" else {"rope_type": kind, **rope}


def _sliding_window(kind: str, raw: Mapping[str, Any], where: Path) -> int | None:
    if kind in ("mistral", "mixtral"):
        window = raw.get("sliding_window")
        return int(window) if window else None
    if raw.get("use_sliding_window"):
        raise GrowmoeError(f"{where}: use_sliding_window is not supported for {kind}")
    return None


def _moe_from_hf(kind: str, raw: Mapping[str, Any]) -> MoEConfig | None:
    if kind not in _EXPERTS:
        return None
    layers = int(raw["num_hidden_layers"])
    # two names for one key: which one a file has depends on who wrote it
    count = int(raw.get("num_local_experts") or raw.get("num_experts") or _EXPERTS[kind])
    if kind in ("mixtral", "olmoe"):
        return MoEConfig(
            experts=(count,) * layers,
            top_k=int(raw["num_experts_per_tok"]),
            ffn_size=int(raw["intermediate_size"]),
            renormalize=kind == "mixtral" or bool(raw.get("norm_topk_prob", False)),
        )
    step = int(raw.get("decoder_sparse_step", 1))
    dense = set(raw.get("mlp_only_layers") or ())
    sparse = [layer not in dense and (layer + 1) % step == 0 for layer in range(layers)]
    shared = int(raw["shared_expert_intermediate_size"]) if kind == "qwen2_moe" else 0
    return MoEConfig(
        experts=tuple(count if is_sparse else 0 for is_sparse in sparse),
        top_k=int(raw["num_experts_per_tok"]),
        ffn_size=int(raw["moe_intermediate_size"]),
        renormalize=bool(raw.get("norm_topk_prob", False)),
        mix="sigmoid_gate" if shared else "none",
        fixed_ffn_size=shared,
    )


def config_to_hf(config: ModelConfig, dtype: str, family: str | None = None) -> dict[str, Any]:
    """The `config.json` of `config`, written as `family` (default `pick_family(config)`) with
    weights in `dtype`."""
    name = family or pick_family(config)
    head = {"architectures": [FAMILIES[name].architecture], "model_type": name}
    # Both spellings: transformers 5 reads dtype and rope_parameters, older readers the others.
    tail = {"dtype": dtype, "torch_dtype": dtype}
    if name == "growmoe":
        return {**head, **dataclasses.asdict(config), **config.token_ids, **tail}
    rope = {"rope_type": "default", **(config.rope_scaling or {})}
    raw = {
        **head,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied_head,
        "use_cache": True,
        # null, not absent: some classes would fill in ids of their own
        **{key: config.token_ids.get(key) for key in TOKEN_ID_KEYS},
    }
    if config.rope_scaling:
        raw["rope_scaling"] = dict(config.rope_scaling)
    return {**raw, **_family_fields(name, config), **tail}


def _family_fields(name: str, config: ModelConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if name in _BIASED:
        fields["attention_bias"] = config.qkv_bias
    if name == "llama":
        fields["mlp_bias"] = config.mlp_bias
    if name == "mixtral" and config.qkv_bias:
        fields["attention_bias"] = True
    if name in ("mistral", "mixtral"):
        fields["sliding_window"] = config.sliding_window
    if name in ("qwen2", "qwen3"):
        fields["use_sliding_window"] = False
    if config.moe is None:
        return fields
    # transformers leaves the router out of the loss unless asked; our losses are our own.
    fields |= {"num_experts_per_tok": config.moe.top_k, "output_router_logits": False}
    if name == "mixtral":
        fields |= {"num_local_experts": max(config.moe.experts)}
        fields |= {"intermediate_size": config.moe.ffn_size}
        return fields
    if name == "olmoe":
        fields |= {"num_experts": max(config.moe.experts), "clip_qkv": None}
        fields |= {"intermediate_size": config.moe.ffn_size}
        return fields | {"norm_topk_prob": config.moe.renormalize}
    fields |= {
        "num_experts": max(config.moe.experts),
        "moe_intermediate_size": config.moe.ffn_size,
        "norm_topk_prob": config.moe.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, count in enumerate(config.moe.experts) if not count],
        "use_sliding_window": False,
    }
    if name == "qwen2_moe":
        fields |= {"shared_expert_intermediate_size": config.moe.fixed_ffn_size}
        fields |= {"qkv_bias": config.qkv_bias}
    return fields


# ---- tensor names ----

_TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_MIXTRAL_PARTS = {"gate": "w1", "up": "w3", "down": "w2"}


def hf_name(config: ModelConfig, family: str, canonical: str) -> str:
    """The name that `family` gives to the tensor `canonical` of `config`."""
    if family == "growmoe":
        return canonical
    if canonical in _TOP:
        return _TOP[canonical]
    _, layer, block, *rest = canonical.split(".")
    place = f"model.layers.{layer}"
    if block in ("attn_norm", "mlp_norm"):
        norm = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}[block]
        return f"{place}.{norm}.{rest[0]}"
    if block == "attn":
        part = rest[0] if rest[0].endswith("norm") else f"{rest[0]}_proj"
        return f"{place}.self_attn.{part}.{rest[1]}"
    moe = "block_sparse_moe" if family == "mixtral" else "mlp"
    if block == "mlp":
        fixed = ".shared_expert" if config.experts_in(int(layer)) else ""
        return f"{place}.mlp{fixed}.{rest[0]}_proj.{rest[1]}"
    if rest[0] == "router":
        return f"{place}.{moe}.gate.weight"
    if rest[0] == "mix":
        return f"{place}.mlp.shared_expert_gate.weight"
    _, expert, part, leaf = rest
    part = _MIXTRAL_PARTS[part] if family == "mixtral" else f"{part}_proj"
    return f"{place}.{moe}.experts.{expert}.{part}.{leaf}"


def hf_names(config: ModelConfig, family: str) -> dict[str, str]:
    """{canonical name: name on disk} for every tensor of `config`."""
    return {name: hf_name(config, family, name) for name in tensor_shapes(config)}


def empty_tensors(config: ModelConfig, family: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names on disk and shapes of zero tensors that a public class insists on.

    Qwen2-MoE always has a shared expert; a model without one carries it with width 0, and a gate
    that multiplies nothing.
    """
    if family != "qwen2_moe" or config.moe is None or config.moe.mix != "none":
        return
    D = config.hidden_size
    for layer, count in enumerate(config.moe.experts):
        if count:
            shared = f"model.layers.{layer}.mlp.shared_expert"
            yield f"{shared}.gate_proj.weight", (0, D)
            yield f"{shared}.up_proj.weight", (0, D)
            yield f"{shared}.down_proj.weight", (D, 0)
            yield f"{shared}_gate.weight", (1, D)
