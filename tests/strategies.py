"""Hypothesis strategies for blockwise quantization.

Tensors are drawn as recipes, one a block, and a seed: cheap to draw at any size, and a failure shrinks to the fewest
and plainest blocks. Each recipe aims at one way to get a byte wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import strategies as st

import oracle
from arrays import BLOCKSIZES, DTYPES, as_tensor, dtype_name

Recipe = Callable[[np.random.Generator, int], np.ndarray]
MAX_ELEMENTS = 20_000


def _normal(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.standard_normal(n) * 10.0 ** rng.uniform(-6, 6)


def _zeros(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.zeros(n)


def _signed_zeros(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.where(rng.random(n) < 0.5, -0.0, 0.0)


def _constant(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.full(n, rng.standard_normal() * 10.0 ** rng.uniform(-38, 38))


def _subnormal(rng: np.random.Generator, n: int) -> np.ndarray:
    """float32 and bfloat16 subnormals; zeros or float16 subnormals when narrowed."""
    return rng.integers(-(2**22), 2**22, n) * 2.0**-149


def _few_units(rng: np.random.Generator, n: int) -> np.ndarray:
    """A handful of the smallest subnormals, where 1/absmax is infinite."""
    return rng.integers(-5, 6, n) * 2.0**-149


def _reciprocal_edge(rng: np.random.Generator, n: int) -> np.ndarray:
    """Block maxima about 2**-128 (2.9e-39), where the reciprocal starts to overflow."""
    absmax = 2.0**-128 + rng.integers(-3, 4) * 2.0**-149
    return np.append(rng.uniform(-1, 1, n - 1) * absmax, absmax)


def _half_subnormal(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(-1023, 1024, n) * 2.0**-24


def _huge(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.uniform(-1, 1, n) * float(oracle.FLT_MAX)


def _largest(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.choice([float(oracle.FLT_MAX), -float(oracle.FLT_MAX), 65504.0, 1.0, 0.0], n)


def _infinite(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.where(rng.random(n) < 0.1, rng.choice([np.inf, -np.inf], n), rng.standard_normal(n))


def _nan(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.where(rng.random(n) < 0.1, np.nan, rng.standard_normal(n))


def _all_nan(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.full(n, np.nan)


def _wide(rng: np.random.Generator, n: int) -> np.ndarray:
    """Every magnitude at once, so that small codes and the zero code are reached."""
    return rng.choice([-1.0, 1.0], n) * 2.0 ** rng.uniform(-30, 0, n)


def _on_thresholds(table: np.ndarray) -> Recipe:
    """Codes, midpoints and their float32 neighbours, exact after scaling: the block maximum is a power of two."""
    mids = oracle.midpoints(np.sort(table))
    exact = np.concatenate([table, mids, np.nextafter(mids, np.float32(-9)), np.nextafter(mids, np.float32(9))])

    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        values = rng.choice(np.clip(exact, -1, 1), n)
        values[rng.integers(n)] = rng.choice([-1.0, 1.0])
        return values * 2.0 ** rng.integers(-20, 21)

    return draw


RECIPES: dict[str, Recipe] = {
    "normal": _normal,
    "zeros": _zeros,
    "signed zeros": _signed_zeros,
    "constant": _constant,
    "nf4 thresholds": _on_thresholds(oracle.NF4),
    "fp4 thresholds": _on_thresholds(oracle.FP4),
    "dynamic thresholds": _on_thresholds(oracle.dynamic_map()),
    "wide": _wide,
    "subnormal": _subnormal,
    "few units": _few_units,
    "reciprocal edge": _reciprocal_edge,
    "half subnormal": _half_subnormal,
    "huge": _huge,
    "largest": _largest,
    "infinite": _infinite,
    "nan": _nan,
    "all nan": _all_nan,
}

ORDINARY = ("normal", "wide")


def fill(recipes: list[str], n: int, blocksize: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A flat tensor of ``n`` elements whose block b follows ``recipes[b % len(recipes)]``."""
    rng = np.random.default_rng(seed)
    parts = [
        RECIPES[recipes[b % len(recipes)]](rng, min(blocksize, n - start))
        for b, start in enumerate(range(0, n, blocksize))
    ]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        values = np.concatenate([np.empty(0), *parts]).astype(np.float32)
        return as_tensor(oracle.narrow(values, dtype_name(dtype)), dtype)


dtypes = st.sampled_from(DTYPES)
blocksizes = st.sampled_from(BLOCKSIZES)
quant_types = st.sampled_from(["nf4", "fp4"])
seeds = st.integers(0, 2**32 - 1)


@st.composite
def lengths(draw: st.DrawFn, blocksize: int) -> int:
    """0, 1, and k blocks with a tail of 0, 1, blocksize - 1 or anything."""
    tail = draw(st.one_of(st.sampled_from([0, 1, blocksize - 1]), st.integers(0, blocksize - 1)))
    return draw(st.integers(0, max(2, MAX_ELEMENTS // blocksize // 4))) * blocksize + tail


@st.composite
def flat_tensors(draw: st.DrawFn, blocksize: int, recipes: tuple[str, ...] = tuple(RECIPES)) -> torch.Tensor:
    """1-D, contiguous, every dtype; the interesting values of ``RECIPES``."""
    n = draw(lengths(blocksize))
    chosen = draw(st.lists(st.sampled_from(recipes), min_size=1, max_size=6))
    return fill(chosen, n, blocksize, draw(dtypes), draw(seeds))


@st.composite
def strided_tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any layout: transposed, stepped, expanded, at an odd storage offset, 0-d to 4-d, empty dimensions included."""
    dtype, seed = draw(dtypes), draw(seeds)
    shape = tuple(draw(st.lists(st.integers(0, 24), max_size=4)))
    layout = draw(st.sampled_from(["contiguous", "offset", "transposed", "stepped", "expanded"]))
    rng = np.random.default_rng(seed)

    def tensor(*size: int) -> torch.Tensor:
        values = rng.standard_normal(size).astype(np.float32)
        return torch.from_numpy(np.asarray(values)).to(dtype)

    count = int(np.prod(shape))
    if layout == "offset":
        start = draw(st.integers(1, 9))
        return tensor(count + start)[start:].view(shape)
    if layout == "transposed":
        return tensor(*shape[::-1]).permute(tuple(reversed(range(len(shape)))))
    if layout == "stepped" and shape:
        return tensor(*shape[:-1], shape[-1] * 3 + 1)[..., 1::3][..., : shape[-1]]
    if layout == "expanded" and shape:
        return tensor(*shape[1:]).expand(shape)
    return tensor(*shape)


@st.composite
def codes_256(draw: st.DrawFn) -> np.ndarray:
    """256-entry codes: in any order, with duplicates (-0.0 is one of 0.0), one-sided, beyond [-1, 1], all the same."""
    kind = draw(
        st.sampled_from(["dynamic", "unsigned", "linear", "mirrored", "random", "duplicates", "wide", "constant"])
    )
    rng = np.random.default_rng(draw(seeds))
    code = (
        {
            "dynamic": lambda: oracle.dynamic_map(),
            "unsigned": lambda: oracle.dynamic_map(signed=False),
            "linear": lambda: np.linspace(-1, 1, 256),
            "mirrored": lambda: np.outer([-1.0, 1.0], rng.uniform(0.001, 1, 128)),  # a threshold at exactly 0
            "random": lambda: np.sort(rng.uniform(-1, 1, 256)),
            "duplicates": lambda: np.sort(rng.choice([-1.0, -0.5, -0.0, 0.0, 0.125, 0.5, 1.0], 256)),
            "wide": lambda: np.sort(rng.standard_normal(256) * 10.0 ** rng.integers(-3, 4)),
            "constant": lambda: np.full(256, rng.uniform(-1, 1)),
        }[kind]()
        .astype(np.float32)
        .reshape(-1)
    )
    return rng.permutation(code) if draw(st.booleans()) else code
