"""What a recipe may say: the fields of every stage, with types, limits and defaults.

`recipe_yaml.py` reads one from a file and reports mistakes. Imports no torch.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from growmoe.recipe.fields import (
    Count,
    ExpertLayout,
    Fraction,
    Layer,
    Name,
    NonNegative,
    Positive,
    Seed,
    Strict,
    numbers,
)
from growmoe.recipe.training import InitModel as InitModel
from growmoe.recipe.training import InitMoE as InitMoE
from growmoe.recipe.training import LossModel as LossModel
from growmoe.recipe.training import OptimizerModel as OptimizerModel
from growmoe.recipe.training import RankingModel as RankingModel
from growmoe.recipe.training import RoutingModel as RoutingModel
from growmoe.recipe.training import TrainStage as TrainStage


class SourceModel(Strict):
    """One source of the mixture."""

    name: Name
    path: str
    """File, folder, glob, `package:NAME/GLOB` or `docstrings:stdlib,NAME`."""
    weight: Positive = 1.0
    text_field: str = "text"
    split: Literal["file", "lines", "paragraphs"] = "file"
    """For txt and md: what one document is."""


class TokenizerModel(Strict):
    """A tokenizer to use (`path`), or the size of the one to train."""

    path: str | None = None
    vocab_size: Annotated[int, Field(ge=260)] = 16384
    sample_mb: Positive = 50.0


class PrepareStage(Strict):
    """Raw text to a corpus directory."""

    stage: Literal["prepare"]
    name: Name = "corpus"
    sources: Annotated[list[SourceModel], Field(min_length=1)]
    tokenizer: TokenizerModel = TokenizerModel()
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01
    min_chars: Count = 1
    max_document_mb: Positive = 32.0
    bad_records: Literal["error", "skip"] = "error"
    shard_tokens: Count = 100_000_000
    validation_length: Count = 512
    """Length of the validation windows, the same for every model that is measured."""
    validation_tokens: Count = 16384
    """Validation tokens per source."""

    @model_validator(mode="after")
    def _unique(self) -> "PrepareStage":
        names = [source.name for source in self.sources]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two sources are called '{doubled[0]}'")
        return self


class _OnText(Strict):
    """Checks run on the text of a file, or on the validation split of a corpus."""

    text: str | None = None
    data: str | None = None
    seed: Seed = 0


def _depth(value: Any) -> Any:
    found = numbers(value)
    if isinstance(found, str) and found not in get_args(Depth):
        raise ValueError(f"give {', '.join(get_args(Depth))}, or the layers to copy as 0,1,1,2")
    return [found] if isinstance(found, int) and not isinstance(found, bool) else found


def _pair(value: Any) -> Any:
    found = numbers(value)
    if not isinstance(found, list | tuple) or len(found) != 2:
        raise ValueError("give two numbers, as 3,3")
    return found


Depth = Literal["identity", "stack", "interpolate", "dus"]
Deviation = Annotated[float, Field(ge=0, le=1000)]


class _Derived(_OnText):
    """A model made from another one, written shard by shard and then checked."""

    name: Name
    model: str
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    verify: bool = True
    """False leaves the check out; the output then says that it is unverified."""
    shard_gb: Annotated[float, Field(gt=0, le=1e6)] = 4.0
    """Largest file; finished files survive an interruption."""
    pretrained_tokens: Count | None = None
    """Training tokens of the source, where its lineage does not say; for the plan's warnings."""


class GrowStage(_Derived):
    """Scale-up: a larger dense model that starts where the small one stopped."""

    stage: Literal["grow"]
    name: Name = "grow"
    hidden: Count | None = None
    layers: Count | None = None
    heads: Count | None = None
    kv_heads: Count | None = None
    merge_kv: Literal["mean"] | None = None
    """Allows fewer kv heads than the source has, by averaging neighbours (lossy)."""
    ffn: Count | None = None
    head_dim: Count | None = None
    vocab: Count | None = None
    vocab_init: Literal["mean", "mean_cov", "zeros", "from_tokens"] = "mean"
    vocab_tokenizer: str | None = None
    """A tokenizer whose first tokens are the model's; it replaces the model's own."""
    method: Literal["exact", "fpi", "aki", "aki-pro"] = "exact"
    depth: Annotated[Depth | list[Layer] | None, BeforeValidator(_depth)] = None
    """Default: identity for exact, interpolate for aki-pro, stack for fpi and aki. A list gives the
    layer that each new layer copies."""
    guard: Annotated[tuple[Layer, Layer], BeforeValidator(_pair)] = (0, 0)
    """First and last layers that stack and interpolate leave single."""
    branch_scale: Literal["one", "count"] = "one"
    """count: o and down of a layer that occurs c times are divided by c."""
    units: Literal["duplicate", "zero_pad"] = "duplicate"
    """New units of the residual stream and the feed-forward; new heads are always copies."""
    split: Literal["random", "even"] | None = None
    """How copies share what reads them; default random for exact, even for the published ones."""
    noise_db: Annotated[float, Field(ge=0, le=120)] | None = None
    """Signal-to-noise ratio of noise that breaks symmetry."""
    noise: Literal["copies", "everywhere"] = "copies"
    """copies: on what reads copies, adding up to zero over them (exact); everywhere: lossy."""

    @model_validator(mode="after")
    def _something(self) -> "GrowStage":
        if self.method != "exact" and self.units == "zero_pad":
            raise ValueError(f"method {self.method} copies units; units: zero_pad contradicts it")
        duplicates = self.depth_method in ("stack", "interpolate")
        if self.guard != (0, 0) and not duplicates:
            raise ValueError("guard is for depth: stack and depth: interpolate")
        if self.branch_scale == "count" and self.depth_method == "identity":
            raise ValueError("branch_scale is for layers that occur twice, not for depth: identity")
        if self.noise == "everywhere" and self.noise_db is None:
            raise ValueError("noise: everywhere needs noise_db")
        if self.vocab_init == "from_tokens" and self.vocab_tokenizer is None:
            raise ValueError("vocab_init: from_tokens needs vocab_tokenizer")
        if isinstance(self.depth, list) and self.layers not in (None, len(self.depth)):
            raise ValueError(f"depth lists {len(self.depth)} layers, but layers is {self.layers}")
        sizes = ("hidden", "layers", "heads", "kv_heads", "ffn", "head_dim", "vocab",
                 "vocab_tokenizer")  # fmt: skip
        asked = isinstance(self.depth, list) or self.noise == "everywhere"
        if all(getattr(self, size) is None for size in sizes) and not asked:
            raise ValueError(f"nothing to grow: give at least one of {', '.join(sizes)}")
        if idle := list(self._idle()):
            raise ValueError("; ".join(idle))
        return self

    def _idle(self) -> Iterator[str]:
        """Options that would do nothing, because what they are for was not asked for."""
        copies = self.hidden or self.heads or self.ffn
        if self.noise == "copies" and self.noise_db is not None and not copies:
            yield "noise: copies needs hidden, heads or ffn (everywhere needs no copies)"
        if self.split is not None and not copies:
            yield "split needs hidden, heads or ffn"
        if self.units == "zero_pad" and not (self.hidden or self.ffn):
            yield "units: zero_pad needs hidden or ffn"
        deeper = self.layers is not None or isinstance(self.depth, list)
        if self.depth is not None and not deeper:
            yield f"depth: {self.depth} needs layers"
        elif not deeper and (self.guard != (0, 0) or self.branch_scale != "one"):
            yield "guard and branch_scale need layers"
        if self.vocab_init != "mean" and self.vocab is None and self.vocab_tokenizer is None:
            yield f"vocab_init: {self.vocab_init} needs vocab or vocab_tokenizer"
        if self.merge_kv is not None and self.kv_heads is None:
            yield "merge_kv needs kv_heads"

    @property
    def depth_method(self) -> Depth | list[int]:
        """How layers are added when `depth` leaves it to `method`."""
        if self.depth is not None:
            return self.depth
        if self.method == "exact":
            return "identity"
        return "interpolate" if self.method == "aki-pro" else "stack"


class UpcycleStage(_Derived, ExpertLayout):
    """Scale-out: a dense model becomes a mixture of experts."""

    stage: Literal["upcycle"]
    name: Name = "upcycle"
    combine: Literal["renorm", "softmax", "sigmoid"] = "renorm"
    """Weights of the chosen experts: softmax divided by their sum, raw softmax (the experts are
    then scaled by E/k), or sigmoid scores divided by their sum."""
    router: Literal["normal", "zero", "virtual_group"] | None = None
    """virtual_group: one row per group of `granularity` experts, so that whole groups are chosen;
    the default when granularity is above 1, else normal."""
    router_std: Deviation = 0.02
    expert_init: Literal["copy", "noise", "drop", "permute"] = "copy"
    """noise and drop (Drop-Upcycling) are lossy, permute reorders hidden units."""
    noise: Deviation = 0.01
    """expert_init noise: root mean square relative to each matrix."""
    drop: Fraction = 0.5
    """expert_init drop: part of the hidden units that is drawn anew."""
    granularity: Count = 1
    """Slices of the feed-forward per expert copy (fine-grained experts)."""
    shared: Literal["dense_plus_null", "half_half"] = "dense_plus_null"
    """What the fixed branch starts as: the dense feed-forward with experts that add nothing yet, or
    both giving their half."""

    @model_validator(mode="after")
    def _idle(self) -> "UpcycleStage":
        if self.residual == "none" and self.shared != "dense_plus_null":
            raise ValueError("shared is for a fixed branch; give residual")
        if self.expert_init != "noise" and "noise" in self.model_fields_set:
            raise ValueError("noise is for expert_init: noise")
        if self.expert_init != "drop" and "drop" in self.model_fields_set:
            raise ValueError("drop is for expert_init: drop")
        if self.router == "zero" and "router_std" in self.model_fields_set and self.router_std:
            raise ValueError("router: zero contradicts router_std")
        return self


class ExportStage(_Derived):
    """The same model in the form that an engine runs."""

    stage: Literal["export"]
    name: Name = "export"
    engine: Literal["transformers", "vllm", "sglang", "llama.cpp"]
    portable: bool = False
    """Allow changes of form that cost space, where no public architecture fits otherwise."""
    format: Literal["gguf", "hf"] | None = None
    """For llama.cpp: a GGUF file (default), or a directory for its own converter."""
    quantize: Literal["int8", "int4"] | None = None
    """Weights as integers with a scale per 32 inputs (lossy): a directory in the compressed-tensors
    form pack-quantized, or Q8_0 and Q4_0 of GGUF. Norms, routers and biases stay, embedding and
    head too (in GGUF they are Q8_0)."""

    @model_validator(mode="after")
    def _formats(self) -> "ExportStage":
        if self.format is not None and self.engine != "llama.cpp":
            raise ValueError("format is for llama.cpp; the other engines read directories")
        if self.as_gguf and "shard_gb" in self.model_fields_set:
            raise ValueError("shard_gb is for directories; a GGUF file is one file")
        if self.quantize and self.dtype not in (None, "bfloat16"):
            raise ValueError(
                f"dtype {self.dtype} contradicts quantize: what {self.quantize} leaves is bfloat16"
            )
        if self.quantize and self.format == "hf":
            raise ValueError("llama.cpp's converter reads no quantised directory; leave out format")
        return self

    @property
    def as_gguf(self) -> bool:
        """Whether the result is one GGUF file."""
        return self.engine == "llama.cpp" and self.format != "hf"


class VerifyStage(_OnText):
    """Is model b the same function as model a?"""

    stage: Literal["verify"]
    name: Name = "verify"
    a: str
    b: str
    tokens: Annotated[int, Field(ge=2)] = 1024


class EvaluateStage(_OnText):
    """Loss per domain, and scores on local task files."""

    stage: Literal["evaluate"]
    name: Name = "evaluate"
    model: str
    tasks: list[str] = Field(default=[])
    limit: Count | None = None
    """Rows per task file."""


class GenerateStage(Strict):
    """Continue some prompts, all at once; the samples stand in the report."""

    stage: Literal["generate"]
    name: Name = "samples"
    model: str
    prompts: Annotated[list[str], Field(min_length=1)]
    weights: Literal["float32", "bfloat16", "int8", "int4"] | None = None
    """How the model is held in memory; int8 and int4 round its weights, in groups of 32. Default:
    as its directory is quantised, else bfloat16."""
    device: Literal["cpu", "cuda"] = "cpu"
    kv_gb: Positive | None = None
    """GiB for keys and values; most of the memory that is left when not given."""
    expert_memory: str | None = None
    """Memory for routed experts, like 4G; those beyond it stay on disk. All of them when not
    given."""
    max_tokens: Count = 64
    temperature: NonNegative = 0.8
    """0 takes the likeliest token."""
    top_k: Layer = 0
    """Only the k likeliest tokens; 0 leaves this out."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Only the smallest set of tokens whose probability reaches this."""
    min_p: Fraction = 0.0
    """Only tokens at least this likely, relative to the likeliest."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Positive logits of tokens seen are divided by it, negative ones multiplied."""
    seed: Seed = 0
    """Sample number i of a prompt has the seed plus i."""
    n: Count = 1
    """Samples per prompt."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """A text ends before the one of these strings that is complete first."""
    ignore_eos: bool = False
    logprobs: Annotated[int, Field(ge=0, le=100)] | None = None
    """Write down the log-probability of every token, and of this many likeliest ones."""


Stage = (
    PrepareStage | TrainStage | GrowStage | UpcycleStage | ExportStage | VerifyStage | EvaluateStage
    | GenerateStage
)  # fmt: skip
STAGES: dict[str, type[Strict]] = {
    "prepare": PrepareStage,
    "train": TrainStage,
    "grow": GrowStage,
    "upcycle": UpcycleStage,
    "export": ExportStage,
    "verify": VerifyStage,
    "evaluate": EvaluateStage,
    "generate": GenerateStage,
}
MODEL_STAGES = ("train", "grow", "upcycle", "export")
REFERENCES = {"model": MODEL_STAGES, "a": MODEL_STAGES, "b": MODEL_STAGES, "data": ("prepare",)}


class Recipe(Strict):
    """A pipeline: stages in order, each naming what it starts from."""

    name: Name
    output: str | None = None
    """Run directory; default runs/NAME."""
    stages: Annotated[
        list[Annotated[Stage, Field(discriminator="stage")]], Field(min_length=1)
    ]  # fmt: skip

    _places: dict[int, str] = PrivateAttr(default_factory=dict)

    def where(self, index: int) -> str:
        """File, line and key of stage number `index`, for error messages."""
        return self._places.get(index, f"stages[{index}]")

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.output or f"runs/{self.name}")
