"""What blockwise quantization means, in NumPy.

This file is the definition that the implementation is tested against. It imports nothing from fewbits, and it prefers
the obvious to the fast. Arithmetic that the definition says is float32 is done on float32 arrays (NumPy's operators
round to nearest even and keep subnormals); what must be exact is done in float64.

Arrays stand for tensors: float32 and float16 as themselves, bfloat16 as its bits in ``uint16``. Every function takes
the flattened tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

FLT_MAX = np.finfo(np.float32).max
NESTED_BLOCKSIZE = 256

# ---- code tables ---------------------------------------------------------------------------------------------------

# Appendix E of QLoRA (Dettmers et al. 2023): quantiles of N(0, 1), normalized to [-1, 1], with an exact zero.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)

# A sign bit (8) and three bits that name a magnitude, here in twelfths.
_FP4_MAGNITUDES = np.array([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]) / 12.0
FP4 = np.concatenate([_FP4_MAGNITUDES, -_FP4_MAGNITUDES]).astype(np.float32)  # FP4[8] is -0.0

TABLES = {"nf4": NF4, "fp4": FP4}
ZERO_CODE = {"nf4": 7, "fp4": 0}


def dynamic_map(signed: bool = True) -> F32:
    """Return the 256 values of the dynamic data type (Dettmers 2015, 8-Bit Approximations for Parallelism).

    A value is a power of ten and a fraction: decade i of 0..6 (10^(i-6)) splits [0.1, 1] into 2^i (signed) or 2^(i+1)
    (unsigned) equal parts and takes their centres; 0 and 1 are added. The arithmetic is float32, as published.
    """
    values = [np.float32(0.0), np.float32(1.0)]
    for i in range(7):
        parts = 2**i if signed else 2 ** (i + 1)
        edges = linspace_f32(0.1, 1.0, parts + 1)
        centres = (edges[:-1] + edges[1:]) / np.float32(2.0)
        decade = np.float32(10.0 ** (i - 6)) * centres
        values.extend(decade)
        if signed:
            values.extend(-decade)
    return np.sort(np.array(values, dtype=np.float32))


def linspace_f32(start: float, stop: float, count: int) -> F32:
    """Equally spaced float32 values: a float32 step, counted from the nearer end, each value rounded once.

    Product and sum share one rounding because the published table was made on a machine with fused multiply-add; the
    float64 arithmetic here is exact enough to stand for it.
    """
    first, last = np.float64(np.float32(start)), np.float64(np.float32(stop))
    step = np.float64((np.float32(stop) - np.float32(start)) / np.float32(count - 1))
    i = np.arange(count)
    return np.where(i < count // 2, first + step * i, last - step * (count - 1 - i)).astype(np.float32)


# ---- dtypes --------------------------------------------------------------------------------------------------------


def widen(x: np.ndarray) -> F32:
    """Read a float32, float16 or bfloat16 (``uint16`` bits) array as float32. Exact."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32)


def narrow(x: F32, dtype: str) -> np.ndarray:
    """Round float32 to the named dtype, to nearest, ties to even; bfloat16 comes back as ``uint16`` bits."""
    if dtype == "bfloat16":
        bits = x.view(np.uint32)
        to_even = np.uint32(0x7FFF) + ((bits >> 16) & 1)
        rounded = ((bits + to_even) >> 16).astype(np.uint16)
        return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)
    with np.errstate(over="ignore", under="ignore"):
        return x.astype({"float32": np.float32, "float16": np.float16}[dtype])


# ---- blocks --------------------------------------------------------------------------------------------------------


def normalize(x: np.ndarray, blocksize: int) -> tuple[F32, F32]:
    """Return ``t`` (n values in about [-1, 1]) and ``absmax`` (one value a block), both float32."""
    values = widen(x)
    values = np.clip(np.where(np.isnan(values), np.float32(0.0), values), -FLT_MAX, FLT_MAX)
    n = values.size
    count = -(-n // blocksize)
    padded = np.zeros(count * blocksize, dtype=np.float32)
    padded[:n] = values
    blocks = padded.reshape(count, blocksize)
    absmax = np.abs(blocks).max(axis=1, initial=0.0).astype(np.float32)
    scale = absmax[:, None]
    with np.errstate(divide="ignore", over="ignore", under="ignore", invalid="ignore"):
        inverse = np.float32(1.0) / scale
        t = np.where(np.isinf(inverse), blocks / scale, blocks * inverse)  # float32 throughout
    t = np.where(scale == 0, np.float32(0.0), t)
    return t.reshape(-1)[:n], absmax


def midpoints(ascending: F32) -> F32:
    """The float32 nearest to the middle of each pair of neighbours."""
    exact = ascending.astype(np.float64)
    return ((exact[:-1] + exact[1:]) / 2).astype(np.float32)


def nearest(t: F32, code: F32) -> U8:
    """Index into ``code`` (any order, duplicates allowed) of the value nearest to each ``t``; a tie takes the lower."""
    order = np.argsort(code, kind="stable")
    rank = np.searchsorted(midpoints(code[order]), t, side="left")  # how many midpoints lie strictly below t
    return order[rank].astype(np.uint8)


def nearest_fp4(t: F32) -> U8:
    """``nearest`` for FP4, whose two zeros are told apart by the sign of ``t``: code 8 for t < 0, else code 0."""
    order = np.lexsort((-np.arange(16), FP4))  # ascending by value, -0.0 (code 8) before +0.0 (code 0)
    thresholds = np.delete(midpoints(FP4[order]), 7)  # entry 7 separates the zeros: t >= 0 instead of t > 0
    rank = np.searchsorted(thresholds, t, side="left") + (t >= 0)
    return order[rank].astype(np.uint8)


# ---- quantize and dequantize ---------------------------------------------------------------------------------------


def quantize_blockwise(x: np.ndarray, code: F32, blocksize: int) -> tuple[U8, F32]:
    """8-bit codes (n) and absmax (one a block)."""
    t, absmax = normalize(x, blocksize)
    return nearest(t, code), absmax


def dequantize_blockwise(codes: U8, absmax: F32, code: F32, blocksize: int, dtype: str) -> np.ndarray:
    """``code[codes] * absmax``, rounded to float32, then to the output dtype."""
    scale = np.repeat(absmax, blocksize)[: codes.size]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return narrow(code[codes] * scale, dtype)


def pack(codes: U8, pad: int) -> U8:
    """Two 4-bit codes a byte, the first in the high nibble; an odd tail is filled with ``pad``."""
    even = np.append(codes, np.uint8(pad)) if codes.size % 2 else codes
    return (even[0::2] << 4) | even[1::2]


def unpack(packed: U8, n: int) -> U8:
    """The inverse of ``pack``."""
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:n]


def quantize_4bit(x: np.ndarray, quant_type: str, blocksize: int) -> tuple[U8, F32]:
    """Packed codes ((n + 1) // 2) and absmax (one a block)."""
    t, absmax = normalize(x, blocksize)
    codes = nearest_fp4(t) if quant_type == "fp4" else nearest(t, NF4)
    return pack(codes, ZERO_CODE[quant_type]), absmax


def dequantize_4bit(packed: U8, n: int, absmax: F32, quant_type: str, blocksize: int, dtype: str) -> np.ndarray:
    """The inverse of ``quantize_4bit``, as far as there is one."""
    return dequantize_blockwise(unpack(packed, n), absmax, TABLES[quant_type], blocksize, dtype)


# ---- double quantization -------------------------------------------------------------------------------------------


@dataclass
class Nested:
    """Block maxima in 8 bits: ``dynamic_map()[codes] * absmax + offset``."""

    codes: U8
    absmax: F32
    offset: np.float32


def quantize_absmax(absmax: F32) -> Nested:
    """Quantize block maxima to 8 bits, around their mean.

    The sum is exact and then rounded to float64, so that it has one value whatever order a device adds in.
    """
    offset = np.float32(math.fsum(absmax.tolist()) / max(absmax.size, 1))
    codes, nested_absmax = quantize_blockwise(absmax - offset, dynamic_map(), NESTED_BLOCKSIZE)
    return Nested(codes, nested_absmax, offset)


def dequantize_absmax(nested: Nested, code: F32 | None = None, blocksize: int = NESTED_BLOCKSIZE) -> F32:
    """Product and sum each rounded to float32: no fused multiply-add."""
    product = dequantize_blockwise(
        nested.codes, nested.absmax, dynamic_map() if code is None else code, blocksize, "float32"
    )
    with np.errstate(over="ignore"):
        return product + nested.offset
