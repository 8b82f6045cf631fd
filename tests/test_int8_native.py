"""The int8 functions of the native module, on every device, against ``oracle_int8.py``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle_int8 as oracle
from arrays import DTYPES, as_numpy, as_tensor, assert_same_bits, dtype_name
from fewbits import _native
from fewbits._checks import DTYPES as NUMBERS
from fewbits._launch import target_queue
from oracle import narrow, widen
from strategies import dtypes, seeds
from tolerances import INT8_OUTLIERS, UNIT_ROUNDOFF

GUARD = 64

# How a row's ordinary elements, and single ones among them, are made.
ROWS = ["normal", "wide", "zero", "tiny", "reciprocal edge", "huge", "ties", "constant"]
PLANTS = ["outlier", "large outlier", "edge", "below", "negative", "nan", "inf"]


class Place:
    """Memory of a device with a guard on either side of what a kernel may write, at an odd address if `shift` is."""

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device, shift: int = 0) -> None:
        self.poison = torch.full((count + 2 * GUARD + shift,), 77, dtype=dtype, device=device)
        self.start, self.count = GUARD + shift, count

    @property
    def inner(self) -> torch.Tensor:
        return self.poison[self.start : self.start + self.count]

    @property
    def address(self) -> int:
        return self.poison.data_ptr() + self.start * self.poison.itemsize

    def put(self, values: torch.Tensor) -> Place:
        self.inner.copy_(values.reshape(-1))
        return self

    def read(self, what: str) -> np.ndarray:
        """Return what was written; fail where the guards were."""
        assert bool((self.poison[: self.start] == 77).all()), f"{what}: written before"
        assert bool((self.poison[self.start + self.count :] == 77).all()), f"{what}: written after"
        return as_numpy(self.inner)


def placed(values: torch.Tensor, device: torch.device, shift: int = 0) -> Place:
    return Place(values.numel(), values.dtype, device, shift).put(values)


def activations(
    rows: list[str], plants: list[tuple[str, int, int]], m: int, k: int, threshold: float, dtype: torch.dtype, seed: int
) -> torch.Tensor:
    """Rows by recipe, with elements planted at (row, column)."""
    rng = np.random.default_rng(seed)
    x = np.zeros((m, k))
    for row in range(m):
        kind = rows[row % len(rows)]
        normal = rng.standard_normal(k)
        x[row] = {
            "normal": normal,
            "wide": normal * 10.0 ** rng.uniform(-6, 0, k),
            "zero": np.zeros(k),
            "tiny": rng.integers(-5, 6, k) * 2.0**-149,
            "reciprocal edge": normal * 2.0**-121,
            "huge": normal * 1e38,
            "ties": np.append(rng.integers(-253, 254, max(k - 1, 0)) / 2, 127.0)[:k] / 32,
            "constant": np.full(k, rng.standard_normal()),
        }[kind]
    edge = threshold or 6.0
    for kind, row, column in plants:
        if m and k:
            x[row % m, column % k] = {
                "outlier": edge * 1.5,
                "large outlier": edge * 1e4,
                "edge": edge,
                "below": np.nextafter(np.float32(edge), np.float32(0)),
                "negative": -edge * 2,
                "nan": np.nan,
                "inf": np.inf if (row + column) % 2 else -np.inf,
            }[kind]
    with np.errstate(all="ignore"):
        return as_tensor(narrow(x.astype(np.float32), dtype_name(dtype)), dtype)


def matrix(place: Place, m: int, k: int) -> np.ndarray:
    return as_numpy(place.inner).reshape(m, k)


def weights(n: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes over all of int8 and scales of several magnitudes."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-128, 128, (n, k)).astype(np.int8)
    scale = (rng.uniform(0.5, 1, n) * 10.0 ** rng.integers(-4, 2, n)).astype(np.float32)
    return torch.from_numpy(codes), torch.from_numpy(scale)


shapes = st.tuples(
    st.one_of(st.integers(0, 9), st.sampled_from([16, 17, 33, 64, 65, 130])),
    st.one_of(st.integers(0, 40), st.sampled_from([64, 65, 127, 128, 192])),
    st.one_of(st.integers(0, 130), st.sampled_from([16, 32, 64, 96, 256, 511, 512, 2049])),
)
thresholds = st.sampled_from([0.0, 6.0, 6.0, 0.5, 3.3, 1e30])
plantings = st.lists(st.tuples(st.sampled_from(PLANTS), st.integers(0, 1000), st.integers(0, 5000)), max_size=12)
ordinary_plantings = st.lists(
    st.tuples(st.sampled_from(PLANTS[:5]), st.integers(0, 1000), st.integers(0, 5000)), max_size=40
)
row_kinds = st.lists(st.sampled_from(ROWS), min_size=1, max_size=4)
shifts = st.sampled_from([0, 0, 0, 1, 3, 8])


def mask_place(k: int, device: torch.device) -> Place:
    place = Place(-(-k // 32), torch.int32, device)
    place.inner.zero_()
    return place


class Quantized:
    """Rows quantized by the native module."""

    def __init__(
        self, x: Place, m: int, k: int, dtype: torch.dtype, threshold: float, device: torch.device, shift: int
    ):
        self.codes = Place(m * k, torch.int8, device, shift)
        self.row = Place(m, torch.float32, device, shift)
        self.mask = mask_place(k, device)
        mask = self.mask.address if threshold > 0 else 0
        where = (self.codes.address, self.row.address, mask, *target_queue(x.poison.device))
        _native.int8_quantize_rows(x.address, m, k, NUMBERS[dtype], threshold, *where)


@given(
    shape=shapes,
    dtype=dtypes,
    threshold=thresholds,
    rows=row_kinds,
    plants=plantings,
    shift=shifts,
    out_shift=shifts,
    seed=seeds,
)
def test_rows(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    threshold: float,
    rows: list[str],
    plants: list[tuple[str, int, int]],
    shift: int,
    out_shift: int,
    seed: int,
    device: torch.device,
) -> None:
    m, _, k = shape
    x = placed(activations(rows, plants, m, k, threshold, dtype, seed), device, shift)
    got = Quantized(x, m, k, dtype, threshold, device, out_shift)
    codes, scale, columns = oracle.quantize_rows(matrix(x, m, k), threshold)
    assert_same_bits(got.row.read("row_scale"), scale, "row_scale")
    assert_same_bits(got.codes.read("codes"), codes.reshape(-1), "codes")
    assert_same_bits(got.mask.read("mask").view(np.uint32), oracle.pack_mask(columns), "mask")


def test_the_mask_is_added_to_and_may_be_absent(device: torch.device) -> None:
    x = placed(activations(["normal"], [("outlier", 1, 40)], 3, 70, 6.0, torch.bfloat16, 0), device)
    codes, row = Place(210, torch.int8, device), Place(3, torch.float32, device)
    mask = mask_place(70, device)
    mask.inner[0] = 5
    for address in (mask.address, 0):
        where = (codes.address, row.address, address, *target_queue(x.poison.device))
        _native.int8_quantize_rows(x.address, 3, 70, NUMBERS[torch.bfloat16], 6.0, *where)
        expected, scale, _ = oracle.quantize_rows(matrix(x, 3, 70), 6.0)
        assert_same_bits(codes.read("codes"), expected.reshape(-1), "codes")
        assert_same_bits(row.read("row_scale"), scale, "row_scale")
    assert mask.read("mask").tolist() == [5, 1 << 8, 0]


@given(shape=shapes, shift=shifts, out_shift=shifts, seed=seeds)
def test_int32(shape: tuple[int, int, int], shift: int, out_shift: int, seed: int, device: torch.device) -> None:
    m, n, k = shape
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(-128, 128, (rows, k)).astype(np.int8) for rows in (m, n))
    a_place, b_place = (placed(torch.from_numpy(values), device, shift) for values in (a, b))
    out = Place(m * n, torch.int32, device, out_shift)
    where = (b_place.address, n, out.address, *target_queue(out.poison.device))
    _native.int8_matmul_int32(a_place.address, m, k, *where)
    assert_same_bits(out.read("out"), oracle.matmul_int32(a, b).reshape(-1), "out")


@pytest.mark.parametrize("m", [1, 5, 20])
@pytest.mark.parametrize("value", [-128, 127])
def test_the_largest_sums_are_exact(m: int, value: int, device: torch.device) -> None:
    k = 131_071
    a = torch.full((m, k), value, dtype=torch.int8, device=device)
    b = torch.full((3, k), -128, dtype=torch.int8, device=device)
    out = torch.zeros(m, 3, dtype=torch.int32, device=device)
    _native.int8_matmul_int32(a.data_ptr(), m, k, b.data_ptr(), 3, out.data_ptr(), *target_queue(a.device))
    assert bool((out == -128 * value * k).all())


class Product:
    """Everything that a product reads, and the place of its result."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        threshold: float,
        rows: list[str],
        plants: list[tuple[str, int, int]],
        biased: bool,
        shift: int,
        out_shift: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.m, self.n, self.k = m, n, k = shape
        self.dtype, self.threshold = dtype, threshold
        self.x = placed(activations(rows, plants, m, k, threshold, dtype, seed), device, shift)
        codes, scale = weights(n, k, seed)
        self.weight, self.col = placed(codes, device, shift), placed(scale, device, shift)
        bias = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
        self.bias = placed(as_tensor(narrow(bias, dtype_name(dtype)), dtype), device, shift) if biased else None
        self.out = Place(m * n, dtype, device, out_shift)
        self.target = target_queue(self.x.poison.device)

    def run(self, how: str) -> np.ndarray:
        """Return the result of one of the ways to the same product."""
        m, n, k, x, out = self.m, self.n, self.k, self.x, self.out
        number, bias = NUMBERS[self.dtype], 0 if self.bias is None else self.bias.address
        out.inner.fill_(99)
        if how == "matmul":
            got = Quantized(x, m, k, self.dtype, self.threshold, x.poison.device, 0)
            x_and_mask = (x.address, got.mask.address) if self.threshold else (0, 0)
            codes = (x_and_mask[0], number, got.codes.address, m, k, got.row.address)
            weight = (self.weight.address, n, self.col.address)
            _native.int8_matmul(*codes, *weight, x_and_mask[1], bias, out.address, *self.target)
            return out.read("out").reshape(m, n)
        size = _native.int8_linear_workspace_size(m, n, k, self.target[0])
        workspace = Place(size, torch.uint8, x.poison.device)
        rest = (bias, out.address, workspace.address if size else 0, *self.target)
        if how == "linear":
            weight = (self.weight.address, n, self.col.address)
            _native.int8_linear(x.address, m, k, number, self.threshold, *weight, *rest)
        else:
            bound = _native.Int8Weight(self.weight.address, n, k, self.col.address)
            bound.linear(x.address, m, number, self.threshold, *rest[:3], 0, *rest[3:])
        workspace.read("workspace")
        return out.read("out").reshape(m, n)

    def check(self, got: np.ndarray) -> None:
        __tracebackhide__ = True
        x, weight, col = matrix(self.x, self.m, self.k), matrix(self.weight, self.n, self.k), as_numpy(self.col.inner)
        bias = None if self.bias is None else as_numpy(self.bias.inner)
        codes, row, columns = oracle.quantize_rows(x, self.threshold)
        if not columns.any():
            expected = oracle.matmul(codes, row, weight, col, dtype_name(self.dtype), bias)
            np.testing.assert_array_equal(widen(got), widen(expected))
            return
        truth, magnitude = oracle.matmul_exact(x, codes, row, columns, weight, col, bias)
        # NaN and infinity touch their own rows: what those hold is IEEE's.
        # Float32 products on the way overflow from about 1e28 on, before the result does.
        finite = (np.abs(widen(x)).max(axis=1, initial=0) < 1e25) & np.isfinite(row)
        with np.errstate(all="ignore"):
            error = np.abs(widen(got).astype(np.float64) - truth)
            allowed = 1.01 * UNIT_ROUNDOFF[self.dtype] * np.abs(truth) + INT8_OUTLIERS[self.dtype] * magnitude
            allowed += torch.finfo(self.dtype).smallest_normal * UNIT_ROUNDOFF[self.dtype]
            # Subnormal steps on the way: what a code stands for is half of one off, times up to 127, times w; products
            # are half of one off.
            largest_weight = np.abs(col).max(initial=0)
            allowed += np.finfo(np.float32).smallest_subnormal * (2 + columns.sum() * (1 + 64 * largest_weight))
            overflows = np.abs(truth) > 0.99 * torch.finfo(self.dtype).max
        worst = (error - allowed)[finite][~overflows[finite]]
        assert not (worst > 0).any(), f"{worst.max()} past the bound"
        assert not np.isnan(worst).any()
        assert not np.isfinite(widen(got)[np.isnan(row)]).any()


HOWS = ["matmul", "linear", "bound"]


@given(
    shape=shapes,
    dtype=dtypes,
    threshold=thresholds,
    rows=row_kinds,
    plants=plantings,
    biased=st.booleans(),
    shift=shifts,
    out_shift=shifts,
    seed=seeds,
    how=st.sampled_from(HOWS),
)
def test_products(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    threshold: float,
    rows: list[str],
    plants: list[tuple[str, int, int]],
    biased: bool,
    shift: int,
    out_shift: int,
    seed: int,
    how: str,
    device: torch.device,
) -> None:
    product = Product(shape, dtype, threshold, rows, plants, biased, shift, out_shift, seed, device)
    product.check(product.run(how))


@given(
    shape=shapes,
    dtype=dtypes,
    plants=ordinary_plantings,
    biased=st.booleans(),
    shift=shifts,
    seed=seeds,
    how=st.sampled_from(HOWS),
)
def test_products_of_ordinary_rows(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    plants: list[tuple[str, int, int]],
    biased: bool,
    shift: int,
    seed: int,
    how: str,
    device: torch.device,
) -> None:
    product = Product(shape, dtype, 6.0, ["normal"], plants, biased, shift, 0, seed, device)
    product.check(product.run(how))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 7, 16, 40, 128, 300])
@pytest.mark.parametrize("outliers", [0, 1, 7, 64, 4160])
def test_layers(dtype: torch.dtype, m: int, outliers: int, device: torch.device) -> None:
    """Sizes that cross every kernel's tiles, with few and with all columns outliers."""
    plants = [("outlier", 5 * i, (i * 4099 + 13) % 4160) for i in range(outliers)]
    product = Product((m, 200, 4160), dtype, 6.0, ["normal"], plants, True, 0, 0, 1, device)
    results = [product.run(how) for how in HOWS]
    product.check(results[0])
    for other in results[1:]:
        product.check(other)


@given(data=st.data(), n=st.integers(1, 40), k=st.integers(1, 200), dtype=dtypes, shift=shifts, seed=seeds)
def test_rectangles(
    data: st.DataObject, n: int, k: int, dtype: torch.dtype, shift: int, seed: int, device: torch.device
) -> None:
    codes, scale = weights(n, k, seed)
    weight, col = placed(codes, device, shift), placed(scale, device, shift)
    first_row, first_column = data.draw(st.integers(0, n)), data.draw(st.integers(0, k))
    rows, columns = data.draw(st.integers(0, n - first_row)), data.draw(st.integers(0, k - first_column))
    out = Place(rows * columns, dtype, device, shift)
    where = (out.address, NUMBERS[dtype], *target_queue(out.poison.device))
    _native.int8_dequantize_panel(weight.address, n, k, col.address, first_row, rows, first_column, columns, *where)
    whole = oracle.dequantize(codes.numpy(), scale.numpy(), dtype_name(dtype))
    part = whole[first_row : first_row + rows, first_column : first_column + columns]
    assert_same_bits(out.read("out"), part.reshape(-1), "out")


@pytest.mark.parametrize("bad", [-1.5, float("nan")])
def test_bad_thresholds(bad: float) -> None:
    x, codes, row, out = torch.ones(2, 32), torch.ones(2, 32, dtype=torch.int8), torch.ones(2), torch.full((2, 2), 7.0)
    with pytest.raises(ValueError, match=r"^threshold: got (-1.5|NaN), expected"):
        _native.int8_quantize_rows(x.data_ptr(), 2, 32, 0, bad, codes.data_ptr(), row.data_ptr(), 0, -1, 1)
    with pytest.raises(ValueError, match=r"^threshold"):
        _native.int8_linear(
            x.data_ptr(), 2, 32, 0, bad, codes.data_ptr(), 2, row.data_ptr(), 0, out.data_ptr(), 0, -1, 1
        )
    assert bool((codes == 1).all())
    assert bool((out == 7).all())


def calls() -> dict[str, tuple[Any, list[Any], dict[int, str]]]:
    """Each function, good arguments, and the names of those that must be addresses."""
    a = 1 << 20  # Nothing is read before every argument is checked.
    return {
        "int8_quantize_rows": (
            _native.int8_quantize_rows,
            [a, 2, 8, 0, 6.0, a, a, a, -1, 1],
            {0: "x", 5: "codes", 6: "row_scale"},
        ),
        "int8_matmul": (
            _native.int8_matmul,
            [a, 0, a, 2, 8, a, a, 3, a, a, 0, a, -1, 1],
            {0: "x", 2: "codes", 5: "row_scale", 6: "weight", 8: "col_scale", 11: "out"},
        ),
        "int8_linear": (
            _native.int8_linear,
            [a, 2, 8, 0, 6.0, a, 3, a, 0, a, 0, -1, 1],
            {0: "x", 5: "weight", 7: "col_scale", 9: "out"},
        ),
        "int8_matmul_int32": (_native.int8_matmul_int32, [a, 2, 8, a, 3, a, -1, 1], {0: "a", 3: "b", 5: "out"}),
        "int8_dequantize_panel": (
            _native.int8_dequantize_panel,
            [a, 3, 8, a, 0, 3, 0, 8, a, 0, -1, 1],
            {0: "weight", 3: "col_scale", 8: "out"},
        ),
    }


@pytest.mark.parametrize("function", list(calls()))
def test_null_addresses(function: str) -> None:
    call, good, addresses = calls()[function]
    for position, name in addresses.items():
        arguments = list(good)
        arguments[position] = 0
        with pytest.raises(ValueError, match=f"^{name}: got a null address"):
            call(*arguments)


@pytest.mark.parametrize(
    ("function", "position", "match"),
    [
        ("int8_matmul", 4, "k: got 131072"),
        ("int8_linear", 2, "k: got 131072"),
        ("int8_matmul_int32", 2, "k: got 131072"),
    ],
)
def test_too_many_columns(function: str, position: int, match: str) -> None:
    call, good, _ = calls()[function]
    good[position] = 131_072
    with pytest.raises(ValueError, match=f"^{match}, expected at most 131071"):
        call(*good)


@pytest.mark.parametrize("function", list(calls()))
def test_sizes_past_the_address_space(function: str) -> None:
    call, good, _ = calls()[function]
    good[next(i for i, value in enumerate(good) if value in (2, 3))] = 2**62
    with pytest.raises(ValueError, match="fits the address space"):
        call(*good)


@pytest.mark.parametrize(
    ("match", "place"),
    [
        ("rows: got 2 from 2 on.*3", (2, 2, 0, 8)),
        ("rows: got 1 from 18446744073709551615 on", (2**64 - 1, 1, 0, 8)),
        ("columns: got 4 from 5 on.*8", (0, 3, 5, 4)),
    ],
)
def test_a_part_must_lie_within(match: str, place: tuple[int, int, int, int]) -> None:
    a = 1 << 20
    with pytest.raises(ValueError, match=f"^{match}"):
        _native.int8_dequantize_panel(a, 3, 8, a, *place, a, 0, -1, 1)
