"""What is asked of the engine and what it answers: sampling options, requests, outputs."""

import dataclasses
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from growmoe.errors import UsageError
from growmoe.recipe import GenerateStage

if TYPE_CHECKING:
    from growmoe.inference.detokenize import TextStream

FinishReason = Literal["stop", "length", "abort", "error"]
State = Literal["held", "waiting", "running", "finished"]
GREEDY_BELOW = 1e-5
MOST_LOGPROBS = 100


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when a text ends. Raises UsageError for impossible values.

    Order: repetition penalty (on tokens of prompt and answer), temperature, top-k, top-p (of what
    top-k left), min-p. The same seed gives the same tokens, whatever else is in the batch.
    """

    max_tokens: int = 128
    temperature: float = 0.8
    """Below 1e-5 (so also 0) the likeliest token is taken."""
    top_p: float = 0.95
    seed: int = 0
    """Sample number i of a prompt draws from a generator of its own, seeded with seed + i."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 leaves this out."""
    min_p: float = 0.0
    """Only tokens at least this likely, relative to the likeliest."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens seen are divided by it, negative ones multiplied."""
    n: int = 1
    """Samples per prompt; the prompt is computed once."""
    stop: tuple[str, ...] = ()
    """The text ends before the one of these strings that is complete first."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """For every token its log-probability, and those of this many likeliest tokens: the log-softmax
    of the raw logits, before penalty and temperature."""

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("max_tokens", "n"):
            _whole(name, getattr(self, name), 1)
        for name in ("seed", "top_k"):
            _whole(name, getattr(self, name), 0)
        if self.seed >= 2**63:
            raise UsageError(f"seed must be below 2**63, not {self.seed}")
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0)
            if self.logprobs > MOST_LOGPROBS:
                raise UsageError(f"logprobs must be at most {MOST_LOGPROBS}, not {self.logprobs}")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(f"{name} must be a number, not {value!r}")
            if not math.isfinite(value):
                raise UsageError(f"{name} must be finite, not {value}")
        if self.temperature < 0:
            raise UsageError(f"temperature must not be negative, but is {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p must be between 0 and 1, not {self.min_p}")
        if not 0.01 <= self.repetition_penalty <= 100:  # far beyond, logits would overflow
            raise UsageError(
                f"repetition_penalty must be between 0.01 and 100, not {self.repetition_penalty}"
            )
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) for s in self.stop):
            raise UsageError(f"stop must be a tuple of strings, not {self.stop!r}")
        if "" in self.stop:
            raise UsageError("a stop string is empty, which would end every text at once")
        if not isinstance(self.stop_token_ids, tuple):
            raise UsageError(f"stop_token_ids must be a tuple, not {self.stop_token_ids!r}")
        for token in self.stop_token_ids:
            _whole("a stop token id", token, 0)

    @classmethod
    def of(cls, spec: GenerateStage) -> "Sampling":
        """What a stage says about sampling."""
        names = {field.name for field in dataclasses.fields(cls)} & set(type(spec).model_fields)
        values = {name: getattr(spec, name) for name in names}
        return cls(**{**values, "stop": tuple(spec.stop)})

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < GREEDY_BELOW


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise UsageError(f"{name} must be at least {least}, not {value}")


@dataclass(frozen=True)
class Logprobs:
    """Log-probability of one generated token, and (token, log-probability) of the likeliest."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Sequence:
    """One sample of a request: its tokens, and where their keys and values lie."""

    __slots__ = (
        "computed", "digests", "finish_reason", "index", "indexed", "prompt_tokens", "request",
        "rng", "seen_V", "state", "table", "text", "tokens",
    )  # fmt: skip

    def __init__(self, request: "Request", index: int, vocab_size: int) -> None:
        self.request, self.index = request, index
        self.tokens = list(request.prompt)
        """Prompt and answer; the engine appends in place."""
        self.prompt_tokens = len(self.tokens)
        self.state: State = "held"
        """held: waits for the first sample of its request to compute the prompt."""
        self.computed = 0
        """Tokens whose keys and values are in the cache."""
        self.table: list[int] = []
        """The blocks that hold them."""
        self.digests: list[bytes] = []
        """Of full blocks, each of it and all before it; stays valid through preemption."""
        self.indexed = 0
        """Blocks of the table that the pool knows by digest, or need not know."""
        self.finish_reason: FinishReason | None = None
        self.text: TextStream | None = None
        sampling = request.sampling
        self.rng: torch.Generator | None = None
        if not sampling.greedy:
            self.rng = torch.Generator().manual_seed(sampling.seed + index)
        self.seen_V: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.seen_V = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen_V[request.prompt] = True

    @property
    def order(self) -> tuple[int, int]:
        """Older requests first."""
        return self.request.id, self.index

    @property
    def needs_logits(self) -> bool:
        """Whether the likeliest token alone is not enough."""
        sampling = self.request.sampling
        return not sampling.greedy or self.seen_V is not None or sampling.logprobs is not None

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_tokens


@dataclass(eq=False)
class Request:
    """A prompt, what to do with it, and what became of it. Times are of time.perf_counter."""

    prompt: list[int]
    sampling: Sampling = Sampling()
    id: int = -1
    """Given by the engine, counting up."""
    samples: list[Sequence] = field(default_factory=list)
    cached_tokens: int = 0
    """Prompt tokens that were found in the cache when the request was first admitted."""
    error: str | None = None
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    """When it was first part of a step."""
    first_token: float | None = None
    finished: float | None = None

    @property
    def generated_tokens(self) -> int:
        """Over all samples."""
        return sum(sample.generated for sample in self.samples)


@dataclass(slots=True)
class Output:
    """What one step adds to one sample: a token, a piece of text (maybe empty, while more is needed
    to be certain), and at the end why it ended."""

    request: Request
    index: int
    text: str
    token_ids: list[int]
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass
class Sample:
    """One finished answer. `token_ids` are all tokens generated, the one that ended it included;
    `text` leaves out special tokens, the stop token and the stop string."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] | None = None
    finish_reason: FinishReason | None = None

    def add(self, output: Output) -> None:
        """What one step brought."""
        self.text += output.text
        self.token_ids += output.token_ids
        if output.logprobs is not None and self.logprobs is not None:
            self.logprobs.append(output.logprobs)
        self.finish_reason = output.finish_reason


@dataclass(frozen=True)
class Timing:
    """Seconds from a request's arrival: to its first step, its first token, its end."""

    started: float
    first_token: float
    total: float


@dataclass
class RequestOutput:
    """The answers to one prompt. `text`, `token_ids`, `logprobs` and `finish_reason` are those of
    the first sample."""

    prompt: str | list[int]
    samples: list[Sample]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    error: str | None = None
    timing: Timing | None = None
    """None when the request was refused or never computed a token."""

    @property
    def text(self) -> str:
        """Of the first sample."""
        return self.samples[0].text

    @property
    def token_ids(self) -> list[int]:
        """Of the first sample."""
        return self.samples[0].token_ids

    @property
    def logprobs(self) -> list[Logprobs] | None:
        """Of the first sample."""
        return self.samples[0].logprobs

    @property
    def finish_reason(self) -> FinishReason | None:
        """Of the first sample."""
        return self.samples[0].finish_reason
