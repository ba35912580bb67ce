"""Integers and scales: error bounds, extremes, packing by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from growmoe.errors import GrowmoeError, UsageError
from growmoe.ops.quantized import (
    GROUP,
    RANGES,
    Quantized,
    dequantize,
    pack,
    packed_width,
    quantize,
    unpack,
)

TINY = torch.finfo(torch.bfloat16).tiny
SHAPES = [(1, 32), (3, 64), (5, 100), (7, 31), (2, 1), (300, 320)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread(scales_NG: Tensor, K: int) -> Tensor:
    return scales_NG.float().abs().repeat_interleave(GROUP, dim=1)[:, :K]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_ranges_and_error_bound(bits: int, shape: tuple[int, int]) -> None:
    w = normal(*shape)
    q = quantize(w, bits)
    N, K = shape
    assert (q.values_NK.dtype, q.scales_NG.dtype) == (torch.int8, torch.bfloat16)
    assert q.values_NK.shape == shape
    assert q.scales_NG.shape == (N, -(-K // GROUP))
    low, high = RANGES[bits]
    assert low <= q.values_NK.min()
    assert q.values_NK.max() <= high
    error, scales = (w - dequantize(q)).abs(), spread(q.scales_NG, K)
    cut = (q.values_NK == low) | (q.values_NK == high)
    assert (error <= scales * 0.5001)[~cut].all()
    # 4 bits: the scale may be up to 1/9 of the largest weight, whose like of the other sign is cut
    # to 7
    assert (error <= scales * (2.05 if bits == 4 else 0.5001)).all()


def test_the_scale_is_rounded_before_integers_are_computed_with_it() -> None:
    w = torch.full((1, 32), 100.0)
    w[0, 0] = 101.3
    q = quantize(w, 8)
    scale = q.scales_NG[0, 0].float()
    assert scale == (w[0, 0] / 127).to(torch.bfloat16)
    assert torch.equal(q.values_NK[0].float(), (w[0] / scale).round())


def test_four_bits_search_the_scale() -> None:
    w = normal(200, 256, seed=1)
    q = quantize(w, 4)
    groups = w.view(-1, GROUP)
    plain = groups.abs().amax(1, keepdim=True) / 7
    absmax = (groups / plain).round() * plain
    searched = dequantize(q).view(-1, GROUP)
    ratio = (searched - groups).square().sum() / (absmax - groups).square().sum()
    assert ratio < 0.75
    # per group no worse than every scale that is tried
    for divisor in (7.0, 8.0, 8.5, 9.0):
        place = groups.abs().argmax(1, keepdim=True)
        scale = (-groups.gather(1, place) / divisor).bfloat16().float()
        tried = ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(1)
        assert ((searched - groups).square().sum(1) <= tried * 1.0001 + 1e-9).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_shorter_last_group_has_a_scale_of_its_own(bits: int) -> None:
    w = normal(4, 40)
    w[:, 32:] *= 1000
    q = quantize(w, bits)
    head, tail = quantize(w[:, :32], bits), quantize(w[:, 32:], bits)
    assert torch.equal(q.values_NK, torch.cat((head.values_NK, tail.values_NK), 1))
    assert torch.equal(q.scales_NG, torch.cat((head.scales_NG, tail.scales_NG), 1))


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_stand_alone(bits: int) -> None:
    w = normal(3000, 96)
    q, rows = quantize(w, bits), quantize(w[1000:1003], bits)
    assert torch.equal(q.values_NK[1000:1003], rows.values_NK)
    assert torch.equal(q.scales_NG[1000:1003], rows.scales_NG)


weights = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=150, deadline=None)
@given(st.lists(weights, min_size=1, max_size=70), st.sampled_from([8, 4]))
def test_any_finite_row(row: list[float], bits: int) -> None:
    """Subnormal, huge and constant weights included: finite, bounded, and stable when repeated."""
    w = torch.tensor([row], dtype=torch.float32)
    q = quantize(w, bits)
    again = dequantize(q)
    assert torch.isfinite(again).all()
    scales = spread(q.scales_NG, len(row)).double()
    lost = RANGES[bits][1] * TINY * 1.3  # a group whose scale would be no normal number
    assert ((w.double() - again.double()).abs() <= scales * 2.05 + lost).all()
    assert torch.equal(dequantize(quantize(again, bits)), again)


@settings(max_examples=60, deadline=None)
@given(weights, st.sampled_from([8, 4]))
def test_a_constant_row_keeps_its_value(value: float, bits: int) -> None:
    w = torch.full((2, 33), value)
    again = dequantize(quantize(w, bits))
    if abs(value) / 127 < 2 * TINY:
        assert (again.abs() <= 2 * abs(value)).all()
    else:
        assert ((again - w).abs() <= abs(w) * 2**-8).all()  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("power", [-110, -60, 60, 110])
def test_integers_do_not_depend_on_the_size_of_weights(bits: int, power: int) -> None:
    """The squares of such weights are no float32."""
    w = normal(20, 64)
    assert torch.equal(quantize(w * 2.0**power, bits).values_NK, quantize(w, bits).values_NK)


@pytest.mark.parametrize("bits", [8, 4])
def test_scales_below_the_normal_numbers_are_zero(bits: int) -> None:
    """Some processors take such numbers for 0."""
    w = torch.ones(3, 64) * RANGES[bits][1] * TINY * 0.4
    w[:, 32:] *= 10
    q = quantize(w, bits)
    assert not q.scales_NG[:, 0].any()
    assert not q.values_NK[:, :32].any()
    assert (q.scales_NG[:, 1].abs() >= TINY).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_zeros(bits: int) -> None:
    q = quantize(torch.zeros(3, 70), bits)
    assert not q.values_NK.any()
    assert not q.scales_NG.any()
    assert not dequantize(q).any()
    empty = quantize(torch.zeros(0, 64), bits)
    assert (tuple(empty.values_NK.shape), tuple(empty.scales_NG.shape)) == ((0, 64), (0, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    w = normal(2000, 64)
    w[1999, 63] = bad
    for bits in (8, 4):
        with pytest.raises(GrowmoeError, match="NaN or infinite"):
            quantize(w, bits)


def test_other_bits_are_refused() -> None:
    with pytest.raises(UsageError, match="8 or 4 bits, not to 3"):
        quantize(normal(1, 32), 3)


def test_half_precision_weights() -> None:
    w = normal(8, 64).bfloat16()
    assert torch.equal(dequantize(quantize(w, 8)), dequantize(quantize(w.float(), 8)))


# ---- packing ----


def test_packing_of_one_row_by_hand() -> None:
    four = torch.tensor([[-8, -7, 0, 7, 1, -1, 3, -4, 2]], dtype=torch.int8)
    # nibbles are value + 8, the first one lowest: 0 1 8 f 9 7 b 4 and a
    assert pack(four, 4).tolist() == [[0x4B79F810, 0x0000000A]]
    eight = torch.tensor([[-127, 0, 127, 1, -1]], dtype=torch.int8)
    # bytes are value + 128: 01 80 ff 81 and 7f
    assert pack(eight, 8).tolist() == [[0x81FF8001 - 2**32, 0x0000007F]]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 70), st.integers(1, 5), st.sampled_from([8, 4]), st.integers(0, 99))
def test_packing_keeps_every_integer(K: int, N: int, bits: int, seed: int) -> None:
    low, high = RANGES[bits]
    rng = torch.Generator().manual_seed(seed)
    values = torch.randint(low, high + 1, (N, K), dtype=torch.int8, generator=rng)
    words = pack(values, bits)
    assert (words.dtype, tuple(words.shape)) == (torch.int32, (N, packed_width(K, bits)))
    assert torch.equal(unpack(words, bits, K), values)


def test_dequantised_weights_are_the_products() -> None:
    q = Quantized(
        torch.tensor([[1, -2, 3] + [0] * 30], dtype=torch.int8),
        torch.tensor([[0.5, -4.0]], dtype=torch.bfloat16),
    )
    assert dequantize(q)[0, :3].tolist() == [0.5, -1.0, 1.5]
    q.values_NK[0, 32] = 7
    assert dequantize(q)[0, 32] == -28.0
