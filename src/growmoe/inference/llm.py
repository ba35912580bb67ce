"""A model to ask: prompts in, texts out, all at once or as they become certain."""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import torch

from growmoe.errors import UsageError
from growmoe.inference.cuda_graph import runner_for
from growmoe.inference.engine import Engine, check_step
from growmoe.inference.loading import Form, Loaded, default_kv_dtype, free_on, kv_name, load
from growmoe.inference.paged import PagedCache
from growmoe.inference.requests import (
    Logprobs,
    Output,
    Request,
    RequestOutput,
    Sample,
    Sampling,
    Timing,
)  # fmt: skip
from growmoe.models.config import ModelConfig
from growmoe.models.footprint import Wanted, admit, parse_size
from growmoe.models.stored import serving_form
from growmoe.ops import native
from growmoe.recipe import GenerateStage

KV_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Prompt = str | list[int]


class LLM:
    """A MODEL directory with an engine around it.

    `form` is how weights are held; default: as the directory is quantised, else bfloat16.
    `kv_dtype` (default: float32 for form float32, else bfloat16) and `kv_gb` (default: most of
    the memory that the weights leave) say how keys and values are kept; memory is taken as it is
    used, and never more than `max_sequences` whole contexts need. A step computes at most
    `step_tokens` tokens of at most `max_sequences` texts. With `expert_memory` (bytes, or a text
    like 4G) at most so much of the routed experts is in memory, and the rest on disk. On `device`
    cuda, steps in which every text gets one token are CUDA graphs.

    Raises UsageError before a weight is read when that does not fit; `footprint` says what it
    takes, `load_report` how long loading took, `expert_statistics` how experts were found.
    """

    def __init__(
        self,
        path: Path | str | Loaded,
        form: Form | None = None,
        *,
        kv_dtype: str | None = None,
        kv_gb: float | None = None,
        max_sequences: int = 64,
        step_tokens: int = 512,
        prefix_reuse: bool = True,
        device: str = "cpu",
        expert_memory: int | str | None = None,
    ) -> None:
        if device not in ("cpu", "cuda"):
            raise UsageError(f"device '{device}' is not one of cpu, cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("device 'cuda' needs a GPU that torch can use; there is none, use cpu")
        if kv_dtype is not None and kv_dtype not in KV_DTYPES:
            raise UsageError(f"kv_dtype '{kv_dtype}' is not one of {', '.join(KV_DTYPES)}")
        check_step(max_sequences, step_tokens)
        if not isinstance(path, Loaded):
            form = serving_form(Path(path), form)
        default = path.kv_dtype if isinstance(path, Loaded) else default_kv_dtype(form)
        dtype = default if kv_dtype is None else KV_DTYPES[kv_dtype]
        wanted = Wanted(
            kv_dtype=kv_name(dtype), step_tokens=step_tokens, max_sequences=max_sequences,
            kv_gb=kv_gb, loaded=isinstance(path, Loaded), native=native.available(),
            form=(path.form if isinstance(path, Loaded) else form) or "bfloat16",
            expert_memory=None if expert_memory is None else parse_size(str(expert_memory)),
        )  # fmt: skip
        if isinstance(path, Loaded):
            for name, value in (("form", form), ("expert_memory", expert_memory)):
                if value is not None:
                    raise UsageError(f"{name} is for models that are loaded here")
            loaded = path
            found = admit(loaded.model.config, wanted, free_on(device), loaded.name)
        else:
            loaded = load(Path(path), form, wanted, device)
            assert loaded.footprint is not None
            found = loaded.footprint
        self.name, self.tokenizer = loaded.name, loaded.tokenizer
        self.config: ModelConfig = loaded.model.config
        self.footprint, self.load_report = found, loaded.report
        self._experts = loaded.experts
        blocks = found.kv_blocks
        try:
            # one block more than the engine knows of: padding rows of a GPU's steps live there
            cache = PagedCache(self.config, blocks + 1, dtype, device)
            self.engine = Engine(
                runner_for(loaded.model.to(device), cache), vocab_size=self.config.vocab_size,
                context=self.config.max_positions, blocks=blocks, tokenizer=loaded.tokenizer,
                ends=loaded.ends, max_sequences=max_sequences, step_tokens=step_tokens,
                prefix_reuse=prefix_reuse,
            )  # fmt: skip
        except BaseException:
            if loaded is not path:  # otherwise its experts are the caller's
                self.close()
            raise
        self._inbox: dict[int, deque[Output]] = {}

    @classmethod
    def of(cls, spec: GenerateStage) -> "LLM":
        """The model that a stage asks for."""
        return cls(
            spec.model, spec.weights, device=spec.device, kv_gb=spec.kv_gb,
            expert_memory=spec.expert_memory,
        )  # fmt: skip

    def serving(self) -> dict[str, object]:
        """For a JSON line: how long loading took, and how experts on disk were found."""
        report = self.load_report.report() if self.load_report else {}
        experts = self.expert_statistics()
        return {**report, **({"experts": experts} if experts else {})}

    def expert_statistics(self) -> dict[str, float] | None:
        """How often experts were found in memory, and what reading took; None where none is on
        disk."""
        return None if self._experts is None else self._experts.store.stats.report()

    def close(self) -> None:
        """Free the experts on disk now, not when this is garbage."""
        if self._experts is not None:
            self._experts.store.close()

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text; ids pass through."""
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise UsageError(f"{self.name} holds no tokenizer.json; give token ids, not text")
        return list(self.tokenizer.encode(prompt, add_special_tokens=False).ids)

    def check(self, prompt: Prompt, sampling: Sampling) -> None:
        """Raises UsageError when this can never be answered."""
        self.engine.check(Request(self.encode(prompt), sampling))

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling | list[Sampling] | None = None
    ) -> list[RequestOutput]:
        """Answer all prompts; `sampling` is for all, or one per prompt.

        A prompt that cannot be answered has an error in its output; the others are not touched.
        """
        each = _per_prompt(prompts, sampling)
        answers = [
            RequestOutput(prompt, [Sample(logprobs=_empty(one)) for _ in range(one.n)])
            for prompt, one in zip(prompts, each)
        ]
        for number, output in self.stream(prompts, each):
            _collect(answers[number], output)
        return answers

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling | list[Sampling] | None = None
    ) -> Generator[tuple[int, Output], None, None]:
        """(number of the prompt, what is new), as it becomes certain.

        Whoever stops listening (closes the iterator) ends the requests that are not finished.
        """
        numbers: dict[int, int] = {}
        try:
            for number, (prompt, one) in enumerate(zip(prompts, _per_prompt(prompts, sampling))):
                request = Request([], one)
                try:
                    request.prompt = self.encode(prompt)
                    numbers[self.engine.add(request)] = number
                except UsageError as error:
                    request.error = str(error)
                    for index in range(one.n):
                        yield number, Output(request, index, "", [], None, "error", request.error)
                else:
                    self._inbox[request.id] = deque()
            while numbers:
                for request_id, output in self._arrived(list(numbers)):
                    if output.request.finished and not self._inbox[request_id]:
                        self._inbox.pop(request_id)
                        yield numbers.pop(request_id), output
                    else:
                        yield numbers[request_id], output
        finally:
            for request_id in numbers:
                self.engine.abort(request_id)
                self._inbox.pop(request_id, None)

    def _arrived(self, wanted: list[int]) -> Iterator[tuple[int, Output]]:
        """Run a step, unless another stream's step has brought something for us already."""
        if not any(self._inbox[request_id] for request_id in wanted):
            for output in self.engine.step():
                if output.request.id in self._inbox:
                    self._inbox[output.request.id].append(output)
        for request_id in wanted:
            inbox = self._inbox[request_id]
            while inbox:
                yield request_id, inbox.popleft()


def _per_prompt(
    prompts: Sequence[Prompt], sampling: Sampling | list[Sampling] | None
) -> list[Sampling]:  # fmt: skip
    if not isinstance(sampling, list):
        return [sampling or Sampling()] * len(prompts)
    if len(sampling) != len(prompts):
        raise UsageError(f"{len(sampling)} samplings are given for {len(prompts)} prompts")
    return sampling


def _empty(sampling: Sampling) -> list[Logprobs] | None:
    return None if sampling.logprobs is None else []


def _collect(answer: RequestOutput, output: Output) -> None:
    """Add one output to the answer it belongs to."""
    request = output.request
    answer.samples[output.index].add(output)
    if output.finish_reason is None:
        return
    answer.error = output.error
    answer.prompt_tokens, answer.cached_tokens = len(request.prompt), request.cached_tokens
    answer.generated_tokens = request.generated_tokens
    if request.finished and request.started and request.first_token:
        times = (request.started, request.first_token, request.finished)
        answer.timing = Timing(*(moment - request.arrived for moment in times))
