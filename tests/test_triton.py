"""The Triton kernels against plain torch: on a GPU if there is one, else under the interpreter."""

import os
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.cuda.is_available()
if not GPU:
    # Triton reads this while it is imported, and growmoe.hf (by way of torch's inductor) may have
    # imported it before: then it is imported again, all but the C++ part, which cannot be.
    os.environ["TRITON_INTERPRET"] = "1"
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        if not name.startswith("triton._C"):
            del sys.modules[name]
pytest.importorskip("triton", reason="triton is not installed")

from growmoe.ops import triton_experts as experts  # noqa: E402
from growmoe.ops import triton_routing as routing  # noqa: E402

try:
    GPU or routing.route(torch.zeros(1, 1), 1)
except Exception as error:  # an older triton beside a newer numpy
    if "0-dimensional arrays" not in str(error):
        raise
    reason = "the interpreter of this triton cannot read the scalars of this numpy"
    pytest.skip(reason, allow_module_level=True)

DEVICE = "cuda" if GPU else "cpu"
NAMES = ("y", "x_TD", "weights_TK", "up_ERD", "down_EDF")
FLOAT32 = {"rtol": 1e-4, "atol": 2e-5}


# --- routing ---


def check_route(logits: Tensor, k: int, scoring: str, norm: bool, bias: Tensor | None) -> None:
    """Values, the sort and both gradients against the reference. Logits are multiples of 1/64:
    equal or far apart, because two exponential functions may order neighbours differently."""
    logits = (logits.mul(64).round() / 64).to(DEVICE).requires_grad_()
    bias = None if bias is None else bias.to(DEVICE)
    found = routing.route(logits, k, scoring, norm, bias)
    expected = routing.route_reference(logits, k, scoring, norm, bias)
    for value, right in zip(found, expected):
        assert value.dtype == right.dtype
        torch.testing.assert_close(value, right, **FLOAT32)
    order = routing.mapping_table(found.experts_TK, found.starts_BE)
    assert torch.equal(order, routing.mapping_table_reference(expected[2]))
    rng = torch.Generator().manual_seed(1)
    dscores, dweights = (torch.randn(t.shape, generator=rng).to(DEVICE) for t in found[:2])
    for pick in ([0], [1], [0, 1]):
        grads = [[dscores, dweights][i] for i in pick]
        outputs = [[out[i] for i in pick] for out in (found, expected)]
        (grad,) = torch.autograd.grad(outputs[0], logits, grads, retain_graph=True)
        (right,) = torch.autograd.grad(outputs[1], logits, grads, retain_graph=True)
        torch.testing.assert_close(grad, right, **FLOAT32)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_route_equals_its_reference(scoring: str, norm: bool, biased: bool) -> None:
    torch.manual_seed(0)
    check_route(torch.randn(40, 5), 2, scoring, norm, torch.randn(5) if biased else None)


@pytest.mark.parametrize(
    ("T", "E", "k"), [(40, 256, 8), (1, 8, 2), (0, 3, 2), (1, 1, 1), (9, 7, 7), (40, 1, 1)]
)
def test_route_at_the_edges(T: int, E: int, k: int) -> None:
    """Among them three blocks of tokens (E = 256), K = E, no token and one expert."""
    torch.manual_seed(0)
    check_route(torch.randn(T, E), k, "softmax", True, torch.randn(E))


@given(
    st.integers(0, 40), st.integers(1, 12), st.integers(1, 12), st.booleans(), st.integers(0, 99)
)
@settings(max_examples=12, deadline=None)
def test_any_route_equals_its_reference(T: int, E: int, k: int, softmax: bool, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    check_route(
        torch.randn(T, E, generator=rng), min(k, E), "softmax" if softmax else "sigmoid",
        seed % 2 == 0, torch.randn(E, generator=rng) if seed % 3 == 0 else None,
    )  # fmt: skip


def test_many_blocks_are_scanned_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 tokens in 20 blocks, more than one chunk of the scan holds; calls share the ticket."""
    ticket = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(routing, "_ticket", lambda device: ticket)
    monkeypatch.setattr(routing, "TILE_ELEMENTS", 16)
    monkeypatch.setattr(routing, "SCAN_BLOCKS", 4)
    torch.manual_seed(0)
    for _ in range(2):
        check_route(torch.randn(40, 6), 3, "softmax", True, None)
        assert ticket.item() == 0


def test_ties_go_to_the_lower_index() -> None:
    logits = torch.zeros(3, 6, device=DEVICE)
    logits[1, 4] = 1.0
    experts_TK = routing.route(logits, 3).experts_TK
    assert experts_TK.tolist() == [[0, 1, 2], [4, 0, 1], [0, 1, 2]]


def test_a_bias_moves_the_choice_and_not_the_weight() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]], device=DEVICE)
    bias = torch.tensor([-float("inf"), 0.0, 0.5], device=DEVICE)
    routed = routing.route(logits, 3, "sigmoid", False, bias)
    assert routed.experts_TK.tolist() == [[2, 1, 0]]
    torch.testing.assert_close(routed.weights_TK, logits.sigmoid().flip(1))


def test_extreme_logits_stay_inside() -> None:
    """A NaN or an infinity may spoil its own token; experts are distinct and counts add up."""
    logits = torch.randn(6, 5)
    logits[0] = float("nan")
    logits[1, 2] = float("nan")
    logits[2] = -float("inf")
    logits[3, 1] = float("inf")
    for scoring in ("softmax", "sigmoid"):
        routed = routing.route(logits.to(DEVICE), 3, scoring)
        assert all(len(set(row)) == 3 for row in routed.experts_TK.tolist())
        assert routed.experts_TK.min() >= 0
        assert routed.experts_TK.max() < 5
        assert routed.counts_E.sum() == 18
        assert routed.weights_TK[4:].isfinite().all()
    low = torch.full((2, 3), -1e4, device=DEVICE)
    assert routing.route(low, 2, "sigmoid").weights_TK.tolist() == [[0.0, 0.0]] * 2


def test_route_refuses_what_it_cannot_do() -> None:
    logits = torch.zeros(2, 3, device=DEVICE)
    assert routing.supported(logits)
    assert not routing.supported(logits.double())
    calls = [
        lambda: routing.route(logits, 4),
        lambda: routing.route(logits, 0),
        lambda: routing.route(logits.double(), 1),
        lambda: routing.route(logits, 1, "tanh"),
        lambda: routing.route(logits, 1, bias_E=logits),
        lambda: routing.mapping_table(logits.long(), torch.zeros(2, 3, dtype=torch.int32)),
    ]
    for call in calls:
        with pytest.raises(ValueError):
            call()


# --- experts ---


def table(choices_TK: Tensor, E: int, dropped: int = 0) -> tuple[Tensor, Tensor]:
    """A mapping table without `dropped` random rows; what lies past its end is poison."""
    order = routing.mapping_table_reference(choices_TK)
    keep = torch.ones(order.numel(), dtype=torch.bool)
    keep[torch.randperm(order.numel())[:dropped]] = False
    chosen = choices_TK.reshape(-1)[order]
    poison = torch.full((dropped,), -(10**12))
    counts = torch.bincount(chosen[keep], minlength=E)
    return torch.cat([order[keep], poison]).to(DEVICE), counts.to(DEVICE)


def choices(T: int, K: int, E: int) -> Tensor:
    rows = [torch.randperm(E)[:K] for _ in range(T)]
    return torch.stack(rows) if T else torch.zeros(0, K, dtype=torch.long)


def inputs(T: int, K: int, E: int, D: int, F: int, dtype: torch.dtype) -> list[Tensor]:
    made = [torch.randn(T, D), torch.rand(T, K), torch.randn(E, 2 * F, D), torch.randn(E, D, F)]
    scale = [1.0, 1.0, 0.3, 0.3]
    dtypes = [dtype, torch.float32, dtype, dtype]
    return [(t * s).to(DEVICE, d).requires_grad_() for t, s, d in zip(made, scale, dtypes)]


def run(f, order: Tensor, counts: Tensor, leaves: list[Tensor]) -> list[Tensor]:  # type: ignore
    """y and the gradients of all leaves for a fixed random dy."""
    x, weights, up, down = leaves
    y = f(x, order, counts, weights, up, down)
    rng = torch.Generator().manual_seed(7)
    dy = torch.randn(y.shape, generator=rng).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check_experts(
    order: Tensor, counts: Tensor, leaves: list[Tensor], **close: float
) -> list[Tensor]:
    """Outputs and gradients against a float32 reference; equal bits on a second run."""
    found = run(experts.moe_experts, order, counts, leaves)
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    expected = run(experts.moe_experts_reference, order, counts, wide)
    for name, value, right in zip(NAMES, found, expected):
        if close:  # by norm: single small elements of a sum may be off by the largest term
            error = (value.float() - right).norm() / right.norm().clamp_min(1e-9)
            assert error < close["relative"], f"{name}: {error}"
        else:
            torch.testing.assert_close(value, right, msg=lambda m, n=name: f"{n}: {m}", **FLOAT32)
    for value, leaf in zip(found[1:], leaves):
        assert value.dtype == leaf.dtype
    again = run(experts.moe_experts, order, counts, leaves)
    assert all(torch.equal(one, two) for one, two in zip(found, again))
    return found


@pytest.mark.parametrize(
    ("T", "K", "E", "D", "F"),
    [
        (7, 2, 4, 24, 16),
        (40, 2, 8, 40, 36),  # several steps of the summed axis, several column tiles
        (1, 2, 4, 9, 5),  # one token, odd sizes
        (0, 2, 4, 8, 8),  # no token
        (5, 3, 3, 33, 7),  # K = E
        (20, 1, 1, 8, 3),  # one expert, two row tiles
        (2, 3, 5, 1, 1),
    ],
)
def test_experts_equal_their_reference(T: int, K: int, E: int, D: int, F: int) -> None:
    torch.manual_seed(0)
    check_experts(*table(choices(T, K, E), E), inputs(T, K, E, D, F, torch.float32))


def test_256_experts_most_of_them_without_rows() -> None:
    torch.manual_seed(0)
    order, counts = table(choices(2, 4, 256), 256)
    found = check_experts(order, counts, inputs(2, 4, 256, 5, 3, torch.float32))
    for grad in found[3:]:
        assert not grad[counts == 0].any()


def test_all_tokens_to_one_expert() -> None:
    """Far more row tiles for one expert than its even share."""
    torch.manual_seed(0)
    order, counts = table(torch.full((40, 1), 2), 5)
    assert counts.tolist() == [0, 0, 40, 0, 0]
    found = check_experts(order, counts, inputs(40, 1, 5, 12, 6, torch.float32))
    for grad in found[3:]:
        assert not grad[[0, 1, 3, 4]].any()


@given(
    st.tuples(st.integers(0, 12), st.integers(1, 4), st.integers(1, 6)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(0, 100),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_any_size_equals_the_reference(
    rows: tuple[int, int, int], widths: tuple[int, int], percent_dropped: int
) -> None:
    """Sizes and capacities, with the same expert named twice by a token or not."""
    (T, K, E), (D, F) = rows, widths
    torch.manual_seed(D * F + percent_dropped)
    order, counts = table(torch.randint(E, (T, K)), E, T * K * percent_dropped // 100)
    check_experts(order, counts, inputs(T, K, E, D, F, torch.float32))


@pytest.mark.parametrize("dropped", [1, 11, 24])
def test_capacity_drops_rows_and_reads_nothing_of_them(dropped: int) -> None:
    """Tokens without a kept row, and weights of dropped rows, are NaN: none of it may show."""
    torch.manual_seed(0)
    order, counts = table(choices(12, 2, 4), 4, dropped)
    kept = torch.zeros(24, dtype=torch.bool, device=DEVICE)
    kept[order[: 24 - dropped]] = True
    kept = kept.view(12, 2)
    leaves = inputs(12, 2, 4, 24, 10, torch.float32)
    with torch.no_grad():
        leaves[0][~kept.any(1)] = float("nan")
        leaves[1][~kept] = float("nan")
        for w in leaves[2:]:
            w[counts == 0] = float("nan")
    y, dx, dweights, dup, ddown = check_experts(order, counts, leaves)
    assert not y[~kept.any(1)].any()
    assert not dx[~kept.any(1)].any()
    assert not dweights[~kept].any()
    assert dweights[kept].all()
    assert all(t.isfinite().all() for t in (y, dx, dweights, dup, ddown))
    # a table that ends where its rows end is the same table
    short = run(experts.moe_experts, order[: 24 - dropped], counts, leaves)
    for one, two in zip((y, dx, dweights, dup, ddown), short):
        torch.testing.assert_close(one, two, **FLOAT32)


def test_memory_left_by_others_does_not_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every uninitialised buffer starts as NaN, or as row numbers that look valid."""
    torch.manual_seed(0)
    order, counts = table(choices(9, 2, 3), 3, 7)
    leaves = inputs(9, 2, 3, 10, 6, torch.float32)
    clean = run(experts.moe_experts, order, counts, leaves)
    new_empty, empty_like = Tensor.new_empty, torch.empty_like

    def poisoned(made: Tensor) -> Tensor:
        if made.is_floating_point():
            return made.fill_(float("nan"))
        return made.copy_(torch.arange(made.numel()).view_as(made) % 11)

    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))
    dirty = run(experts.moe_experts, order, counts, leaves)
    assert all(torch.equal(one, two) for one, two in zip(clean, dirty))


def test_inputs_need_not_be_contiguous() -> None:
    torch.manual_seed(0)
    order, counts = table(choices(6, 2, 4), 4)
    leaves = inputs(6, 2, 4, 12, 10, torch.float32)
    strided = [leaf.detach().mT.contiguous().mT.requires_grad_() for leaf in leaves]
    assert not any(leaf.is_contiguous() for leaf in strided)
    for one, two in zip(
        check_experts(order, counts, leaves), check_experts(order, counts, strided)
    ):
        assert torch.equal(one, two)
    logits = torch.randn(8, 6, device=DEVICE)
    for one, two in zip(routing.route(logits.t(), 2), routing.route(logits.t().contiguous(), 2)):
        assert torch.equal(one, two)


def test_bfloat16_stays_near_float32() -> None:
    """The interpreter rounds to bfloat16 by cutting, hence the wide margin."""
    torch.manual_seed(0)
    order, counts = table(choices(20, 3, 5), 5, 9)
    found = check_experts(order, counts, inputs(20, 3, 5, 40, 20, torch.bfloat16), relative=3e-2)
    assert found[0].dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_every_tile_computes_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles of bfloat16, too large for these sizes to choose, and narrow ones."""
    torch.manual_seed(0)
    order, counts = table(choices(40, 2, 3), 3)
    for kernel in ("gated", "rows", "weights"):
        tile = experts.Tile(rows, 16, 16, 4, 2)
        monkeypatch.setitem(experts.TILES, (kernel, torch.float32), (tile,))
    check_experts(order, counts, inputs(40, 2, 3, 20, 35, torch.float32))


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    torch.manual_seed(0)
    order, counts = table(choices(6, 2, 4), 4)
    leaves = inputs(6, 2, 4, 12, 10, torch.float32)
    full = run(experts.moe_experts, order, counts, leaves)
    for asked in range(4):
        some = [leaf.detach().requires_grad_(i == asked) for i, leaf in enumerate(leaves)]
        x, weights, up, down = some
        y = experts.moe_experts(x, order, counts, weights, up, down)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y)
        y.backward(dy)
        assert [leaf.grad is not None for leaf in some] == [i == asked for i in range(4)]
        assert torch.equal(some[asked].grad, full[1 + asked])
    with torch.no_grad():
        assert torch.equal(experts.moe_experts(x, order, counts, weights, up, down), full[0])


def test_tiles_fit_the_shared_memory_of_an_sm80() -> None:
    for (kernel, dtype), tiles in experts.TILES.items():
        operands = 2 if kernel == "gated" else 1
        assert [tile.rows for tile in tiles] == sorted(tile.rows for tile in tiles)
        for tile in tiles:
            assert tile.shared_bytes(dtype.itemsize, operands) <= experts.SHARED_BYTES
    heights = [experts.choose_tile("rows", torch.bfloat16, n, 999, 999).rows for n in (1, 17, 999)]
    assert heights == [16, 32, 128]


def test_operands_are_widened_only_for_the_interpreter() -> None:
    tile = experts.TILES["rows", torch.bfloat16][0]
    upcast = experts._options(tile, 4, torch.bfloat16)["UPCAST"]
    assert upcast is (not GPU)
    assert experts.INTERPRETED is routing.INTERPRETED is (not GPU)
    assert not experts._options(tile, 4, torch.float32)["UPCAST"]


def test_experts_refuse_what_they_cannot_do() -> None:
    x, weights, up, down = inputs(3, 2, 4, 8, 6, torch.float32)
    order, counts = table(choices(3, 2, 4), 4)
    assert experts.supported(x, up, down)
    bad = [
        (x.double(), order, counts, weights, up, down),
        (x.bfloat16(), order, counts, weights, up, down),
        (x, order, counts, weights, up, down[:, :, :5]),
        (x, order, counts, weights, up[:, :11], down),
        (x[:, :7], order, counts, weights, up, down),
        (x[:2], order, counts, weights, up, down),
        (x, order, counts[:3], weights, up, down),
        (x, order.int(), counts, weights, up, down),
        (x, torch.cat([order, order]), counts, weights, up, down),
    ]
    for arguments in bad:
        with pytest.raises(ValueError):
            experts.moe_experts(*arguments)


# --- no host synchronisation ---


class NoSync(TorchDispatchMode):
    """Fails on operations that would wait for a GPU, or that the layer does not launch itself."""

    ALLOWED = ("empty", "new_empty", "empty_like", "detach", "view", "alias", "unbind", "select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore
        name = func.overloadpacket.__name__
        assert name in self.ALLOWED, f"{name} on the hot path"
        return func(*args, **(kwargs or {}))


def layer(
    logits: Tensor, x: Tensor, up: Tensor, down: Tensor, k: int
) -> tuple[Tensor, routing.Routed]:
    """From logits to outputs, the way a model would call it."""
    routed = routing.route(logits, k, "softmax", True, None)
    order = routing.mapping_table(routed.experts_TK, routed.starts_BE)
    return experts.moe_experts(x, order, routed.counts_E, routed.weights_TK, up, down), routed


def test_the_layer_launches_only_its_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """No .item(), no nonzero, no fill, no copy: only allocations between the launches. (The
    kernels themselves are left out here; the interpreter copies their arguments.)"""
    launched = []
    for module in (routing, experts):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            fake = type(
                "Fake", (), {"__getitem__": lambda s, g, n=name: lambda *a, **k: launched.append(n)}
            )
            monkeypatch.setattr(module, name, fake())
    leaves = inputs(4, 2, 3, 8, 6, torch.float32)
    logits = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    dy = torch.zeros(4, 8, device=DEVICE)
    with NoSync():
        y, _ = layer(logits, leaves[0], leaves[2], leaves[3], 2)
        assert launched == [
            "_route_kernel", "_scatter_kernel", "_gated_rows_kernel", "_scattered_rows_kernel",
            "_sum_rows_kernel",
        ]  # fmt: skip
        torch.autograd.grad(y, [logits, leaves[0], *leaves[2:]], dy)
    assert len(launched) == 5 + 6 + 1


@pytest.mark.parametrize("multiple_blocks", [False, True])
def test_the_whole_layer_has_the_gradients_of_plain_torch(
    multiple_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if multiple_blocks:
        monkeypatch.setattr(routing, "TILE_ELEMENTS", 32)
    torch.manual_seed(0)
    x, _, up, down = inputs(13, 2, 5, 12, 9, torch.float32)
    router = torch.randn(5, 12, device=DEVICE, requires_grad=True)
    leaves = [x, up, down, router]

    y, routed = layer(x @ router.T, x, up, down, 2)
    loss = y.square().sum() + (routed.scores_TE.mean(0) * routed.counts_E).sum()
    found = torch.autograd.grad(loss, leaves)

    scores, weights, chosen, counts, _ = routing.route_reference(x @ router.T, 2)
    order = routing.mapping_table_reference(chosen)
    y = experts.moe_experts_reference(x, order, counts, weights, up, down)
    expected = torch.autograd.grad(y.square().sum() + (scores.mean(0) * counts).sum(), leaves)
    for value, right in zip(found, expected):
        torch.testing.assert_close(value, right, rtol=1e-3, atol=1e-3)


# --- only on a GPU ---


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("T", "K", "E", "D", "F"),
    [(1, 2, 8, 256, 512), (64, 8, 64, 512, 384), (2048, 2, 8, 1024, 704), (333, 3, 7, 257, 129)],
)
def test_bfloat16_on_tensor_cores(T: int, K: int, E: int, D: int, F: int) -> None:
    torch.manual_seed(0)
    leaves = inputs(T, K, E, D, F, torch.bfloat16)
    with torch.no_grad():
        leaves[2].mul_(3 / D**0.5)
        leaves[3].mul_(3 / F**0.5)
    check_experts(*table(choices(T, K, E), E, T * K // 10), leaves, relative=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("T", "E", "k"), [(1, 64, 8), (4096, 64, 8), (5000, 256, 8), (70000, 7, 2)]
)
def test_route_with_blocks_that_race(T: int, E: int, k: int) -> None:
    """Many blocks finish in any order; the ticket must be zero again for the next call."""
    torch.manual_seed(0)
    for _ in range(20):
        check_route(torch.randn(T, E), k, "sigmoid", True, None)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_the_layer_never_waits_for_the_gpu_and_can_be_captured() -> None:
    torch.manual_seed(0)
    x, _, up, down = inputs(3000, 2, 8, 256, 128, torch.bfloat16)
    logits = torch.randn(3000, 8, device=DEVICE, requires_grad=True)
    layer(logits, x, up, down, 2)[0].sum().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(logits, x, up, down, 2)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.no_grad():
        expected = layer(logits, x, up, down, 2)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(logits, x, up, down, 2)[0]
        for _ in range(3):
            captured.zero_()
            graph.replay()
            assert torch.equal(captured, expected)
