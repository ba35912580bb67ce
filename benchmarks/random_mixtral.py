"""A random Mixtral on disk, in every form that an engine of `decode.py` or `serving.py` reads.

The weights come from a seed and are values that bfloat16 holds, so that all forms start from the
same numbers. Files are made once, when they are first asked for:

    FOLDER/float32/, FOLDER/bfloat16/             safetensors, config.json, tokenizer
    FOLDER/F32.gguf, BF16.gguf, Q8_0.gguf, Q4_0.gguf    for llama.cpp

Q4_0 has its output head in Q8_0, as our int4 has it in int8. llama.cpp's own tool would take Q6_K,
which is 0.5% fewer bytes a token at the default size.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from growmoe.data.tokenizer import SPECIAL_TOKENS, save_tokenizer
from growmoe.models.checkpoint import write_model
from growmoe.models.config import ModelConfig, MoEConfig, tensor_shapes
from growmoe.models.gguf_write import write_gguf

GGUF = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
"""Our name of a form, and llama.cpp's of the nearest one."""
BITS = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.5, "int4": 4.5}
"""Bits a weight, scales of the groups of 32 included; equal for ours and for llama.cpp's."""
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The shape of the model, and its seed."""

    hidden: int = 1024
    layers: int = 12
    heads: int = 16
    kv_heads: int = 4
    experts: int = 8
    top_k: int = 2
    ffn: int = 2048
    vocab: int = 32000
    seed: int = 0

    def config(self) -> ModelConfig:
        """As this project writes it."""
        moe = MoEConfig(experts=(self.experts,) * self.layers, top_k=self.top_k, ffn_size=self.ffn)
        return ModelConfig(
            vocab_size=self.vocab, hidden_size=self.hidden, num_layers=self.layers,
            num_heads=self.heads, num_kv_heads=self.kv_heads, head_dim=self.hidden // self.heads,
            ffn_size=self.ffn, max_positions=4096, family="mixtral", moe=moe,
            token_ids={"eos_token_id": 0},
        )  # fmt: skip

    @property
    def attention_weights(self) -> int:
        """Of one layer, with the router."""
        width = self.hidden // self.heads
        both = 2 * self.heads * width + 2 * self.kv_heads * width
        return self.hidden * (both + self.experts)

    @property
    def expert_weights(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.ffn

    @property
    def head_weights(self) -> int:
        """Of the output head."""
        return self.vocab * self.hidden

    def distinct_experts(self, batch: int) -> float:
        """How many experts of a layer a step of `batch` tokens reads if routing is uniform."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** batch)

    def step_bytes(self, batch: int, form: str) -> float:
        """Bytes of weights that one decoding step reads: L * (attention + U(batch) * expert) +
        head. Left out: keys and values, activations, norms, one row of the embedding a token."""
        layer = self.attention_weights + self.distinct_experts(batch) * self.expert_weights
        head = BITS["int8" if form == "int4" else form] * self.head_weights
        return (self.layers * layer * BITS[form] + head) / 8

    @property
    def prefill_flop(self) -> float:
        """Operations of one prompt token: 2 * L * (attention + k * expert) weights; attention
        scores and the head, which only the last token needs, left out."""
        return 2 * self.layers * (self.attention_weights + self.top_k * self.expert_weights)


class RandomSource:
    """The weights of `Sizes` as a Source, tensor by tensor."""

    dtype = "bfloat16"

    def __init__(self, sizes: Sizes) -> None:
        self.config, self.seed = sizes.config(), sizes.seed
        self.shapes = tensor_shapes(self.config)

    def load(self, name: str) -> Tensor:
        """N(0, 1/columns); norms are 1."""
        shape = self.shapes[name]
        if "norm" in name:
            return torch.ones(shape, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()


def tokenizer_of(size: int) -> Tokenizer:
    """A byte-level BPE of exactly `size` tokens, made by rule: bytes, then pairs of letters, then
    pairs and a letter, then two pairs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL_TOKENS, *alphabet]
    pairs = [(a, b) for a in _LETTERS for b in _LETTERS]
    doubles = [a + b for a, b in pairs]
    triples = [(pair, letter) for pair in doubles for letter in _LETTERS]
    fours = [(a, b) for a in doubles for b in doubles]
    merges = [*pairs, *triples, *fours][: size - len(tokens)]
    tokens += [a + b for a, b in merges]
    if len(tokens) != size:
        raise ValueError(f"no tokenizer of {size} tokens: {len(tokens)} can be made")
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


class Model:
    """The files of one random model in a cache folder."""

    def __init__(self, cache: Path, sizes: Sizes) -> None:
        self.sizes = sizes
        name = hashlib.sha256(json.dumps(dataclasses.asdict(sizes)).encode()).hexdigest()[:12]
        self.folder = cache / f"random_mixtral-{name}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def directory(self, dtype: str) -> Path:
        """A MODEL directory in float32 or bfloat16."""
        out = self.folder / dtype
        if not out.exists():
            beside = self.folder / f"{dtype}.{os.getpid()}"
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
            source = RandomSource(self.sizes)
            write_model(beside, source.config, source.load, dtype)
            save_tokenizer(tokenizer_of(self.sizes.vocab), beside)
            beside.replace(out)
        return out

    def gguf(self, form: str) -> Path:
        """The file of llama.cpp's form nearest to ours."""
        out = self.folder / f"{GGUF[form]}.gguf"
        if not out.exists():
            beside = out.with_suffix(f".{os.getpid()}")
            if form in ("float32", "bfloat16"):
                tokenizer = self.directory(form)
                write_gguf(beside, RandomSource(self.sizes), tokenizer, form)
            else:
                _quantised(self.gguf("bfloat16"), beside, GGUF[form])
            beside.replace(out)
        return out

    def of(self, kind: str, form: str) -> Path:
        """What an engine of this kind loads for a form; ours packs int8 and int4 itself."""
        if kind == "llama.cpp":
            return self.gguf(form)
        return self.directory("float32" if form == "float32" else "bfloat16")


def _quantised(plain: Path, out: Path, kind: str) -> None:
    """`plain` with its matrices in `kind`, by the gguf package."""
    import gguf

    reader, wanted = gguf.GGUFReader(plain), gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(out, "llama")
    for key, field in reader.fields.items():
        if key.startswith(("llama.", "tokenizer.")):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type({"Q8_0": 7, "Q4_0": 2}[kind])
    writer.add_quantization_version(2)
    for tensor in reader.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        to = gguf.GGMLQuantizationType.Q8_0 if tensor.name == "output.weight" else wanted
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
