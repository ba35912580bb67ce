"""The expert operation against its reference: all implementations, awkward sizes, gradients."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growmoe.ops import cpu_experts, products
from growmoe.ops.experts import (
    ExpertWeights,
    expert_mlp,
    expert_mlp_reference,
    grouped_experts,
)
from growmoe.ops.linear import Linear, linear
from growmoe.ops.mapping import MappingTable, mapping_table, with_capacity

Case = tuple[torch.Tensor, MappingTable, torch.Tensor, ExpertWeights]


def case(
    T: int, E: int, K: int, D: int, width: int, *, dtype: torch.dtype = torch.float64,
    gelu: bool = False, bias: bool = False, seed: int = 0, limit: int | None = None,
    experts: torch.Tensor | None = None,
) -> Case:  # fmt: skip
    rng = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=rng) * 0.4).to(dtype).requires_grad_()

    rows = width if gelu else 2 * width
    if experts is None:
        experts = torch.rand(T, E, generator=rng).topk(K, dim=1).indices
    weights = torch.rand(T, K, generator=rng)
    table = mapping_table(experts, E)
    if limit is not None:
        table = with_capacity(experts, weights, E, limit, "position")
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    w = ExpertWeights(
        made(E, rows, D), made(E, D, width), made(E, rows) if bias else None,
        made(E, D) if bias else None,
    )  # fmt: skip
    return made(T, D), table, weights.to(wide).requires_grad_(), w


def compare(found, made: Case, activation: str, tolerance: float) -> None:
    """Outputs and all gradients of `found` and of the reference."""
    x, table, weights, w = made
    leaves = [t for t in (x, weights, *w) if t is not None]
    results = []
    for function in (found, expert_mlp_reference):
        y = function(x, table, weights, w, activation)
        coefficients = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        grads = torch.autograd.grad(y, leaves, coefficients) if y.numel() else []
        results.append([y, *grads])
    for got, want in zip(*results):
        assert got.dtype == want.dtype
        scale = float(want.detach().abs().max()) if want.numel() else 0.0
        assert torch.allclose(got, want, rtol=tolerance, atol=tolerance * max(scale, 1e-6))


SIZES = [
    # T, E, K, D, width
    (1, 1, 1, 3, 5),  # E = 1, one token, odd widths
    (1, 256, 4, 8, 8),  # 256 experts, nearly all without tokens
    (40, 256, 8, 4, 3),
    (7, 3, 3, 5, 7),  # k = E
    (33, 8, 2, 16, 12),
    (64, 4, 1, 16, 8),
    (0, 4, 2, 8, 8),  # no token
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("gelu", "bias"), [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize("function", [expert_mlp, grouped_experts])
def test_equals_the_reference_in_float64(function, size, gelu: bool, bias: bool) -> None:
    made = case(*size, gelu=gelu, bias=bias)
    compare(function, made, "gelu" if gelu else "swiglu", 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(50, 6, 2, 32, 24), (50, 6, 2, 31, 23), (9, 40, 4, 32, 16)])
def test_equals_the_reference_in_narrower_types(dtype: torch.dtype, size) -> None:
    compare(expert_mlp, case(*size, dtype=dtype), "swiglu", 1e-4 if dtype.itemsize == 4 else 5e-2)


@pytest.mark.parametrize("function", [expert_mlp, grouped_experts])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_tokens_to_one_expert(function, dtype: torch.dtype) -> None:
    experts = torch.full((12, 1), 2)
    compare(function, case(12, 5, 1, 8, 8, dtype=dtype, experts=experts), "swiglu", 1e-4)


@pytest.mark.parametrize("function", [expert_mlp, grouped_experts])
@pytest.mark.parametrize("limit", [1, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dropped_rows_add_nothing_and_get_no_gradient(function, limit: int, dtype) -> None:
    made = case(20, 4, 2, 8, 12, limit=limit, dtype=dtype)
    compare(function, made, "swiglu", 1e-4)


@given(
    st.integers(0, 12), st.integers(1, 9), st.integers(1, 4), st.integers(1, 9),
    st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 99),
    st.one_of(st.none(), st.integers(1, 6)),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_size(T, E, K, D, width, gelu, bias, seed, limit) -> None:
    made = case(T, E, min(K, E), D, width, gelu=gelu, bias=bias, seed=seed, limit=limit)
    compare(expert_mlp, made, "gelu" if gelu else "swiglu", 1e-9)


def test_gradcheck() -> None:
    x, table, weights, w = case(6, 4, 2, 3, 5, bias=True)
    assert torch.autograd.gradcheck(
        lambda x, weights, *w: expert_mlp(x, table, weights, ExpertWeights(*w), "swiglu"),
        (x, weights, *w), atol=1e-6,
    )  # fmt: skip


def test_the_grouped_strategy_is_the_looped_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made = case(30, 40, 2, 32, 16, dtype=torch.bfloat16)
    used = []
    real = cpu_experts._forward_grouped
    monkeypatch.setattr(
        cpu_experts, "_forward_grouped", lambda *a: used.append(1) or real(*a)
    )  # fmt: skip
    compare(expert_mlp, made, "swiglu", 5e-2)
    assert used  # few rows for many experts
    monkeypatch.setattr(cpu_experts, "_grouped_is_faster", lambda *_: False)
    compare(expert_mlp, made, "swiglu", 5e-2)
    assert len(used) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_contiguous(dtype: torch.dtype) -> None:
    x, table, weights, w = case(20, 4, 2, 16, 12, dtype=dtype)
    turned = [t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in w[:2]]
    assert not any(t.is_contiguous() for t in turned)
    made = (x.detach().t().contiguous().t().requires_grad_(), table, weights,
            ExpertWeights(*(t.requires_grad_() for t in turned)))  # fmt: skip
    compare(expert_mlp, made, "swiglu", 1e-4 if dtype is torch.float32 else 5e-2)
    for function in (expert_mlp, grouped_experts):
        plain = function(x, table, weights, w, "swiglu")
        assert torch.allclose(function(*made, "swiglu"), plain, rtol=1e-2, atol=1e-3)


def test_weights_in_a_memory_mapped_file_at_an_odd_place(tmp_path) -> None:
    x, table, weights, w = case(20, 4, 2, 16, 12, dtype=torch.float32)
    mapped = []
    for number, tensor in enumerate(w[:2]):
        file = np.memmap(tmp_path / str(number), np.uint8, "w+", shape=(tensor.numel() * 4 + 4,))
        file[4:] = tensor.detach().numpy().reshape(-1).view(np.uint8)  # 4 bytes off alignment
        mapped.append(torch.from_numpy(file[4:].view(np.float32)).view(tensor.shape))
    assert mapped[0].data_ptr() % 16 == 4
    made = (x, table, weights, ExpertWeights(*(t.requires_grad_() for t in mapped)))
    for function in (expert_mlp, grouped_experts):
        compare(function, made, "swiglu", 1e-4)


def test_an_expanded_gradient_is_understood() -> None:
    """`sum().backward()` hands down a gradient of stride 0, which torch's grouped_mm refuses."""
    x, table, weights, w = case(30, 40, 2, 32, 16, dtype=torch.bfloat16)
    expert_mlp(x, table, weights, w, "swiglu").sum().backward()
    assert w.up_ERD.grad.abs().sum() > 0


def test_only_what_is_kept_is_in_memory() -> None:
    """Backward needs the pre-activations and the outputs, not the activations."""
    x, table, weights, w = case(64, 4, 2, 8, 32, dtype=torch.float32)
    y = expert_mlp(x, table, weights, w, "swiglu")
    inputs = {t.data_ptr() for t in (x, weights, *w[:2])}
    saved = [t for t in y.grad_fn.saved_tensors if t is not None and t.is_floating_point()]
    kept = sum(t.numel() for t in saved if t.data_ptr() not in inputs)
    S = 64 * 2
    assert kept == S * 64 + S * 8  # [S,2F] and [S,D]


@pytest.mark.parametrize("E", [4, 40])  # the loop, and the grouped product
@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_what_is_frozen_gets_no_gradient(frozen: int, E: int) -> None:
    x, table, weights, w = case(30, E, 2, 32, 16, dtype=torch.bfloat16)
    leaves = [x, weights, w.up_ERD, w.down_EDF]
    full = torch.autograd.grad(expert_mlp(x, table, weights, w, "swiglu").float().sum(), leaves)
    leaves[frozen].requires_grad_(False)
    expert_mlp(x, table, weights, w, "swiglu").float().sum().backward()
    for number, (leaf, want) in enumerate(zip(leaves, full)):
        if number == frozen:
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, want)


def test_no_gradient_mode_gives_the_same() -> None:
    x, table, weights, w = case(30, 5, 2, 16, 12, dtype=torch.float32)
    y = expert_mlp(x, table, weights, w, "swiglu")
    with torch.no_grad():
        assert torch.equal(expert_mlp(x, table, weights, w, "swiglu"), y)


# ---- the products underneath ----


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 33])
@pytest.mark.parametrize("fast", [True, False])
def test_products(rows: int, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setattr(products, "onednn", lambda: False)
    rng = torch.Generator().manual_seed(rows)
    x, y, w, b = (torch.randn(s, generator=rng) for s in ((rows, 37), (rows, 19), (19, 37), (19,)))
    exact = [t.double() for t in (x, y, w, b)]
    expected = exact[0] @ exact[2].t() + exact[3]
    for out in (None, torch.empty(rows, 19)):
        found = products.times_transposed(x, w, b, out)
        assert torch.allclose(found.double(), expected, atol=1e-5)
    for out in (None, torch.empty(rows, 37)):
        assert torch.allclose(products.times(y, w, out).double(), exact[1] @ exact[2], atol=1e-5)
    for out in (None, torch.empty(19, 37)):
        found = products.outer(y, x, out)
        assert torch.allclose(found.double(), exact[1].t() @ exact[0], atol=1e-5)


def test_without_onednn_everything_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    made = case(40, 4, 2, 32, 24, dtype=torch.float32)
    monkeypatch.setattr(products, "onednn", lambda: False)
    compare(expert_mlp, made, "swiglu", 1e-4)


@pytest.mark.parametrize(
    ("bias", "shape"), itertools.product([True, False], [(700, 64), (2, 350, 64), (1, 1, 64)])
)
def test_linear_is_nn_linear(bias: bool, shape: tuple[int, ...]) -> None:
    layer = Linear(64, 96, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    leaves = [x, *layer.parameters()]
    results = []
    for function in (linear, torch.nn.functional.linear):
        y = function(x, layer.weight, layer.bias)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for got, want in zip(*results):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        assert torch.allclose(layer(x), results[0][0], atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16


def test_linear_in_float64_is_exact() -> None:
    layer = Linear(64, 96).double()
    x = torch.randn(700, 64, dtype=torch.float64)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
