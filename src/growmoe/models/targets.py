"""In which form a model is exported for an engine, and what an engine would compute wrongly.

Facts about transformers 5.23 and llama.cpp were run, those about vLLM 0.33 and SGLang 0.5.23 were
read in their sources. Imports no torch.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from growmoe.errors import UsageError
from growmoe.models.config import ModelConfig
from growmoe.models.families import pick_family
from growmoe.models.gguf_arch import gguf_architecture, gguf_obstacle

Engine = Literal["transformers", "vllm", "sglang", "llama.cpp"]
Step = Literal["sum_as_gate", "duplicate", "untie", "zero_biases", "null_shared"]
SHARED_SIZE = 128
"""Width of a shared expert that adds nothing: vLLM and SGLang split it over up to 4 devices in
blocks of 32."""
_SERVERS = {"vllm": "vLLM", "sglang": "SGLang"}


@dataclass(frozen=True)
class Target:
    """The architecture to write, and the exact changes of form that lead to it, in order."""

    family: str
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()


def export_target(
    config: ModelConfig, engine: Engine, portable: bool = False, gguf: bool = True
) -> Target:
    """How to export `config` for `engine`; `portable` allows changes that cost space. For
    llama.cpp, `gguf` says whether a GGUF file or a directory for its converter is wanted.

    Raises UsageError that names the engine and the reason when it would not run, or would compute
    something else.
    """
    steps: list[Step] = []
    if portable:
        steps += _portable_steps(config)
    shaped = changed_config(config, tuple(steps))
    if engine == "llama.cpp":
        if reason := gguf_obstacle(shaped):
            raise UsageError(_refusal("llama.cpp", reason, config, portable))
        family = pick_family(shaped)
        if not gguf:
            family = _converter_family(shaped)
        return Target(family, tuple(steps))
    family = pick_family(shaped)
    if engine == "transformers":
        notes = ("transformers loads it after `import growmoe.hf`",) if family == "growmoe" else ()
        return Target(family, tuple(steps), notes)
    name = _SERVERS[engine]
    if reason := _server_obstacle(shaped, family, engine):
        raise UsageError(_refusal(name, reason, config, portable))
    if shaped.moe is not None:  # their MoE classes build a head of their own, without a word
        steps += ["untie"] if shaped.tied_head else []
    if family == "qwen2_moe":
        steps += [] if shaped.qkv_bias else ["zero_biases"]
        assert shaped.moe is not None
        steps += ["null_shared"] if shaped.moe.mix == "none" else []
    return Target(family, tuple(steps), (f"{name} itself was not run",))


def _refusal(name: str, reason: str, config: ModelConfig, portable: bool) -> str:
    hint = ""
    if not portable and (steps := _possible_steps(config)):
        hint = f" (--portable may help: {', '.join(steps)})"
    return f"{name} cannot run this model as it is: {reason}{hint}"


def _possible_steps(config: ModelConfig) -> list[Step]:
    try:
        return _portable_steps(config)
    except UsageError:
        return []


def _portable_steps(config: ModelConfig) -> list[Step]:
    """Changes of form that cost space or a constant gate, so that a public architecture fits."""
    moe = config.moe
    if moe is None:
        return []
    steps: list[Step] = ["sum_as_gate"] if moe.mix == "sum" else []
    counts = {count for count in moe.experts if count}
    if len(counts) > 1:
        if moe.top_k > 1:
            raise UsageError(
                f"a pyramid is made portable by copying experts, which is exact for top-k 1 only, "
                f"not {moe.top_k}: the copies of one expert would take the places of others"
            )
        if moe.scoring != "softmax":
            raise UsageError("copied experts are exact under a softmax router only")
        if moe.selection_bias or moe.groups > 1:
            raise UsageError("copied experts are not chosen alike by a selection bias or in groups")
        steps.append("duplicate")
    return steps


def changed_config(config: ModelConfig, steps: tuple[Step, ...]) -> ModelConfig:
    """The shape after `steps`."""
    for step in steps:
        config = _changed(config, step)
    return config


def _changed(config: ModelConfig, step: Step) -> ModelConfig:
    moe = config.moe
    if step == "untie":
        return config.replace(tied_head=False)
    if step == "zero_biases":
        return config.replace(qkv_bias=True)
    assert moe is not None
    if step == "sum_as_gate":
        return config.replace(moe=replace(moe, mix="sigmoid_gate"), family="")
    if step == "null_shared":
        return config.replace(moe=replace(moe, mix="sigmoid_gate", fixed_ffn_size=SHARED_SIZE))
    most = math.lcm(*(count for count in moe.experts if count))
    if most > 4 * max(moe.experts):
        raise UsageError(
            f"expert counts {sorted(set(moe.experts))} have no small common multiple "
            f"({most} experts per layer would be written)"
        )
    experts = tuple(most if count else 0 for count in moe.experts)
    return config.replace(moe=replace(moe, experts=experts), family="")


def _server_obstacle(config: ModelConfig, family: str, engine: Engine) -> str | None:
    """Why vLLM or SGLang would not run it, or compute something else (their loaders skip unknown
    biases without a word)."""
    moe = config.moe
    square = config.num_heads * config.head_dim == config.hidden_size
    if family == "growmoe":
        return "no public architecture expresses it"
    if family in ("qwen2", "qwen2_moe") and not square:
        return "it takes the head dim of Qwen2 models as hidden size / heads"
    if family == "olmoe":
        return "its OLMoE routing was not checked against ours"
    if config.o_bias and family in ("qwen3", "qwen3_moe"):
        return "the bias of the attention's output projection would be dropped"
    if family == "mixtral" and config.rope_scaling:
        return "its Mixtral does not scale rotary positions"
    if engine == "vllm":
        return None
    if config.sliding_window and config.sliding_window < config.max_positions:
        return f"the sliding window of {config.sliding_window} tokens would be ignored"
    if config.mlp_bias:
        return "biases of the feed-forward would be dropped"
    if family == "mixtral" and not square:
        return "it takes the head dim of Mixtral as hidden size / heads"
    if moe is not None and 0 in moe.experts:
        return "it takes every layer of a Qwen MoE as sparse (decoder_sparse_step is not read)"
    return None


_CONVERTED = {"qwen2": ("qwen2",), "qwen3": ("qwen3",), "qwen3moe": ("qwen3_moe",),
              "llama": ("llama", "mistral")}  # fmt: skip


def _converter_family(config: ModelConfig) -> str:
    """The directory that llama.cpp's converter turns into the right GGUF file: a renormalised
    mixture without QK-norm goes as Mixtral, Q, K and V biases and all (the converter drops
    norm_topk_prob of Qwen2-MoE without a word). Raises UsageError where only the file that is
    written here would be right."""
    architecture, family = gguf_architecture(config), pick_family(config)
    if config.moe is not None and architecture == "llama" and not config.o_bias:
        return "mixtral"
    if family in _CONVERTED.get(architecture, ()):
        return family
    raise UsageError(
        "llama.cpp's converter would make another model of this one; export with format gguf"
    )
