"""The engine: many requests under way at once, a step at a time: schedule, run, postprocess.

Whatever goes wrong in a step, only the request that it belongs to fails, with its reason; all
others go on, and every block is accounted for.
"""

import math
import time
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from growmoe.errors import GrowmoeError, UsageError
from growmoe.inference.blocks import BLOCK, BlockPool
from growmoe.inference.detokenize import TextStream
from growmoe.inference.requests import FinishReason, Logprobs, Output, Request, Sequence
from growmoe.inference.runner import StepRunner
from growmoe.inference.sampling import choose, logprobs_of, peaks
from growmoe.inference.scheduler import Scheduler, Step


@dataclass(frozen=True)
class Stats:
    """What the engine is doing, and totals since it started."""

    running: int
    waiting: int
    """Queued sequences; samples that wait for the first one of their request are not counted."""
    blocks: int
    blocks_used: int
    blocks_cached: int
    step_tokens: int
    """Tokens in the last step."""
    step_sequences: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    failures: int
    """Calls of the model that raised."""


def check_step(max_sequences: int, step_tokens: int) -> None:
    """Raises UsageError for a step without room for texts, or for prompts beside them."""
    if max_sequences < 1:
        raise UsageError(f"max_sequences must be at least 1, not {max_sequences}")
    if step_tokens <= max_sequences:
        raise UsageError(
            f"step_tokens ({step_tokens}) must be more than max_sequences ({max_sequences}), "
            "or prompts would have no room beside the texts under way"
        )


class Engine:
    """Runs requests through a runner with `blocks` blocks of keys and values.

    `context` is the most tokens that prompt and answer may have, `ends` the tokens that end a text.
    Without a tokenizer outputs carry no text.
    """

    def __init__(
        self,
        runner: StepRunner,
        *,
        vocab_size: int,
        context: int,
        blocks: int,
        tokenizer: Tokenizer | None = None,
        ends: frozenset[int] = frozenset(),
        max_sequences: int = 64,
        step_tokens: int = 512,
        prefix_reuse: bool = True,
    ) -> None:
        check_step(max_sequences, step_tokens)
        if blocks < 1:
            raise UsageError(f"blocks must be at least 1, not {blocks}")
        self.runner, self.tokenizer, self.ends = runner, tokenizer, ends
        self.vocab_size, self.context = vocab_size, context
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(self.pool, max_sequences, step_tokens, prefix_reuse)
        self.requests: dict[int, Request] = {}
        """Those that are not finished."""
        self._next_id = 0
        self._outputs: list[Output] = []
        self._steps = self._step_tokens = self._step_sequences = 0
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = self._failures = 0

    # ---- what others call ----

    def check(self, request: Request) -> None:
        """Raises UsageError, in one sentence, for a request that can never be served."""
        prompt, room = request.prompt, self.pool.total * BLOCK
        if not prompt:
            raise UsageError("the prompt is empty")
        for token in (*prompt, *request.sampling.stop_token_ids):
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise UsageError(
                    f"token {token} is outside the model's vocabulary of {self.vocab_size}"
                )
        if len(prompt) >= self.context:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens; the model's context is {self.context}"
            )
        if len(prompt) >= room:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens; the whole KV cache holds {room}, "
                "so give it more memory"
            )
        if request.sampling.stop and self.tokenizer is None:
            raise UsageError("stop strings need a tokenizer, and the model has none")

    def add(self, request: Request) -> int:
        """Queue a request; returns its id. Raises UsageError as `check`."""
        self.check(request)
        request.id, self._next_id = self._next_id, self._next_id + 1
        sampling = request.sampling
        request.samples = [Sequence(request, i, self.vocab_size) for i in range(sampling.n)]
        if self.tokenizer is not None:
            for sample in request.samples:
                sample.text = TextStream(self.tokenizer, sampling.stop)
        self.requests[request.id] = request
        self.scheduler.wait(request.samples[0])
        return request.id

    def abort(self, request_id: int, index: int | None = None) -> bool:
        """End a request, or only its sample `index`; the next step tells. False when there is
        nothing to end."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        found = [
            sample for sample in request.samples
            if sample.state != "finished" and index in (None, sample.index)
        ]  # fmt: skip
        for sample in found:
            self._finish(sample, "abort", sample.text.finish() if sample.text else "")
        return bool(found)

    def has_work(self) -> bool:
        """Whether a step would do or tell something."""
        return bool(self.requests or self._outputs)

    def step(self) -> list[Output]:
        """Run one step; what it adds to each sample, one output per new token."""
        step = self.scheduler.schedule()
        if step.spans:
            self._steps += 1
            self._step_tokens, self._step_sequences = step.size, len(step.spans)
            self._note_start(step)
            if self._attempt(step):
                self.scheduler.calm()
        outputs, self._outputs = self._outputs, []
        return outputs

    def stats(self) -> Stats:
        """Counts of this moment and since the start."""
        return Stats(
            running=len(self.scheduler.running), waiting=len(self.scheduler.waiting),
            blocks=self.pool.total, blocks_used=self.pool.used, blocks_cached=self.pool.cached,
            step_tokens=self._step_tokens, step_sequences=self._step_sequences,
            steps=self._steps, prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens, generated_tokens=self._generated_tokens,
            preemptions=self.scheduler.preemptions, failures=self._failures,
        )  # fmt: skip

    # ---- run ----

    def _note_start(self, step: Step) -> None:
        for sequence in step.sequences:
            request = sequence.request
            if request.started is None:
                request.started = time.perf_counter()
                self._prompt_tokens += len(request.prompt)
                self._cached_tokens += request.cached_tokens

    def _attempt(self, step: Step) -> bool:
        """Run the step and use what it gives; True when it ran as planned.

        A step of several sequences that fails is run again in parts, so that only the guilty one
        fails: in halves when memory ran out, else one by one. Nothing counts as computed before it
        succeeded, so parts write the same keys and values again.
        """
        reason, memory = "", False
        try:
            logits_SV = self.runner.run(step)
            best, likeliest = peaks(logits_SV)
            if any(sequence.needs_logits for sequence in step.sequences):
                logits_SV = logits_SV.cpu()
        except Exception as error:
            memory = _out_of_memory(error)
            reason = _sentence(error, "even with this request alone in a step")
        if not reason:
            self._postprocess(step, logits_SV, best, likeliest)
            return True
        # here the error is forgotten, and with it all tensors that its frames held
        self._failures += 1
        if memory:
            self.scheduler.lower(step.size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        several = len(step.spans)
        if several > 1:
            for part in step.parts((several + 1) // 2 if memory else 1):
                part = part.alive()
                if part.spans:
                    self._attempt(part)
        elif memory and step.spans[0].count > 1:
            half = Step()
            half.add(step.sequences[0], step.spans[0].count // 2)
            self._attempt(half)
        else:
            self._fail(step.sequences[0].request, reason)
        return False

    # ---- postprocess ----

    def _postprocess(
        self, step: Step, logits_SV: Tensor, best: list[float], likeliest: list[int]
    ) -> None:
        for row, (sequence, span) in enumerate(zip(step.sequences, step.spans)):
            if sequence.state != "running":
                continue  # its request failed a moment ago, in another sample
            if not math.isfinite(best[row]):
                self._fail(
                    sequence.request,
                    f"the model gives logits that are not finite at position "
                    f"{span.start + span.count - 1}; its weights or its numeric form are at fault",
                )
                continue
            self.scheduler.advance(sequence, span.count)
            if sequence.computed < len(sequence.tokens):
                continue
            try:
                self._take(sequence, logits_SV[row], likeliest[row])
            except Exception as error:
                self._fail(sequence.request, _sentence(error, "when its next token was chosen"))

    def _take(self, sequence: Sequence, logits_V: Tensor, likeliest: int) -> None:
        """The next token of `sequence`; the first one also of the samples that waited for it."""
        request = sequence.request
        if request.first_token is None:
            request.first_token = time.perf_counter()
            siblings = [sample for sample in request.samples if sample.state == "held"]
            for sibling in siblings:
                copied = self.scheduler.fork(sequence, sibling)
                if copied is not None:
                    self.runner.copy(*copied)
            for sibling in siblings:
                self._append(sibling, logits_V, likeliest)
        self._append(sequence, logits_V, likeliest)

    def _append(self, sequence: Sequence, logits_V: Tensor, likeliest: int) -> None:
        sampling, stream = sequence.request.sampling, sequence.text
        token = likeliest
        if not sampling.greedy or sequence.seen_V is not None:
            token = choose(logits_V, sampling, sequence.rng, sequence.seen_V)
        logprobs = None
        if sampling.logprobs is not None:
            logprobs = logprobs_of(logits_V, token, sampling.logprobs)
        sequence.tokens.append(token)
        self._generated_tokens += 1
        if sequence.seen_V is not None:
            sequence.seen_V[token] = True
        reason: FinishReason | None = None
        text = ""
        ended = not sampling.ignore_eos and token in self.ends
        if ended or token in sampling.stop_token_ids:
            reason = "stop"
        else:
            text = stream.push(token) if stream is not None else ""
            if stream is not None and stream.stopped:
                reason = "stop"
            elif sequence.generated >= sampling.max_tokens or self._full(sequence):
                reason = "length"
        if reason is None:
            self._outputs.append(Output(sequence.request, sequence.index, text, [token], logprobs))
            return
        if stream is not None and not stream.stopped:
            text += stream.finish()
            reason = "stop" if stream.stopped else reason
        self._finish(sequence, reason, text, [token], logprobs)

    def _full(self, sequence: Sequence) -> bool:
        """Whether the context, or the whole cache, has no room for one token more."""
        return len(sequence.tokens) >= min(self.context, self.pool.total * BLOCK)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        text: str = "",
        token_ids: list[int] | None = None,
        logprobs: Logprobs | None = None,
    ) -> None:
        request = sequence.request
        self.scheduler.finish(sequence, trusted=reason != "error")
        sequence.finish_reason = reason
        self._outputs.append(
            Output(
                request, sequence.index, text, token_ids or [], logprobs, reason, request.error
            )
        )  # fmt: skip
        left = [sample for sample in request.samples if sample.state != "finished"]
        if not left:
            request.finished = time.perf_counter()
            del self.requests[request.id]
        elif reason != "error" and all(sample.state == "held" for sample in left):
            self.scheduler.wait(left[0])  # the one that computed the prompt for them is gone

    def _fail(self, request: Request, reason: str) -> None:
        """End all samples of a request; nothing that they computed is used again."""
        request.error = reason
        for sample in request.samples:
            if sample.state != "finished":
                self._finish(sample, "error")


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _sentence(error: Exception, when: str) -> str:
    if _out_of_memory(error):
        return f"out of memory, {when}"
    if isinstance(error, GrowmoeError):  # a sentence for readers already
        return str(error)
    detail = str(error).splitlines()[0] if str(error) else "no message"
    return f"{type(error).__name__}: {detail}"
