"""The int8 functions of `fewbits.functional`, and `fewbits.matmul`: the oracle's values, any shape, wrong calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewbits
import fewbits.functional as F
import oracle_int8 as oracle
from arrays import DTYPES, as_numpy, assert_same_bits, dtype_name
from linear8bit_layers import activations, randn
from tolerances import INT8_OUTLIERS, UNIT_ROUNDOFF

SHAPES = [(5, 96), (2, 3, 64), (1, 33), (96,), (0, 32), (3, 0)]


def rows_of(x: torch.Tensor) -> np.ndarray:
    return as_numpy(x).reshape(-1, x.shape[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_vectorwise_quant(dtype: torch.dtype, shape: tuple[int, ...], threshold: float, device: torch.device) -> None:
    x = activations(*shape).to(dtype) if 0 not in shape else torch.empty(shape, dtype=dtype)
    codes, row_stats, columns = F.int8_vectorwise_quant(x.to(device), threshold)
    want, scale, outliers = oracle.quantize_rows(
        rows_of(x) if x.numel() else np.zeros((shape[0], shape[-1]), "f4"), threshold
    )
    assert (codes.shape, codes.dtype, row_stats.shape) == (x.shape, torch.int8, (scale.size,))
    assert_same_bits(row_stats, scale, "row_stats")
    want[:, outliers] = 0
    assert_same_bits(codes, want, "codes")
    if threshold:
        assert columns is not None
        assert columns.dtype == torch.int64
        assert columns.tolist() == np.flatnonzero(outliers).tolist()
    else:
        assert columns is None


def test_vectorwise_quant_without_a_list(device: torch.device) -> None:
    x = activations(4, 40)
    codes, row_stats, columns = F.int8_vectorwise_quant(x.to(device), 6.0, return_outliers=False)
    want, scale, _ = oracle.quantize_rows(as_numpy(x).reshape(4, 40), 6.0)
    assert columns is None
    assert_same_bits(codes, want, "codes")
    assert_same_bits(row_stats, scale, "row_stats")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_spoils_no_other(value: float, device: torch.device) -> None:
    x = randn(3, 32)
    x[1, 4] = value
    weight = randn(8, 32, seed=1)
    y = fewbits.matmul(x.to(device), weight.to(device))
    clean = fewbits.matmul(randn(3, 32)[[0, 2]].to(device), weight.to(device))
    assert torch.equal(y[[0, 2]], clean)
    assert not y[1].isfinite().any()


def test_zero_rows(device: torch.device) -> None:
    codes, row_stats, _ = F.int8_vectorwise_quant(torch.zeros(2, 32, device=device))
    assert not codes.any()
    assert not row_stats.any()
    assert not fewbits.matmul(torch.zeros(2, 32, device=device), randn(4, 32).to(device)).any()


def test_strided_and_expanded(device: torch.device) -> None:
    x = randn(64, 6).to(device)
    for view in (x.t(), x.t()[:, ::2], x[:1, :1].expand(3, 32)):
        got, expected = F.int8_vectorwise_quant(view), F.int8_vectorwise_quant(view.contiguous())
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_vectorwise_dequant(device: torch.device) -> None:
    codes, stats, _ = F.int8_vectorwise_quant(randn(7, 50).to(device))
    got = F.int8_vectorwise_dequant(codes, stats)
    want = oracle.dequantize(as_numpy(codes).reshape(7, 50), as_numpy(stats), "float32")
    assert_same_bits(got, want, "values")
    assert torch.equal(F.int8_vectorwise_dequant(codes.view(7, 5, 10)[:, 0], stats), got[:, :10])


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_double_quant(threshold: float, device: torch.device) -> None:
    x = randn(9, 33)
    by_row, by_column, row_stats, col_stats, columns = F.int8_double_quant(x.to(device), threshold=threshold)
    want_row, want_rows, want_columns = oracle.quantize_rows(as_numpy(x).reshape(9, 33), threshold)
    want_row[:, want_columns] = 0
    want_column, want_cols, _ = oracle.quantize_rows(np.ascontiguousarray(as_numpy(x).reshape(9, 33).T), threshold)
    for got, want in ((by_row, want_row), (by_column, want_column.T), (row_stats, want_rows), (col_stats, want_cols)):
        assert_same_bits(got, np.ascontiguousarray(want), "double_quant")
    assert (columns is None) == (not threshold)
    buffers = {
        "col_stats": torch.empty(33, device=device),
        "row_stats": torch.empty(9, device=device),
        "out_col": torch.empty(9, 33, dtype=torch.int8, device=device),
        "out_row": torch.empty(9, 33, dtype=torch.int8, device=device),
    }
    results = F.int8_double_quant(x.to(device), threshold=threshold, **buffers)
    assert results[0] is buffers["out_row"]
    assert results[1] is buffers["out_col"]
    assert results[2] is buffers["row_stats"]
    assert results[3] is buffers["col_stats"]
    assert torch.equal(results[1], by_column)


@pytest.mark.parametrize("shape", [(1, 5003), (3, 64), (2, 3, 40), (0, 8), (4, 0)])
def test_linear_matmul_is_exact(shape: tuple[int, ...], device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    b = torch.randint(-127, 128, (5, shape[-1]), generator=generator, dtype=torch.int8)
    expected = (a.long() @ b.long().t()).int()
    got = F.int8_linear_matmul(a.to(device), b.to(device))
    assert (got.dtype, got.shape) == (torch.int32, expected.shape)
    assert torch.equal(got.cpu(), expected)
    out = torch.empty(5, *expected.shape[:-1], dtype=torch.int32, device=device).movedim(0, -1)
    assert F.int8_linear_matmul(a.to(device), b.to(device), out=out) is out
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_mm_dequant_and_scaled_mm(dtype: torch.dtype, bias: bool, device: torch.device) -> None:
    a, row_stats, _ = F.int8_vectorwise_quant(randn(2, 3, 48).to(device))
    b, col_stats, _ = F.int8_vectorwise_quant(randn(7, 48, seed=1).to(device))
    added = randn(7, seed=2).to(dtype) if bias else None
    want = oracle.matmul(
        as_numpy(a).reshape(6, 48),
        as_numpy(row_stats),
        as_numpy(b).reshape(7, 48),
        as_numpy(col_stats),
        dtype_name(dtype),
        None if added is None else as_numpy(added),
    )
    there = None if added is None else added.to(device)
    got = F.int8_scaled_mm(a, b, row_stats, col_stats, there, dtype)
    assert got.shape == (2, 3, 7)
    assert_same_bits(got, want, "scaled_mm")
    product = F.int8_linear_matmul(a, b)
    assert_same_bits(F.int8_mm_dequant(product, row_stats, col_stats, bias=there, dtype=dtype), want, "mm_dequant")
    out = torch.empty(2, 3, 7, dtype=dtype, device=device)
    assert F.int8_mm_dequant(product, row_stats, col_stats, out, there) is out
    assert_same_bits(out, want, "out")


def test_default_dtype_is_float16() -> None:
    a, stats, _ = F.int8_vectorwise_quant(randn(2, 32))
    assert F.int8_scaled_mm(a, a, stats, stats).dtype == torch.float16
    assert F.int8_mm_dequant(F.int8_linear_matmul(a, a), stats, stats).dtype == torch.float16


def check_mixed(
    y: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    row: torch.Tensor,
    columns: Any,
    w: torch.Tensor,
    col: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Within a rounding of the outlier part and one of the result."""
    k, dtype = x.shape[-1], x.dtype
    flags = np.zeros(k, dtype=bool)
    flags[np.asarray(columns, dtype=np.int64)] = True
    added = None if bias is None else as_numpy(bias)
    rows = as_numpy(row), flags, rows_of(w), as_numpy(col)
    truth, magnitude = oracle.matmul_exact(rows_of(x), rows_of(codes), *rows, added)
    got = y.double().cpu().numpy().reshape(truth.shape)
    allowed = UNIT_ROUNDOFF[dtype] * np.abs(truth) * 1.01 + INT8_OUTLIERS[dtype] * magnitude
    assert (np.abs(got - truth) <= allowed + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 96), (2, 3, 96), (1, 96)])
def test_mixed_scaled_mm(dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    x, bias = activations(*shape).to(device, dtype), randn(11, seed=4).to(device, dtype)
    ca, sca, columns = F.int8_vectorwise_quant(x, 6.0)
    cb, scb, _ = F.int8_vectorwise_quant(randn(11, 96, seed=3).to(device))
    assert columns is not None
    y, sub = F.int8_mixed_scaled_mm(x, ca, cb, sca, scb, columns, bias)
    assert sub is not None
    assert torch.equal(sub, x[..., columns])
    check_mixed(y, x, ca, sca, columns.cpu(), cb, scb, bias)
    fused = fewbits.matmul(x, cb, state=state_of(cb, scb), threshold=6.0, bias=bias)
    check_mixed(fused, x, *F.int8_vectorwise_quant(x, 6.0, return_outliers=False)[:2], columns.cpu(), cb, scb, bias)
    y, sub = F.int8_mixed_scaled_mm(x, ca, cb, sca, scb)
    assert sub is None
    assert torch.equal(y, F.int8_scaled_mm(ca, cb, sca, scb, dtype=dtype))


def test_every_column_an_outlier(device: torch.device) -> None:
    x, w = (10 + randn(3, 70).abs()).to(device), randn(5, 70).to(device)
    ca, sca, columns = F.int8_vectorwise_quant(x, 6.0)
    cb, scb, _ = F.int8_vectorwise_quant(w)
    assert columns is not None
    assert columns.tolist() == list(range(70))
    assert not ca.any()
    y, _ = F.int8_mixed_scaled_mm(x, ca, cb, sca, scb, columns)
    torch.testing.assert_close(y, x @ F.int8_vectorwise_dequant(cb, scb).t(), rtol=1e-5, atol=1e-4)


def state_of(cb: torch.Tensor, scb: torch.Tensor) -> fewbits.MatmulLtState:
    state = fewbits.MatmulLtState()
    state.CB, state.SCB, state.has_fp16_weights, state.is_training = cb, scb, False, False
    return state


@given(
    st.integers(0, 9),
    st.integers(1, 40),
    st.integers(0, 130),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 2.0, 6.0]),
    st.sampled_from([0, 1, 7, 1000]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_matmul_on_any_shape(
    m: int, n: int, k: int, dtype: torch.dtype, threshold: float, outliers: int, bias: bool, seed: int
) -> None:
    if not m * k:
        y = fewbits.matmul(torch.ones(m, k, dtype=dtype), torch.ones(n, k), threshold=threshold)
        assert y.shape == (m, n)
        assert not y.any()
        return
    x = activations(m, k, outliers=min(outliers, k), seed=seed).to(dtype)
    cb, scb, _ = F.int8_vectorwise_quant(randn(n, k, seed=seed + 1))
    added = randn(n, seed=seed + 2).to(dtype) if bias else None
    y = fewbits.matmul(x, cb, state=state_of(cb, scb), threshold=threshold, bias=added)
    codes, row, _ = F.int8_vectorwise_quant(x, threshold, return_outliers=False)
    columns = F.int8_vectorwise_quant(x, threshold)[2]
    check_mixed(y, x, codes, row, [] if columns is None else columns, cb, scb, added)


@pytest.mark.parametrize("outliers", [0, 1, 7, 64, 512])
def test_decomposition_keeps_what_outliers_spoil(outliers: int, device: torch.device) -> None:
    """The claim of the paper, on normal activations with columns of magnitude 20 to 60."""
    x, weight = randn(64, 512).to(device), randn(256, 512, seed=1).to(device)
    x[:, :outliers] *= 40
    truth = x.double() @ weight.double().t()
    mixed = fewbits.matmul(x, weight, threshold=6.0)
    assert float((mixed.double() - truth).norm() / truth.norm()) < 0.015
    if 0 < outliers < 64:
        plain = fewbits.matmul(x, weight)
        assert (plain.double() - truth).norm() > 1.5 * (mixed.double() - truth).norm()


def test_large_bfloat16_activations_stay_finite(device: torch.device) -> None:
    x = torch.full((4, 64), 1e5, dtype=torch.bfloat16, device=device)
    for threshold in (0.0, 6.0):
        y = fewbits.matmul(x, randn(8, 64).to(device), threshold=threshold)
        assert y.dtype == torch.bfloat16
        assert y.isfinite().all()


# ---- matmul and its state ------------------------------------------------------------------------------------------


def test_matmul_out(device: torch.device) -> None:
    x, w = activations(3, 32).to(device), randn(8, 32).to(device)
    expected = fewbits.matmul(x, w, threshold=6.0)
    for out in (torch.empty(3, 8, device=device), torch.empty(8, 3, device=device).t()):
        assert fewbits.matmul(x, w, out=out, threshold=6.0) is out
        assert torch.equal(out, expected)
    square, weight = randn(32, 32).to(device), randn(32, 32, seed=1).to(device)
    expected = fewbits.matmul(square, weight)
    assert torch.equal(fewbits.matmul(square, weight, out=square), expected)


def test_state_is_filled_and_used(device: torch.device) -> None:
    x, w = activations(3, 32).to(device), randn(8, 32).to(device)
    state = fewbits.MatmulLtState()
    expected = fewbits.matmul(x, w, state=state, threshold=6.0)
    codes, stats, _ = F.int8_vectorwise_quant(w)
    assert state.threshold == 6.0
    assert torch.equal(state.CB, codes)  # type: ignore[arg-type]
    assert torch.equal(state.SCB, stats)  # type: ignore[arg-type]
    assert torch.equal(fewbits.matmul(x, codes, state=state), expected)
    state.has_fp16_weights = False
    assert torch.equal(fewbits.matmul(x, w, state=state), expected)
    del state.CB  # as some servers do
    assert torch.equal(fewbits.matmul(x, codes, state=state), expected)
    state.reset_grads()
    assert (state.CB, state.SCB, state.CxB) == (None, None, None)
    state.CxB = None


def test_a_shard_of_a_larger_weight(device: torch.device) -> None:
    codes, stats, _ = F.int8_vectorwise_quant(randn(20, 48).to(device))
    x = activations(1, 4, 48).bfloat16().to(device)
    whole = fewbits.matmul(x, codes, state=state_of(codes, stats), threshold=6.0)
    for first, last in ((0, 7), (7, 20)):
        part = fewbits.matmul(x, codes[first:last], state=state_of(codes[first:last], stats[first:last]), threshold=6.0)
        assert torch.equal(part, whole[..., first:last])


def test_float64_and_autocast(device: torch.device) -> None:
    x, w = randn(3, 32).to(device), randn(8, 32).to(device)
    assert torch.equal(fewbits.matmul(x.double(), w), fewbits.matmul(x, w).double())
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = fewbits.matmul(x, w)
    assert torch.equal(y, fewbits.matmul(x.bfloat16(), w))


def test_signatures() -> None:
    """Names and order as bitsandbytes'."""
    expected = {
        F.int8_vectorwise_quant: ["A", "threshold"],
        F.int8_vectorwise_dequant: ["A", "stats"],
        F.int8_double_quant: ["A", "col_stats", "row_stats", "out_col", "out_row", "threshold"],
        F.int8_linear_matmul: ["A", "B", "out", "dtype"],
        F.int8_mm_dequant: ["A", "row_stats", "col_stats", "out", "bias"],
        F.int8_scaled_mm: ["A", "B", "row_stats", "col_stats", "bias", "dtype"],
        F.int8_mixed_scaled_mm: ["A", "CA", "CB", "SCA", "SCB", "outlier_cols", "bias"],
        fewbits.matmul: ["A", "B", "out", "state", "threshold", "bias"],
    }
    for function, names in expected.items():
        assert list(inspect.signature(function).parameters)[: len(names)] == names  # type: ignore[arg-type]


X, CODES, STATS = torch.ones(2, 32), torch.ones(4, 32, dtype=torch.int8), torch.ones(4)
WRONG: list[tuple[str, type[Exception], Callable[[], object]]] = [
    ("A: expected a tensor", TypeError, lambda: F.int8_vectorwise_quant([1.0])),  # type: ignore[arg-type]
    ("A: expected float32", ValueError, lambda: F.int8_vectorwise_quant(X.int())),
    ("A: expected at least one", ValueError, lambda: F.int8_vectorwise_quant(torch.tensor(1.0))),
    ("threshold: expected 0 or more, got -1", ValueError, lambda: F.int8_vectorwise_quant(X, -1.0)),
    ("threshold: expected 0 or more, got nan", ValueError, lambda: F.int8_vectorwise_quant(X, float("nan"))),
    ("threshold: expected a number", TypeError, lambda: F.int8_vectorwise_quant(X, "6")),  # type: ignore[arg-type]
    ("A: expected torch.int8", ValueError, lambda: F.int8_vectorwise_dequant(X, STATS)),
    ("stats: expected 4 elements", ValueError, lambda: F.int8_vectorwise_dequant(CODES, torch.ones(3))),
    ("out_row: expected torch.int8", ValueError, lambda: F.int8_double_quant(X, out_row=X.clone())),
    ("dtype: expected torch.int32", ValueError, lambda: F.int8_linear_matmul(CODES, CODES, dtype=torch.float32)),
    ("A: expected a last size of 32", ValueError, lambda: F.int8_linear_matmul(CODES[:, 1:], CODES)),
    ("out: expected torch.int32", ValueError, lambda: F.int8_linear_matmul(CODES, CODES, torch.empty(4, 4))),
    ("A: expected a torch.int32", ValueError, lambda: F.int8_mm_dequant(X, STATS, STATS)),
    ("col_stats: expected 4", ValueError, lambda: F.int8_scaled_mm(CODES, CODES, STATS, torch.ones(5))),
    ("bias: expected shape", ValueError, lambda: F.int8_scaled_mm(CODES, CODES, STATS, STATS, torch.ones(5))),
    ("dtype: expected float32", ValueError, lambda: F.int8_scaled_mm(CODES, CODES, STATS, STATS, dtype=torch.int32)),
    ("state.SCB: expected the scales", ValueError, lambda: fewbits.matmul(X, CODES)),
    ("B: expected two dimensions", ValueError, lambda: fewbits.matmul(X, X[0])),
    ("A: expected a last size of 32", ValueError, lambda: fewbits.matmul(X[:, 1:], X)),
    ("threshold: expected 0 or more", ValueError, lambda: fewbits.matmul(X, X, threshold=-6.0)),
    ("threshold: expected 0 or more", ValueError, lambda: fewbits.nn.Linear8bitLt(8, 8, threshold=-6.0)),
    ("A: expected a floating-point", ValueError, lambda: fewbits.matmul(X.int(), X)),
    ("out: expected shape", ValueError, lambda: fewbits.matmul(X, X, out=torch.empty(3, 2))),
    ("out: expected None", ValueError, lambda: fewbits.matmul(X.clone().requires_grad_(), X, out=torch.empty(2, 2))),
    ("bias: expected shape", ValueError, lambda: fewbits.matmul(X, X, bias=torch.ones(5))),
]


@pytest.mark.parametrize(("message", "error", "call"), WRONG, ids=[f"{i}-{w[0][:24]}" for i, w in enumerate(WRONG)])
def test_wrong_calls(message: str, error: type[Exception], call: Callable[[], object]) -> None:
    with pytest.raises(error, match=message.replace("(", r"\(")):
        call()


def test_gradient_free() -> None:
    x = randn(2, 32).requires_grad_()
    codes, stats, _ = F.int8_vectorwise_quant(x, 1.0)
    assert not codes.requires_grad
    assert not stats.requires_grad
