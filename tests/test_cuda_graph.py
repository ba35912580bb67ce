"""Decoding steps on static buffers: padding changes nothing, replaying is running, no host waits.

Recording is here `as_it_is`, which runs the same work on the same buffers; the kernels are Triton's
under its interpreter. Tests marked gpu record real graphs.
"""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

# the first import of growmoe's kernels: it turns the interpreter on
from test_triton import DEVICE, GPU

# isort: split

from conftest import tiny_config, tiny_model
from growmoe.errors import GrowmoeError, UsageError
from growmoe.inference import cuda_graph
from growmoe.inference import llm as llm_module
from growmoe.inference.cuda_graph import GraphRunner, Work, as_it_is, runner_for
from growmoe.inference.llm import LLM
from growmoe.inference.loading import Loaded
from growmoe.inference.paged import PagedCache, Span
from growmoe.inference.requests import Sampling
from growmoe.inference.runner import Runner
from growmoe.inference.scheduler import Step
from growmoe.models.checkpoint import load_model
from growmoe.models.config import MoEConfig
from growmoe.models.transformer import Transformer
from growmoe.ops import triton_direct, triton_experts, triton_paged, triton_routing

CLOSE = {"rtol": 2e-4, "atol": 2e-4}
MOE = MoEConfig(experts=(4, 16), top_k=2, ffn_size=12, mix="sum", fixed_ffn_size=20)
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"sliding_window": 11, "qk_norm": True, "num_layers": 1},
    "learned": {
        "positions": "learned", "norm": "layer", "activation": "gelu", "mlp_bias": True,
        "qkv_bias": True, "num_layers": 1,
    },
    "moe": {"moe": MOE, "num_layers": 2},
    "gelu-moe": {
        "moe": MoEConfig(experts=(4,), top_k=2, ffn_size=13), "num_layers": 1,
        "activation": "gelu", "mlp_bias": True,
    },
    "groups": {
        "moe": MoEConfig(
            experts=(8,), top_k=2, ffn_size=12, groups=4, top_groups=2, scoring="sigmoid",
            selection_bias=True,
        ),
        "num_layers": 1,
    },
}  # fmt: skip


@pytest.fixture
def triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the way of CUDA's."""
    for module in ("inference.paged", "inference.cuda_graph", "ops.experts", "models.router"):
        monkeypatch.setattr(f"growmoe.{module}.on_triton", lambda x: True)
    monkeypatch.setattr("growmoe.ops.experts.plain_cpu", lambda x: False)


def steps(seed: int, *rounds: list[tuple[int, int]]) -> Iterator[Step]:
    """Steps of (text, new tokens) per round; every text has its own blocks, out of order."""
    rng = torch.Generator().manual_seed(seed)
    texts: dict[int, list[int]] = {}
    computed: dict[int, int] = {}
    order = torch.randperm(40, generator=rng).tolist()
    for cells in rounds:
        step = Step()
        for text, count in cells:
            tokens = texts.setdefault(text, [])
            tokens += torch.randint(0, 97, (count,), generator=rng).tolist()
            start = computed.get(text, 0)
            computed[text] = start + count
            table = [order[text * 5 + i] for i in range(-(-computed[text] // 16))]
            step.sequences.append(SimpleNamespace(tokens=tokens))  # type: ignore[arg-type]
            step.spans.append(Span(start, count, table))
        yield step


ROUNDS = (
    [(0, 15), (1, 3), (2, 1)],  # prompts
    [(0, 1), (1, 1), (2, 1)],  # three rows in a bucket of four; text 0 ends its block
    [(2, 1), (1, 1)],  # another order, another bucket
    [(1, 1), (0, 1), (3, 1), (2, 1), (4, 1)],  # new texts begin with one token; five in eight
    [(4, 3), (0, 1)],  # mixed: not a decoding step
    [(4, 1)],
    [(0, 1), (4, 1), (1, 1)],  # fewer than before in the same buffers
)


def pair(model: Transformer, record: Any = as_it_is) -> tuple[Runner, GraphRunner]:
    caches = [PagedCache(model.config, 41, torch.float32, DEVICE) for _ in range(2)]
    return Runner(model, caches[0]), GraphRunner(model, caches[1], record)


@pytest.mark.parametrize("kind", KINDS)
def test_replaying_is_running(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and blocks after every step as the plain runner has them, by torch alone."""
    model = tiny_model(**KINDS[kind]).to(DEVICE)
    eager, graphs = pair(model)
    expected, rounds = [], ROUNDS if kind == "dense" else ROUNDS[:4]
    for step in steps(1, *rounds):
        expected.append(eager.run(step).clone())
    if not GPU:
        triton_everywhere.__wrapped__(monkeypatch)  # type: ignore[attr-defined]
    for step, right in zip(steps(1, *rounds), expected):
        torch.testing.assert_close(graphs.run(step), right, **CLOSE)
    for ours, theirs in zip(graphs.cache.keys, eager.cache.keys):
        torch.testing.assert_close(ours[:40], theirs[:40], **CLOSE)


def test_a_bucket_is_recorded_once_and_on_padding(triton_everywhere: None) -> None:
    """While it is recorded no text's block may change: its tables are all padding."""
    recorded: list[int] = []

    def record(work: Work) -> Work:
        before = [blocks[:40].clone() for blocks in (*graphs.cache.keys, *graphs.cache.values)]
        work()
        after = [blocks[:40] for blocks in (*graphs.cache.keys, *graphs.cache.values)]
        assert all(torch.equal(one, two) for one, two in zip(before, after))
        recorded.append(len(graphs._recorded))
        return work

    _, graphs = pair(tiny_model(num_layers=1).to(DEVICE), record)
    for step in steps(1, *ROUNDS):
        graphs.run(step)
    assert recorded == [0, 1, 2, 3]
    assert list(graphs._recorded) == [4, 2, 8, 1]


def test_a_bucket_larger_than_the_step_changes_nothing(
    triton_everywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket of 8 gives the logits of one of 4, whatever an earlier step left in its rows."""
    model = tiny_model(num_layers=1).to(DEVICE)
    found = []
    for bucket in (4, 8):
        monkeypatch.setattr(cuda_graph, "BUCKETS", (bucket, 8))
        _, graphs = pair(model)
        graphs._host_2N.fill_(20)  # as an earlier, larger step would leave them
        graphs._host_NM.fill_(3)
        found.append([graphs.run(step).clone() for step in steps(1, *ROUNDS[:3])])
        assert list(graphs._recorded) == [bucket]
        used = {block for step in steps(1, *ROUNDS[:3]) for s in step.spans for block in s.table}
        free = [block for block in range(40) if block not in used]
        assert not graphs.cache.keys[0][free].any()  # what belongs to others
    for one, two in zip(*found):
        torch.testing.assert_close(one, two, **CLOSE)


def test_more_rows_than_the_largest_bucket_run_as_they_are(
    triton_everywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graph, "BUCKETS", (1, 2))
    _, graphs = pair(tiny_model(num_layers=1).to(DEVICE))
    for step in steps(1, [(0, 1), (1, 1), (2, 1)]):
        assert graphs.run(step).shape == (3, 97)
    assert not graphs._recorded


def test_positions_that_a_model_has_not_are_refused(triton_everywhere: None) -> None:
    model = tiny_model(num_layers=1, positions="learned", max_positions=20).to(DEVICE)
    _, graphs = pair(model)
    step = Step([SimpleNamespace(tokens=[1] * 21)], [Span(20, 1, [0, 1])])  # type: ignore[list-item]
    with pytest.raises(GrowmoeError, match="only 20 positions"):
        graphs.run(step)


def test_the_engine_answers_the_same_with_graphs(
    triton_everywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and sampled texts that come, end and share prompts, by way of LLM."""
    moe = MoEConfig(experts=(4,), top_k=2, ffn_size=12)
    model = tiny_model(moe=moe, num_layers=1)
    rng = torch.Generator().manual_seed(0)
    asked = [torch.randint(0, 97, (n,), generator=rng).tolist() for n in (3, 17, 3)]
    ways = [
        Sampling(max_tokens=4, temperature=0), Sampling(max_tokens=3, temperature=0, logprobs=2),
        Sampling(max_tokens=2, seed=4, n=2, repetition_penalty=1.3),
    ]  # fmt: skip
    found = []
    for make in (Runner, lambda model, cache: GraphRunner(model, cache, as_it_is)):
        monkeypatch.setattr(llm_module, "runner_for", make)
        loaded = Loaded("tiny", model, None, frozenset(), torch.float32)
        answers = LLM(loaded, kv_gb=0.001, max_sequences=3, step_tokens=20).generate(asked, ways)
        found.append([[sample.token_ids for sample in answer.samples] for answer in answers])
        assert not any(answer.error for answer in answers)
    assert found[0] == found[1]


def test_who_gets_graphs() -> None:
    model = tiny_model(num_layers=1)
    runner = runner_for(model, PagedCache(model.config, 2, torch.float32))
    assert type(runner) is Runner
    if not GPU:
        with pytest.raises(UsageError, match="needs a GPU"):
            LLM(Loaded("tiny", model, None, frozenset(), torch.float32), device="cuda")


def test_the_benchmark_decodes_as_transformers_does(
    triton_everywhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of gpu_decode.py but the GPU and its clock: the same logits, then the same tokens."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    bench, random_mixtral = map(importlib.import_module, ("gpu_decode", "random_mixtral"))
    sizes = random_mixtral.Sizes(
        hidden=32, layers=1, heads=4, kv_heads=2, experts=4, ffn=16, vocab=400
    )
    folder = random_mixtral.Model(tmp_path, sizes).directory("float32")
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [[1, 2, 3], [7, 6, 5]]
    model = load_model(folder, "float32")
    decodings = [
        bench.ours(model.to(DEVICE), as_it_is, DEVICE, prompts),
        *(
            bench.theirs(peer.to(DEVICE), name, DEVICE, prompts)
            for name in ("grouped_mm", "batched_mm")
        ),
    ]
    firsts, tokens = zip(*map(next, decodings))
    bench.compare(dict(zip("abc", firsts)), 2)
    with pytest.raises(GrowmoeError, match="b differs from a at batch 2"):
        bench.compare({"a": firsts[0], "b": firsts[0].flip(1)}, 2)
    for _ in range(3):
        assert tokens[0] == tokens[1] == tokens[2]
        nothing, tokens = zip(*map(next, decodings))
        assert nothing == (None,) * 3


# --- nothing waits for the device ---


class OnlyDevice(TorchDispatchMode):
    """Every tensor of every operation is on the device: no copy from or to the host, no value asked
    for. The device is torch's `meta`, which has no values to give: it refuses .item() and whatever
    has as many elements as contents say."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore
        name = func.overloadpacket.__name__
        self.seen.add(name)
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        assert all(tensor.device.type == "meta" for tensor in tensors), f"{name} on the host"
        return out


class NoLaunch:
    """A kernel that is not run, but counted."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: self.launched.append(self.name)


@pytest.mark.skipif(GPU, reason="the same is checked with real tensors there")
@pytest.mark.parametrize("bucket", [1, 8, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_decoding_step_never_waits(
    kind: str, bucket: int, triton_everywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole recorded work: router, experts, attention and cache; only kernels are left out."""
    launched: list[str] = []
    for module in (triton_routing, triton_experts, triton_direct, triton_paged):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, NoLaunch(name, launched))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: False)  # unknown to meta
    config = tiny_config(**KINDS[kind])
    with torch.device("meta"):
        model = Transformer(config).eval()
    cache = PagedCache(config, 5, torch.float32, "meta")
    work = GraphRunner(model, cache, as_it_is)._work(bucket)
    with torch.inference_mode():
        work()  # as before recording: copies that are made once
        launched.clear()
        with OnlyDevice() as only:
            work()
    assert "embedding" in only.seen
    per_layer = [name for name in launched if name in ("_write_kernel", "_attend_kernel")]
    assert per_layer == ["_write_kernel", "_attend_kernel"] * config.num_layers
    routed = sum(1 for count in config.moe.experts if count) if config.moe else 0
    ends = [name for name in launched if name in ("_direct_down_kernel", "_sum_rows_kernel")]
    assert len(ends) == routed


# --- only on a GPU ---


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_is_the_same_work(kind: str, dtype: torch.dtype) -> None:
    """Bits of real graphs against the same work run as it is, on the same buffers' contents."""
    model = tiny_model(**{"hidden_size": 64, "num_heads": 8, "num_kv_heads": 2, "head_dim": 16,
                          **KINDS[kind]}).to("cuda", dtype)  # fmt: skip
    found = []
    for record in (as_it_is, cuda_graph.cuda_graphs()):
        graphs = GraphRunner(model, PagedCache(model.config, 41, dtype, "cuda"), record)
        found.append([graphs.run(step).clone() for step in steps(1, *ROUNDS, *ROUNDS[5:])])
    for one, two in zip(*found):
        assert torch.equal(one, two)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_a_replayed_step_does_not_wait() -> None:
    """No synchronisation in run() but that of who reads the logits."""
    model = tiny_model(moe=MOE, num_layers=2).to("cuda", torch.bfloat16)
    cache = PagedCache(model.config, 41, torch.bfloat16, "cuda")
    graphs = GraphRunner(model, cache, cuda_graph.cuda_graphs())
    for step in steps(1, *ROUNDS):
        graphs.run(step)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in steps(1, *ROUNDS[1:4]):
            graphs.run(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_an_llm_on_a_gpu_answers_as_on_a_cpu() -> None:
    found = []
    for device in ("cpu", "cuda"):
        loaded = Loaded("tiny", tiny_model(moe=MOE, num_layers=2), None, frozenset(), torch.float32)
        llm = LLM(loaded, kv_gb=0.001, device=device)
        found.append([answer.token_ids for answer in llm.generate(
            [[1, 2, 3], [5] * 20, [7]],
            [Sampling(max_tokens=12, temperature=0), Sampling(max_tokens=9, seed=3),
             Sampling(max_tokens=9, temperature=0, logprobs=1, repetition_penalty=1.2)],
        )])  # fmt: skip
    assert found[0] == found[1]
