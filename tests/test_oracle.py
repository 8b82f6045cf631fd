"""The oracle against what is known from elsewhere, so that the definition itself is not taken on trust."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from arrays import as_numpy, assert_same_bits
from strategies import codes_256, fill, seeds

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize(
    ("signed", "sha1"),
    [(True, "cb07ba0d1557267d68103e0f7bc95af7a44d75f8"), (False, "455646eccb91aa9c9e76eec41f55b43022a651ce")],
)
def test_dynamic_map_has_the_published_bytes(signed: bool, sha1: str) -> None:
    assert hashlib.sha1(oracle.dynamic_map(signed).tobytes()).hexdigest() == sha1


def test_nf4_holds_the_quantiles_of_the_normal_distribution() -> None:
    """QLoRA's recipe: 8 positive and 7 negative evenly spaced quantiles up to 0.9677083, and 0, over the largest."""
    offset, inverse = 0.9677083, NormalDist().inv_cdf
    positive = [inverse(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-inverse(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    table = np.sort([*positive, 0.0, *negative]) / max(positive)
    np.testing.assert_allclose(oracle.NF4, table, atol=1e-6)


def test_fp4_is_a_sign_and_a_magnitude() -> None:
    assert_same_bits(oracle.FP4[8:], -oracle.FP4[:8], "negative half")
    assert sorted(oracle.FP4[:8] * np.float32(12)) == pytest.approx([0, 0.0625, 2, 3, 4, 6, 8, 12])


@given(st.lists(st.floats(width=32), min_size=1, max_size=64))
def test_narrow_rounds_as_torch_does(values: list[float]) -> None:
    x = np.array(values, dtype=np.float32)
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        got, expected = oracle.widen(oracle.narrow(x, name)), torch.from_numpy(x).to(dtype).to(torch.float32)
        assert_same_bits(got, expected, name)


def _nearest_exactly(t: np.float32, code: np.ndarray) -> int:
    """The definition read aloud, in rational arithmetic."""
    order = sorted(range(code.size), key=lambda i: (code[i], i))
    rank = 0
    for low, high in pairwise(order):
        middle = np.float32(float((Fraction(float(code[low])) + Fraction(float(code[high]))) / 2))
        rank += bool(t > middle)
    return order[rank]


@given(codes_256(), st.lists(floats.map(np.float32), min_size=1, max_size=8))
def test_nearest_is_the_definition(code: np.ndarray, values: list[np.float32]) -> None:
    mids = oracle.midpoints(np.sort(code))
    t = np.array([*values, mids[0], mids[100], np.nextafter(mids[100], np.float32(9))], dtype=np.float32)
    assert oracle.nearest(t, code).tolist() == [_nearest_exactly(v, code) for v in t]


@given(st.lists(floats, min_size=1, max_size=64))
def test_fp4_differs_from_the_general_rule_in_its_zeros_alone(values: list[float]) -> None:
    t = np.array(values, dtype=np.float32)
    codes = oracle.nearest_fp4(t)
    values_of = oracle.FP4[codes]
    np.testing.assert_array_equal(values_of, oracle.FP4[oracle.nearest(t, oracle.FP4)])
    zero = values_of == 0
    assert codes[zero & (t < 0)].tolist() == [8] * int((zero & (t < 0)).sum())
    assert codes[zero & (t >= 0)].tolist() == [0] * int((zero & (t >= 0)).sum())


@given(st.lists(st.floats(0, width=32, allow_infinity=False), min_size=1, max_size=1000))
def test_offset_is_the_mean(values: list[float]) -> None:
    nested = oracle.quantize_absmax(np.array(values, dtype=np.float32))
    assert nested.offset == pytest.approx(float(sum(map(Fraction, values)) / len(values)), rel=1e-7, abs=2**-149)


@given(st.integers(0, 300).filter(bool), seeds)
def test_pack_round_trip(n: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, n).astype(np.uint8)
    packed = oracle.pack(codes, pad=7)
    assert packed.size == (n + 1) // 2
    np.testing.assert_array_equal(oracle.unpack(packed, n), codes)
    assert packed[0] >> 4 == codes[0]
    assert n % 2 == 0 or packed[-1] & 15 == 7


def test_special_values() -> None:
    """NaN is 0, infinity is the largest finite number, an all-zero block has absmax 0 and the code of 0.0."""
    x = np.array([np.nan, np.inf, -np.inf, 1.0], dtype=np.float32)
    packed, absmax = oracle.quantize_4bit(x, "nf4", 32)
    assert oracle.unpack(packed, 4).tolist() == [7, 15, 0, 7]
    assert absmax.tolist() == [float(oracle.FLT_MAX)]
    packed, absmax = oracle.quantize_4bit(np.zeros(3, np.float32), "nf4", 32)
    assert (packed.tolist(), absmax.tolist()) == ([0x77, 0x77], [0.0])
    smallest = np.float32(2.0**-149)
    packed, absmax = oracle.quantize_4bit(np.array([smallest, -smallest, 0, 2 * smallest]), "nf4", 32)
    assert oracle.NF4[oracle.unpack(packed, 4)] == pytest.approx([0.5, -0.5, 0, 1], abs=0.07)


def test_as_numpy_reads_bfloat16_bits() -> None:
    x = fill(["normal"], 64, 64, torch.bfloat16, 0)
    np.testing.assert_array_equal(oracle.widen(as_numpy(x)), x.float().numpy())
