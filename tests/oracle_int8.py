"""What LLM.int8() means, in NumPy.

As ``oracle.py``: nothing from fewbits, float32 arithmetic on float32 arrays where the definition says float32, exact
integers, and float64 where that is the truth. Matrices are two-dimensional; bfloat16 is its bits in ``uint16``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from oracle import F32, narrow, widen

I8 = NDArray[np.int8]
Bools = NDArray[np.bool_]

INVERSE_127 = np.float32(1) / np.float32(127)
INVERSE_16129 = np.float32(1) / np.float32(16129)


def is_outlier(x: np.ndarray, threshold: float) -> Bools:
    """Elements of at least `threshold`, compared in float32; none where it is 0."""
    values = np.abs(widen(x))
    return values >= np.float32(threshold) if threshold > 0 else np.zeros(values.shape, dtype=bool)


def quantize_rows(x: np.ndarray, threshold: float = 0.0) -> tuple[I8, F32, Bools]:
    """Return the codes, the scale of each row, and which columns hold an outlier."""
    values, outliers = widen(x), is_outlier(x, threshold)
    scale = np.max(np.abs(np.where(outliers, np.float32(0), values)), axis=1, initial=np.float32(0))
    with np.errstate(all="ignore"):
        scaled = values * (np.float32(127) / scale)[:, None]
    # Infinity in a row of infinite scale is the largest code. A reciprocal that overflows gives infinities, too.
    scaled = np.where(np.isinf(values), values, scaled)
    zero = outliers | np.isnan(scaled) | (np.isnan(scale) | (scale == 0))[:, None]
    codes = np.rint(np.clip(np.where(zero, 0, scaled), -127, 127)).astype(np.int8)
    return codes, scale.astype(np.float32), outliers.any(axis=0)


def pack_mask(columns: Bools) -> NDArray[np.uint32]:
    """Return bit ``c % 32`` of word ``c // 32`` for column c."""
    padded = np.zeros(-(-columns.size // 32) * 32, dtype=bool)
    padded[: columns.size] = columns
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32)


def matmul_int32(a: I8, b: I8) -> NDArray[np.int32]:
    """Sums of products; float64 holds them exactly."""
    return (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.int64).astype(np.int32)


def left_over(x: np.ndarray, codes: I8, row: F32) -> F32:
    """Return what the codes leave over of `x`."""
    with np.errstate(all="ignore"):
        return (widen(x) - codes.astype(np.float32) * (row * INVERSE_127)[:, None]).astype(np.float32)


def matmul(codes: I8, row: F32, weight: I8, col: F32, dtype: str, bias: np.ndarray | None = None) -> np.ndarray:
    """Return the product without outliers: every operation float32, rounded once. It has one right answer."""
    with np.errstate(all="ignore"):
        out = matmul_int32(codes, weight).astype(np.float32) * row[:, None] * col * INVERSE_16129
        return narrow(out if bias is None else out + widen(bias), dtype)


def matmul_exact(
    x: np.ndarray,
    codes: I8,
    row: F32,
    columns: Bools,
    weight: I8,
    col: F32,
    bias: np.ndarray | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the product with outlier columns in float64, and the sum of the magnitudes of what was added up."""
    row64, col64 = row.astype(np.float64)[:, None], col.astype(np.float64)
    with np.errstate(all="ignore"):
        main = matmul_int32(codes, weight).astype(np.float64) * row64 * col64 / 16129
        x64 = widen(x)[:, columns].astype(np.float64)
        rest = x64 - codes[:, columns].astype(np.float64) * (row64 / 127)
        dense = weight[:, columns].astype(np.float64) * col64[:, None] / 127
        added = np.zeros(weight.shape[0]) if bias is None else widen(bias).astype(np.float64)
        magnitude = np.abs(main) + (np.abs(x64) + np.abs(row64)) @ np.abs(dense).T + np.abs(added)
        return main + rest @ dense.T + added, magnitude


def dequantize(weight: I8, col: F32, dtype: str) -> np.ndarray:
    """Return ``code * (scale * (1 / 127))``, two operations in float32, rounded once."""
    with np.errstate(all="ignore"):
        return narrow(weight.astype(np.float32) * (col * INVERSE_127)[:, None], dtype)
