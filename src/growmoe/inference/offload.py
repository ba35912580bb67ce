"""Experts beyond a budget stay on disk: a cache of fixed slots over a scratch file.

`ExpertStore` holds as many experts as the budget has room for, whatever layers they belong to, and
evicts the one that was used least recently. Experts in use are pinned. A thread reads what is
missing while experts that are there already compute, and what `prefetch` predicts when nothing is
missing. Slots are allocated once; nothing is allocated per read.
"""

import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from growmoe.errors import GrowmoeError
from growmoe.inference.scratch import Scratch
from growmoe.models.footprint import SLOT_ALIGN

T = TypeVar("T")


class Field(NamedTuple):
    """One tensor of an expert."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Record:
    """How the tensors of one expert lie in a slot; the same for every expert of a model."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields = tuple(fields)
        self._starts, at = [], 0
        for each in self.fields:
            self._starts.append(at)
            size = each.dtype.itemsize * torch.Size(each.shape).numel()
            at += -(-size // SLOT_ALIGN) * SLOT_ALIGN
        self.nbytes = at

    def views(self, bytes_N: Tensor) -> dict[str, Tensor]:
        """The tensors of the expert that lies in `bytes_N`, as views."""
        found = {}
        for each, start in zip(self.fields, self._starts):
            size = each.dtype.itemsize * torch.Size(each.shape).numel()
            found[each.name] = bytes_N[start : start + size].view(each.dtype).view(each.shape)
        return found


@dataclass
class Statistics:
    """What a store did since it was made (or since `reset`)."""

    hits: int = 0
    """Experts asked for that were there, not for a prefetch."""
    prefetch_hits: int = 0
    """Experts asked for that a prefetch had read, or was reading."""
    misses: int = 0
    """Experts that were read because they were asked for."""
    prefetched: int = 0
    """Experts read ahead of being asked for."""
    wasted: int = 0
    """Of those, evicted without having been asked for."""
    bytes_read: int = 0
    stall_seconds: float = 0.0
    """Time in which a request waited or read instead of computing."""

    def report(self) -> dict[str, float]:
        """For a JSON line, with the part of the requests that needed no read of their own."""
        asked = self.hits + self.prefetch_hits + self.misses
        rate = (self.hits + self.prefetch_hits) / asked if asked else 0.0
        return {**asdict(self), "hit_rate": rate}


@dataclass(eq=False)
class _Slot(Generic[T]):
    bytes_N: Tensor
    tensors: dict[str, Tensor]
    expert: T
    """What `tensors` stand for."""
    key: int = -1
    pins: int = 0
    ready: bool = False
    ahead: bool = False
    """Read by a prefetch and not asked for since."""
    error: str | None = None
    buffer: memoryview = field(init=False)

    def __post_init__(self) -> None:
        self.buffer = self.bytes_N.numpy().data


class ExpertStore(Generic[T]):
    """The experts of a model behind a budget of `slots` (see the module). Safe for threads.

    Fill it with `put`, then `seal` it; `request` gives experts, `close` ends the thread and frees
    the scratch file. `experts` has one entry per layer, 0 meaning none; `made_of` makes of a slot's
    tensors what requests give out, once per slot.
    """

    def __init__(
        self,
        record: Record,
        experts: Sequence[int],
        slots: int,
        made_of: Callable[[dict[str, Tensor]], T],
        folder: Path | None = None,
        page_cache: bool = True,
    ) -> None:
        self.record, self.stats, self._made_of = record, Statistics(), made_of
        self._first = [sum(experts[:layer]) for layer in range(len(experts))]
        count = sum(experts)
        slots = min(slots, count)
        self._scratch = Scratch(record.nbytes, count, folder, page_cache) if slots < count else None
        rows_SN = torch.empty(slots, record.nbytes, dtype=torch.uint8)
        self.slots = [self._slot(row_N) for row_N in rows_SN]
        self._staging: _Slot[T] | None = None
        self._free = list(reversed(self.slots))
        self._place: OrderedDict[int, _Slot[T]] = OrderedDict()  # by key, least recently used first
        self._queue: deque[_Slot[T]] = deque()  # asked for and not yet being read
        self._ahead: deque[int] = deque()  # predicted and without a slot as yet
        self._guesses: list[_Slot[T]] = []  # read since the last prediction
        self._closed = False
        self._changed = threading.Condition()
        self._whole = threading.Lock()
        weakref.finalize(self, _wake, self._changed)  # the thread does not keep the store alive
        self._thread = threading.Thread(
            target=_serve, args=(weakref.ref(self), self._changed), daemon=True, name="experts"
        )
        self._thread.start()

    def _slot(self, bytes_N: Tensor) -> _Slot[T]:
        tensors = self.record.views(bytes_N)
        return _Slot(bytes_N, tensors, self._made_of(tensors))

    # ---- filling ----

    def put(self, layer: int, expert: int, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors of one expert: in a slot while there are free ones, and on disk.
        Raises GrowmoeError when the disk does not take it."""
        key = self._first[layer] + expert
        with self._changed:
            slot = self._free.pop() if self._free else None
        where = slot or self._stage()
        for name, view in where.tensors.items():
            view.copy_(tensors[name])
        if self._scratch is not None:
            self._scratch.write(key, where.buffer)
        if slot is not None:
            with self._changed:
                slot.key, slot.ready = key, True
                self._place[key] = slot

    def _stage(self) -> _Slot[T]:
        if self._staging is None:
            self._staging = self._slot(torch.empty(self.record.nbytes, dtype=torch.uint8))
        return self._staging

    def seal(self) -> None:
        """Everything has been put: flush it, so that its pages are the kernel's to drop."""
        self._staging = None
        if self._scratch is not None:
            self._scratch.flush()

    # ---- using ----

    def request(self, layer: int, experts: Sequence[int], whole: bool = False) -> "Request[T]":
        """Ask for distinct experts of a layer; reading starts at once. Use it in a `with` block
        and iterate over what comes, or (`whole`) take `all` of them, which must fit the slots."""
        first = self._first[layer]
        return Request(self, [first + expert for expert in experts], first, whole)

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Predict the experts that a layer will ask for, most likely first. They take up to half
        of the slots. Earlier predictions that were not read yet are forgotten, and those that
        nobody asked for are the next to go, so that wrong ones cost little room."""
        with self._changed:
            self._ahead.clear()
            for slot in self._guesses:
                if slot.ahead and self._place.get(slot.key) is slot:
                    self._place.move_to_end(slot.key, last=False)
            self._guesses.clear()
            for expert in experts[: len(self.slots) // 2]:
                key = self._first[layer] + expert
                if key in self._place:
                    self._place.move_to_end(key)
                else:
                    self._ahead.append(key)
            if self._ahead:
                self._changed.notify_all()

    def reset(self) -> Statistics:
        """Start the statistics anew; returns the old ones."""
        with self._changed:
            old, self.stats = self.stats, Statistics()
        return old

    def close(self) -> None:
        """End the thread and free the scratch file; waiting requests fail."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()
        if self._scratch is not None:
            self._scratch.close()

    def __enter__(self) -> "ExpertStore[T]":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- inside; the lock is held where nothing else is said ----

    def _check_open(self) -> None:
        if self._closed:
            raise GrowmoeError("the store of offloaded experts is closed")

    def _reserve(self, key: int) -> _Slot[T] | None:
        """A slot for `key`, which is not there: a free one, or that of the expert used least
        recently; None when all are in use."""
        if self._free:
            slot = self._free.pop()
        else:
            unused = (s for s in self._place.values() if not s.pins and s.ready)
            found = next(unused, None)
            if found is None:
                return None
            slot = found
            del self._place[slot.key]
            self.stats.wasted += slot.ahead
        slot.key, slot.ready, slot.ahead, slot.error = key, False, False, None
        self._place[key] = slot
        return slot

    def _unpin(self, slots: Sequence[_Slot[T]]) -> None:
        for slot in slots:
            slot.pins -= 1
            self._give_back(slot)
        self._changed.notify_all()

    def _give_back(self, slot: _Slot[T]) -> None:
        """A slot whose read failed is free again when nobody looks at it any more."""
        if slot.error is not None and not slot.pins:
            slot.error = None
            self._free.append(slot)

    def _job(self) -> _Slot[T] | None:
        """The next slot to read into: what was asked for, then what was predicted."""
        if self._queue:
            return self._queue.popleft()
        while self._ahead:
            key = self._ahead.popleft()
            if key in self._place:
                continue
            slot = self._reserve(key)
            if slot is not None:
                slot.ahead = True
                self._guesses.append(slot)
                self.stats.prefetched += 1
            return slot
        return None

    def _read(self, slot: _Slot[T]) -> None:
        """Read into `slot`, without the lock: nobody else touches a slot that is not ready."""
        error = None
        try:
            assert self._scratch is not None
            self._scratch.read(slot.key, slot.buffer)
        except BaseException as problem:  # others wait for this slot, also after Ctrl-C
            error = self._reason(slot.key, problem)
            if not isinstance(problem, Exception):
                raise
        finally:
            self._finish(slot, error)

    def _finish(self, slot: _Slot[T], error: str | None) -> None:
        with self._changed:
            if error is None:
                slot.ready = True
                self.stats.bytes_read += self.record.nbytes
            else:
                slot.error = error
                del self._place[slot.key]
                self._give_back(slot)
            self._changed.notify_all()

    def _reason(self, key: int, problem: BaseException) -> str:
        layer = max(at for at, first in enumerate(self._first) if first <= key)
        said = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
        return (
            f"expert {key - self._first[layer]} of layer {layer} cannot be read back from the "
            f"scratch file: {said}"
        )


class Request(Generic[T]):
    """Experts asked for. Iterating gives batches of (number, expert) as they become ready, each
    expert once; they are valid until the next batch, and the rest is let go at the end of the
    `with` block. Raises GrowmoeError when an expert cannot be read."""

    def __init__(self, store: ExpertStore[T], keys: Sequence[int], first: int, whole: bool) -> None:
        self._store, self._first, self._whole = store, first, whole
        self._missing: deque[int] = deque()
        self._held: list[_Slot[T]] = []
        self._lent: list[_Slot[T]] = []
        if whole:  # two that hold some slots and want more would wait for each other
            assert len(keys) <= len(store.slots)
            store._whole.acquire()
        try:
            with store._changed:
                store._check_open()
                for key in keys:
                    self._look_up(key)
                self._start_reads()
        except BaseException:
            self.__exit__()
            raise

    def _look_up(self, key: int) -> None:
        store, slot = self._store, self._store._place.get(key)
        if slot is None:
            self._missing.append(key)
            return
        store._place.move_to_end(key)
        if slot.ahead:
            store.stats.prefetch_hits += 1
        else:
            store.stats.hits += 1
        slot.ahead = False
        slot.pins += 1
        self._held.append(slot)

    def _start_reads(self) -> None:
        """Queue missing experts as far as there are slots. Whoever holds slots needs no other to
        go on, or is the only one who does, so that requests cannot wait for each other."""
        store = self._store
        while self._missing:
            key = self._missing[0]
            if key in store._place:  # somebody else's read, since
                self._look_up(self._missing.popleft())
                continue
            slot = store._reserve(key)
            if slot is None:
                return
            self._missing.popleft()
            store.stats.misses += 1
            slot.pins += 1
            self._held.append(slot)
            store._queue.append(slot)
            store._changed.notify_all()

    def __iter__(self) -> Iterator[list[tuple[int, T]]]:
        while True:
            self._let_go()
            batch = self._next()
            if not batch:
                return
            yield [(slot.key - self._first, slot.expert) for slot in batch]

    def all(self) -> list[tuple[int, T]]:
        """The experts of a `whole` request at once, valid until the `with` block ends."""
        assert self._whole
        found: list[_Slot[T]] = []
        while self._held or self._missing:
            found += self._next()
            self._lent = found
        return [(slot.key - self._first, slot.expert) for slot in found]

    def _let_go(self) -> None:
        with self._store._changed:
            self._store._unpin(self._lent)
            self._lent = []

    def _next(self) -> list[_Slot[T]]:
        """What is ready; reads itself, or waits, when nothing is."""
        store = self._store
        began: float | None = None
        while True:
            with store._changed:
                store._check_open()
                self._start_reads()
                failed = next((slot.error for slot in self._held if slot.error), None)
                ready = [slot for slot in self._held if slot.ready]
                if failed or ready or not (self._held or self._missing):
                    if began is not None:
                        store.stats.stall_seconds += time.perf_counter() - began
                    if failed:
                        raise GrowmoeError(failed)
                    self._held = [slot for slot in self._held if not slot.ready]
                    self._lent = ready
                    return ready
                began = began or time.perf_counter()
                job = store._queue.popleft() if store._queue else None
                if job is None:
                    store._changed.wait()
            if job is not None:
                store._read(job)

    def __enter__(self) -> "Request":
        return self

    def __exit__(self, *exc: object) -> None:
        with self._store._changed:
            self._store._unpin(self._lent + self._held)
            self._lent, self._held = [], []
            self._missing.clear()
        if self._whole:
            self._whole = False
            self._store._whole.release()


def _wake(changed: threading.Condition) -> None:
    with changed:
        changed.notify_all()


def _serve(ref: "weakref.ref[ExpertStore[T]]", changed: threading.Condition) -> None:
    """The reading thread; ends when its store is closed or gone."""
    while True:
        with changed:
            store = ref()
            if store is None or store._closed:
                return
            slot = store._job()
            if slot is None:
                del store
                if ref() is not None:  # this was not the last reference to it
                    changed.wait()
                continue
        store._read(slot)
        del store
