"""Growth: exact where it says so, judged by the source's noise floor; broken rules are caught."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import InMemory, tiny_model
from growmoe.errors import UsageError
from growmoe.growth.aki import AKI
from growmoe.growth.axes import Axis, duplicated_axis, head_axis
from growmoe.growth.compose import grow
from growmoe.growth.depth import Deepened
from growmoe.growth.upcycle import Upcycled
from growmoe.growth.verify import Comparison, compare
from growmoe.growth.vocab import GrownVocab
from growmoe.growth.width import Widened, Widening
from growmoe.models.checkpoint import Source, build_model
from growmoe.models.config import MoEConfig, tensor_shapes
from growmoe.models.shapes import depth_map, head_maps
from growmoe.models.upcycling import Upcycling, why_lossy
from growmoe.recipe import GrowStage

GPT = {
    "norm": "layer", "positions": "learned", "activation": "gelu", "qkv_bias": True,
    "o_bias": True, "mlp_bias": True, "family": "growmoe",
}  # fmt: skip
SOURCES = {
    "llama": {},
    "llama-tied": {"tied_head": True},
    "llama-biased": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "qwen2": {"qkv_bias": True, "tied_head": True, "family": "qwen2"},
    "qwen3": {"qk_norm": True, "family": "qwen3"},
}
GROWTHS = {
    "hidden at a non-integer ratio": Widening(hidden=48),
    "hidden, even split": Widening(hidden=48, split="even"),
    "hidden doubled": Widening(hidden=72),
    "hidden without heads": Widening(hidden=50, heads=9),
    "hidden zero-padded": Widening(hidden=48, units="zero_pad"),
    "ffn": Widening(ffn=70),
    "ffn zero-padded": Widening(ffn=70, units="zero_pad"),
    "heads in their groups": Widening(heads=15),
    "more kv heads": Widening(heads=18, kv_heads=6),
    "kv heads to MHA": Widening(kv_heads=9),
    "everything": Widening(hidden=50, heads=15, ffn=61),
}


def source(seed: int = 0, **changes) -> InMemory:
    return InMemory(tiny_model(seed, **changes))


def tokens(vocab: int = 97, length: int = 150) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(7)
    return [torch.randint(0, vocab, (n,), generator=rng) for n in (length, 20)]


def check(a: Source, b: Source) -> Comparison:
    return compare(a, b, tokens(), memory_bytes=1 << 40, note=lambda _: None)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("growth", GROWTHS)
def test_width_is_exact(kind: str, growth: str) -> None:
    a = source(**SOURCES[kind])
    result = check(a, Widened(a, GROWTHS[growth]))
    assert result.exact, result
    assert result.max_abs_logit_diff < 1e-3  # logits are of size 10
    assert result.ce_a == pytest.approx(result.ce_b, abs=1e-5)


@pytest.mark.parametrize("multiple", [2, 3])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2"])
def test_head_dim_is_exact_at_late_positions(kind: str, multiple: int) -> None:
    a = source(**SOURCES[kind])
    result = check(a, Widened(a, Widening(head_dim=4 * multiple, heads=9)))
    assert result.exact, result
    assert result.longest_position == 150


@pytest.mark.parametrize("tied", [False, True])
def test_layer_norm_models_grow_by_whole_multiples(tied: bool) -> None:
    a = source(**GPT, tied_head=tied)
    grown = Widened(a, Widening(hidden=72, heads=18, kv_heads=6, ffn=70))
    assert check(a, grown).exact
    with pytest.raises(UsageError, match="whole multiples"):
        Widened(a, Widening(hidden=48))


OLMOE = {
    "qk_norm": True, "qk_norm_scope": "all", "family": "olmoe",
    "moe": MoEConfig(experts=(4, 4, 4), top_k=2, ffn_size=20, renormalize=False),
}  # fmt: skip


def test_a_norm_over_all_heads_grows_without_its_heads() -> None:
    a = source(**OLMOE)
    wide = Widened(GrownVocab(a, 128), Widening(hidden=48))
    assert wide.config.num_heads == a.config.num_heads
    assert check(a, wide).exact
    assert check(a, Deepened(wide, depth_map(3, 5, "identity"))).exact
    dense = source(qk_norm=True, qk_norm_scope="all")
    moe = Upcycled(Widened(dense, Widening(ffn=61)), Upcycling(experts=4))
    assert check(dense, moe).exact


@pytest.mark.parametrize("sizes", [{"heads": 18}, {"heads": 18, "kv_heads": 6}, {"head_dim": 8}])
def test_a_norm_over_all_heads_keeps_its_heads(sizes: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"cannot grow.* norm"):
        Widened(source(**OLMOE), Widening(**sizes))
    with pytest.raises(UsageError, match="num_kv_heads cannot grow from 3 to 9"):
        Widened(source(**OLMOE), Widening(kv_heads=9))


def test_everything_composes() -> None:
    a = source(**SOURCES["qwen2"])
    wide = Widened(GrownVocab(a, 128), Widening(hidden=50, heads=15, head_dim=8, ffn=61))
    grown = Upcycled(Deepened(wide, depth_map(3, 5, "identity")), Upcycling(experts=4))
    result = check(a, grown)
    assert result.exact
    assert grown.config.params_total() == sum(
        grown.load(name).numel() for name in tensor_shapes(grown.config)
    )


def test_a_moe_grows_too() -> None:
    a = source(moe=MoEConfig(experts=(0, 2, 4), top_k=2, ffn_size=20))
    grown = Deepened(Widened(a, Widening(hidden=48)), depth_map(3, 4, "identity"))
    assert check(a, grown).exact


def test_new_tokens_leave_old_logits_alone() -> None:
    a = source()
    result = check(a, GrownVocab(a, 130))
    assert result.exact
    assert result.ce_b > result.ce_a  # new tokens take some probability


def test_growth_to_equal_size_is_the_identity() -> None:
    a = source()
    same = Deepened(Widened(a, Widening(hidden=36, ffn=50)), depth_map(3, 3, "interpolate"))
    for name in tensor_shapes(a.config):
        assert torch.equal(same.load(name), a.load(name)), name


def test_same_seed_same_bytes_other_seed_others() -> None:
    a = source()
    first, again, other = (
        Widened(a, Widening(hidden=48, ffn=70, seed=seed)).load("layers.1.mlp.down.weight")
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ---- rules deliberately broken must fail verification ----


def test_without_the_gamma_correction_verification_fails() -> None:
    a = source()

    class NoGamma(Widened):
        def _norm_gain(self, name: str, gain_N: torch.Tensor) -> torch.Tensor:
            return gain_N[self.axes["residual"].index_N]

    result = check(a, NoGamma(a, Widening(hidden=48)))
    assert not result.exact
    assert result.max_abs_logit_diff > 100 * result.tolerance
    padded = check(a, Widened(a, Widening(hidden=48, keep_rms=False)))
    assert not padded.exact


def test_heads_appended_at_the_end_fail_verification() -> None:
    a = source()
    grown = Widened(a, Widening(heads=12))
    assert check(a, grown).exact
    appended = [*range(9), 0, 1, 2]  # not inside their groups
    grown.axes["q"] = head_axis(appended, 4, 4)
    assert not check(a, grown).exact


@pytest.mark.parametrize("top_k", [1, 2])
def test_top_k_not_renormalised_fails_verification(top_k: int) -> None:
    a = source()
    up = Upcycling(experts=4, top_k=top_k)
    assert check(a, Upcycled(a, up)).exact
    raw = Upcycled(a, dataclasses.replace(up, combine="softmax"))
    assert not check(a, raw).exact
    assert why_lossy(raw.up, (4, 4, 4)) is not None


def test_wrong_query_scale_fails_verification() -> None:
    a = source()
    grown = Widened(a, Widening(head_dim=8, heads=9))
    q = grown.axes["q"]
    grown.axes["q"] = dataclasses.replace(q, write_N=torch.ones_like(q.write_N))
    assert not check(a, grown).exact


def test_a_small_perturbation_fails_verification() -> None:
    a = source()

    class Nudged:
        config, dtype = a.config, "float32"

        def load(self, name: str) -> torch.Tensor:
            tensor = a.load(name)
            return tensor * 1.001 if name == "layers.1.mlp.up.weight" else tensor

    assert check(a, a).exact
    assert not check(a, Nudged()).exact


# ---- what is published as lossy ----


def test_fpi_is_exact_at_integer_ratios_only() -> None:
    a = source()
    fpi = {"split": "even", "keep_rms": False}
    assert check(a, Widened(a, Widening(hidden=72, **fpi))).exact
    assert not check(a, Widened(a, Widening(hidden=48, **fpi))).exact


def test_aki_takes_new_units_from_the_next_layer() -> None:
    a = source(qkv_bias=True)
    spec = Widening(hidden=48, heads=12, ffn=70, split="even", keep_rms=False)
    aki, fpi = AKI(a, spec), Widened(a, spec)
    for part, new in (("attn.o", slice(36, None)), ("mlp.gate", slice(50, None))):
        names = [f"layers.{layer}.{part}.weight" for layer in range(3)]
        own, above, last = (
            torch.equal(aki.load(names[i])[new], fpi.load(names[j])[new])
            for i, j in ((0, 0), (0, 1), (2, 2))
        )
        assert (own, above, last) == (False, True, True)
        old = slice(0, new.start)
        name = f"layers.0.{part}.weight"
        assert torch.equal(aki.load(name)[old], fpi.load(name)[old])
    # heads: groups of 3 become groups of 4, so every fourth head is new
    rows = torch.arange(48) // 4 % 4 == 3
    for leaf in ("weight", "bias"):
        grown, base = aki.load(f"layers.0.attn.q.{leaf}"), fpi.load(f"layers.0.attn.q.{leaf}")
        assert torch.equal(grown[~rows], base[~rows])
        assert torch.equal(grown[rows], fpi.load(f"layers.1.attn.q.{leaf}")[rows])
    assert torch.equal(aki.load("embed.weight"), fpi.load("embed.weight"))
    assert not check(a, aki).exact


@pytest.mark.parametrize(
    ("method", "layers"),
    [
        ("stack", (0, 1, 2, 0, 1, 2)),
        ("interpolate", (0, 0, 1, 1, 2, 2)),
        ("identity", (0, 0, 1, 1, 2, 2)),
    ],
)
def test_depth_maps(method: str, layers: tuple[int, ...]) -> None:
    found = depth_map(3, 6, method)
    assert found.source == layers
    assert found.silent == (frozenset({1, 3, 5}) if method == "identity" else frozenset())


@given(
    st.integers(1, 12), st.integers(0, 20), st.sampled_from(["identity", "stack", "interpolate"])
)
def test_depth_maps_stay_inside_the_source(old: int, extra: int, method: str) -> None:
    found = depth_map(old, old + extra, method)
    assert len(found.source) == old + extra
    assert set(found.source) == set(range(old))
    if method == "identity":
        kept = [layer for i, layer in enumerate(found.source) if i not in found.silent]
        assert kept == list(range(old))


def test_half_steps_divide_the_branches_of_layers_that_occur_twice() -> None:
    a = source()
    halved = Deepened(a, depth_map(3, 5, "interpolate"), halve_branches=True)
    assert halved.depth.source == (0, 0, 1, 1, 2)
    for layer, old, copies in ((0, 0, 2), (3, 1, 2), (4, 2, 1)):
        for part in ("attn.o", "mlp.down"):
            grown = halved.load(f"layers.{layer}.{part}.weight")
            assert torch.equal(grown * copies, a.load(f"layers.{old}.{part}.weight"))
        q = "attn.q.weight"
        assert torch.equal(halved.load(f"layers.{layer}.{q}"), a.load(f"layers.{old}.{q}"))
    assert depth_map(6, 9, "interpolate", guard=(2, 1)).source == (0, 1, 2, 2, 3, 3, 4, 4, 5)


# ---- properties ----


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 8), st.integers(1, 3))
def test_group_rule(groups: int, per_group: int, extra: int, factor: int) -> None:
    H, K = groups * per_group, groups
    new_K = K * factor
    new_H = new_K * (-(-per_group // factor) + extra)
    heads, kv = head_maps(H, K, new_H, new_K)
    assert set(heads) == set(range(H))
    assert set(kv) == set(range(K))
    for new, old in enumerate(heads):
        assert kv[new // (new_H // new_K)] == old // per_group


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((8, 4, 8, 2), "never exact"), ((8, 4, 9, 4), "not a multiple"), ((9, 3, 8, 4), "do not fit")],
)
def test_impossible_heads_are_refused(sizes: tuple[int, int, int, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        head_maps(*sizes)


@given(st.integers(1, 20), st.integers(0, 40), st.booleans(), st.integers(0, 5))
def test_read_shares_sum_to_one_and_rms_is_kept(
    old: int, extra: int, random: bool, seed: int
) -> None:
    axis = duplicated_axis(old, old + extra, keep_rms=True, random_split=random, seed=seed)
    shares = torch.zeros(old, dtype=torch.float64)
    shares.index_add_(0, axis.index_N, axis.read_N("some.tensor"))
    assert torch.allclose(shares, torch.ones(old, dtype=torch.float64))
    x = torch.randn(old, dtype=torch.float64)
    wide = x[axis.index_N] * axis.write_N
    assert torch.allclose(wide.square().mean(), x.square().mean())


@given(
    st.sampled_from([36, 40, 44, 54, 72, 80]), st.integers(50, 110),
    st.sampled_from([(9, 3), (12, 3), (18, 6), (9, 9), (15, 5), (21, 3)]), st.sampled_from([1, 2]),
    st.sampled_from(["duplicate", "zero_pad"]), st.sampled_from(["even", "random"]),
    st.booleans(), st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_any_target_is_exact(hidden, ffn, heads, multiple, units, split, tied, seed) -> None:
    a = source(seed, tied_head=tied, qkv_bias=True)
    spec = Widening(
        hidden=hidden, ffn=ffn, heads=heads[0], kv_heads=heads[1], head_dim=4 * multiple,
        units=units, split=split, seed=seed,
    )  # fmt: skip
    try:
        grown = Widened(a, spec)
    except UsageError as error:
        assert "do not fit" in str(error)
        return
    assert check(a, grown).exact


def gradients(model_source: Source) -> dict[str, torch.Tensor]:
    model = build_model(model_source)
    ids = tokens()[0][None]
    logits = model(ids[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_random_split_breaks_symmetry_and_even_split_does_not() -> None:
    """Copies with equal gradients would stay copies for ever."""
    a = source()
    for split, equal in (("even", True), ("random", False)):
        grads = gradients(Widened(a, Widening(ffn=100, split=split)))
        gate = grads["layers.1.mlp.gate.weight"]
        assert torch.allclose(gate[:50], gate[50:], rtol=1e-4, atol=1e-7) == equal


def test_every_new_unit_of_a_larger_head_gets_a_gradient_somewhere() -> None:
    a = source()
    grads = gradients(Widened(a, Widening(head_dim=8, heads=9)))
    assert grads["layers.1.attn.q.weight"].abs().sum(1).min() > 0
    assert grads["layers.1.attn.o.weight"].abs().sum(0).min() > 0


def test_compose_declares_what_is_exact() -> None:
    a = source()

    def declared(**options) -> tuple[bool, bool]:
        spec = GrowStage(stage="grow", model="x", **options)
        grown, plan = grow(a, spec)
        return not plan.lossy, check(a, grown).exact

    assert declared(hidden=48, layers=5, ffn=60) == (True, True)
    assert declared(hidden=72, method="fpi") == (True, True)
    assert declared(hidden=48, method="fpi") == (False, False)
    assert declared(hidden=48, layers=5, method="aki-pro") == (False, False)
    assert declared(layers=5, depth="stack") == (False, False)
    assert declared(hidden=48, layers=5, method="fpi", depth="identity") == (False, False)


def test_upcycled_layers_and_experts() -> None:
    a = source()
    for layers, counts in (("all", (4, 4, 4)), ("second", (0, 4, 0)), ("0,2", (4, 0, 4))):
        grown = Upcycled(a, Upcycling(experts=4, layers=layers))
        assert grown.config.moe is not None
        assert grown.config.moe.experts == counts
        assert check(a, grown).exact
    with pytest.raises(UsageError, match="layer 3 is not one"):
        Upcycled(a, Upcycling(layers="3"))
    with pytest.raises(UsageError, match="already"):
        Upcycled(grown, Upcycling())
    with pytest.raises(UsageError, match="fewer than top-k"):
        Upcycled(a, Upcycling(experts=2, top_k=3))


def test_half_precision_storage_is_judged_by_its_own_floor(tmp_path) -> None:
    from growmoe.models.checkpoint import Directory, write_model

    a = source(vocab_size=97)
    for name, grown in (("a", a), ("b", Widened(a, Widening(hidden=48, ffn=70)))):
        (tmp_path / name).mkdir()
        write_model(tmp_path / name, grown.config, grown.load, "bfloat16")
    low, grown = Directory(tmp_path / "a"), Directory(tmp_path / "b")
    result = check(low, grown)
    assert result.noise_floor > 1e-3
    assert result.exact, result
    broken = Widened(a, Widening(hidden=48, keep_rms=False))
    (tmp_path / "c").mkdir()
    write_model(tmp_path / "c", broken.config, broken.load, "bfloat16")
    assert not check(low, Directory(tmp_path / "c")).exact


def test_axis_marks_later_copies_as_new() -> None:
    axis = Axis(torch.tensor([0, 1, 0, -1, 1]), torch.ones(5, dtype=torch.float64))
    assert axis.new_N().tolist() == [False, False, True, True, True]


def test_verification_is_not_fooled_by_short_text() -> None:
    """A rotary mistake vanishes at position 0; the check runs long sequences."""
    a = source()

    class Shifted(Widened):
        def load(self, name: str) -> torch.Tensor:
            tensor = super().load(name)
            return tensor.roll(1, 0) if name.endswith("attn.k.weight") else tensor

    assert not check(a, Shifted(a, Widening(head_dim=8, heads=9))).exact
    assert len(list(itertools.chain(*tokens()))) == 170


def test_a_wrong_expert_in_16_bits_is_not_hidden_by_routing_flips(tmp_path) -> None:
    """Rounding swaps an expert now and then, which makes the largest difference of a re-rounded
    mixture large; the mean does not move, so it is judged too."""
    from growmoe.models.checkpoint import Directory, write_model

    moe = MoEConfig(experts=(8, 8, 8), top_k=2, ffn_size=20)
    a = source(0, moe=moe)
    (tmp_path / "a").mkdir()
    write_model(tmp_path / "a", a.config, a.load, "bfloat16")
    low = Directory(tmp_path / "a")

    class Weaker:
        config, dtype = low.config, "bfloat16"

        def load(self, name: str) -> torch.Tensor:
            tensor = low.load(name)
            return tensor * 0.7 if name.startswith("layers.1.moe") and "down" in name else tensor

    assert check(low, Widened(low, Widening(hidden=48))).exact
    assert not check(low, Weaker()).exact
