"""Experts on disk: the same results with any budget, an honest cache, and nothing left behind."""

import gc
import os
import random
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import InMemory, tiny_config, tiny_model, write_tiny
from growmoe.errors import GrowmoeError, UsageError
from growmoe.inference import scratch
from growmoe.inference.llm import LLM
from growmoe.inference.offload import ExpertStore, Field, Record
from growmoe.inference.offloaded import Offload, PackedRecord
from growmoe.inference.packing import build_packed
from growmoe.inference.requests import Sampling
from growmoe.inference.scratch import Scratch
from growmoe.models.attention import Cache
from growmoe.models.config import MoEConfig
from growmoe.models.transformer import Transformer
from growmoe.ops import native

RECORD = Record([Field("a", torch.float32, (3,)), Field("b", torch.int8, (5,))])
EXPERTS = (4, 0, 8, 6)
PLACES = [(layer, expert) for layer, count in enumerate(EXPERTS) for expert in range(count)]


@pytest.fixture(autouse=True)
def _any_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary folders may lie in memory where tests run."""
    monkeypatch.setattr(scratch, "in_memory", lambda folder: False)


def contents(layer: int, expert: int) -> dict[str, Tensor]:
    return {
        "a": torch.tensor([layer, expert, 0.5]),
        "b": torch.full((5,), layer * 10 + expert, dtype=torch.int8),
    }


def as_they_are(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


Store = ExpertStore[dict[str, Tensor]]


def filled(slots: int, folder: Path | None = None) -> Store:
    store = ExpertStore(RECORD, EXPERTS, slots, as_they_are, folder)
    for layer, expert in PLACES:
        store.put(layer, expert, contents(layer, expert))
    store.seal()
    return store


def taken(store: Store, layer: int, experts: list[int]) -> list[int]:
    """Experts in the order they came, their contents checked."""
    came = []
    with store.request(layer, experts) as request:
        for batch in request:
            assert batch
            assert len(batch) <= len(store.slots)
            for expert, tensors in batch:
                wanted = contents(layer, expert)
                assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
                came.append(expert)
    assert sorted(came) == sorted(experts)
    return came


def idle(store: Store) -> bool:
    """Nothing is pinned, waiting or lost: every slot is free or holds an expert."""
    with store._changed:
        assert all(slot.pins == 0 for slot in store.slots)
        assert len(store._free) + len(store._place) == len(store.slots)
        return not store._queue


ASKED = st.lists(
    st.sampled_from([0, 2, 3]).flatmap(
        lambda layer: st.tuples(
            st.just(layer),
            st.lists(st.integers(0, EXPERTS[layer] - 1), min_size=1, max_size=3, unique=True),
        )
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(slots=st.integers(3, 18), asked=ASKED)
def test_it_is_a_global_lru_that_counts_right(slots: int, asked: list) -> None:
    """Against a plain model of an LRU; requests fit, so that nothing depends on the thread."""
    model: OrderedDict = OrderedDict((place, None) for place in PLACES[:slots])
    hits = misses = 0
    with filled(slots) as store:
        for layer, experts in asked:
            keys = [(layer, expert) for expert in experts]
            missing = [key for key in keys if key not in model]
            for key in keys:
                if key in model:
                    model.move_to_end(key)
            for key in missing:
                if len(model) == slots:
                    model.popitem(last=False)
                model[key] = None
            hits, misses = hits + len(keys) - len(missing), misses + len(missing)
            taken(store, layer, experts)
            resident = [store._first[layer] + expert for layer, expert in model]
            assert list(store._place) == resident
        assert (store.stats.hits, store.stats.misses) == (hits, misses)
        assert store.stats.bytes_read == misses * RECORD.nbytes
        assert store.stats.prefetched == store.stats.prefetch_hits == 0
        assert idle(store)


@settings(max_examples=25, deadline=None)
@given(
    slots=st.integers(1, 17), seed=st.integers(0, 1000),
    asked=st.lists(st.tuples(st.sampled_from([0, 2, 3]), st.booleans()), min_size=1, max_size=15),
)  # fmt: skip
def test_requests_larger_than_the_cache_come_in_waves(slots: int, seed: int, asked: list) -> None:
    rng = random.Random(seed)
    with filled(slots) as store:
        for layer, ahead in asked:
            experts = rng.sample(range(EXPERTS[layer]), rng.randint(1, EXPERTS[layer]))
            if ahead:
                store.prefetch(layer, rng.sample(range(EXPERTS[layer]), EXPERTS[layer]))
            taken(store, layer, experts)
            assert len(store._place) <= slots
        found, asked_for = store.stats, store.stats
    reads = found.misses + found.prefetched
    assert found.bytes_read == reads * RECORD.nbytes
    assert asked_for.prefetch_hits + found.wasted <= found.prefetched


def test_what_is_in_use_is_never_evicted() -> None:
    with filled(3) as store:  # holds experts 0, 1 and 2 of layer 0
        with store.request(0, [0, 1]) as held:
            lent = next(iter(held))
            assert [expert for expert, _ in lent] == [0, 1]
            store.prefetch(3, [0])
            taken(store, 3, [0, 1, 2, 3, 4, 5])  # through the one slot that is left
            for expert, tensors in lent:
                assert torch.equal(tensors["a"], contents(0, expert)["a"])
        assert idle(store)


def wait_for(store: Store, prefetched: int) -> None:
    """Until the thread has read that many ahead."""
    with store._changed:
        assert store._changed.wait_for(
            lambda: (
                store.stats.prefetched == prefetched
                and all(slot.ready for slot in store._place.values())
            ),
            timeout=30,
        )


def test_a_prefetch_is_a_hit_later_and_waste_when_nobody_asks() -> None:
    with filled(6) as store:
        store.prefetch(2, [3, 4])
        wait_for(store, 2)
        taken(store, 2, [3, 4])
        assert (store.stats.prefetch_hits, store.stats.misses) == (2, 0)
        taken(store, 2, [3])
        assert store.stats.hits == 1
        store.prefetch(3, [0])
        wait_for(store, 3)
        taken(store, 2, [0, 1, 2, 5, 6, 7])
        assert store.stats.wasted == 1
        assert store.reset().prefetched == 3
        assert store.stats.prefetched == 0


def test_predictions_take_half_of_the_slots_and_keep_what_is_there() -> None:
    with filled(4) as store:  # holds the four experts of layer 0
        store.prefetch(0, [0])  # the oldest, now the newest
        store.prefetch(2, [0, 1, 2, 3])
        wait_for(store, 2)
        assert list(store._place) == [3, 0, 4, 5]


def test_many_threads_share_a_small_store() -> None:
    problems: list[BaseException] = []
    with filled(3) as store:

        def work(seed: int) -> None:
            rng = random.Random(seed)
            try:
                for _ in range(60):
                    layer = rng.choice([0, 2, 3])
                    store.prefetch(layer, [rng.randrange(EXPERTS[layer])])
                    experts = rng.sample(range(EXPERTS[layer]), rng.randint(1, 4))
                    if len(experts) > 3 or rng.random() < 0.5:
                        taken(store, layer, experts)
                        continue
                    with store.request(layer, experts, whole=True) as request:
                        for expert, tensors in request.all():
                            assert torch.equal(tensors["a"], contents(layer, expert)["a"])
            except BaseException as problem:
                problems.append(problem)

        threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "deadlock"
        assert not problems
        assert idle(store)


# ---- failing ----


class Broken:
    """A scratch file whose reads fail while `bad` says so."""

    def __init__(self, inner: Scratch, bad: set[int]) -> None:
        self.inner, self.bad = inner, bad

    def read(self, index: int, record: memoryview) -> None:
        if index in self.bad:
            raise OSError(5, "Input/output error")
        self.inner.read(index, record)

    def close(self) -> None:
        self.inner.close()


def test_a_failed_read_fails_its_request_and_no_other() -> None:
    with filled(4) as store:
        bad = {4 + 3}  # expert 3 of layer 2
        store._scratch = Broken(store._scratch, bad)  # type: ignore[assignment,arg-type]
        for experts in ([3], [0, 3, 5], [3, 1, 2, 0, 4, 5, 6, 7]):
            with pytest.raises(GrowmoeError, match=r"expert 3 of layer 2 cannot be read .*Input"):
                taken(store, 2, experts)
            taken(store, 2, [1, 2])
        store.prefetch(2, [3])
        taken(store, 3, [0, 1, 2, 3, 4, 5])
        with pytest.raises(GrowmoeError, match="expert 3"):
            taken(store, 2, [3])
        bad.clear()
        taken(store, 2, [3, 4])
        assert _settled(store)


def _settled(store: Store) -> bool:
    with store._changed:
        done = store._changed.wait_for(
            lambda: not store._queue and all(s.ready for s in store._place.values()), timeout=30
        )
    return done and idle(store)


def test_an_exception_of_the_user_lets_everything_go() -> None:
    with filled(4) as store:
        with pytest.raises(ZeroDivisionError), store.request(3, [0, 1, 2, 3, 4, 5]) as request:
            for _ in request:
                raise ZeroDivisionError
        assert _settled(store)
        taken(store, 3, [0, 1, 2, 3, 4, 5])


def test_closing_fails_who_waits_and_who_comes_later() -> None:
    store = filled(2)
    with store.request(0, [0, 1]) as held:
        next(iter(held))
        failed: list[str] = []

        def wait() -> None:
            try:
                taken(store, 2, [0, 1])
            except GrowmoeError as error:
                failed.append(str(error))

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        store.close()
        thread.join(30)
    assert failed == ["the store of offloaded experts is closed"]
    with pytest.raises(GrowmoeError, match="closed"):
        store.request(0, [0])


def test_the_thread_ends_with_a_store_that_nobody_closed() -> None:
    store = filled(3)
    thread = store._thread
    del store
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


# ---- the scratch file ----


def test_the_scratch_file_has_no_name_and_is_gone_after_any_end(tmp_path: Path) -> None:
    def descriptors() -> int:
        return sum(
            str(tmp_path) in os.readlink(f"/proc/self/fd/{name}")
            for name in os.listdir("/proc/self/fd")
            if os.path.islink(f"/proc/self/fd/{name}")
        )

    with pytest.raises(ZeroDivisionError), filled(2, tmp_path) as store:
        taken(store, 0, [2, 3])
        assert not os.listdir(tmp_path)
        assert descriptors() == 1
        raise ZeroDivisionError
    assert descriptors() == 0
    code = (
        "import sys, os, signal, pathlib; from growmoe.inference import scratch;"
        "scratch.in_memory = lambda folder: False;"
        "kept = scratch.Scratch(4096, 8, pathlib.Path(sys.argv[1]));"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert done.returncode == -9
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_one_sentence_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(GrowmoeError, match=r"experts on disk need 72.0 KiB in .*No space left"):
        ExpertStore(RECORD, EXPERTS, 2, as_they_are, tmp_path)
    monkeypatch.undo()
    file = Scratch(64, 2, tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(GrowmoeError, match=f"cannot write experts into {tmp_path}: No space"):
        file.write(0, memoryview(bytes(64)))


def test_folders_that_cannot_hold_it_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="cannot write in .*nowhere"):
        Scratch(64, 2, tmp_path / "nowhere")
    monkeypatch.setattr(scratch, "in_memory", lambda folder: True)
    with pytest.raises(UsageError, match="lies in memory"):
        Scratch(64, 2, tmp_path)


def test_a_scratch_file_that_was_cut_short_is_noticed(tmp_path: Path) -> None:
    file = Scratch(64, 2, tmp_path)
    os.ftruncate(file._file.fileno(), 32)
    with pytest.raises(GrowmoeError, match="cut short"):
        file.read(0, memoryview(bytearray(64)))


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_memory_file_systems_are_known() -> None:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    for _, point, kind, *_ in mounts:
        if kind == "tmpfs" and os.path.isdir(point):
            assert MEMORY(Path(point))
    assert not MEMORY(Path("/proc"))


MEMORY = scratch.in_memory


# ---- models ----

FIXED = {"ffn_size": 20, "fixed_ffn_size": 30}
MODELS: dict[str, dict[str, Any]] = {
    "moe": {"moe": MoEConfig(experts=(4, 6, 4), top_k=2, ffn_size=20)},
    "pr-moe": {"moe": MoEConfig(experts=(0, 4, 8), top_k=2, mix="softmax2", **FIXED)},
    "shared": {"moe": MoEConfig(experts=(8, 4, 4), top_k=3, mix="sum", **FIXED)},
    "biases": {
        "activation": "gelu", "mlp_bias": True, "norm": "layer", "positions": "learned",
        "moe": MoEConfig(experts=(4, 0, 6), top_k=1, ffn_size=20),
    },
}  # fmt: skip
needs_kernels = pytest.mark.skipif(not native.available(), reason="the native kernels are missing")


@torch.inference_mode()
def greedy(model: Transformer) -> tuple[list[int], Tensor]:
    """Tokens and all logits of a prefill and some steps."""
    cache, logits = Cache(), []
    tokens = torch.arange(40).remainder(97)[None] * 7 % 97
    for _ in range(6):
        out = model(tokens, cache=cache).logits
        logits.append(out[0])
        tokens = out[:, -1:].argmax(-1)
    return [int(step[-1].argmax()) for step in logits], torch.cat(logits)


@needs_kernels
@pytest.mark.parametrize("form", native.FORMS)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_results_are_the_same_bits_with_any_budget(name: str, form: native.Form) -> None:
    model = tiny_model(3, **MODELS[name])
    moe = model.config.moe
    assert moe is not None
    tokens, logits = greedy(build_packed(InMemory(model), form))
    each = PackedRecord(model.config, form).record.nbytes
    count = sum(moe.experts)
    for prefetch in (False, True):
        for slots in sorted({moe.top_k, moe.top_k + 1, 5, count - 1, count}):
            offload = Offload(model.config, form, slots * each, prefetch=prefetch)
            with offload.store as store:
                found_tokens, found = greedy(build_packed(InMemory(model), form, offload))
            assert torch.equal(found, logits)
            assert found_tokens == tokens
            assert len(store.slots) == slots
            assert (store.stats.misses + store.stats.prefetched > 0) == (slots < count)
            assert prefetch or not store.stats.prefetched


@needs_kernels
def test_predictions_are_what_the_next_router_says() -> None:
    model = tiny_model(3, **MODELS["moe"])
    offload = Offload(model.config, "float32", 1 << 30)
    with offload.store as store:
        built = build_packed(InMemory(model), "float32", offload)
        asked: list[tuple[int, list[int]]] = []
        store.prefetch = lambda layer, experts: asked.append((layer, list(experts)))  # type: ignore[method-assign]
        inputs: list[Tensor] = []
        for block in built.layers:
            block.moe.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))  # type: ignore[union-attr]
        with torch.no_grad():
            built(torch.tensor([[5]]))
    assert [layer for layer, _ in asked] == [1, 2]
    for (layer, experts), x_TD in zip(asked, inputs):
        router_ED = model.layers[layer].moe.router.weight.detach()  # type: ignore[union-attr]
        best = (x_TD @ router_ED.t())[0].topk(2).indices.tolist()
        assert sorted(experts) == sorted(best)


@needs_kernels
def test_a_read_that_fails_in_a_model_is_one_sentence_and_the_model_goes_on() -> None:
    model = tiny_model(3, **MODELS["moe"])
    _, logits = greedy(build_packed(InMemory(model), "int8"))
    offload = Offload(model.config, "int8", 2 * PackedRecord(model.config, "int8").record.nbytes)
    with offload.store as store:
        built = build_packed(InMemory(model), "int8", offload)
        bad = set(range(14))
        store._scratch = Broken(store._scratch, bad)  # type: ignore[assignment,arg-type]
        with pytest.raises(GrowmoeError, match="cannot be read back"):
            greedy(built)
        bad.clear()
        assert torch.equal(greedy(built)[1], logits)


@needs_kernels
def test_a_budget_below_one_tokens_experts_is_refused() -> None:
    config = tiny_model(**MODELS["moe"]).config
    with pytest.raises(UsageError, match=r"hold 1 experts of .* visits 2 at a time; give at least"):
        Offload(config, "int4", 2 * PackedRecord(config, "int4").record.nbytes - 1)
    with pytest.raises(UsageError, match="dense"):
        Offload(tiny_config(), "int4", 1 << 30)


@needs_kernels
def test_an_engine_with_experts_on_disk_answers_the_same_and_outlives_a_failed_read(
    tmp_path: Path,
) -> None:
    write_tiny(tmp_path / "m", **MODELS["pr-moe"])
    prompts: list[str | list[int]] = [[1, 2, 3], [7] * 50, [5, 9]]
    sampling = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
    config = tiny_config(**MODELS["pr-moe"])
    budget = 3 * PackedRecord(config, "int4").record.nbytes

    def answers(llm: LLM) -> list[tuple[list[int], str | None]]:
        found = llm.generate(prompts, sampling)
        return [(answer.samples[0].token_ids, answer.error) for answer in found]

    wanted = answers(LLM(tmp_path / "m", "int4", max_sequences=4))
    llm = LLM(tmp_path / "m", "int4", max_sequences=4, expert_memory=budget)
    assert answers(llm) == wanted
    statistics = llm.expert_statistics()
    assert statistics is not None
    assert statistics["misses"] > 0
    store = llm._experts.store  # type: ignore[union-attr]
    bad = set(range(12))
    store._scratch = Broken(store._scratch, bad)  # type: ignore[assignment,arg-type]
    assert all("cannot be read back" in (error or "") for _, error in answers(llm))
    bad.clear()
    assert answers(llm) == wanted
    llm.close()
    assert all(error for _, error in answers(llm))
