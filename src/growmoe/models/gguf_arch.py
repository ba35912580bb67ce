"""What of a model llama.cpp computes exactly, and how its GGUF files spell it. Imports no torch.

llama.cpp fixes per architecture what our ModelConfig leaves open: `llama` and `qwen3moe` always
renormalise the top-k weights, `qwen2moe` never does; one number of experts holds for all layers;
only `llama` reads rotary factors (llama3 scaling) and biases beyond Q, K and V.
"""

import math

from growmoe.errors import UsageError
from growmoe.models.config import ModelConfig, MoEConfig, tensor_shapes

_TOP = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
_BLOCK = {
    "attn_norm": "attn_norm", "mlp_norm": "ffn_norm", "attn.q": "attn_q", "attn.k": "attn_k",
    "attn.v": "attn_v", "attn.o": "attn_output", "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate", "mlp.up": "ffn_up",
    "mlp.down": "ffn_down", "moe.router": "ffn_gate_inp", "moe.mix": "ffn_gate_inp_shexp",
}  # fmt: skip
ROPE_FREQS = "rope_freqs.weight"
FILE_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ENDS = ("token_embd.weight", "output.weight")
_BLOCK_WEIGHTS, _BLOCK_BYTES = 32, {"Q8_0": 34, "Q4_0": 18}
# array bounds inside llama.cpp, which ends the process beyond them (build of October 2026)
MOST_LAYERS, MOST_EXPERTS = 512, 1024


def gguf_obstacle(config: ModelConfig) -> str | None:
    """Why llama.cpp cannot compute what `config` says, or None when it can."""
    found = _arch(config)
    return None if found in _ARCHS else found


def gguf_architecture(config: ModelConfig) -> str:
    """`general.architecture` of a file with `config`; raises UsageError where there is none."""
    if problem := gguf_obstacle(config):
        raise UsageError(
            f"llama.cpp cannot run this model exactly, so no GGUF file is written: {problem}; "
            f"use its safetensors directory"
        )
    return _arch(config)


_ARCHS = ("llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe")


def _arch(c: ModelConfig) -> str:
    """One of _ARCHS, or the obstacle."""
    scaling = c.rope_scaling["rope_type"] if c.rope_scaling is not None else "none"
    if c.norm != "rms" or c.positions != "rope" or c.activation != "swiglu":
        return "it is run with RMSNorm, rotary positions and SwiGLU only"
    if c.sliding_window and c.sliding_window < c.max_positions:
        return f"the sliding window of {c.sliding_window} tokens would be ignored"
    if scaling not in ("none", "linear", "llama3"):
        return f"rotary scaling '{scaling}' is not known there"
    if c.qk_norm and c.qk_norm_scope != "head":
        return "queries and keys normalised over all heads together are not written"
    if c.num_layers > MOST_LAYERS:
        return f"it has room for {MOST_LAYERS} layers, not {c.num_layers}"
    arch = _dense(c, scaling) if c.moe is None else _routed(c, c.moe)
    if arch in _ARCHS and arch != "llama":
        if scaling == "llama3":
            return f"llama3 rotary scaling is read in architecture llama, not in {arch}"
        if c.o_bias or c.mlp_bias:
            return f"its architecture {arch} has biases on Q, K and V only"
    return arch


def _dense(c: ModelConfig, scaling: str) -> str:
    if c.qk_norm:
        return "qwen3"
    square = c.hidden_size == c.num_heads * c.head_dim
    only_qkv = c.qkv_bias and not c.o_bias and not c.mlp_bias
    return "qwen2" if only_qkv and square and scaling != "llama3" else "llama"


def _routed(c: ModelConfig, moe: MoEConfig) -> str:
    counts = set(moe.experts)
    if 0 in counts:
        return "layers with and without experts cannot be mixed there"
    if len(counts) > 1:
        return "all layers have the same number of experts there, so no pyramid"
    experts = counts.pop()
    if experts > MOST_EXPERTS:
        return f"it has room for {MOST_EXPERTS} experts, not {experts}"
    if c.mlp_bias:
        return "experts have no biases there"
    if moe.scoring != "softmax":
        return f"its routers take a softmax there, not a {moe.scoring}"
    if moe.selection_bias or moe.groups > 1:
        return "its routers have no selection bias and no groups there"
    sums_to_one = moe.top_k == experts  # renormalising all of a softmax changes nothing
    if moe.mix == "none":
        if not moe.renormalize and not sums_to_one:
            return "without a shared expert it always renormalises the top-k weights"
        return "qwen3moe" if c.qk_norm else "llama"
    if moe.mix != "sigmoid_gate":
        return f"experts mixed with a fixed branch by '{moe.mix}' are unknown there"
    if moe.renormalize and not sums_to_one:
        return "beside a shared expert it never renormalises the top-k weights"
    if c.qk_norm:
        return "QK-norm with a shared expert is unknown there"
    if c.hidden_size != c.num_heads * c.head_dim:
        return "its architecture qwen2moe has a hidden size of heads times head dim"
    return "qwen2moe"


def gguf_name(config: ModelConfig, canonical: str) -> str:
    """The name in a GGUF file; experts of one layer and part share one."""
    stem, _, leaf = canonical.rpartition(".")
    if not stem.startswith("layers."):
        return f"{_TOP[stem]}.{leaf}"
    _, layer, block = stem.split(".", 2)
    if block.startswith("moe.experts."):
        return f"blk.{layer}.ffn_{block.rpartition('.')[2]}_exps.{leaf}"
    fixed = "_shexp" if block.startswith("mlp.") and config.experts_in(int(layer)) else ""
    return f"blk.{layer}.{_BLOCK[block]}{fixed}.{leaf}"


def gguf_tensors(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], list[str]]]:
    """{name in the file: (shape, canonical tensors it holds)}; several of those are stacked.

    `rope_freqs.weight`, which holds none of ours, is there for llama3 rotary scaling.
    """
    found: dict[str, tuple[tuple[int, ...], list[str]]] = {}
    for name, shape in tensor_shapes(config).items():
        file_name = gguf_name(config, name)
        if ".moe.experts." in name:
            _, members = found.get(file_name, ((), []))
            found[file_name] = ((len(members) + 1, *shape), [*members, name])
        else:  # the gate of a shared expert is a vector there
            found[file_name] = (shape[1:] if name.endswith("moe.mix.weight") else shape, [name])
    if config.tied_head and gguf_architecture(config) == "qwen2moe":
        found["output.weight"] = (found["token_embd.weight"][0], ["embed.weight"])
    if (config.rope_scaling or {}).get("rope_type") == "llama3":
        found[ROPE_FREQS] = ((config.head_dim // 2,), [])
    return found


def gguf_kinds(config: ModelConfig, dtype: str, form: str | None = None) -> dict[str, str]:
    """{name in the file: how it is stored}. Vectors and routers are float32; with a `form`, int8 or
    int4, matrices are Q8_0 or Q4_0 and embedding and head Q8_0, but rows that do not divide into
    blocks are bfloat16."""
    matrix = {"int8": "Q8_0", "int4": "Q4_0"}.get(form or "")
    kinds = {}
    for name, (shape, _) in gguf_tensors(config).items():
        if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
            kinds[name] = "F32"
        elif matrix is None:
            kinds[name] = FILE_DTYPES[dtype]
        elif shape[-1] % _BLOCK_WEIGHTS:
            kinds[name] = "BF16"
        else:
            kinds[name] = "Q8_0" if name in _ENDS else matrix
    return kinds


def kind_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor of this shape."""
    count = math.prod(shape)
    if kind in _BLOCK_BYTES:
        return count // _BLOCK_WEIGHTS * _BLOCK_BYTES[kind]
    return count * {"F32": 4, "F16": 2, "BF16": 2}[kind]


def gguf_fields(config: ModelConfig) -> dict[str, int | float | str]:
    """The header fields that describe the model, but for the tokenizer's."""
    arch, moe = gguf_architecture(config), config.moe
    fields: dict[str, int | float | str] = {
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": moe.ffn_size if moe and arch == "llama" else config.ffn_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
    }
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    if moe:
        fields |= {"expert_count": moe.experts[0], "expert_used_count": moe.top_k}
        fields |= {"expert_feed_forward_length": moe.ffn_size}
        if moe.fixed_ffn_size:
            fields |= {"expert_shared_feed_forward_length": moe.fixed_ffn_size}
    return {f"{arch}.{key}": value for key, value in fields.items()}
