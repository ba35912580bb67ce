"""What goes wrong hits only whom it belongs to, and no block is ever lost.

Most of it on a runner that has no model: the next token is a function of the tokens that it reads
back from the blocks, so a block that is shared, evicted or copied wrongly changes the answer.
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from growmoe.errors import GrowmoeError, UsageError
from growmoe.inference.blocks import BLOCK, blocks_for
from growmoe.inference.engine import Engine
from growmoe.inference.requests import Output, Request, Sampling
from growmoe.inference.sampling import choose
from growmoe.inference.scheduler import RECOVERY_STEPS, Step
from test_engine import float64, llm, plain

VOCAB = 40
CONTEXT = 90
END = 39
ROWS = torch.randn(101, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


def next_logits(tokens: list[int]) -> Tensor:
    return ROWS[hash(tuple(tokens)) % len(ROWS)]


class Fake:
    """Blocks of token ids in place of keys and values; `trouble` may raise, or spoil a row."""

    def __init__(self, blocks: int) -> None:
        self.memory: list[list[int | None]] = [[None] * BLOCK for _ in range(blocks)]
        self.trouble: Callable[[Step], None] = lambda step: None
        self.spoilt: Callable[[list[int]], bool] = lambda tokens: False
        self.computed = 0
        self.complaints: list[str] = []

    def run(self, step: Step) -> Tensor:
        self.computed += step.size
        for sequence, span in zip(step.sequences, step.spans):
            if sequence.state != "running" or sequence.table is not span.table:
                self.complaints.append("a sequence that does not run is in a step")
            if span.count < 1 or span.start != sequence.computed:
                self.complaints.append("a span is not what comes next")
        new = iter(step.tokens())
        rows = []
        for span in step.spans:
            end = span.start + span.count
            for place in range(span.start, end):
                self.memory[span.table[place // BLOCK]][place % BLOCK] = next(new)
            held: list[Any] = []
            for block in span.table[: blocks_for(end)]:
                held += self.memory[block]
            row = next_logits(held[:end])
            rows.append(row * torch.nan if self.spoilt(held[:end]) else row)
        self.trouble(step)  # after the writing: half a step may have been written
        return torch.stack(rows)

    def copy(self, source: int, target: int) -> None:
        self.memory[target] = list(self.memory[source])


def engine_of(blocks: int, **options: Any) -> tuple[Engine, Fake]:
    fake = Fake(blocks)
    defaults = {"max_sequences": 4, "step_tokens": 30, "ends": frozenset([END])}
    return (
        Engine(fake, vocab_size=VOCAB, context=CONTEXT, blocks=blocks, **{**defaults, **options}),
        fake,
    )


def expected(request: Request, index: int, ends: frozenset[int] = frozenset([END])) -> list[int]:
    """The answer to a request that is alone in the world."""
    sampling, tokens, found = request.sampling, list(request.prompt), []
    rng = torch.Generator().manual_seed(sampling.seed + index)
    while len(found) < sampling.max_tokens and len(tokens) < CONTEXT:
        seen = torch.zeros(VOCAB, dtype=torch.bool)
        seen[tokens] = True
        if sampling.repetition_penalty == 1:
            seen = None
        found.append(choose(next_logits(tokens), sampling, rng, seen))
        tokens.append(found[-1])
        if found[-1] in ends and not sampling.ignore_eos:
            break
    return found


def check_blocks(engine: Engine) -> None:
    """Free, cached and held blocks are all blocks; holders are those who hold."""
    pool, scheduler = engine.pool, engine.scheduler
    assert not getattr(engine.runner, "complaints", [])
    held = Counter(block for sequence in scheduler.running for block in sequence.table)
    assert pool.holders == [held[block] for block in range(pool.total)]
    free, cached = list(pool._free), list(pool._cached)
    assert sorted([*free, *cached, *held]) == list(range(pool.total))
    assert (pool.free, pool.cached, pool.used) == (len(free), len(cached), len(held))
    assert {block: digest for digest, block in pool._block_of.items()} == pool._digest_of
    assert not set(free) & set(pool._digest_of)
    assert set(cached) <= set(pool._digest_of)
    for request in engine.requests.values():
        for sample in request.samples:
            assert sample.state in ("held", "waiting", "running", "finished")
            assert (sample in scheduler.running) == (sample.state == "running")
            assert (sample in scheduler.waiting) == (sample.state == "waiting")
            if sample.state == "running":
                assert len(sample.table) == blocks_for(len(sample.table) * BLOCK)
                assert sample.computed <= len(sample.table) * BLOCK
            else:
                assert sample.table == []
    for name in ("running", "waiting"):
        orders = [sequence.order for sequence in getattr(scheduler, name)]
        assert orders == sorted(orders)


def drain(engine: Engine, limit: int = 2000) -> list[Output]:
    found: list[Output] = []
    while engine.has_work():
        found += engine.step()
        check_blocks(engine)
        limit -= 1
        assert limit, "the engine does not come to an end"
    assert engine.pool.used == 0
    return found


def tokens_of(outputs: list[Output], request: Request, index: int = 0) -> list[int]:
    own = [o for o in outputs if o.request is request and o.index == index]
    assert [o.finish_reason is not None for o in own] == [False] * (len(own) - 1) + [True]
    return [token for output in own for token in output.token_ids]


def reason_of(outputs: list[Output], request: Request, index: int = 0) -> str | None:
    return [o.finish_reason for o in outputs if o.request is request and o.index == index][-1]


GREEDY = Sampling(max_tokens=12, temperature=0, ignore_eos=True)


def prompt_of(length: int, first: int = 1) -> list[int]:
    return [(first + i) % (VOCAB - 1) for i in range(length)]


# ---- random schedules ----


class Storm:
    """Random arrivals, aborts, faults and memory limits on a small pool, by one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        blocks = self.random.choice([6, 7, 9, 20])
        self.engine, self.fake = engine_of(
            blocks,
            max_sequences=self.random.choice([1, 4, 7]),
            step_tokens=self.random.choice([8, 20, 64]),
            prefix_reuse=self.random.random() < 0.8,
        )
        self.fake.trouble, self.fake.spoilt = self.trouble, self.spoilt
        self.outputs: list[Output] = []
        self.requests: list[Request] = []
        self.aborted: set[tuple[int, int]] = set()
        self.limit = 10**9
        self.hurry = self.random.choice([0.1, 0.5, 0.9])
        self.starts = [prompt_of(length, first) for length, first in ((40, 3), (33, 7))]
        self.steps = 0

    # tokens 0 and 1 of a prompt are reserved: they make the request a guilty one
    def spoilt(self, tokens: list[int]) -> bool:
        return tokens[0] == 0 and len(tokens) > tokens[1] + 30

    def trouble(self, step: Step) -> None:
        if step.size > self.limit:
            raise RuntimeError(NO_MEMORY)
        for sequence, span in zip(step.sequences, step.spans):
            if sequence.tokens[0] == 1 and span.start + span.count > sequence.tokens[1] + 30:
                raise KeyError("a guilty request")
        if self.random.random() < 0.01:
            self.limit = self.random.choice([1, 5, 12])

    def arrive(self) -> None:
        kind = self.random.random()
        if kind < 0.06:
            prompt = [self.random.choice([0, 1]), self.random.randrange(25), *prompt_of(20)]
        elif kind < 0.6:
            prompt = [2, *self.random.choice(self.starts)[: self.random.randrange(1, 41)]]
            prompt += [self.random.randrange(3, 39) for _ in range(self.random.randrange(4))]
        else:
            prompt = [self.random.randrange(3, 39) for _ in range(self.random.randrange(1, 60))]
        sampling = Sampling(
            max_tokens=self.random.randrange(1, 30),
            temperature=self.random.choice([0, 0, 1.0]),
            repetition_penalty=self.random.choice([1.0, 1.0, 1.3]),
            n=self.random.choice([1, 1, 1, 3]),
            seed=self.random.randrange(1000),
            ignore_eos=self.random.random() < 0.5,
        )
        request = Request(prompt, sampling)
        try:
            self.engine.add(request)
        except UsageError:
            assert len(prompt) >= min(CONTEXT, self.engine.pool.total * BLOCK)
        else:
            self.requests.append(request)

    def abort(self) -> None:
        request = self.random.choice(self.requests)
        index = self.random.choice([None, 0, request.sampling.n - 1])
        live = {s.index for s in request.samples if s.state != "finished"}
        hit = live if index is None else live & {index}
        assert self.engine.abort(request.id, index) == bool(hit)
        self.aborted |= {(request.id, i) for i in hit}
        check_blocks(self.engine)

    def run(self, arrivals: int) -> None:
        while arrivals or self.engine.has_work():
            if arrivals and self.random.random() < self.hurry:
                self.arrive()
                arrivals -= 1
            if self.requests and self.random.random() < 0.03:
                self.abort()
            if self.random.random() < 0.05:
                self.limit = 10**9
            self.outputs += self.engine.step()
            self.steps += 1
            check_blocks(self.engine)
            assert self.steps < 100_000
        assert self.engine.pool.used == 0
        self.compare()

    def compare(self) -> None:
        room = min(CONTEXT, self.engine.pool.total * BLOCK)
        for request in self.requests:
            guilty = request.prompt[0] in (0, 1)
            for index in range(request.sampling.n):
                found = tokens_of(self.outputs, request, index)
                reason = reason_of(self.outputs, request, index)
                right = expected(request, index)[: room - len(request.prompt)]
                if (request.id, index) in self.aborted:
                    assert (reason, found) == ("abort", right[: len(found)])
                elif reason == "error":
                    assert guilty
                    assert request.error
                    assert found == right[: len(found)]
                else:
                    assert (reason in ("stop", "length"), found) == (True, right)
                    assert guilty or request.error is None


def test_ten_thousand_random_steps() -> None:
    steps, stats, errors = 0, [], 0
    seed = 0
    while steps < 10_000:
        storm = Storm(seed)
        storm.run(60)
        seed += 1
        stats.append(storm.engine.stats())
        steps += stats[-1].steps
        errors += sum(request.error is not None for request in storm.requests)
    # the storms were storms
    assert sum(s.preemptions for s in stats) > 100
    assert sum(s.failures for s in stats) > 100
    assert sum(s.cached_tokens for s in stats) > 1000
    assert errors > 10


def test_random_steps_of_a_model() -> None:
    """The same with a real model in float64: arrivals, aborts, preemption, shared beginnings."""
    model = float64()
    rng = random.Random(5)
    big = llm(model, blocks=9, max_sequences=4, step_tokens=19)
    engine, outputs, requests, aborted = big.engine, [], [], set()
    for _ in range(300):
        if rng.random() < 0.15:
            prompt = [*range(rng.randrange(1, 50)), *(rng.randrange(97) for _ in range(3))]
            request = Request(prompt, Sampling(rng.randrange(1, 25), temperature=0, n=2))
            engine.add(request)
            requests.append(request)
        if requests and rng.random() < 0.03 and engine.abort(rng.choice(requests).id, 0):
            aborted |= {r.id for r in requests if r.samples[0].finish_reason == "abort"}
        outputs += engine.step()
        check_blocks(engine)
    outputs += drain(engine)
    assert engine.stats().preemptions > 0
    assert engine.stats().cached_tokens > 0
    for request in requests:
        right = [token for token, _ in plain(model, request.prompt, request.sampling.max_tokens)]
        for index in (0, 1):
            found = tokens_of(outputs, request, index)
            cut = len(found) if index == 0 and request.id in aborted else None
            assert found == right[:cut]


# ---- one fault at a time ----


def test_memory_that_runs_out_in_a_batch_makes_smaller_batches() -> None:
    engine, fake = engine_of(24, step_tokens=60)
    requests = [Request(prompt_of(20, first), GREEDY) for first in (1, 5, 9)]
    for request in requests:
        engine.add(request)
    sizes = []

    def trouble(step: Step) -> None:
        sizes.append(step.size)
        if step.size > 7:
            raise RuntimeError(NO_MEMORY)

    fake.trouble = trouble
    outputs = drain(engine)
    for request in requests:
        assert tokens_of(outputs, request) == expected(request, 0, frozenset())
    assert sizes[0] == 60
    assert sum(size > 7 for size in sizes) < 20  # it learns: later steps are planned smaller
    fake.trouble = lambda step: sizes.append(step.size)
    engine.add(Request(prompt_of(8), dataclasses.replace(GREEDY, max_tokens=5 * RECOVERY_STEPS)))
    drain(engine)
    engine.add(Request(prompt_of(59, 11), GREEDY))
    drain(engine)
    assert 59 in sizes  # and recovers when the trouble is over


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError(NO_MEMORY), torch.OutOfMemoryError("CUDA out of memory")],
    ids=["python", "torch-cpu", "torch-gpu"],
)
def test_a_request_that_never_fits_memory_fails_alone(error: Exception) -> None:
    engine, fake = engine_of(24)
    good, bad, late = (Request(prompt_of(20, first), GREEDY) for first in (1, 5, 9))

    def trouble(step: Step) -> None:
        if any(sequence.request is bad for sequence in step.sequences):
            raise error

    fake.trouble = trouble
    for request in (good, bad, late):
        engine.add(request)
    outputs = drain(engine)
    for request in (good, late):
        assert tokens_of(outputs, request) == expected(request, 0, frozenset())
    assert reason_of(outputs, bad) == "error"
    assert bad.error == "out of memory, even with this request alone in a step"


def test_an_exception_fails_only_the_guilty_one() -> None:
    engine, fake = engine_of(24)
    good, bad = Request(prompt_of(20), GREEDY), Request(prompt_of(20, 5), GREEDY)

    def trouble(step: Step) -> None:
        if any(s.request is bad and s.generated == 4 for s in step.sequences):
            raise ValueError("an odd request\nand more lines")

    fake.trouble = trouble
    engine.add(bad)
    engine.add(good)
    outputs = drain(engine)
    assert tokens_of(outputs, good) == expected(good, 0, frozenset())
    assert tokens_of(outputs, bad) == expected(bad, 0, frozenset())[:4]
    assert bad.error == "ValueError: an odd request"
    assert outputs[[o.request for o in outputs].index(bad)].error is None


def test_a_sentence_for_readers_is_the_reason_as_it_is() -> None:
    engine, fake = engine_of(24)
    request = Request(prompt_of(9), GREEDY)

    def trouble(step: Step) -> None:
        raise GrowmoeError("expert 3 of layer 1 cannot be read")

    fake.trouble = trouble
    engine.add(request)
    drain(engine)
    assert request.error == "expert 3 of layer 1 cannot be read"


def test_logits_that_are_not_finite_fail_their_own_request() -> None:
    engine, fake = engine_of(24)
    bad = Request(prompt_of(20, 5), dataclasses.replace(GREEDY, n=2))
    good = Request(prompt_of(20), GREEDY)
    fake.spoilt = lambda tokens: tokens[0] == 5 and len(tokens) > 25
    engine.add(bad)
    engine.add(good)
    outputs = drain(engine)
    assert tokens_of(outputs, good) == expected(good, 0, frozenset())
    for index in (0, 1):
        assert reason_of(outputs, bad, index) == "error"
        assert tokens_of(outputs, bad, index) == expected(bad, 0, frozenset())[:6]
    assert "not finite at position 25" in str(bad.error)


def test_an_exception_in_choosing_fails_only_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def picky(logits_V: Tensor, sampling: Sampling, *rest: Any) -> int:
        if sampling.seed == 7:
            raise MemoryError
        return choose(logits_V, sampling, *rest)

    monkeypatch.setattr("growmoe.inference.engine.choose", picky)
    engine, _ = engine_of(24)
    bad, good = (Request(prompt_of(9), Sampling(9, 1.0, seed=seed, n=2)) for seed in (7, 8))
    engine.add(bad)
    engine.add(good)
    outputs = drain(engine)
    assert bad.error == "out of memory, when its next token was chosen"
    assert [tokens_of(outputs, good, i) for i in (0, 1)] == [expected(good, i) for i in (0, 1)]


def test_the_same_tokens_after_others_are_another_block() -> None:
    engine, fake = engine_of(24)
    same = prompt_of(16, 20)
    first, second = (Request(prompt_of(16, start) + same + [1], GREEDY) for start in (1, 2))
    for request in (first, second):
        engine.add(request)
        assert tokens_of(drain(engine), request) == expected(request, 0, frozenset())
        assert request.cached_tokens == 0
    again = Request(first.prompt, GREEDY)
    engine.add(again)
    before = fake.computed
    assert tokens_of(drain(engine), again) == expected(first, 0, frozenset())
    assert again.cached_tokens == 32
    assert fake.computed - before == 1 + GREEDY.max_tokens - 1


def test_idle_blocks_go_oldest_first_and_ends_before_beginnings() -> None:
    engine, _ = engine_of(6)
    quick = dataclasses.replace(GREEDY, max_tokens=1)
    old, young = (Request(prompt_of(47, first), quick) for first in (1, 9))
    for request in (old, young, Request(prompt_of(47, 20), quick)):
        engine.add(request)  # the last one finds two free blocks and takes one of `old`
        drain(engine)
    again = [Request(request.prompt, quick) for request in (young, old)]
    for request in again:
        engine.add(request)
        drain(engine)
    assert [request.cached_tokens for request in again] == [32, 16]


def test_samples_share_the_prompt_that_is_computed_once() -> None:
    engine, fake = engine_of(24)
    request = Request(prompt_of(40), Sampling(8, temperature=1.0, n=4, seed=3, ignore_eos=True))
    engine.add(request)
    outputs = [*engine.step(), *engine.step()]
    assert len(outputs) == 4
    # two full blocks for all of them, and a last one each
    assert engine.stats().blocks_used == 2 + 4
    outputs += drain(engine)
    assert fake.computed == 40 + 4 * 7
    answers = [tokens_of(outputs, request, index) for index in range(4)]
    assert answers == [expected(request, index, frozenset()) for index in range(4)]
    assert len({tuple(answer) for answer in answers}) == 4
    alone = Request(prompt_of(40), Sampling(8, temperature=1.0, seed=5, ignore_eos=True))
    engine.add(alone)
    assert tokens_of(drain(engine), alone) == answers[2]  # seed + index


def test_prefix_reuse_can_be_left_out() -> None:
    engine, fake = engine_of(24, prefix_reuse=False)
    for _ in range(2):
        request = Request(prompt_of(40), dataclasses.replace(GREEDY, max_tokens=1))
        engine.add(request)
        drain(engine)
        assert request.cached_tokens == 0
    assert fake.computed == 80
    assert engine.stats().blocks_cached == 0


def test_texts_under_way_come_before_prompts_and_prompts_in_order() -> None:
    engine, _ = engine_of(24, max_sequences=3, step_tokens=10)
    requests = [Request(prompt_of(15, first), GREEDY) for first in (1, 5, 9, 13)]
    for request in requests:
        engine.add(request)
    sizes = []
    for _ in range(4):
        engine.step()
        running = engine.scheduler.running
        sizes.append([(s.request.id, s.computed) for s in running])
    assert sizes == [
        [(0, 10)],
        [(0, 15), (1, 5)],
        [(0, 16), (1, 14)],
        [(0, 17), (1, 15), (2, 8)],
    ]
    assert engine.stats().waiting == 1
    assert requests[3].started is None


def test_a_keyboard_interrupt_leaves_the_engine_whole() -> None:
    engine, fake = engine_of(24)
    request = Request(prompt_of(20), GREEDY)
    engine.add(request)
    outputs = engine.step()

    def stop(step: Step) -> None:
        raise KeyboardInterrupt

    fake.trouble = stop
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    check_blocks(engine)
    fake.trouble = lambda step: None
    assert tokens_of(outputs + drain(engine), request) == expected(request, 0, frozenset())


def test_cached_tokens_are_those_of_others_not_of_a_preempted_self() -> None:
    engine, _ = engine_of(5, step_tokens=40)
    long = dataclasses.replace(GREEDY, max_tokens=25)
    requests = [Request(prompt_of(20, first), long) for first in (1, 5)]
    for request in requests:
        engine.add(request)
    drain(engine)
    assert engine.stats().preemptions == 1
    assert [request.cached_tokens for request in requests] == [0, 0]
    assert engine.stats().cached_tokens == 0


def test_a_budget_without_room_for_prompts_is_refused() -> None:
    with pytest.raises(UsageError, match="step_tokens .4. must be more than max_sequences .4."):
        engine_of(8, step_tokens=4)


def test_what_a_failed_request_computed_is_not_used_again() -> None:
    engine, fake = engine_of(24)
    fake.spoilt = lambda tokens: len(tokens) > 40
    engine.add(Request(prompt_of(38), GREEDY))
    drain(engine)
    fake.spoilt = lambda tokens: False
    again = Request(prompt_of(38), GREEDY)
    engine.add(again)
    drain(engine)
    assert again.cached_tokens == 0
    assert again.error is None


def test_impossible_requests_are_refused_and_change_nothing() -> None:
    engine, _ = engine_of(4)
    cases: list[tuple[list[Any], Sampling, str]] = [
        ([], GREEDY, "the prompt is empty"),
        ([3, VOCAB], GREEDY, f"token {VOCAB} is outside the model's vocabulary of {VOCAB}"),
        ([3, -1], GREEDY, "token -1 is outside"),
        ([3, 1.5], GREEDY, "token 1.5 is outside"),
        ([3], Sampling(stop_token_ids=(99,)), "token 99 is outside"),
        (prompt_of(CONTEXT), GREEDY, "the prompt has 90 tokens; the model's context is 90"),
        (prompt_of(64), GREEDY, "64 tokens; the whole KV cache holds 64"),
        ([3], Sampling(stop=("x",)), "stop strings need a tokenizer"),
    ]
    for prompt, sampling, said in cases:
        with pytest.raises(UsageError, match=said):
            engine.add(Request(prompt, sampling))
    assert not engine.has_work()
    fine = Request(prompt_of(63), GREEDY)  # ends when the cache is full
    engine.add(fine)
    assert tokens_of(drain(engine), fine) == expected(fine, 0, frozenset())[:1]


# ---- abort ----


def test_abort_of_what_is_unknown_or_over_does_nothing() -> None:
    engine, _ = engine_of(8)
    assert not engine.abort(3)
    request = Request(prompt_of(5), GREEDY)
    engine.add(request)
    drain(engine)
    assert not engine.abort(request.id)
    assert not engine.abort(request.id, 0)
    assert not engine.has_work()


@pytest.mark.parametrize("steps", range(5), ids=["waiting", "prefill", "prefill", "decode", "d2"])
def test_abort_in_every_state(steps: int) -> None:
    engine, _ = engine_of(8, step_tokens=10)
    request, other = Request(prompt_of(25), GREEDY), Request(prompt_of(25, 5), GREEDY)
    engine.add(request)
    engine.add(other)
    outputs = []
    for _ in range(steps):
        outputs += engine.step()
    assert engine.abort(request.id)
    assert not engine.abort(request.id)
    check_blocks(engine)
    outputs += drain(engine)
    found = tokens_of(outputs, request)
    assert found == expected(request, 0, frozenset())[: len(found)]
    assert (len(found) > 0) == (steps >= 3)
    assert reason_of(outputs, request) == "abort"
    assert tokens_of(outputs, other) == expected(other, 0, frozenset())


def test_abort_of_a_preempted_request() -> None:
    engine, _ = engine_of(5)
    long = dataclasses.replace(GREEDY, max_tokens=25)
    requests = [Request(prompt_of(20, first), long) for first in (1, 5)]
    for request in requests:
        engine.add(request)
    outputs = []
    for _ in range(30):
        outputs += [] if engine.scheduler.preemptions else engine.step()
    victim = requests[1]
    assert victim.samples[0].state == "waiting"
    assert victim.generated_tokens
    assert engine.abort(victim.id)
    outputs += drain(engine)
    assert reason_of(outputs, victim) == "abort"
    assert tokens_of(outputs, requests[0]) == expected(requests[0], 0, frozenset())


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_abort_of_one_of_three_samples(steps: int, index: int) -> None:
    """Also of the one that computes the prompt for all."""
    engine, _ = engine_of(12, step_tokens=10)
    request = Request(prompt_of(25), Sampling(9, temperature=1.0, n=3, ignore_eos=True))
    engine.add(request)
    outputs = []
    for _ in range(steps):
        outputs += engine.step()
    assert engine.abort(request.id, index)
    outputs += drain(engine)
    for other in range(3):
        right = expected(request, other, frozenset())
        found = tokens_of(outputs, request, other)
        if other == index:
            assert (reason_of(outputs, request, other), found) == ("abort", right[: len(found)])
        else:
            assert found == right
    assert request.finished is not None
