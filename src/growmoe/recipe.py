"""Recipes: one YAML that a person reads top to bottom, checked before anything runs.

Every mistake is reported at once, with the path of the key, its line and, for unknown keys, the
nearest known one. Imports no torch.
"""

import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from growmoe.errors import UsageError

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Strict(BaseModel):
    """Unknown keys are errors; a checked stage does not change; text is never taken for numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


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


class InitModel(Strict):
    """A new model; its vocabulary is the corpus's, rounded up to a multiple of 64."""

    hidden_size: Count
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count | None = None
    head_dim: Count | None = None
    ffn_size: Count
    max_positions: Count = 2048
    norm: Literal["rms", "layer"] = "rms"
    positions: Literal["rope", "learned"] = "rope"
    activation: Literal["swiglu", "gelu"] = "swiglu"
    rope_theta: Positive = 10000.0
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = True
    init_std: Positive = 0.02

    @model_validator(mode="after")
    def _divides(self) -> "InitModel":
        kv_heads = self.num_kv_heads or self.num_heads
        if self.num_heads % kv_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide by {kv_heads} kv heads")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide by num_heads {self.num_heads}; "
                "give head_dim"
            )
        head_dim = self.head_dim or self.hidden_size // self.num_heads
        if self.positions == "rope" and head_dim % 2:
            raise ValueError(f"head_dim {head_dim} must be even for rotary positions")
        return self


class OptimizerModel(Strict):
    """AdamW and its learning rate over the run."""

    lr: Positive = 3e-4
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: Fraction = 0.02
    """Share of the steps with a linearly rising rate."""
    decay: Fraction = 0.2
    """wsd: share of the steps at the end with a falling rate."""
    min_lr_ratio: Fraction = 0.1
    weight_decay: NonNegative = 0.1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    clip: Positive = 1.0


class LossModel(Strict):
    """Router losses, computed per layer and averaged over layers."""

    balance: NonNegative = 0.001
    z: NonNegative = 0.01
    z_kind: Literal[
        "router_logsumexp", "router_max", "output_logsumexp", "output_max"
    ] = "router_logsumexp"  # fmt: skip


class TrainStage(Strict):
    """Train a new model (`init` or `preset`) or an existing one (`model`)."""

    stage: Literal["train"]
    name: Name = "train"
    model: str | None = None
    init: InitModel | None = None
    preset: str | None = None
    data: str
    weights: dict[str, NonNegative] | None = None
    """Mixture weights in place of the corpus's own."""
    tokens: Count
    sequence_length: Count = 512
    batch_size: Count = 8
    """Sequences per micro batch."""
    accumulation: Count = 1
    optimizer: OptimizerModel = OptimizerModel()
    losses: LossModel = LossModel()
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass; weights and optimizer are float32. auto: bfloat16 where the
    processor multiplies it natively."""
    seed: int = 0
    validate_every: Count = 100
    checkpoint_every: Count = 100

    @model_validator(mode="after")
    def _one_start(self) -> "TrainStage":
        given = [key for key in ("model", "init", "preset") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of model, init and preset, not {given or 'none'}")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.sequence_length * self.batch_size * self.accumulation

    @property
    def steps(self) -> int:
        """Optimizer steps that `tokens` make, at least one."""
        return max(1, round(self.tokens / self.tokens_per_step))


class _OnText(Strict):
    """Checks run on the text of a file, or on the validation split of a corpus."""

    text: str | None = None
    data: str | None = None
    seed: int = 0


class GrowStage(_OnText):
    """Scale-up: a larger dense model that starts where the small one stopped."""

    stage: Literal["grow"]
    name: Name = "grow"
    model: str
    hidden: Count | None = None
    layers: Count | None = None
    heads: Count | None = None
    kv_heads: Count | None = None
    ffn: Count | None = None
    head_dim: Count | None = None
    vocab: Count | None = None
    method: Literal["exact", "fpi", "aki", "aki-pro"] = "exact"
    depth: Literal["identity", "stack", "interpolate"] | None = None
    """Default: identity for exact, interpolate for aki-pro, stack for fpi and aki."""
    units: Literal["duplicate", "zero_pad"] = "duplicate"
    split: Literal["random", "even"] | None = None
    """How copies share what reads them; default random for exact, even for the published ones."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @model_validator(mode="after")
    def _something(self) -> "GrowStage":
        if self.method in ("aki", "aki-pro") and self.units == "zero_pad":
            raise ValueError(f"method {self.method} copies units; units: zero_pad contradicts it")
        return self


class UpcycleStage(_OnText):
    """Scale-out: a dense model becomes a mixture of experts."""

    stage: Literal["upcycle"]
    name: Name = "upcycle"
    model: str
    experts: Count = 8
    top_k: Count = 2
    router_std: NonNegative = 0.02
    layers: str = "all"
    """all, second, or a list like '3,5,7' (from 0)."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @model_validator(mode="after")
    def _enough(self) -> "UpcycleStage":
        if self.experts < self.top_k:
            raise ValueError(f"experts ({self.experts}) are fewer than top_k ({self.top_k})")
        return self


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
    tasks: list[str] = []
    limit: Count | None = None
    """Rows per task file."""


class GenerateStage(Strict):
    """Continue some prompts; the samples stand in the report."""

    stage: Literal["generate"]
    name: Name = "samples"
    model: str
    prompts: Annotated[list[str], Field(min_length=1)]
    max_tokens: Count = 64
    temperature: NonNegative = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    seed: int = 0


Stage = (
    PrepareStage | TrainStage | GrowStage | UpcycleStage | VerifyStage | EvaluateStage
    | GenerateStage
)  # fmt: skip
STAGES: dict[str, type[Strict]] = {
    "prepare": PrepareStage,
    "train": TrainStage,
    "grow": GrowStage,
    "upcycle": UpcycleStage,
    "verify": VerifyStage,
    "evaluate": EvaluateStage,
    "generate": GenerateStage,
}
MODEL_STAGES = ("train", "grow", "upcycle")
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


# ---- loading, with lines ----

Loc = tuple[str | int, ...]


@dataclasses.dataclass
class _Document:
    value: Any
    lines: dict[Loc, int]


def _compose(text: str, file: str) -> _Document:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UsageError(f"{file}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    lines: dict[Loc, int] = {}
    problems: list[str] = []
    value = _plain(root, (), lines, problems, file)
    if problems:
        raise UsageError("\n".join(problems))
    return _Document(value, lines)


def _plain(
    node: yaml.Node | None, at: Loc, lines: dict[Loc, int], problems: list[str], file: str
) -> Any:
    """The plain value of a YAML node; notes the line of every key, and keys given twice."""
    if node is None:
        return None
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in result:
                problems.append(f"{file}:{line}: {_path((*at, key))} is given twice")
            lines[(*at, key)] = line
            result[key] = _plain(value_node, (*at, key), lines, problems, file)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [
            _plain(item, (*at, i), lines, problems, file) for i, item in enumerate(node.value)
        ]  # fmt: skip
    loader = yaml.SafeLoader("")
    try:
        return _number(loader.construct_object(node), node)
    except (yaml.YAMLError, ValueError) as error:
        problems.append(f"{file}:{node.start_mark.line + 1}: {_path(at)}: {error}")
        return None


def _number(value: Any, node: yaml.Node) -> Any:
    """YAML 1.1 reads 3e-4 as text; people mean the number."""
    if isinstance(value, str) and isinstance(node, yaml.ScalarNode) and node.style is None:
        try:
            return float(value) if "e" in value.lower() and value[:1] in "+-.0123456789" else value
        except ValueError:
            return value
    return value


def _path(loc: Loc) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "the recipe"


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read and check a recipe; `overrides` are `a.b.c=value` with stage names or numbers in the
    path. Raises UsageError with one line per problem."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    document = _compose(text, str(path))
    if not isinstance(document.value, dict):
        raise UsageError(f"{path}: a recipe is a mapping with 'name' and 'stages'")
    source: dict[Loc, str] = {}
    for override in overrides or []:
        apply_override(document.value, override, source)
    problems = list(_reference_problems(document, str(path), source))
    try:
        recipe = check(TypeAdapter(Recipe), document, str(path), source)
    except UsageError as error:
        raise UsageError("\n".join([str(error), *problems])) from None
    if problems:
        raise UsageError("\n".join(problems))
    for index in range(len(recipe.stages)):
        recipe._places[index] = _where(("stages", index), document, str(path), source)
    return recipe


def apply_override(value: dict[str, Any], override: str, source: dict[Loc, str]) -> None:
    """Set one `a.b.c=value` in a parsed recipe; `source` remembers where a value came from."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"override '{override}' is not of the form key.path=value")
    try:
        parsed = _compose(text, f"override '{key}'").value
    except UsageError as error:
        raise UsageError(str(error).splitlines()[0]) from None
    at: list[str | int] = []
    place: Any = value
    parts = key.split(".")
    if parts[0] not in Recipe.model_fields:
        parts = ["stages", *parts]
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if isinstance(place, list):
            index = _list_index(place, part, override)
            at.append(index)
            if last:
                place[index] = parsed
            place = place[index]
            continue
        if not isinstance(place, dict):
            raise UsageError(f"override '{override}': {_path(tuple(at))} holds no keys")
        at.append(part)
        if last:
            place[part] = parsed
        else:
            place = place.setdefault(part, {})
    source[tuple(at)] = f"override '{override}'"


def _list_index(items: list[Any], part: str, override: str) -> int:
    names = [item.get("name", item.get("stage")) if isinstance(item, dict) else None for item in items]  # fmt: skip  # noqa: E501
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    known = [str(name) for name in names if name]
    hint = did_you_mean(part, known) or f"; there are {', '.join(known)}"
    raise UsageError(f"override '{override}': nothing is called '{part}'{hint}")


def check(
    adapter: TypeAdapter[Any], document: _Document, file: str, source: dict[Loc, str]
) -> Any:  # fmt: skip
    """Validate with pydantic; raises UsageError with one line per problem."""
    try:
        return adapter.validate_python(document.value)
    except ValidationError as error:
        lines = [
            f"{_where(_clean_loc(e['loc']), document, file, source)}: {_message(e)}"
            for e in error.errors()
        ]
        raise UsageError("\n".join(lines)) from None


def _clean_loc(loc: Loc) -> Loc:
    """pydantic puts the discriminator's value into the path; the file has no such key."""
    if len(loc) > 2 and loc[0] == "stages" and loc[2] in STAGES:
        return (*loc[:2], *loc[3:])
    return loc


def _where(loc: Loc, document: _Document, file: str, source: dict[Loc, str]) -> str:
    for size in range(len(loc), -1, -1):
        if loc[:size] in source:
            return f"{source[loc[:size]]}: {_path(loc)}"
    for size in range(len(loc), -1, -1):
        if loc[:size] in document.lines:
            return f"{file}:{document.lines[loc[:size]]}: {_path(loc)}"
    return f"{file}: {_path(loc)}"


def _message(error: Any) -> str:
    kind, loc = error["type"], error["loc"]
    if kind == "extra_forbidden":
        return f"unknown key{did_you_mean(str(loc[-1]), _known_keys(loc))}"
    if kind == "missing":
        return "this key is required"
    if kind == "union_tag_invalid":
        tag = error["ctx"]["tag"]
        return f"unknown stage '{tag}'{did_you_mean(tag, list(STAGES))}"
    if kind == "union_tag_not_found":
        return f"the key 'stage' is required; it is one of {', '.join(STAGES)}"
    text = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    shown = f", not {given!r}" if not isinstance(given, dict | list | BaseModel) else ""
    return text[0].lower() + text[1:] + (shown if kind != "value_error" else "")


def _known_keys(loc: Loc) -> list[str]:
    """The keys that are allowed where `loc` has an unknown one."""
    model: Any = Recipe
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        if part in STAGES and model is Recipe:
            model = STAGES[str(part)]
        elif isinstance(part, str) and hasattr(model, "model_fields"):
            field = model.model_fields.get(part)
            model = _model_inside(field.annotation, model) if field else model
    return list(getattr(model, "model_fields", {}))


def _model_inside(annotation: Any, default: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [_model_inside(inner, None) for inner in getattr(annotation, "__args__", ())]
    models = [model for model in found if model is not None]
    return models[0] if len(models) == 1 else default


def did_you_mean(word: str, known: list[str]) -> str:
    """ "; did you mean 'x'?" for the nearest of `known`, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def _reference_problems(
    document: _Document, file: str, source: dict[Loc, str]
) -> Iterator[str]:  # fmt: skip
    """Stages that refer to what does not come before them, or to the wrong kind of stage.

    Works on the parsed YAML, so that these problems are reported beside all others."""
    stages = document.value.get("stages")
    named = [
        (index, stage, str(stage.get("name", STAGES[stage["stage"]].model_fields["name"].default)))
        for index, stage in enumerate(stages if isinstance(stages, list) else [])
        if isinstance(stage, dict) and str(stage.get("stage")) in STAGES
    ]
    before: dict[str, str] = {}
    for index, stage, name in named:
        at: Loc = ("stages", index)
        if name in before:
            where = _where((*at, "name"), document, file, source)
            yield f"{where}: two stages are called '{name}'"
        for key, kinds in REFERENCES.items():
            value = stage.get(key)
            if not isinstance(value, str):
                continue
            where = _where((*at, key), document, file, source)
            if value in before:
                if before[value] not in kinds:
                    yield f"{where}: '{value}' is a {before[value]} stage, not {' or '.join(kinds)}"
            elif not Path(value).exists():
                later = value in [other for i, _, other in named if i >= index]
                hint = "; it comes later" if later else did_you_mean(value, list(before))
                yield f"{where}: '{value}' is neither an earlier stage nor an existing path{hint}"
        before[name] = stage["stage"]


def stage_from_options(kind: str, options: dict[str, Any], overrides: list[str]) -> Any:
    """One stage from command-line options plus `key.path=value` pairs, checked like a recipe."""
    value: dict[str, Any] = {"stage": kind}
    value |= {key: given for key, given in options.items() if given is not None}
    source: dict[Loc, str] = {}
    wrapped = {"stages": [value]}
    for override in overrides:
        apply_override(wrapped, f"stages.0.{override}", source)
    adapter: TypeAdapter[Any] = TypeAdapter(STAGES[kind])
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        lines = []
        for e in error.errors():
            e["loc"] = ("stages", 0, kind, *e["loc"])
            lines.append(f"{_path(e['loc'][3:]) if e['loc'][3:] else kind}: {_message(e)}")
        raise UsageError("\n".join(lines)) from None
