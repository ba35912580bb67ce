"""The native CPU kernels against torch, at every instruction set, and the model made of them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import InMemory, tiny_model
from growmoe.errors import UsageError
from growmoe.inference.packing import build_packed
from growmoe.inference.paged import PagedBatch, PagedCache, Span
from growmoe.models.attention import Cache, attend
from growmoe.models.checkpoint import build_model
from growmoe.models.config import MoEConfig
from growmoe.models.router import Router
from growmoe.models.transformer import Transformer
from growmoe.ops import native
from growmoe.ops.experts import ExpertWeights, expert_mlp_reference
from growmoe.ops.mapping import mapping_table
from growmoe.ops.quantized import dequantize, quantize, quantize_reference

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels are not built")


@pytest.fixture(params=native.LEVELS, autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test at every instruction set that this processor has."""
    best = native.level()
    assert best is not None
    if native.set_level(request.param) != request.param:
        native.set_level(best)
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    native.set_level(best)


def packed(w_NK: Tensor, form: native.Form, bias_N: Tensor | None = None) -> tuple[Any, Tensor]:
    """The packed weight and what it stands for, in float32."""
    if form == "float32":
        return native.pack(w_NK, form, bias_N), w_NK
    if form == "bfloat16":
        return native.pack(w_NK, form, bias_N), w_NK.bfloat16().float()
    quantized = quantize(w_NK, {"int8": 8, "int4": 4}[form])
    weight = native.pack_integers(quantized.values_NK, quantized.scales_NG, form, bias_N)
    return weight, dequantize(quantized)


def rounded(x: Tensor, form: native.Form) -> Tensor:
    """Activations as products read them."""
    return x if form == "float32" else x.bfloat16().float()


@pytest.mark.parametrize("form", native.FORMS)
@settings(max_examples=12, deadline=None)
@given(st.integers(1, 27), st.integers(1, 110), st.integers(1, 140), st.integers(1, 3))
def test_linear(form: native.Form, T: int, N: int, K: int, threads: int) -> None:
    """Any shape equals torch within rounding; every row has the bits that it has alone."""
    rng = torch.Generator().manual_seed(N * 1000 + K)
    x, w = torch.randn(T, K, generator=rng), torch.randn(N, K, generator=rng)
    bias = torch.randn(N, generator=rng)
    weight, meaning = packed(w, form, bias)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = native.linear(x, weight)
    finally:
        torch.set_num_threads(before)
    expected = rounded(x, form).double() @ meaning.double().t() + bias
    assert torch.allclose(y.double(), expected, atol=2e-5 * K**0.5, rtol=1e-5)
    for t in range(T):
        assert torch.equal(native.linear(x[t : t + 1], weight)[0], y[t])


def test_what_is_not_finite_stays_so() -> None:
    w = torch.eye(40)
    x = torch.zeros(2, 40)
    x[0, 3], x[0, 5] = torch.nan, torch.inf
    for form in native.FORMS:
        y = native.linear(x, packed(w, form)[0])
        assert y[0].isnan().any()
        assert torch.equal(y[1], torch.zeros(40))


def test_views_with_a_stride() -> None:
    x, w = torch.randn(5, 90), torch.randn(33, 40)
    y = native.linear(x[:, :40], native.pack(w, "float32"))
    assert torch.allclose(y, x[:, :40] @ w.t(), atol=1e-4)


@pytest.mark.parametrize("D", [1, 7, 64, 100])
def test_rms_norm(D: int) -> None:
    x, w = torch.randn(9, D), torch.rand(D)
    y = native.rms_norm(x, w, 1e-5)
    assert torch.allclose(y, torch.nn.functional.rms_norm(x, (D,), w, 1e-5), atol=1e-5)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bias", [False, True])
def test_router(scoring: str, bias: bool) -> None:
    moe = MoEConfig(
        experts=(5,), top_k=3, ffn_size=4, scoring=scoring, renormalize=bias, selection_bias=bias
    )  # type: ignore[arg-type]
    config = tiny_model(num_layers=1).config.replace(moe=moe)
    router = Router(config, 5).eval()
    torch.nn.init.normal_(router.weight)
    if router.bias is not None:
        torch.nn.init.normal_(router.bias)
    x = torch.randn(40, 36)
    routing, _ = router(x)
    weight = native.pack(router.weight.detach(), "float32")
    packed = native.PackedRouter(weight, router.bias, 3, scoring == "sigmoid", bias, mix="sum")
    found = native.route(x, packed)
    assert found.chosen_TK[:, 3].eq(5).all()
    assert found.shares_TK[:, 3].eq(1).all()
    assert torch.allclose(found.logits_TE, routing.logits_TE, atol=1e-5)
    assert torch.allclose(found.scores_TE, routing.scores_TE, atol=1e-6)
    assert torch.equal(found.chosen_TK[:, :3].long(), routing.experts_TK)
    assert torch.allclose(found.shares_TK[:, :3], routing.weights_TK, atol=1e-6)


@pytest.mark.parametrize("form", native.FORMS)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@settings(max_examples=6, deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 70), st.integers(1, 70), st.data())
def test_experts(
    form: native.Form, activation: Any, T: int, E: int, D: int, width: int, data: Any
) -> None:
    K = data.draw(st.integers(1, E))
    rng = torch.Generator().manual_seed(T * 100 + E)
    R = 2 * width if activation == "swiglu" else width
    up, down = torch.randn(E, R, D, generator=rng), torch.randn(E, D, width, generator=rng)
    up, down = up * D**-0.5, down * width**-0.5
    up_bias, down_bias = torch.randn(E, R, generator=rng), torch.randn(E, D, generator=rng)
    x, shares = torch.randn(T, D, generator=rng), torch.rand(T, K, generator=rng)
    chosen = torch.rand(T, E, generator=rng).topk(K).indices
    experts, meanings = [], []
    for e in range(E):
        rows, bias = up[e], up_bias[e]
        joined, joined_bias = rows, bias
        if activation == "swiglu":
            joined = native.interleaved(*rows.chunk(2))
            joined_bias = native.interleaved(*bias.chunk(2))
        up_weight, _ = packed(joined, form, joined_bias)
        down_weight, down_meaning = packed(down[e], form, down_bias[e])
        experts.append(native.PackedExpert(up_weight, down_weight))
        meanings.append((packed(rows, form)[1], down_meaning))
    table = native.ExpertTable(experts, activation == "gelu")
    y = native.experts(x, chosen.int(), shares, table, D)
    weights = ExpertWeights(
        torch.stack([u for u, _ in meanings]), torch.stack([d for _, d in meanings]), up_bias,
        down_bias,
    )  # fmt: skip
    expected = expert_mlp_reference(
        rounded(x, form), mapping_table(chosen, E), shares, weights, activation
    )
    tolerance = 1e-4 if form == "float32" else 0.05  # activations are rounded in between
    assert torch.allclose(y, expected, atol=tolerance, rtol=tolerance)
    for t in range(T):
        one = native.experts(x[t : t + 1], chosen[t : t + 1].int(), shares[t : t + 1], table, D)
        assert torch.equal(one[0], y[t])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 140), st.integers(1, 140), st.data())
def test_plain_experts(dtype: torch.dtype, T: int, E: int, D: int, width: int, data: Any) -> None:
    """Weights as models have them: row-major, unpacked."""
    K = data.draw(st.integers(1, E))
    rng = torch.Generator().manual_seed(T * 100 + E)
    up = (torch.randn(E, 2 * width, D, generator=rng) * D**-0.5).to(dtype)
    down = (torch.randn(E, D, width, generator=rng) * width**-0.5).to(dtype)
    x, shares = torch.randn(T, D, generator=rng).to(dtype), torch.rand(T, K, generator=rng)
    chosen = torch.rand(T, E, generator=rng).topk(K).indices
    y = native.plain_experts(x, chosen, shares, up, down)
    expected = expert_mlp_reference(
        x.float(), mapping_table(chosen, E), shares, ExpertWeights(up.float(), down.float()),
        "swiglu",
    )  # fmt: skip
    tolerance = 1e-4 if dtype is torch.float32 else 0.05
    assert torch.allclose(y, expected, atol=tolerance, rtol=tolerance)
    for t in range(T):
        one = native.plain_experts(x[t : t + 1], chosen[t : t + 1], shares[t : t + 1], up, down)
        assert torch.equal(one[0], y[t])


def steps(lengths: list[int], chunk: int) -> Iterator[list[tuple[int, int, int]]]:
    """(sequence, start, count) of every step that prefills several sequences in chunks."""
    done = [0] * len(lengths)
    while any(d < n for d, n in zip(done, lengths)):
        step = []
        for s, n in enumerate(lengths):
            count = min(chunk, n - done[s])
            if count:
                step.append((s, done[s], count))
                done[s] += count
        yield step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize(("H", "G", "C"), [(6, 2, 8), (4, 4, 64), (3, 1, 36), (8, 1, 128)])
def test_attention(dtype: torch.dtype, window: int | None, H: int, G: int, C: int) -> None:
    """Ragged and paged equals plain attention, and the bits do not depend on chunks or company."""
    config = tiny_model(num_layers=1).config.replace(
        num_heads=H, num_kv_heads=G, head_dim=C, hidden_size=H * C, max_positions=400
    )
    lengths = [150, 1, 97]
    qkv = [torch.randn(n, (H + 2 * G) * C) for n in lengths]
    shape = native.AttentionShape(H, G, C, window or 0)

    def run(chunk: int, alone: bool) -> list[Tensor]:
        cache = PagedCache(config, 64, dtype)
        tables = [list(range(20 * s + 1, 20 * s + 1 + -(-n // 16))) for s, n in enumerate(lengths)]
        found: list[list[Tensor]] = [[] for _ in lengths]
        groups = [[0], [1], [2]] if alone else [[0, 1, 2]]
        for group in groups:
            for step in steps([n if s in group else 0 for s, n in enumerate(lengths)], chunk):
                spans = [Span(start, n, tables[s][: -(-(start + n) // 16)]) for s, start, n in step]
                batch = PagedBatch(cache, spans)
                rows = torch.cat([qkv[s][start : start + n] for s, start, n in step])
                y = native.attention(rows, None, cache.keys[0], cache.values[0], batch, shape)
                for (s, _, _), part in zip(step, y.split([n for _, _, n in step])):
                    found[s].append(part)
        return [torch.cat(parts) for parts in found]

    whole = run(1000, alone=True)
    for rows, y in zip(qkv, whole):
        q, k, v = rows.view(len(rows), -1, C).transpose(0, 1)[None].split([H, G, G], dim=1)
        k, v = k.to(dtype).float(), v.to(dtype).float()
        expected = attend(q, k, v, window, None)[0].transpose(0, 1).flatten(1)
        assert torch.allclose(y, expected, atol=2e-5)
    for chunk, alone in ((1000, False), (7, False), (1, True), (64, False)):
        for y, other in zip(whole, run(chunk, alone)):
            assert torch.equal(y, other)


MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "learned positions, layer norm, gelu, biases": {
        "positions": "learned", "norm": "layer", "activation": "gelu", "qkv_bias": True,
        "o_bias": True, "mlp_bias": True, "tied_head": True, "family": "growmoe",
    },
    "qk norm": {"qk_norm": True, "family": "qwen3"},
    "qk norm over all, window": {"qk_norm": True, "qk_norm_scope": "all", "sliding_window": 40,
                                 "family": "growmoe"},
    "moe": {"moe": MoEConfig(experts=(4, 4, 4), top_k=2, ffn_size=24), "family": "mixtral"},
    "pyramid, softmax2": {
        "moe": MoEConfig(experts=(0, 4, 8), top_k=1, ffn_size=24, renormalize=False,
                         mix="softmax2", fixed_ffn_size=40),
        "family": "growmoe",
    },
    "shared expert": {
        "moe": MoEConfig(experts=(4, 4, 4), top_k=2, ffn_size=24, mix="sigmoid_gate",
                         fixed_ffn_size=33),
        "family": "qwen2_moe", "qkv_bias": True,
    },
    "sum, biases": {
        "moe": MoEConfig(experts=(4, 4, 4), top_k=2, ffn_size=24, mix="sum", fixed_ffn_size=33,
                         scoring="sigmoid", selection_bias=True),
        "family": "growmoe", "mlp_bias": True,
    },
    "groups": {
        "moe": MoEConfig(experts=(8, 8, 8), top_k=2, ffn_size=24, groups=4, top_groups=2),
        "family": "growmoe",
    },
}  # fmt: skip


def through_pages(model: Transformer, ids: Tensor, dtype: torch.dtype, chunk: int) -> Tensor:
    """Logits of every token, prefilled in chunks over a paged cache."""
    cache = PagedCache(model.config, 16, dtype)
    found = []
    for start in range(0, len(ids), chunk):
        count = min(chunk, len(ids) - start)
        batch = PagedBatch(
            cache, [Span(start, count, [3, 1, 7, 2, 9, 4, 8][: -(-(start + count) // 16)])]
        )
        found.append(model(ids[None, start : start + count], batch).logits[0])
    return torch.cat(found)


@pytest.mark.parametrize("name", MODELS)
def test_packed_models(name: str) -> None:
    """Every kind of layer gives what the plain model gives, with pages, without, in chunks."""
    source = InMemory(tiny_model(3, **MODELS[name]))
    plain = build_model(source)
    model = build_packed(source, "float32")
    ids = torch.arange(100) * 31 % 97
    with torch.inference_mode():
        expected = plain(ids[None]).logits[0]
        scale = expected.abs().max()
        assert ((model(ids[None]).logits[0] - expected).abs().max() / scale) < 2e-5
        cached, cache = [], Cache()
        for part in ids.split(30):
            cached.append(model(part[None], cache).logits[0])
        assert ((torch.cat(cached) - expected).abs().max() / scale) < 2e-5
        whole = through_pages(model, ids, torch.float32, 100)
        assert ((whole - expected).abs().max() / scale) < 2e-5
        for chunk in (1, 17):
            assert torch.equal(through_pages(model, ids, torch.float32, chunk), whole)
        # one call a layer is a saving, not another computation
        fused = [block.layer is not None for block in model.layers]
        assert all(fused) is (source.config.norm == "rms" and "over all" not in name)
        for block in model.layers:
            block.layer = None
        assert torch.equal(through_pages(model, ids, torch.float32, 17), whole)


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", ["dense", "shared expert"])
def test_forms(name: str, form: native.Form) -> None:
    """Smaller forms differ by what rounding explains, and have the same bits in any chunks."""
    source = InMemory(tiny_model(3, **MODELS[name]))
    model = build_packed(source, form)
    ids = torch.arange(100) * 31 % 97
    with torch.inference_mode():
        expected = build_model(source)(ids[None]).logits[0]
        whole = through_pages(model, ids, torch.bfloat16, 100)
        assert torch.equal(through_pages(model, ids, torch.bfloat16, 9), whole)
    error = float((whole - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    assert error < {"bfloat16": 0.05, "int8": 0.06, "int4": 0.6}[form]


def test_observed_routing_is_that_of_the_router() -> None:
    source = InMemory(tiny_model(3, **MODELS["shared expert"]))
    plain, model = build_model(source), build_packed(source, "float32")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert model(ids).routing == []
        for block in model.layers:
            block.moe.observe = True
        for a, b in zip(plain(ids).routing, model(ids).routing, strict=True):
            assert torch.equal(a.experts_TK, b.experts_TK)
            assert torch.equal(a.counts_E, b.counts_E)
            assert torch.allclose(a.weights_TK, b.weights_TK, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 100), st.sampled_from([8, 4]), st.integers(-140, 120))
def test_quantising_is_bit_equal_to_torch(N: int, K: int, bits: int, exponent: int) -> None:
    rng = torch.Generator().manual_seed(N * 1000 + K)
    w = torch.randn(N, K, generator=rng) * 2.0**exponent
    w[torch.rand(N, K, generator=rng) < 0.1] = 0.0
    w[0] = w[0, 0]
    w[0, 1::2] *= -1  # of equally large weights the first gives the sign of the scale
    found, expected = quantize(w, bits), quantize_reference(w, bits)
    assert torch.equal(found.scales_NG, expected.scales_NG)
    assert torch.equal(found.values_NK, expected.values_NK)


def test_routers_and_norms_are_not_rounded() -> None:
    source = InMemory(tiny_model(3, **MODELS["moe"]))
    model = build_packed(source, "int4")
    router = model.layers[1].moe.router.weight
    expected = native.pack(source.load("layers.1.moe.router.weight"), "float32")
    assert torch.equal(router.data, expected.data)
    assert torch.equal(model.norm.weight_D, source.load("norm.weight"))


def test_heads_that_are_too_wide() -> None:
    source = InMemory(tiny_model(3, num_heads=1, num_kv_heads=1, head_dim=514))
    with pytest.raises(UsageError, match="GROWMOE_NATIVE=0"):
        build_packed(source, "float32")


def test_no_tokens() -> None:
    for form in native.FORMS:
        weight = packed(torch.randn(40, 30), form)[0]
        assert native.linear(torch.empty(0, 30), weight).shape == (0, 40)


def test_kernels_work_in_a_forked_child() -> None:
    """Threads do not survive a fork; the child makes its own."""
    code = (
        "import os, torch\n"
        "from growmoe.ops import native\n"
        "torch.set_num_threads(2)\n"
        "w = native.pack(torch.randn(4000, 64), 'float32')\n"
        "x = torch.randn(1, 64)\n"
        "y = native.linear(x, w)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if torch.equal(native.linear(x, w), y) else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, env={**os.environ})
    assert done.returncode == 0
