"""The one-hot baseline against the definition: nothing dropped, then exactly the right rows."""

import pytest
import torch
import torch.nn.functional as F

from growmoe.ops.onehot import onehot_moe, slots_of

T, E, D, FF = 11, 5, 8, 6


def loop(x_TD, experts_TK, weights_TK, up_ERD, down_EDF, kept_TK) -> torch.Tensor:
    """Token by token and choice by choice."""
    rows = []
    for x, experts, weights, kept in zip(x_TD, experts_TK, weights_TK, kept_TK):
        y = torch.zeros_like(x)
        for expert, weight, keep in zip(experts, weights, kept):
            gate, up = F.linear(x, up_ERD[expert]).chunk(2)
            if keep:
                y = y + weight * F.linear(F.silu(gate) * up, down_EDF[expert])
        rows.append(y)
    return torch.stack(rows)


def example(K: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x, experts (distinct in a token), weights, up, down; float64 leaves."""
    g = torch.Generator().manual_seed(seed)
    experts_TK = torch.rand(T, E, generator=g).topk(K, dim=1).indices
    shapes = ((T, D), (T, K), (E, 2 * FF, D), (E, D, FF))
    x, weights, up, down = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    return x, experts_TK, weights, up, down


@pytest.mark.parametrize("K", [1, 2, 3])
def test_without_drops_it_is_the_loop(K: int) -> None:
    x, experts, weights, up, down = example(K)
    leaves = [t.requires_grad_() for t in (x, weights, up, down)]
    most = int(torch.bincount(experts.reshape(-1), minlength=E).max())
    y = onehot_moe(x, experts, weights, up, down, most)
    expected = loop(x, experts, weights, up, down, torch.ones(T, K, dtype=torch.bool))
    torch.testing.assert_close(y, expected)
    grad = torch.randn(T, D, dtype=torch.float64)
    for got, want in zip(
        torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    ):
        torch.testing.assert_close(got, want)


def test_first_choices_take_slots_before_second_ones() -> None:
    experts = torch.tensor([[0, 1], [0, 1], [1, 0], [2, 0]])
    assert slots_of(experts, 3).tolist() == [[0, 1], [1, 2], [0, 2], [0, 3]]


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_a_small_capacity_drops_the_late_choices_and_nothing_else(capacity: int) -> None:
    x, experts, weights, up, down = example(2, seed=1)
    kept, taken = torch.zeros(T, 2, dtype=torch.bool), [0] * E
    for choice in range(2):
        for token in range(T):
            expert = int(experts[token, choice])
            kept[token, choice] = taken[expert] < capacity
            taken[expert] += 1
    assert 0 < int(kept.sum()) < 2 * T
    y = onehot_moe(x, experts, weights, up, down, capacity)
    torch.testing.assert_close(y, loop(x, experts, weights, up, down, kept))
    lost = ~kept.any(1)
    assert not y[lost].any()
