"""The MoE layer against a plain loop: outputs, gradients, odd sizes, empty experts."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_config, tiny_model
from growmoe.models.config import MoEConfig
from growmoe.models.moe import MLP, MoE
from growmoe.ops.mapping import mapping_table, mapping_table_reference


def layer(E: int, k: int, F_: int = 24, seed: int = 0, **changes) -> tuple[MoE, MLP | None]:
    mix = changes.pop("mix", "none")
    moe = MoEConfig(
        experts=(E,) * 3, top_k=k, ffn_size=F_, mix=mix, fixed_ffn_size=0 if mix == "none" else 10,
        renormalize=changes.pop("renormalize", True),
    )  # fmt: skip
    block = tiny_model(seed, moe=moe, **changes).layers[1]
    return block.moe, block.mlp


def loop(moe: MoE, fixed: MLP | None, x_TD: torch.Tensor) -> torch.Tensor:
    """The definition, token by token and expert by expert."""
    rows = []
    for x in x_TD:
        probs = F.linear(x.to(torch.promote_types(x.dtype, torch.float32)), moe.router.weight)
        weights, chosen = probs.softmax(-1).topk(moe.config.top_k)
        if moe.config.renormalize:
            weights = weights / weights.sum()
        y = torch.zeros_like(x)
        for weight, expert in zip(weights, chosen):
            h = F.linear(x, moe.experts.up[expert])
            if moe.experts.up_bias is not None:
                h = h + moe.experts.up_bias[expert]
            if moe.experts.swiglu:
                gate, up = h.chunk(2)
                h = F.silu(gate) * up
            else:
                h = F.gelu(h, approximate="tanh")
            out = F.linear(h, moe.experts.down[expert])
            if moe.experts.down_bias is not None:
                out = out + moe.experts.down_bias[expert]
            y = y + weight.to(x.dtype) * out
        if fixed is not None:
            mixed = moe.mix(x) if moe.config.mix != "sum" else None
            if moe.config.mix == "sum":
                y = y + fixed(x)
            elif moe.config.mix == "sigmoid_gate":
                y = y + mixed.sigmoid() * fixed(x)
            else:
                share = mixed.softmax(-1)
                y = share[0] * y + share[1] * fixed(x)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("mix", ["none", "sum", "softmax2", "sigmoid_gate"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_equals_the_definition(mix: str, activation: str, renormalize: bool) -> None:
    moe, fixed = layer(
        5, 2, mix=mix, activation=activation, renormalize=renormalize, mlp_bias=activation == "gelu"
    )
    x = torch.randn(11, 36)
    y, routing = moe(x[None], fixed)
    assert torch.allclose(y[0], loop(moe, fixed, x), atol=1e-4)
    assert routing.counts_E.sum() == 22


sizes = st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(0, 30), st.integers(1, 13))


@given(sizes, st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_any_size_equals_the_definition(size: tuple[int, int, int, int], seed: int) -> None:
    """Odd widths (no grouped kernel), k = E, E = 1, one token, no token, experts without tokens."""
    E, k, T, width = size
    moe, _ = layer(E, min(k, E), F_=width, seed=seed)
    x = torch.randn(T, 36)
    y, _ = moe(x[None], None)
    expected = loop(moe, None, x) if T else x
    assert torch.allclose(y[0], expected, atol=1e-4)


@pytest.mark.parametrize("width", [24, 13])
def test_gradients_equal_the_definition(width: int) -> None:
    moe, _ = layer(4, 2, F_=width)
    x = torch.randn(9, 36)
    found = []
    for run in (lambda: moe(x[None], None)[0][0], lambda: loop(moe, None, x)):
        moe.zero_grad()
        run().square().sum().backward()
        found.append({name: p.grad.clone() for name, p in moe.named_parameters()})
    for name, grad in found[0].items():
        assert torch.allclose(grad, found[1][name], rtol=1e-3, atol=1e-3), name
    assert found[0]["router.weight"].abs().max() > 0


def test_gradcheck_in_float64() -> None:
    moe, _ = layer(3, 2, F_=5)
    moe = moe.double()
    x = torch.randn(4, 36, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: moe(x[None], None)[0], (x,), atol=1e-6)


def test_all_tokens_to_one_expert() -> None:
    moe, _ = layer(4, 1)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[2] = 1.0
    x = torch.rand(6, 36)
    y, routing = moe(x[None], None)
    assert routing.counts_E.tolist() == [0, 0, 6, 0]
    assert torch.allclose(y[0], loop(moe, None, x), atol=1e-4)


@given(st.lists(st.integers(0, 5), max_size=60), st.integers(1, 3))
def test_mapping_table_is_a_stable_sort(choices: list[int], k: int) -> None:
    choices = choices[: len(choices) // k * k]
    experts = torch.tensor(choices, dtype=torch.long).view(-1, k)
    table = mapping_table(experts, 6)
    assert table.counts_E.tolist() == [choices.count(e) for e in range(6)]
    assert table.order_S.tolist() == sorted(range(len(choices)), key=lambda i: choices[i])
    order, counts = mapping_table_reference(experts, 6)
    assert (order.tolist(), counts.tolist()) == (table.order_S.tolist(), table.counts_E.tolist())


def test_router_stays_in_float32_under_autocast() -> None:
    moe, _ = layer(4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = moe(torch.randn(1, 8, 36), None)
    assert routing.logits_TE.dtype == routing.weights_TK.dtype == torch.float32
    assert y.shape == (1, 8, 36)


@torch.no_grad()
def test_eval_is_deterministic_and_batches_agree() -> None:
    model = tiny_model(moe=MoEConfig(experts=(4, 4, 4), top_k=2, ffn_size=20))
    ids = torch.randint(0, 97, (3, 25))
    together = model(ids).logits
    assert torch.equal(together, model(ids).logits)
    for row in range(3):
        assert torch.allclose(model(ids[row : row + 1]).logits[0], together[row], atol=1e-4)
    assert tiny_config().moe is None
