"""The same Transformer behind the interface of transformers, for directories of type `growmoe`.

Importing this module (or `growmoe.hf`) registers the architecture, after which
`AutoModelForCausalLM.from_pretrained` and `save_pretrained` read and write MODEL directories whose
config.json says `growmoe`: one tensor per expert on disk, stacked experts in memory.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.cache_utils import Cache as PublicCache
from transformers.cache_utils import DynamicCache, StaticLayer
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from growmoe.errors import UsageError
from growmoe.models.attention import Cache
from growmoe.models.config import ModelConfig
from growmoe.models.families import TOKEN_ID_KEYS, config_from_hf
from growmoe.models.transformer import Transformer, fresh_weights

_FIELDS = [
    field.name
    for field in dataclasses.fields(ModelConfig)
    if field.name not in ("family", "token_ids")
]


class GrowmoeConfig(PreTrainedConfig):
    """The fields of a ModelConfig as a configuration of transformers; `shape()` gives it back."""

    model_type = "growmoe"
    keys_to_ignore_at_inference = ("past_key_values", "router_logits")
    attribute_map = {  # noqa: RUF012 (the base class wants a dict)
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "intermediate_size": "ffn_size",
        "max_position_embeddings": "max_positions",
        "initializer_range": "init_std",
        "tie_word_embeddings": "tied_head",
    }
    rope_scaling = None  # a plain field here, where the base class has a property

    def __init__(self, **kwargs: Any) -> None:
        """Takes the keys of a config.json of type `growmoe`; raises GrowmoeError for a model that
        cannot be."""
        kwargs = {self.attribute_map.get(key, key): value for key, value in kwargs.items()}
        token_ids = kwargs.pop("token_ids", None) or {}
        kwargs.pop("family", None)
        fields = {key: kwargs.pop(key) for key in _FIELDS if key in kwargs}
        shape = config_from_hf({**fields, "model_type": self.model_type}, Path("config.json"))
        for key in TOKEN_ID_KEYS:
            kwargs.setdefault(key, token_ids.get(key))
        super().__init__(**kwargs)
        for key in _FIELDS:
            setattr(self, key, getattr(shape, key))
        if shape.moe is not None:
            self.moe = dataclasses.asdict(shape.moe) | {"experts": list(shape.moe.experts)}

    @classmethod
    def from_shape(cls, shape: ModelConfig) -> "GrowmoeConfig":
        """The configuration of a model of this shape, for `AutoModelForCausalLM.from_config`."""
        return cls(**dataclasses.asdict(shape))

    def shape(self) -> ModelConfig:
        """The ModelConfig; raises GrowmoeError when the fields contradict each other."""
        return config_from_hf(self.to_dict(), Path("config.json"))

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: growmoe reads the token ids as one field, transformers singly."""
        output = super().to_dict()
        ids = {key: getattr(self, key, None) for key in TOKEN_ID_KEYS}
        output["token_ids"] = {key: value for key, value in ids.items() if value is not None}
        return output


class _Past(Cache):
    """The keys and values in a cache of transformers, as our attention asks for them."""

    def __init__(self, cache: PublicCache) -> None:
        if any(isinstance(layer, StaticLayer) for layer in cache.layers):
            raise UsageError(
                "a growmoe model does not run with a static cache; leave out cache_implementation "
                "or pass a DynamicCache"
            )
        self.cache = cache

    @property
    def length(self) -> int:
        """Tokens seen, also those that a sliding window has dropped."""
        return self.cache.get_seq_length()

    def append(self, layer: int, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Add new keys and values of `layer`; returns what the cache still holds of it."""
        return self.cache.update(k_BKTC, v_BKTC, layer)


class GrowmoeForCausalLM(PreTrainedModel, GenerationMixin):
    """A growmoe Transformer (`.model`) with the methods of a PreTrainedModel.

    The loss is the cross entropy alone; the router losses and their logs are `growmoe train`'s.
    """

    config_class = GrowmoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]  # noqa: RUF012 (the base class wants a list)
    _supports_sdpa = True
    accepts_loss_kwargs = False

    def __init__(self, config: GrowmoeConfig) -> None:
        super().__init__(config)
        self.model = Transformer(config.shape())
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: PublicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        **unsupported: Any,
    ) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B,T,V] and, with `labels` (equal to input_ids; -100 is left out), the mean loss
        of predicting each next token.

        `attention_mask` [B, held + new tokens] is 0 where a token is padding, on either side.
        A cache is kept when evaluating without labels, or as `use_cache` says.
        Raises UsageError for arguments that this architecture has no use for.
        """
        for key, value in unsupported.items():
            if value is not None and value is not False:
                raise UsageError(f"a growmoe model does not take {key}; leave it out")
        if use_cache is None:
            use_cache = past_key_values is not None or (labels is None and not self.training)
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        past = None if past_key_values is None else _Past(past_key_values)
        real_BS = self._real_tokens(attention_mask, input_ids, past)
        output = self.model(input_ids, past, real_BS)
        loss = None
        if labels is not None:
            loss = self.loss_function(output.logits, labels, output.logits.shape[-1])
        routers = tuple(routing.logits_TE for routing in output.routing)
        result = MoeCausalLMOutputWithPast(
            loss=loss,
            logits=output.logits,
            past_key_values=past_key_values,
            router_logits=routers if output_router_logits else None,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()

    def _real_tokens(
        self, mask: Tensor | None, input_ids: Tensor, past: _Past | None
    ) -> Tensor | None:
        """The mask as bool [B,S]; None when nothing is padding."""
        if mask is None:
            return None
        held = past.length if past is not None else 0
        expected = (input_ids.shape[0], held + input_ids.shape[1])
        if tuple(mask.shape) != expected:
            raise UsageError(
                f"attention_mask has shape {list(mask.shape)}, but batch and tokens (held ones "
                f"included) are {list(expected)}"
            )
        real_BS = mask.to(input_ids.device) != 0
        if real_BS.all():
            return None
        before_BS, after_BS = real_BS.cumsum(1) > 0, real_BS.flip(1).cumsum(1).flip(1) > 0
        if self.config.sliding_window and (before_BS & ~real_BS & after_BS).any():
            raise UsageError(
                "attention_mask has padding between tokens, which a model with a sliding window "
                "cannot skip; pad on the left"
            )
        return real_BS

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers; raises UsageError when a prompt ends in padding, because the next
        token would continue the padding."""
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise UsageError("attention_mask ends in padding; pad prompts on the left to generate")
        return super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, **kwargs
        )

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """The rule of Transformer.init_weights, from torch's global seed, for what was not loaded.

        Not module by module as in transformers: the rule knows parameters by name.
        """
        for name, parameter in self.model.named_parameters():
            mean, std = fresh_weights(self.model.config, name)
            if std:
                initialization.normal_(parameter, mean, std)
            else:
                initialization.constant_(parameter, mean)

    def get_input_embeddings(self) -> nn.Module:
        """The token table."""
        return self.model.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token table (resize_token_embeddings does)."""
        self.model.embed = value
        self.model.config = self.model.config.replace(vocab_size=value.num_embeddings)

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None for a tied one, which is the token table itself."""
        return None if self.config.tied_head else self.model.head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.model.head = value


# ---- tensors on disk and in memory ----


def _gate_first(patterns: list[str]) -> list[str]:
    return sorted(patterns, key=lambda pattern: ".gate." not in pattern)


class _StackExperts(ConversionOps):
    """One tensor per expert and part (gate, up) into one tensor, gate rows first."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        parts = [
            input_dict.pop(pattern)
            for pattern in _gate_first(source_patterns)
            if pattern in input_dict  # a GELU model has no gate
        ]
        # quantised experts come dequantised and stacked already
        parts = [torch.stack(part) if isinstance(part, list) else part for part in parts]
        return {target_patterns[0]: torch.cat(parts, dim=1)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _UnstackExperts()


class _UnstackExperts(ConversionOps):
    """The reverse of _StackExperts."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        config: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        (found,) = input_dict.values()
        stacked = found[0] if isinstance(found, list) else found
        names = _gate_first(target_patterns)
        if config.activation == "gelu":
            names = [name for name in names if ".gate." not in name]
        return {
            name.replace("*", str(expert)): part.contiguous()
            for expert, rows in enumerate(stacked.unbind(0))
            for name, part in zip(names, rows.chunk(len(names), dim=0))
        }

    @property
    def reverse_op(self) -> ConversionOps:
        return _StackExperts()


def _conversions() -> list[WeightRenaming | WeightConverter]:
    experts = "moe.experts"
    stacks = []
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        gate, up, down = (f"{experts}.*.{part}.{kind}" for part in ("gate", "up", "down"))
        # `up` first: transformers names all after the first pattern, and GELU has no gate
        stacks.append(WeightConverter([up, gate], f"{experts}.up{suffix}", [_StackExperts()]))
        stacks.append(WeightConverter([down], f"{experts}.down{suffix}", [_StackExperts()]))
    top = r"^(embed|positions|layers|norm|head)\."
    return [WeightRenaming(top, r"^model.\1."), *stacks]


def register() -> None:
    """Tell transformers about the architecture; importing this module does it."""
    register_checkpoint_conversion_mapping("growmoe", _conversions(), overwrite=True)
    AutoConfig.register("growmoe", GrowmoeConfig, exist_ok=True)
    AutoModelForCausalLM.register(GrowmoeConfig, GrowmoeForCausalLM, exist_ok=True)


register()
