"""The router: who is chosen and with what weight, capacity, groups, bias, jitter, determinism."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_config, tiny_model
from growmoe.errors import GrowmoeError
from growmoe.models.config import MoEConfig
from growmoe.models.router import Router, RoutingPolicy, routers, set_policy
from growmoe.ops.mapping import capacity, mapping_table, with_capacity


def router(E: int = 6, seed: int = 0, experts: int | None = None, **moe) -> Router:
    options = {"experts": (E,) * 3, "top_k": 2, "ffn_size": 8, **moe}
    made = Router(tiny_config(moe=MoEConfig(**options)), E)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.weight.normal_(0, 0.5, generator=rng)
        if made.bias is not None:
            made.bias.normal_(0, 0.3, generator=rng)
    return made.eval()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_weights_are_the_scores_of_the_best(scoring: str, renormalize: bool, k: int) -> None:
    made = router(scoring=scoring, renormalize=renormalize, top_k=k)
    x = torch.randn(9, 36)
    routing, table = made(x)
    for t in range(9):
        logits = made.weight.double() @ x[t].double()
        scores = logits.softmax(0) if scoring == "softmax" else logits.sigmoid()
        best = sorted(range(6), key=lambda e: -scores[e])[:k]
        assert routing.experts_TK[t].tolist() == best
        expected = scores[best] / scores[best].sum() if renormalize else scores[best]
        assert torch.allclose(routing.weights_TK[t].double(), expected, atol=1e-6)
    assert routing.probs_TE.sum(1).tolist() == pytest.approx([1.0] * 9)
    assert torch.equal(table.counts_E, routing.counts_E)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_it_computes_in_float32_or_wider(dtype: torch.dtype) -> None:
    made = router().to(dtype)
    routing, _ = made(torch.randn(4, 36).to(dtype))
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert routing.logits_TE.dtype == routing.scores_TE.dtype == routing.weights_TK.dtype == wide


def test_a_selection_bias_moves_the_choice_and_not_the_weight() -> None:
    made = router(selection_bias=True, top_k=1, renormalize=False)
    x = torch.randn(20, 36)
    with torch.no_grad():
        made.bias.zero_()
        made.bias[3] = 2.0  # above every softmax score
    routing, _ = made(x)
    assert (routing.experts_TK == 3).all()
    assert torch.equal(routing.weights_TK[:, 0], routing.scores_TE[:, 3])
    routing.weights_TK.sum().backward()
    assert made.bias.grad is None
    assert made.weight.grad.abs().sum() > 0


def test_a_shift_of_nothing_changes_nothing() -> None:
    made = router()
    x = torch.randn(20, 36)
    plain, _ = made(x)
    made.shift_E = torch.zeros(6)
    shifted, _ = made(x)
    assert torch.equal(plain.experts_TK, shifted.experts_TK)
    assert torch.equal(plain.weights_TK, shifted.weights_TK)


@pytest.mark.parametrize(("groups", "chosen", "k"), [(3, 1, 2), (3, 2, 2), (2, 1, 3), (3, 3, 4)])
def test_only_the_best_groups_are_visited(groups: int, chosen: int, k: int) -> None:
    made = router(groups=groups, top_groups=chosen, top_k=k, scoring="sigmoid", selection_bias=True)
    routing, _ = made(torch.randn(30, 36))
    size, best = 6 // groups, max(1, k // chosen)
    for t in range(30):
        scores = routing.scores_TE[t] + made.bias
        parts = scores.view(groups, size)
        worth = parts.sort(1, descending=True).values[:, :best].sum(1)
        open_groups = set(worth.topk(chosen).indices.tolist())
        inside = [e for e in range(6) if e // size in open_groups]
        expected = sorted(inside, key=lambda e: -scores[e])[:k]
        assert routing.experts_TK[t].tolist() == expected


@pytest.mark.parametrize(
    ("moe", "words"),
    [
        ({"groups": 4}, "6 experts are not a multiple of groups 4"),
        ({"groups": 3, "top_groups": 4}, "top_groups 4 is not between 1 and groups 3"),
        ({"groups": 3, "top_groups": 1, "top_k": 3}, "hold fewer than top_k 3"),
    ],
)
def test_impossible_groups_are_refused(moe: dict, words: str) -> None:
    with pytest.raises(GrowmoeError, match=words):
        router(**moe)


def test_jitter_is_for_training_only() -> None:
    made = router()
    made.policy = RoutingPolicy(jitter=0.2)
    x = torch.randn(50, 36)
    assert torch.equal(made(x)[0].logits_TE, made(x)[0].logits_TE)
    quiet = made(x)[0].logits_TE
    made.train()
    first, second = made(x)[0].logits_TE, made(x)[0].logits_TE
    assert not torch.equal(first, second)
    # |x_i| changes by at most a fifth, so no logit moves by more than a fifth of sum |w_i x_i|
    bound = 0.2 * x.abs() @ made.weight.abs().t()
    assert ((first - quiet).abs() <= bound + 1e-5).all()
    assert (first - quiet).abs().max() > 0.01


# ---- capacity ----


def dropped_by_hand(experts, weights, E: int, limit: int, drop: str) -> set[int]:
    """Flat indices that do not fit, choice by choice in order of priority."""
    T, K = experts.shape
    flat = [(t, j) for j in range(K) for t in range(T)]
    if drop == "probability":
        flat = sorted(((t, j) for t in range(T) for j in range(K)), key=lambda p: -weights[p])
    taken, lost = [0] * E, set()
    for t, j in flat:
        expert = int(experts[t, j])
        if taken[expert] == limit:
            lost.add(t * K + j)
        else:
            taken[expert] += 1
    return lost


@given(
    st.integers(1, 5), st.integers(1, 3), st.integers(0, 25), st.integers(1, 9),
    st.sampled_from(["position", "probability"]), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_capacity_drops_exactly_these(E, K, T, limit, drop, seed) -> None:
    K = min(K, E)
    rng = torch.Generator().manual_seed(seed)
    experts = torch.rand(T, E, generator=rng).topk(K, dim=1).indices
    weights = torch.rand(T, K, generator=rng)
    table = with_capacity(experts, weights, E, limit, drop)
    kept = int(table.counts_E.sum())
    lost = dropped_by_hand(experts, weights, E, limit, drop)
    assert set(table.order_S[kept:].tolist()) == lost
    assert sorted(table.order_S.tolist()) == list(range(T * K))
    owners = experts.reshape(-1)[table.order_S[:kept]]
    assert owners.tolist() == sorted(owners.tolist())
    assert torch.bincount(owners, minlength=E).tolist() == table.counts_E.tolist()
    for e in range(E):  # stable within an expert
        rows = table.order_S[:kept][owners == e].tolist()
        assert rows == sorted(rows)


def test_capacity_is_the_formula_of_gshard() -> None:
    assert capacity(100, 2, 8, 1.0) == 25
    assert capacity(100, 2, 8, 1.25) == math.ceil(31.25)
    assert capacity(1, 1, 64, 1.0) == 1


def capacity_model(drop: str, factor: float):
    model = tiny_model(moe=MoEConfig(experts=(4, 4, 4), top_k=2, ffn_size=20))
    set_policy(model, RoutingPolicy(capacity_factor=factor, drop=drop))
    return model


@pytest.mark.parametrize("drop", ["position", "probability"])
def test_dropped_choices_add_nothing_and_are_counted(drop: str) -> None:
    model = capacity_model(drop, 0.5).train()
    block = model.layers[1]
    x = torch.randn(1, 24, 36, requires_grad=True)
    y, routing = block.moe(x, None)
    lost = int(routing.counts_E.sum() - routing.kept_E.sum())
    assert routing.counts_E.sum() == 48
    assert lost == 48 - int(routing.kept_E.sum()) > 0
    assert routing.kept_E.max() <= capacity(24, 2, 4, 0.5)
    scores = routing.scores_TE.gather(1, routing.experts_TK)
    table = with_capacity(routing.experts_TK, scores, 4, capacity(24, 2, 4, 0.5), drop)
    dropped = set(table.order_S[int(table.counts_E.sum()) :].tolist())
    expected = torch.zeros(24, 36)
    for t in range(24):
        for j in range(2):
            if t * 2 + j not in dropped:
                e = int(routing.experts_TK[t, j])
                gate, up = torch.nn.functional.linear(x[0, t], block.moe.experts.up[e]).chunk(2)
                h = torch.nn.functional.silu(gate) * up
                out = torch.nn.functional.linear(h, block.moe.experts.down[e])
                expected[t] += routing.weights_TK[t, j] * out
    assert torch.allclose(y[0], expected, atol=1e-4)
    grads = torch.autograd.grad(y.square().sum(), [x, block.moe.experts.down], retain_graph=True)
    wanted = torch.autograd.grad(expected.square().sum(), [x, block.moe.experts.down])
    for got, want in zip(grads, wanted):
        assert torch.allclose(got, want, rtol=1e-3, atol=1e-3)


def test_a_single_renormalised_choice_is_kept_by_its_score() -> None:
    """Its weight is 1 whatever the router thinks of it."""
    made = router(top_k=1).train()
    made.policy = RoutingPolicy(capacity_factor=0.5, drop="probability")
    routing, _ = made(torch.randn(60, 36))
    chosen = routing.scores_TE.gather(1, routing.experts_TK)[:, 0]
    for e in range(6):
        mine = routing.experts_TK[:, 0] == e
        kept, lost = (chosen[mine & (routing.kept_TK[:, 0] == flag)] for flag in (True, False))
        assert not len(lost) or kept.min() >= lost.max()
    assert routing.kept_E.sum() < 60


def test_a_large_capacity_drops_nothing_and_eval_never_does() -> None:
    plain = tiny_model(moe=MoEConfig(experts=(4, 4, 4), top_k=2, ffn_size=20))
    ids = torch.randint(0, 97, (2, 20))
    wide = capacity_model("position", 4.0).train()
    assert torch.allclose(plain(ids).logits, wide(ids).logits, atol=1e-4)
    narrow = capacity_model("position", 0.25)
    assert torch.equal(narrow(ids).logits, plain(ids).logits)
    assert not torch.allclose(narrow.train()(ids).logits, plain(ids).logits, atol=1e-2)


def test_policies_reach_every_router() -> None:
    model = capacity_model("probability", 1.0)
    assert len(routers(model)) == 3
    assert {r.policy.drop for r in routers(model)} == {"probability"}


@torch.no_grad()
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_same_tokens_are_routed_alike_alone_and_in_a_batch(scoring: str) -> None:
    moe = MoEConfig(
        experts=(4, 6, 4), top_k=2, ffn_size=20, scoring=scoring, selection_bias=True, groups=2,
    )  # fmt: skip
    model = tiny_model(moe=moe)
    ids = torch.randint(0, 97, (3, 25))
    together = model(ids)
    for row in range(3):
        alone = model(ids[row : row + 1])
        assert torch.allclose(alone.logits[0], together.logits[row], atol=1e-4)
        for one, all_of_them in zip(alone.routing, together.routing):
            assert torch.equal(one.experts_TK, all_of_them.experts_TK.view(3, 25, 2)[row])


def test_the_table_of_no_tokens_is_empty() -> None:
    table = mapping_table(torch.zeros(0, 2, dtype=torch.long), 3)
    assert table.order_S.tolist() == []
    assert table.counts_E.tolist() == [0, 0, 0]
