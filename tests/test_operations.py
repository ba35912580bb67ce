"""Operations of growth and upcycling: what is declared exact is, what is declared lossy is not, and
the published rules that are easy to get wrong."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import InMemory, tiny_model
from growmoe.errors import UsageError
from growmoe.growth.aki import AKI
from growmoe.growth.axes import duplicated_axis
from growmoe.growth.compose import grow, widening_of
from growmoe.growth.depth import Deepened
from growmoe.growth.kv import MergedKV
from growmoe.growth.perturb import Perturbed
from growmoe.growth.upcycle import Upcycled
from growmoe.growth.verify import Comparison, compare
from growmoe.growth.vocab import GrownVocab
from growmoe.growth.width import Widened, Widening
from growmoe.models.checkpoint import Source, build_model
from growmoe.models.config import MoEConfig, tensor_shapes
from growmoe.models.growing import plan_growth
from growmoe.models.shapes import custom_depth_map, depth_map
from growmoe.models.streamed import streamed_logits
from growmoe.models.upcycling import Upcycling, why_lossy
from growmoe.recipe import GrowStage, UpcycleStage

SMALL = {
    "vocab_size": 31, "hidden_size": 12, "num_layers": 2, "num_heads": 3, "num_kv_heads": 3,
    "head_dim": 4, "ffn_size": 20, "max_positions": 64,
}  # fmt: skip
GPT = {
    "norm": "layer", "positions": "learned", "activation": "gelu", "qkv_bias": True,
    "o_bias": True, "mlp_bias": True, "family": "growmoe",
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tied_head": True},
    "qwen2": {"qkv_bias": True, "tied_head": True, "family": "qwen2"},
    "gpt": GPT,
    "biased": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
}


def source(**changes: Any) -> InMemory:
    return InMemory(tiny_model(**{**SMALL, **changes}))


def tokens(vocab: int = 31) -> list[Tensor]:
    rng = torch.Generator().manual_seed(7)
    return [torch.randint(0, vocab, (n,), generator=rng) for n in (40, 9)]


def check(a: Source, b: Source) -> Comparison:
    return compare(a, b, tokens(), memory_bytes=1 << 40, note=lambda _: None)


def difference(a: Source, b: Source) -> float:
    """Largest logit difference in float64, over the tokens that both have."""
    pairs = zip(streamed_logits(a, tokens(), "float64"), streamed_logits(b, tokens(), "float64"))
    return max(float((y[:, : x.shape[1]] - x).abs().max()) for x, y in pairs)


def stage(**options: Any) -> GrowStage:
    return GrowStage(stage="grow", model="x", **options)


def tensors(built: Source) -> dict[str, Tensor]:
    return {name: built.load(name) for name in tensor_shapes(built.config)}


def same_tensors(left: Source, right: Source) -> bool:
    a, b = tensors(left), tensors(right)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- sparse upcycling: declared = verified ----


def upcyclings() -> Iterator[Upcycling]:
    """Every combination of options, with counts that leave the router a choice."""
    fixed = [("none", "dense_plus_null")]
    fixed += itertools.product(
        ("sum", "softmax2", "sigmoid_gate"), ("dense_plus_null", "half_half")
    )
    for (top_k, G), combine, router, init, (residual, shared) in itertools.product(
        ((2, 1), (4, 2)), ("renorm", "softmax", "sigmoid"), ("normal", "zero", "virtual_group"),
        ("copy", "noise", "drop", "permute"), fixed,
    ):  # fmt: skip
        if router == "zero" and G > 1:
            continue  # which of equal scores are taken is nowhere promised
        yield Upcycling(
            experts=3 * G, top_k=top_k, granularity=G, combine=combine, router=router,
            router_std=0.5, expert_init=init, noise=0.3, residual=residual, shared=shared,
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gpt"])
def test_every_combination_of_upcycling_is_what_it_is_declared_to_be(kind: str) -> None:
    a = source(**KINDS[kind], num_layers=1)
    text = [tokens()[0][:16]]
    wanted = streamed_logits(a, text, "float64")[0]
    wrong, lossy, exact = [], 0, 0
    for up in upcyclings():
        if kind == "gpt" and up.combine == "sigmoid":
            continue  # one activation is enough for what happens outside the experts
        declared = why_lossy(up, (up.experts,)) is None
        found = streamed_logits(Upcycled(a, up), text, "float64")[0]
        far = float((wanted - found).abs().max())
        exact, lossy = exact + declared, lossy + (not declared)
        # factors are multiplied in float32: 1e-6 of logits that are of size 10
        if (far < 1e-4) != declared:
            wrong.append((far, declared, up))
    assert not wrong, wrong[:3]
    assert exact > 100
    assert lossy > 50


@given(
    kind=st.sampled_from(list(KINDS)), copies=st.sampled_from([(1, 1), (2, 2), (4, 0), (2, 4)]),
    chosen=st.integers(1, 4), G=st.sampled_from([1, 2, 4]),
    combine=st.sampled_from(["renorm", "softmax", "sigmoid"]),
    router=st.sampled_from(["normal", "zero", "virtual_group"]),
    init=st.sampled_from(["copy", "permute", "drop", "noise"]),
    residual=st.sampled_from(["none", "sum", "softmax2", "sigmoid_gate"]),
    shared=st.sampled_from(["dense_plus_null", "half_half"]),
    std=st.sampled_from([0.02, 0.5]), seed=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_what_is_declared_exact_passes_verification(
    kind, copies, chosen, G, combine, router, init, residual, shared, std, seed
) -> None:
    """With one expert, with all experts chosen, and with other numbers in other layers too."""
    top_k = min(chosen, *(count for count in copies if count)) * G
    up = Upcycling(
        experts=tuple(count * G for count in copies), top_k=top_k, granularity=G, combine=combine,
        router=router, router_std=std, expert_init=init, residual=residual, shared=shared,
        seed=seed,
    )  # fmt: skip
    a = source(seed=seed, **KINDS[kind])
    if why_lossy(up, up.experts) is None:
        result = check(a, Upcycled(a, up))
        assert result.exact, (up, result)


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ({"experts": 1, "top_k": 1}, True),
        ({"experts": 1, "top_k": 1, "combine": "softmax"}, True),
        ({"experts": 4, "top_k": 1}, True),
        ({"experts": 4, "top_k": 1, "combine": "softmax"}, False),
        ({"experts": 4, "top_k": 4, "combine": "softmax"}, True),
        ({"experts": 4, "top_k": 4, "combine": "sigmoid"}, True),
        ({"experts": (4, 8), "top_k": 2}, True),
        ({"experts": (4, 2), "top_k": 2, "combine": "softmax"}, False),
        ({"experts": (2, 0), "top_k": 2, "combine": "softmax"}, True),
        ({"experts": 4, "combine": "softmax", "router": "zero"}, True),
        ({"experts": 32, "top_k": 8, "granularity": 4}, True),
        ({"experts": 32, "top_k": 8, "granularity": 4, "router": "normal"}, False),
        ({"experts": 8, "top_k": 8, "granularity": 4, "combine": "softmax"}, True),
        ({"experts": 4, "residual": "sum", "combine": "softmax"}, True),
        ({"experts": 4, "residual": "sum", "combine": "softmax", "shared": "half_half"}, False),
        ({"experts": 4, "residual": "sigmoid_gate", "shared": "half_half"}, True),
        ({"experts": 4, "residual": "softmax2", "top_k": 1, "shared": "half_half"}, True),
        ({"experts": 4, "expert_init": "drop", "residual": "sum"}, True),
        ({"experts": 4, "expert_init": "drop"}, False),
        ({"experts": 4, "expert_init": "drop", "drop": 0.0}, True),
        ({"experts": 4, "expert_init": "noise", "noise": 0.05}, False),
        ({"experts": 4, "expert_init": "noise", "noise": 0.0}, True),
        ({"experts": 8, "expert_init": "permute", "granularity": 2}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["qwen2", "gpt"])
def test_published_ways_to_upcycle(kind: str, options: dict[str, Any], exact: bool) -> None:
    a = source(**KINDS[kind])
    up = Upcycling.of(UpcycleStage(stage="upcycle", model="x", router_std=0.5, **options)
                      if options.get("router") != "zero"
                      else UpcycleStage(stage="upcycle", model="x", **options))  # fmt: skip
    grown = Upcycled(a, up)
    assert grown.config.moe is not None
    assert (why_lossy(up, grown.config.moe.experts) is None) == exact
    assert check(a, grown).exact == exact


def routing_of(built: Source) -> list[Any]:
    return build_model(built)(tokens()[0][None]).routing


def test_every_token_takes_one_of_each_slice() -> None:
    a = source()
    up = Upcycling(experts=16, top_k=8, granularity=4, router="virtual_group", router_std=0.5)
    routings = [r for r in routing_of(Upcycled(a, up)) if r is not None]
    assert len(routings) == 2
    groups = set()
    for routing in routings:
        for row in routing.experts_TK.tolist():
            taken: dict[int, list[int]] = {}
            for expert in row:
                taken.setdefault(expert // 4, []).append(expert % 4)
            assert all(sorted(slices) == [0, 1, 2, 3] for slices in taken.values()), row
            groups |= set(taken)
    assert groups == {0, 1, 2, 3}  # no copy is left over by every token


class Rescaled:
    """An upcycled source, some of whose tensors are multiplied once more."""

    def __init__(self, inner: Source, factors: dict[str, float]) -> None:
        self.inner, self.config, self.dtype = inner, inner.config, inner.dtype
        self.factors = factors

    def load(self, name: str) -> Tensor:
        tensor = self.inner.load(name)
        for part, factor in self.factors.items():
            if part in name:
                tensor = tensor * factor
        return tensor


@pytest.mark.parametrize(
    "broken",
    [
        # Megatron's: the cube root of the factor on gate, up and down
        {".moe.": 1.0, "gate.weight": 2 ** (1 / 3), "up.weight": 2 ** (1 / 3) / 2**0.5,
         "down.weight": 2 ** (1 / 3) / 2**0.5},
        # slices added up without the factor
        {"up.weight": 2**-0.5, "down.weight": 2**-0.5},
    ],
)  # fmt: skip
def test_a_wrong_scale_of_slices_fails_verification(broken: dict[str, float]) -> None:
    a = source()
    up = Upcycling(experts=8, top_k=4, granularity=2, router="virtual_group", router_std=0.5)
    assert check(a, Upcycled(a, up)).exact
    assert not check(a, Rescaled(Upcycled(a, up), broken)).exact


@pytest.mark.parametrize("residual", ["sum", "softmax2", "sigmoid_gate"])
def test_a_naive_fixed_branch_fails_verification(residual: str) -> None:
    """Dense feed-forward and whole copies beside it add up to twice as much."""
    a = source()
    up = Upcycling(experts=4, residual=residual, shared="half_half")
    assert check(a, Upcycled(a, up)).exact
    naive = Rescaled(Upcycled(a, up), {".down.weight": 2.0})
    assert not check(a, naive).exact


# ---- expert_init ----


def expert(built: Source, number: int, part: str) -> Tensor:
    return built.load(f"layers.1.moe.experts.{number}.{part}.weight")


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 1.0])
def test_drop_draws_the_same_units_of_gate_up_and_down_anew(drop: float) -> None:
    a = source()
    grown = Upcycled(a, Upcycling(experts=2, expert_init="drop", drop=drop))
    sets = []
    for number in range(2):
        changed = [
            (expert(grown, number, part) != a.load(f"layers.1.mlp.{part}.weight")).any(
                0 if part == "down" else 1
            )
            for part in ("gate", "up", "down")
        ]
        assert torch.equal(changed[0], changed[1])
        assert torch.equal(changed[0], changed[2])
        assert int(changed[0].sum()) == round(drop * 20)
        sets.append(changed[0])
    if drop == 0.5:
        assert not torch.equal(*sets)  # every expert keeps other units


def test_units_are_drawn_with_the_mean_and_deviation_of_those_they_replace() -> None:
    a = source(hidden_size=64, ffn_size=512, num_layers=2)
    for name in ("layers.1.mlp.up.weight", "layers.1.mlp.down.weight"):
        a.views[name].mul_(0.3).add_(1.5)
    grown = Upcycled(a, Upcycling(experts=2, expert_init="drop", drop=0.5))
    for part, dim in (("up", 1), ("down", 0)):
        old, new = a.load(f"layers.1.mlp.{part}.weight"), expert(grown, 0, part)
        chosen = (old != new).any(dim)
        drawn = new[chosen] if dim else new[:, chosen]
        assert float(drawn.mean()) == pytest.approx(1.5, abs=0.01)
        assert float(drawn.std()) == pytest.approx(0.3 * 0.25, rel=0.05)


def test_permuted_experts_hold_the_same_units_in_another_order() -> None:
    a = source(**KINDS["gpt"])
    grown = Upcycled(a, Upcycling(experts=2, expert_init="permute"))
    old = a.load("layers.1.mlp.up.weight")
    orders = []
    for number in range(2):
        new = expert(grown, number, "up")
        order = [next(i for i in range(20) if torch.equal(old[i], row)) for row in new]
        assert sorted(order) == list(range(20))
        down = a.load("layers.1.mlp.down.weight")[:, order]
        assert torch.equal(expert(grown, number, "down"), down)
        bias = grown.load(f"layers.1.moe.experts.{number}.up.bias")
        assert torch.equal(bias, a.load("layers.1.mlp.up.bias")[order])
        orders.append(order)
    assert orders[0] != orders[1]


def decibels(signal: Tensor, noise: Tensor) -> float:
    return float(20 * torch.log10(signal.double().norm() / noise.double().norm()))


def test_noisy_experts_have_the_noise_that_was_asked_for() -> None:
    a = source(hidden_size=64, ffn_size=256, num_layers=1)
    grown = Upcycled(a, Upcycling(experts=2, expert_init="noise", noise=0.1))
    for part in ("gate", "up", "down"):
        old = a.load(f"layers.0.mlp.{part}.weight")
        drawn = [grown.load(f"layers.0.moe.experts.{i}.{part}.weight") - old for i in range(2)]
        assert all(decibels(old, one) == pytest.approx(20, abs=0.3) for one in drawn)
        assert not torch.equal(*drawn)


# ---- noise while growing ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["even", "random"])
def test_noise_on_copies_is_exact_and_makes_them_differ(kind: str, split: str) -> None:
    hidden = {"hidden": 24} if kind == "gpt" else {"hidden": 20}
    spec = stage(**hidden, heads=6, ffn=50, noise_db=10, split=split)
    a = source(**KINDS[kind])
    grown, plan = grow(a, spec)
    assert not plan.lossy
    assert check(a, grown).exact
    quiet, _ = grow(a, stage(**hidden, heads=6, ffn=50, split=split))
    for name in ("layers.0.attn.q.weight", "layers.0.attn.o.weight", "layers.1.mlp.down.weight"):
        assert not torch.equal(grown.load(name), quiet.load(name)), name
    down = grown.load("layers.1.mlp.down.weight")
    assert not torch.equal(down[:, :20], down[:, 20:40])


@pytest.mark.parametrize("copies", [2, 3])
def test_noise_on_copies_has_the_ratio_that_was_asked_for(copies: int) -> None:
    a = source(hidden_size=64, ffn_size=256, num_layers=1, num_heads=16, num_kv_heads=16)
    sizes = {"hidden": 64 * copies, "ffn": 256 * copies, "split": "even"}
    grown, _ = grow(a, stage(**sizes, noise_db=20))
    quiet, _ = grow(a, stage(**sizes))
    for name in ("layers.0.mlp.up.weight", "layers.0.mlp.down.weight", "layers.0.attn.o.weight"):
        signal = quiet.load(name)
        assert decibels(signal, grown.load(name) - signal) == pytest.approx(20, abs=0.3), name


def test_noise_that_does_not_cancel_fails_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    from growmoe.growth import axes

    class Plain(axes._CopyNoise):
        def draw(self, rows: int) -> Tensor:
            return torch.randn(rows, len(self.columns)).double() * self.std_C

    a = source()
    grown, _ = grow(a, stage(hidden=24, noise_db=20))
    assert check(a, grown).exact
    monkeypatch.setattr(axes, "_CopyNoise", Plain)
    assert not check(a, grown).exact


def test_noise_everywhere_is_lossy_and_has_its_ratio() -> None:
    a = source(hidden_size=64, ffn_size=256, num_heads=4, num_kv_heads=4)
    noisy, plan = grow(a, stage(noise="everywhere", noise_db=30))
    assert plan.lossy == ("noise is added to every matrix",)
    assert not check(a, noisy).exact
    for name, old in tensors(a).items():
        if name.startswith("layers.") and old.dim() == 2:
            assert decibels(old, noisy.load(name) - old) == pytest.approx(30, abs=0.4)
        else:
            assert torch.equal(noisy.load(name), old)
    both, plan = grow(a, stage(layers=3, noise="everywhere", noise_db=30))
    assert plan.lossy
    assert isinstance(both, Perturbed)


# ---- kv heads, depth, vocabulary ----


def test_merged_kv_heads_are_means_of_neighbours() -> None:
    a = source(num_heads=6, num_kv_heads=6, qkv_bias=True)
    grown, plan = grow(a, stage(kv_heads=2, merge_kv="mean"))
    assert grown.config.num_kv_heads == 2
    assert plan.lossy == ("6 kv heads are averaged into 2",)
    assert not check(a, grown).exact
    for part in ("k", "v"):
        for leaf in ("weight", "bias"):
            old = a.load(f"layers.1.attn.{part}.{leaf}").split(4)
            new = grown.load(f"layers.1.attn.{part}.{leaf}").split(4)
            for i in range(2):
                mean = sum(old[3 * i : 3 * i + 3]) / 3
                assert torch.allclose(new[i], mean, atol=1e-6)
    for name in ("layers.1.attn.q.weight", "layers.1.attn.o.weight"):
        assert torch.equal(grown.load(name), a.load(name))


def test_merging_equal_kv_heads_changes_nothing() -> None:
    """Only then are means the heads themselves; queries must still meet their own."""
    many = Widened(source(num_heads=6, num_kv_heads=2), Widening(kv_heads=6, heads=6))
    grown, plan = grow(many, stage(kv_heads=2, merge_kv="mean"))
    assert check(many, grown).exact
    assert plan.lossy  # nobody knows before the weights are read


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 6, "num_kv_heads": 6}, "6 kv heads do not divide into 4 groups"),
        ({"num_heads": 8, "num_kv_heads": 8, "qk_norm": True, "qk_norm_scope": "all"},
         "over all heads together"),
    ],
)  # fmt: skip
def test_kv_heads_that_cannot_be_merged_are_refused(options: dict, words: str) -> None:
    config = source(**options).config
    with pytest.raises(UsageError, match=words):
        plan_growth(config, stage(kv_heads=4, merge_kv="mean"))


def test_aki_works_on_merged_heads() -> None:
    a = source(num_heads=6, num_kv_heads=6, num_layers=3)
    spec = stage(hidden=16, heads=8, kv_heads=2, merge_kv="mean", method="aki", split="even")
    grown, plan = grow(a, spec)
    assert len(plan.lossy) == 2
    aki = AKI(MergedKV(a, 2), widening_of(spec))
    assert same_tensors(grown, aki)
    # two groups of three heads became groups of four: the fourth is the layer above's first
    q = grown.load("layers.0.attn.q.weight").split(4)
    above = Widened(MergedKV(a, 2), widening_of(spec)).load("layers.1.attn.q.weight").split(4)
    assert torch.equal(q[3], above[3])
    assert not check(a, grown).exact


@pytest.mark.parametrize(
    ("old", "new", "layers"),
    [
        (32, 48, (*range(24), *range(8, 32))),  # SOLAR
        (3, 4, (0, 1, 1, 2)),
        (3, 6, (0, 1, 2, 0, 1, 2)),
    ],
)
def test_depth_up_scaling_is_solars(old: int, new: int, layers: tuple[int, ...]) -> None:
    assert depth_map(old, new, "dus").source == layers
    with pytest.raises(UsageError, match="even number"):
        depth_map(old, new + 1, "dus")
    with pytest.raises(UsageError, match="at most"):
        depth_map(old, 2 * old + 2, "dus")


def test_layers_as_they_are_listed() -> None:
    a = source(num_layers=3)
    grown, plan = grow(a, stage(depth=[2, 0, 0]))
    for new, old in enumerate((2, 0, 0)):
        part = "mlp.up.weight"
        assert torch.equal(grown.load(f"layers.{new}.{part}"), a.load(f"layers.{old}.{part}"))
    assert plan.lossy
    assert not check(a, grown).exact
    same, plan = grow(a, stage(depth=[0, 1, 2]))
    assert not plan.lossy
    assert same_tensors(same, a)
    with pytest.raises(UsageError, match="layer 3 is not one of the layers 0 to 2"):
        custom_depth_map(3, (0, 3))


@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 5), st.integers(0, 5))
def test_guarded_layers_stay_single(old: int, extra: int, first: int, last: int) -> None:
    if first + last >= old:
        with pytest.raises(UsageError, match="leaves none"):
            depth_map(old, old + extra, "interpolate", (first, last))
        return
    for method in ("stack", "interpolate"):
        found = depth_map(old, old + extra, method, (first, last)).source
        assert len(found) == old + extra
        assert set(found) == set(range(old))
        assert found[:first] == tuple(range(first))
        assert found[len(found) - last :] == tuple(range(old - last, old))
        for layer in (*range(first), *range(old - last, old)):
            assert found.count(layer) == 1


def test_half_steps_lose_less_than_whole_ones() -> None:
    a = source(num_layers=4)
    for name, tensor in a.views.items():
        if name.endswith(("o.weight", "down.weight")):
            tensor.mul_(0.3)  # small steps, as those of a trained model are
    losses = []
    for scale in ("one", "count"):
        grown, plan = grow(a, stage(layers=6, depth="interpolate", branch_scale=scale))
        assert plan.lossy
        losses.append(check(a, grown).kl)
    assert losses[1] < losses[0] / 2


def test_new_rows_have_the_mean_and_covariance_of_the_old_ones() -> None:
    a = source(vocab_size=300, hidden_size=6, num_heads=1, num_kv_heads=1, head_dim=6)
    old = a.load("embed.weight")
    old.copy_(old @ torch.randn(6, 6, generator=torch.Generator().manual_seed(1)) + 2.0)
    grown = GrownVocab(a, 300 + 40_000, "mean_cov", seed=3)
    new = grown.load("embed.weight")[300:]
    assert torch.allclose(new.mean(0), old.mean(0), atol=0.02)
    wanted = torch.cov(old.T, correction=0)
    assert torch.allclose(torch.cov(new.T), wanted, atol=0.03 * float(wanted.abs().max()))
    assert not torch.equal(grown.load("head.weight")[300:], new)
    again = GrownVocab(a, 340, "mean_cov", seed=4)
    assert not torch.equal(again.load("embed.weight")[300:], new[:40])


@pytest.mark.parametrize("init", ["mean", "mean_cov", "zeros"])
@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_old_logits_stay_for_every_start_of_new_tokens(init: str, kind: str) -> None:
    a = source(**KINDS[kind])
    grown, plan = grow(a, stage(vocab=40, vocab_init=init))
    assert not plan.lossy
    assert check(a, grown).exact
    new = grown.load("embed.weight")[31:]
    if init == "mean":
        assert torch.allclose(new[0], a.load("embed.weight").mean(0), atol=1e-6)
    if init == "zeros":
        assert not new.any()


def test_new_tokens_start_as_the_mean_of_what_spelled_them() -> None:
    a = source()
    pieces = {30: [4], 31: [1, 2], 32: [7, 7, 9]}  # 30 was padding
    grown = GrownVocab(a, 34, pieces=pieces)
    for name in ("embed.weight", "head.weight"):
        old, new = a.load(name), grown.load(name)
        assert torch.equal(new[:30], old[:30])
        assert torch.equal(new[30], old[4])
        assert torch.allclose(new[31], (old[1] + old[2]) / 2, atol=1e-6)
        assert torch.allclose(new[32], (2 * old[7] + old[9]) / 3, atol=1e-6)
        assert torch.allclose(new[33], old.mean(0), atol=1e-6)
    in_place = GrownVocab(a, 31, pieces={30: [4]})
    assert torch.equal(in_place.load("embed.weight")[30], a.load("embed.weight")[4])


# ---- all together ----


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_everything_together_is_exact(kind: str) -> None:
    a = source(**KINDS[kind])
    spec = stage(
        hidden=20, heads=6, kv_heads=6, head_dim=8, ffn=33, layers=5, vocab=40,
        vocab_init="mean_cov", noise_db=20, seed=5,
    )  # fmt: skip
    grown, plan = grow(a, spec)
    assert not plan.lossy
    up = Upcycling(
        experts=(0, 6, 12, 9, 3), top_k=3, granularity=3, router="virtual_group", router_std=0.5,
        expert_init="permute", residual="sigmoid_gate", shared="half_half", seed=5,
    )  # fmt: skip
    moe = Upcycled(grown, up)
    assert moe.config.moe is not None
    assert why_lossy(up, moe.config.moe.experts) is None
    assert check(a, moe).exact
    assert {n: tuple(t.shape) for n, t in tensors(moe).items()} == tensor_shapes(moe.config)


def test_a_moe_of_every_kind_grows() -> None:
    for options in ({"residual": "sum"}, {"residual": "softmax2", "shared": "half_half"},
                    {"residual": "sigmoid_gate"}, {"combine": "sigmoid"}):  # fmt: skip
        a = Upcycled(source(), Upcycling(experts=4, router_std=0.5, **options))
        grown, plan = grow(a, stage(hidden=20, layers=3, noise_db=20))
        assert not plan.lossy
        assert check(a, grown).exact, options


SEEDED = {
    "noise on copies": {"hidden": 20, "noise_db": 20},
    "noise everywhere": {"noise": "everywhere", "noise_db": 20},
    "mean_cov": {"vocab": 50, "vocab_init": "mean_cov"},
    "zero_pad": {"hidden": 20, "units": "zero_pad"},
}


@pytest.mark.parametrize("name", SEEDED)
def test_the_same_seed_gives_the_same_tensors(name: str) -> None:
    a = source()
    first, again, other = (grow(a, stage(**SEEDED[name], seed=s))[0] for s in (3, 3, 4))
    assert same_tensors(first, again)
    assert not same_tensors(first, other)


@pytest.mark.parametrize("init", ["copy", "noise", "drop", "permute"])
def test_the_same_seed_gives_the_same_experts(init: str) -> None:
    a = source()
    first, again, other = (
        Upcycled(a, Upcycling(experts=2, expert_init=init, seed=s)) for s in (3, 3, 4)
    )
    assert same_tensors(first, again)
    assert not same_tensors(first, other)


@pytest.mark.parametrize(
    "options",
    [
        {"hidden": 12, "heads": 3, "kv_heads": 3, "head_dim": 4, "ffn": 20, "noise_db": 20},
        {"layers": 2, "depth": "dus"}, {"layers": 2, "depth": "interpolate", "guard": (1, 0)},
        {"layers": 2, "depth": "stack", "branch_scale": "count"}, {"depth": [0, 1]},
        {"vocab": 31, "vocab_init": "mean_cov"}, {"kv_heads": 3, "merge_kv": "mean"},
        {"hidden": 12, "method": "aki"},
    ],
)  # fmt: skip
def test_growth_to_the_same_size_is_the_identity(options: dict[str, Any]) -> None:
    a = source()
    assert same_tensors(grow(a, stage(**options))[0], a)


def test_a_growth_that_changes_nothing_is_declared_exact() -> None:
    config = source().config
    for options in ({"hidden": 12, "method": "aki"}, {"layers": 2, "depth": "stack"}):
        assert not plan_growth(config, stage(**options)).lossy


def test_deepened_layers_of_copies_are_not_mixed_up_with_silence() -> None:
    a = source()
    deep = Deepened(a, depth_map(2, 4, "identity"))
    assert check(a, deep).exact
    loud = Deepened(a, dataclasses.replace(deep.depth, silent=frozenset()))
    assert not check(a, loud).exact
    assert len(duplicated_axis(3, 7, keep_rms=True, random_split=False, seed=0)) == 7
    assert difference(a, deep) == 0.0
    assert MoEConfig(experts=(2,), top_k=1, ffn_size=3).renormalize
