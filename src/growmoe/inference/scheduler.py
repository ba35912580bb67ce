"""What runs in the next step: one token of every text under way, then pieces of prompts.

A sequence holds blocks for all its tokens from the moment it is admitted, so a prompt never stops
half-way for want of blocks; only growing texts can find none left. Then the youngest sequence gives
up its blocks and will be computed again.
"""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from growmoe.inference.blocks import BLOCK, BlockPool, blocks_for, chain
from growmoe.inference.paged import Span
from growmoe.inference.requests import Sequence

RECOVERY_STEPS = 16
"""Steps without trouble after which a lowered token budget is doubled."""


@dataclass(slots=True)
class Step:
    """Tokens to compute: one span per sequence."""

    sequences: list[Sequence] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    def add(self, sequence: Sequence, count: int) -> None:
        """The next `count` tokens of `sequence`."""
        self.sequences.append(sequence)
        self.spans.append(Span(sequence.computed, count, sequence.table))

    def tokens(self) -> list[int]:
        """All new tokens, span after span."""
        found: list[int] = []
        for sequence, span in zip(self.sequences, self.spans):
            if span.count == 1:
                found.append(sequence.tokens[span.start])
            else:
                found += sequence.tokens[span.start : span.start + span.count]
        return found

    def alive(self) -> "Step":
        """Without the sequences that no longer run."""
        kept = [i for i, sequence in enumerate(self.sequences) if sequence.state == "running"]
        return Step([self.sequences[i] for i in kept], [self.spans[i] for i in kept])

    @property
    def size(self) -> int:
        """Number of new tokens."""
        return sum(span.count for span in self.spans)

    def parts(self, size: int) -> Iterator["Step"]:
        """The same in steps of at most `size` sequences."""
        for first in range(0, len(self.spans), size):
            last = first + size
            yield Step(self.sequences[first:last], self.spans[first:last])


class Scheduler:
    """Sequences that wait and that run, both oldest first, and the blocks they hold."""

    def __init__(
        self, pool: BlockPool, max_sequences: int, step_tokens: int, prefix_reuse: bool
    ) -> None:
        self.pool = pool
        self.max_sequences, self.step_tokens = max_sequences, step_tokens
        self.prefix_reuse = prefix_reuse
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.budget = step_tokens
        """Tokens of the next step; less than `step_tokens` for a while after memory ran out."""
        self._calm = 0

    # ---- a step ----

    def schedule(self) -> Step:
        """The next step; empty when nothing runs or waits."""
        step, left = Step(), self.budget
        for sequence in list(self.running):
            if not left:
                break
            if sequence.state == "running" and _pending(sequence) == 1 and self._grow(sequence):
                step.add(sequence, 1)
                left -= 1
        for sequence in self.running:
            if not left:
                break
            if (pending := _pending(sequence)) > 1:
                step.add(sequence, min(pending, left))
                left -= step.spans[-1].count
        while left and self.waiting and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            step.add(sequence, min(_pending(sequence), left))
            left -= step.spans[-1].count
        return step

    def _grow(self, sequence: Sequence) -> bool:
        """Blocks for all tokens of `sequence`; False when it was the one to give way."""
        while len(sequence.table) * BLOCK < len(sequence.tokens):
            if not self.pool.available:
                victim = self.running[-1]
                self.preempt(victim)
                if victim is sequence:
                    return False
                continue
            sequence.table.append(self.pool.allocate())
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Give the sequence its blocks, if there are enough; cached ones count as computed."""
        shared = self._known_prefix(sequence)
        needed = blocks_for(len(sequence.tokens)) - len(shared)
        idle = sum(self.pool.idle(block) for block in shared)
        # a block to spare, or texts under way would soon take back what this one has computed
        spare = 1 if self.running else 0
        if needed + spare > self.pool.available - idle:
            return False
        for block in shared:
            self.pool.share(block)
        sequence.table = shared
        sequence.table += [self.pool.allocate() for _ in range(needed)]
        sequence.computed = (len(sequence.table) - needed) * BLOCK
        sequence.indexed = sequence.computed // BLOCK
        if sequence.request.started is None:
            sequence.request.cached_tokens = sequence.computed
        self.waiting.pop(0)
        self.run(sequence)
        return True

    def _known_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the first tokens already; at least one token stays to be computed."""
        found: list[int] = []
        if not self.prefix_reuse:
            return found
        for number in range((len(sequence.tokens) - 1) // BLOCK):
            block = self.pool.find(self._digest(sequence, number))
            if block is None:
                break
            found.append(block)
        return found

    def _digest(self, sequence: Sequence, number: int) -> bytes:
        """Of full block `number`; those before it have theirs already."""
        digests = sequence.digests
        if number == len(digests):
            tokens = sequence.tokens[number * BLOCK : (number + 1) * BLOCK]
            digests.append(chain(digests[-1] if digests else b"", tokens))
        return digests[number]

    # ---- what happened ----

    def advance(self, sequence: Sequence, count: int) -> None:
        """`count` more tokens are computed; full blocks can now be found by others."""
        sequence.computed += count
        if not self.prefix_reuse:
            return
        while (sequence.indexed + 1) * BLOCK <= sequence.computed:
            number = sequence.indexed
            self.pool.index(sequence.table[number], self._digest(sequence, number))
            sequence.indexed += 1

    def calm(self) -> None:
        """A step ran as planned: a lowered budget recovers."""
        if self.budget < self.step_tokens:
            self._calm += 1
            if self._calm >= RECOVERY_STEPS:
                self.budget, self._calm = min(self.step_tokens, 2 * self.budget), 0

    def lower(self, size: int) -> None:
        """Memory ran out in a step of `size` tokens: plan half as many."""
        self.budget, self._calm = max(1, min(self.budget, size // 2)), 0

    # ---- moves between the states ----

    def wait(self, sequence: Sequence) -> None:
        """Queue a sequence by age."""
        sequence.state = "waiting"
        insort(self.waiting, sequence, key=_order)

    def run(self, sequence: Sequence) -> None:
        """A sequence that has its blocks joins those that run."""
        sequence.state = "running"
        insort(self.running, sequence, key=_order)

    def preempt(self, sequence: Sequence) -> None:
        """Take the blocks of a running sequence; it waits to be computed again."""
        self.running.remove(sequence)
        self._release(sequence, True)
        self.preemptions += 1
        self.wait(sequence)

    def finish(self, sequence: Sequence, trusted: bool) -> None:
        """Forget a sequence in any state; keep its full blocks for others if they are trusted."""
        if sequence.state == "running":
            self.running.remove(sequence)
        elif sequence.state == "waiting":
            self.waiting.remove(sequence)
        self._release(sequence, trusted)
        sequence.state = "finished"

    def fork(self, sequence: Sequence, sibling: Sequence) -> tuple[int, int] | None:
        """Start a sibling that has the same prompt, all computed, and one token of its own.

        It shares the full blocks. Returns (from, to) when the last, partly filled block must be
        copied. Where there is no room for it the sibling waits.
        """
        prompt = sequence.prompt_tokens
        full, rest = divmod(prompt, BLOCK)
        if len(self.running) >= self.max_sequences or (rest and not self.pool.available):
            self.wait(sibling)
            return None
        sibling.table = sequence.table[:full]
        for block in sibling.table:
            self.pool.share(block)
        sibling.computed, sibling.indexed = prompt, full
        sibling.digests = sequence.digests[:full]
        self.run(sibling)
        if not rest:
            return None
        sibling.table.append(self.pool.allocate())
        return sequence.table[full], sibling.table[full]

    def _release(self, sequence: Sequence, trusted: bool) -> None:
        self.pool.release(sequence.table, trusted)
        sequence.table, sequence.computed, sequence.indexed = [], 0, 0


def _pending(sequence: Sequence) -> int:
    return len(sequence.tokens) - sequence.computed


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
