"""GGUF files of the llama, mistral, qwen2 and qwen3 architectures, read tensor by tensor.

Needs the `gguf` extra. Quantised weights are dequantised to float32 by the gguf library.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growmoe.errors import GrowmoeError, UsageError
from growmoe.models.config import ModelConfig, tensor_shapes
from growmoe.models.gguf_arch import gguf_name


class GGUFFile:
    """One GGUF file; `load` gives float32 tensors in the row order of Hugging Face."""

    dtype = "float32"

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise UsageError(
                "reading GGUF needs the gguf extra: pip install 'growmoe[gguf]'"
            ) from None
        if not path.is_file():
            raise UsageError(f"{path} does not exist")
        self.path = path
        self._dequantize = gguf.quants.dequantize
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, OSError, IndexError) as error:
            raise GrowmoeError(f"{path} is not a whole GGUF file ({error})") from None
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.config = self._config()
        for name, shape in tensor_shapes(self.config).items():
            found = self._tensors.get(gguf_name(self.config, name))
            if found is None:
                raise GrowmoeError(f"{path}: tensor {gguf_name(self.config, name)} is missing")
            have = tuple(int(side) for side in reversed(found.shape))
            if have != shape:
                raise GrowmoeError(
                    f"{path}: tensor {found.name} has shape {list(have)}, but the header says "
                    f"{list(shape)}"
                )

    def _field(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        if field is not None:
            return field.contents()
        if default is None:
            raise GrowmoeError(f"{self.path}: key {key} is missing")
        return default

    def _config(self) -> ModelConfig:
        kind = self._field("general.architecture")
        if kind not in ("llama", "qwen2", "qwen3"):
            raise GrowmoeError(f"{self.path}: architecture '{kind}' is not llama, qwen2 or qwen3")
        if f"{kind}.expert_count" in self._reader.fields:
            raise GrowmoeError(f"{self.path}: MoE files in GGUF are not read")
        heads = int(self._field(f"{kind}.attention.head_count"))
        hidden = int(self._field(f"{kind}.embedding_length"))
        scaling = self._field(f"{kind}.rope.scaling.type", "none")
        if "rope_freqs.weight" in self._tensors or scaling not in ("none", "linear"):
            raise GrowmoeError(f"{self.path}: only linear scaling of rotary positions is read")
        factor = float(self._field(f"{kind}.rope.scaling.factor", 1.0))
        ids = {
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id", -1),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id", -1),
            "pad_token_id": self._field("tokenizer.ggml.padding_token_id", -1),
        }
        return ModelConfig(
            vocab_size=int(self._tensors["token_embd.weight"].shape[1]),
            hidden_size=hidden,
            num_layers=int(self._field(f"{kind}.block_count")),
            num_heads=heads,
            num_kv_heads=int(self._field(f"{kind}.attention.head_count_kv", heads)),
            head_dim=int(self._field(f"{kind}.attention.key_length", hidden // heads)),
            ffn_size=int(self._field(f"{kind}.feed_forward_length")),
            max_positions=int(self._field(f"{kind}.context_length")),
            norm_eps=round(float(self._field(f"{kind}.attention.layer_norm_rms_epsilon")), 12),
            rope_theta=float(self._field(f"{kind}.rope.freq_base", 10000.0)),
            rope_scaling=None if scaling == "none" else {"rope_type": scaling, "factor": factor},
            qkv_bias="blk.0.attn_q.bias" in self._tensors,
            o_bias="blk.0.attn_output.bias" in self._tensors,
            mlp_bias="blk.0.ffn_up.bias" in self._tensors,
            qk_norm="blk.0.attn_q_norm.weight" in self._tensors,
            tied_head="output.weight" not in self._tensors,
            family=kind,
            token_ids={key: int(value) for key, value in ids.items() if int(value) >= 0},
        )

    def load(self, name: str) -> Tensor:
        """The tensor with the canonical `name`, dequantised to float32."""
        found = self._tensors[gguf_name(self.config, name)]
        array = self._dequantize(found.data, found.tensor_type)
        tensor = torch.from_numpy(array.astype("float32", copy=True))
        if not torch.isfinite(tensor).all():
            raise GrowmoeError(f"{self.path}: tensor {found.name} holds NaN or infinite values")
        part = name.rpartition(".")[0].rpartition(".")[2]
        if part in ("q", "k") and self.config.family == "llama":
            heads = self.config.num_heads if part == "q" else self.config.num_kv_heads
            tensor = unpermute(tensor, heads)
        return tensor


def permute(rows: Tensor, heads: int) -> Tensor:
    """Rotary rows in the order of llama.cpp's `llama` (halves apart -> pairs side by side)."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """Undo `permute`."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def export_tokenizer(path: Path, out: Path) -> None:
    """Write the tokenizer that a GGUF file carries as tokenizer.json into the directory `out`."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(out)
