"""`import growmoe.hf_experts`: mixtures of experts of transformers compute with our kernels.

It registers the experts implementation `growmoe` with transformers and makes it the default of
every model that is made afterwards, by `from_pretrained`, `from_config` or its class, for inference
and for training. Whoever asks for another one gets it (`experts_implementation="eager"`), and
`disable()` gives transformers its own default back. A model that exists already takes part by
`model.set_experts_implementation("growmoe")`.

It serves SwiGLU experts in the layout of Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and those who share
it: `hidden_act` silu, weights gate_up_proj [E,2F,D] (gate rows first) and down_proj [E,D,F] without
biases. A model whose config or code says otherwise (another activation, transposed or interleaved
weights, biases, a gate of its own, quantised weights) keeps transformers' default; and so does a
layer that turns out to be different, is split over devices, or is being compiled.

Gradients can be taken once, not of gradients.
"""

import inspect
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations import moe
from transformers.modeling_utils import PreTrainedModel

from growmoe.ops.device import without_autocast
from growmoe.ops.experts import ExpertWeights, expert_mlp
from growmoe.ops.mapping import mapping_table

NAME = "growmoe"
_theirs = PreTrainedModel.get_correct_experts_implementation


def enable() -> None:
    """Be the default of models that are made from now on."""
    moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    PreTrainedModel.get_correct_experts_implementation = _choose


def disable() -> None:
    """Transformers' own default again. Models that use `growmoe` already go on using it."""
    PreTrainedModel.get_correct_experts_implementation = _theirs


def _choose(self: PreTrainedModel, requested_experts: str | None) -> str:
    """In place of PreTrainedModel.get_correct_experts_implementation."""
    chosen = _theirs(self, requested_experts)
    if requested_experts is None and chosen == "grouped_mm" and _model_fits(self):
        return NAME
    return chosen


def _model_fits(model: PreTrainedModel) -> bool:
    """By its config and its code, because it has no layers yet. Transformers finds out in the same
    way whether a model can have other experts at all."""
    config = model.config
    if getattr(config, "quantization_config", None) is not None:
        return False
    if getattr(config, "hidden_act", None) not in ("silu", "swish"):
        return False
    code = inspect.getsource(sys.modules[type(model).__module__])
    return "@use_experts_implementation(" not in code and "_apply_gate" not in code


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What an experts module of transformers calls with [T,D], [T,K] and [T,K]."""
    if not _layer_fits(self, hidden_states):
        theirs = moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"]
        return theirs(self, hidden_states, top_k_index, top_k_weights)
    up_ERD, down_EDF = self.gate_up_proj, self.down_proj
    dtype, kind = up_ERD.dtype, hidden_states.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    weights = ExpertWeights(up_ERD.to(dtype), down_EDF.to(dtype))
    table = mapping_table(top_k_index, len(up_ERD))
    with without_autocast(hidden_states):
        y_TD = expert_mlp(hidden_states.to(dtype), table, top_k_weights, weights, "swiglu")
    return y_TD.to(hidden_states.dtype)


def _layer_fits(layer: Any, x_TD: Tensor) -> bool:
    """Whether these experts are SwiGLU, plain and here."""
    if torch.compiler.is_compiling() or x_TD.device.type not in ("cpu", "cuda"):
        return False
    if not layer.has_gate or layer.has_bias or layer.is_transposed or not layer.is_concatenated:
        return False
    if getattr(layer, "has_post_expert_norm", False) or getattr(layer, "_is_expert_parallel", 0):
        return False
    if type(layer)._apply_gate is not moe._default_apply_gate:
        return False
    if layer.act_fn is not F.silu and not isinstance(layer.act_fn, nn.SiLU | SiLUActivation):
        return False
    weights = (layer.gate_up_proj, layer.down_proj)
    return all(type(weight) in (Tensor, nn.Parameter) for weight in weights)


enable()
