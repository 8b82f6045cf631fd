"""What an optimizer step means, in NumPy.

This file is the definition that ``_native.optim_step`` and its companions are tested against, on every device. Each
operation on float32 arrays is rounded once, to nearest even, with subnormals; NumPy fuses nothing. What is computed
once a tensor is float64 and then rounded once. States of 8 bits are blocks of ``oracle.py``.

Arrays stand for tensors as in ``oracle.py``: bfloat16 as its bits in ``uint16``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import oracle
from oracle import F32, U8, narrow, widen

FAMILIES = ("adam", "ademamix", "lion", "sgd", "rmsprop", "adagrad", "lamb", "lars")
BLOCK, TILE = 256, 4096
ONE = np.float32(1)
DECOUPLED, AMSGRAD, NESTEROV, CENTERED, BIAS_CORRECTION = 1, 2, 4, 8, 16

SIGNED, UNSIGNED = oracle.dynamic_map(), oracle.dynamic_map(signed=False)


@dataclass(frozen=True)
class Group:
    """Hyperparameters. ``beta1`` is the momentum of sgd and lars and the smoothing constant of rmsprop."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    beta3: float = 0.9999
    alpha: float = 5.0
    t_alpha: float = 0.0
    t_beta3: float = 0.0
    eps: float = 1e-8
    weight_decay: float = 0.0
    dampening: float = 0.0
    lr_decay: float = 0.0
    trust: float = 1.0
    flags: int = 0

    def has(self, flag: int) -> bool:
        return bool(self.flags & flag)


# ---- coefficients: float64 -----------------------------------------------------------------------------------------


def f32(x: float) -> np.float32:
    with np.errstate(over="ignore"):
        return np.float32(x)


def divide(a: float, b: float) -> float:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return float(np.float64(a) / np.float64(b))


def power(base: float, exponent: int) -> float:
    """``base ** exponent`` by squaring: one order of products, so one result everywhere."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def slow_decay(group: Group, t: int) -> float:
    """AdEMAMix's beta3 at step t: the half-life rises linearly (Pagliardini et al. 2024, section 3)."""
    if not group.t_beta3:
        return group.beta3
    fast, slow, part = math.log(group.beta1), math.log(group.beta3), t / group.t_beta3
    risen = math.exp(fast * slow / ((1.0 - part) * slow + part * fast))
    return risen if risen < group.beta3 else group.beta3


def slow_weight(group: Group, t: int) -> float:
    if not group.t_alpha:
        return group.alpha
    risen = t * group.alpha / group.t_alpha
    return risen if risen < group.alpha else group.alpha


# ---- rules: float32 ------------------------------------------------------------------------------------------------


def larger(a: F32, b: F32) -> F32:
    """The maximum; NaN where either is."""
    return np.maximum(a, b)


def sign(x: F32) -> F32:
    """+1, -1, +0 for either zero, NaN for NaN."""
    return np.where(x > 0, np.float32(1), np.where(x < 0, np.float32(-1), np.where(x == 0, np.float32(0), x)))


def decayed(g: F32, p: F32, group: Group) -> F32:
    return g + f32(group.weight_decay) * p if group.weight_decay != 0 else g


def kept(p: F32, group: Group) -> F32:
    return p * f32(1.0 - group.lr * group.weight_decay) if group.weight_decay != 0 else p


def averages(group: Group, g: F32, m: F32, v: F32) -> tuple[F32, F32]:
    m = f32(group.beta1) * m + f32(1.0 - group.beta1) * g
    v = f32(group.beta2) * v + (f32(1.0 - group.beta2) * g) * g
    return m, v


def adam(group: Group, t: int, p: F32, g: F32, s: list[F32], ratio: np.float32) -> tuple[F32, list[F32]]:
    if group.has(DECOUPLED):
        p = kept(p, group)
    else:
        g = decayed(g, p, group)
    m, v = averages(group, g, s[0], s[1])
    states, divisor = [m, v], v
    if group.has(AMSGRAD):
        divisor = larger(s[2], v)
        states.append(divisor)
    inverse = f32(divide(1.0, math.sqrt(1.0 - power(group.beta2, t))))
    d = np.sqrt(divisor) * inverse + f32(group.eps)
    return p - f32(divide(group.lr, 1.0 - power(group.beta1, t))) * (m / d), states


def ademamix(group: Group, t: int, p: F32, g: F32, s: list[F32], ratio: np.float32) -> tuple[F32, list[F32]]:
    p = kept(p, group)
    fast, v = averages(group, g, s[0], s[2])
    beta3 = slow_decay(group, t)
    slow = f32(beta3) * s[1] + f32(1.0 - beta3) * g
    inverse1 = f32(divide(1.0, 1.0 - power(group.beta1, t)))
    inverse2 = f32(divide(1.0, math.sqrt(1.0 - power(group.beta2, t))))
    u = fast * inverse1 + f32(slow_weight(group, t)) * slow
    d = np.sqrt(v) * inverse2 + f32(group.eps)
    return p - f32(group.lr) * (u / d), [fast, slow, v]


def lion(group: Group, t: int, p: F32, g: F32, s: list[F32], ratio: np.float32) -> tuple[F32, list[F32]]:
    p = kept(p, group)
    u = f32(group.beta1) * s[0] + f32(1.0 - group.beta1) * g
    m = f32(group.beta2) * s[0] + f32(1.0 - group.beta2) * g
    return p - f32(group.lr) * sign(u), [m]


def with_momentum(group: Group, t: int, p: F32, g: F32, s: list[F32]) -> tuple[F32, list[F32]]:
    if group.beta1 == 0:
        return p - f32(group.lr) * g, []
    momentum = f32(group.beta1)
    b = g if t == 1 else momentum * s[0] + f32(1.0 - group.dampening) * g
    g = g + momentum * b if group.has(NESTEROV) else b
    return p - f32(group.lr) * g, [b]


def sgd(group: Group, t: int, p: F32, g: F32, s: list[F32], ratio: np.float32) -> tuple[F32, list[F32]]:
    return with_momentum(group, t, p, decayed(g, p, group), s)


def lars(group: Group, t: int, p: F32, g: F32, s: list[F32], ratio: np.float32) -> tuple[F32, list[F32]]:
    return with_momentum(group, t, p, decayed(g, p, group) * ratio, s)


def rmsprop(group: Group, t: int, p: F32, g: F32, s: list[F32], ratio: np.float32) -> tuple[F32, list[F32]]:
    g = decayed(g, p, group)
    rest = f32(1.0 - group.beta1)
    square = f32(group.beta1) * s[0] + (rest * g) * g
    states, variance = [square], square
    if group.has(CENTERED):
        mean = s[-1] + rest * (g - s[-1])
        variance = square - mean * mean
    step = g / (np.sqrt(variance) + f32(group.eps))
    if group.beta2 != 0:
        step = f32(group.beta2) * s[1] + step
        states.append(step)
    if group.has(CENTERED):
        states.append(mean)
    return p - f32(group.lr) * step, states


def adagrad(group: Group, t: int, p: F32, g: F32, s: list[F32], ratio: np.float32) -> tuple[F32, list[F32]]:
    g = decayed(g, p, group)
    square = s[0] + g * g
    lr = f32(divide(group.lr, 1.0 + (t - 1) * group.lr_decay))
    return p - lr * (g / (np.sqrt(square) + f32(group.eps))), [square]


def lamb_direction(group: Group, t: int, p: F32, g: F32, s: list[F32]) -> tuple[F32, list[F32]]:
    if not group.has(DECOUPLED):
        g = decayed(g, p, group)
    m, v = averages(group, g, s[0], s[1])
    inverse1 = inverse2 = np.float32(1)
    if group.has(BIAS_CORRECTION):
        inverse1 = f32(divide(1.0, 1.0 - power(group.beta1, t)))
        inverse2 = f32(divide(1.0, math.sqrt(1.0 - power(group.beta2, t))))
    r = (m * inverse1) / (np.sqrt(v) * inverse2 + f32(group.eps))
    if group.has(DECOUPLED):
        r = decayed(r, p, group)
    return r, [m, v]


def lamb(group: Group, t: int, p: F32, g: F32, s: list[F32], ratio: np.float32) -> tuple[F32, list[F32]]:
    r, states = lamb_direction(group, t, p, g, s)
    return p - (f32(group.lr) * ratio) * r, states


RULES = {rule.__name__: rule for rule in (adam, ademamix, lion, sgd, rmsprop, adagrad, lamb, lars)}


# ---- states --------------------------------------------------------------------------------------------------------


def state_maps(family: str, group: Group) -> list[F32]:
    """The 8-bit map of each of a rule's states, in the rule's order; the second of a pair of averages is unsigned."""
    match family:
        case "adam":
            return [SIGNED, UNSIGNED, UNSIGNED][: 3 if group.has(AMSGRAD) else 2]
        case "lamb":
            return [SIGNED, UNSIGNED]
        case "ademamix":
            return [SIGNED, SIGNED, UNSIGNED]
        case "sgd" | "lars":
            return [SIGNED] if group.beta1 != 0 else []
        case "rmsprop":
            return [SIGNED] * (1 + (group.beta2 != 0) + group.has(CENTERED))
    return [SIGNED]


@dataclass
class State8:
    """A state in 8 bits: ``table[codes] * absmax``."""

    codes: U8
    absmax: F32
    table: F32

    def value(self) -> F32:
        return oracle.dequantize_blockwise(self.codes, self.absmax, self.table, BLOCK, "float32")


def quantized(values: F32, table: F32) -> State8:
    return State8(*oracle.quantize_blockwise(values, table, BLOCK), table)


State = F32 | State8


def values_of(states: list[State]) -> list[F32]:
    return [state.value() if isinstance(state, State8) else state for state in states]


# ---- rounding of parameters ----------------------------------------------------------------------------------------


def philox(counter: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """Philox4x32-10 (Salmon et al. 2011) of counters (..., 4), words in uint64 arrays."""
    mask = np.uint64(0xFFFFFFFF)
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (second >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            second & mask,
            (first >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            first & mask,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, axis=-1)


@dataclass(frozen=True)
class Random:
    """Where a tensor's random numbers come from; ``first`` is the offset of a piece within its tensor."""

    seed: int
    ordinal: int
    first: int = 0

    def halves(self, n: int, t: int) -> NDArray[np.uint32]:
        """Sixteen bits an element: eight elements share a counter, words are taken from the low half on."""
        element = np.uint64(self.first) + np.arange(n, dtype=np.uint64)
        number = element >> np.uint64(3)
        counter = np.empty((n, 4), dtype=np.uint64)
        counter[:, 0], counter[:, 1] = number & np.uint64(0xFFFFFFFF), number >> np.uint64(32)
        counter[:, 2], counter[:, 3] = t & 0xFFFFFFFF, self.ordinal
        place = (element & np.uint64(7)).astype(np.intp)
        words = philox(counter, self.seed)[np.arange(n), place // 2]
        return np.where(place % 2, words >> np.uint64(16), words & np.uint64(0xFFFF)).astype(np.uint32)


def narrow_stochastic(p: F32, random: NDArray[np.uint32]) -> np.ndarray:
    up = ((p.view(np.uint32) + random) >> 16).astype(np.uint16)
    return np.where(np.isfinite(p), up, narrow(p, "bfloat16"))


# ---- a step --------------------------------------------------------------------------------------------------------


def dtype_of(p: np.ndarray) -> str:
    return "bfloat16" if p.dtype == np.uint16 else p.dtype.name


def step(
    family: str,
    group: Group,
    t: int,
    p: np.ndarray,
    g: np.ndarray,
    states: list[State],
    scale: np.float32 | None = None,
    ratio: np.float32 = ONE,
    random: Random | None = None,
) -> tuple[np.ndarray, list[State]]:
    """The parameter and the states after step ``t`` (from 1); ``random`` rounds a bfloat16 parameter stochastically."""
    with np.errstate(all="ignore"):
        gradient = widen(g) if scale is None else widen(g) * scale
        wide, fresh = RULES[family](group, t, widen(p), gradient, values_of(states), ratio)
        kept_states: list[State] = [
            quantized(new, old.table) if isinstance(old, State8) else new
            for new, old in zip(fresh, states, strict=True)
        ]
        if random is not None and dtype_of(p) == "bfloat16":
            return narrow_stochastic(wide, random.halves(p.size, t)), kept_states
        return narrow(wide, dtype_of(p)), kept_states


# ---- norms ---------------------------------------------------------------------------------------------------------


def fold(sums: NDArray[np.float64]) -> np.float64:
    while sums.size > 1:
        half = sums.size // 2
        sums = sums[:half] + sums[half:]
    return sums[0]


def tile_sums(x: F32) -> NDArray[np.float64]:
    """Sums of squares of each tile: lanes of 8 in order, 32 lanes folded by halves, 16 blocks in order."""
    tiles = -(-x.size // TILE)
    padded = np.zeros(tiles * TILE, dtype=np.float64)
    padded[: x.size] = x
    with np.errstate(over="ignore", invalid="ignore"):
        squares = (padded * padded).reshape(tiles, TILE // BLOCK, 32, 8)
        sums = np.zeros(tiles)
        for tile in range(tiles):
            for block in squares[tile]:
                lanes = np.zeros(32)
                for i in range(8):
                    lanes = lanes + block[:, i]
                sums[tile] += fold(lanes)
    return sums


def total(partials: NDArray[np.float64]) -> np.float64:
    """The sum of the partials: 1024 lanes, each of every 1024th in order, folded by halves."""
    with np.errstate(over="ignore", invalid="ignore"):
        lanes = np.zeros(1024)
        for start in range(0, partials.size, 1024):
            part = partials[start : start + 1024]
            lanes[: part.size] += part
        return fold(lanes)


def control(
    partials: NDArray[np.float64],
    max_norm: float,
    grad_scale: np.float32 | None,
    found_inf: np.float32 | None,
    skip_nonfinite: bool,
) -> tuple[np.float32, int]:
    """The factor of the gradients, and 1 where the step is left out."""
    with np.errstate(all="ignore"):
        norm = total(partials)
        inverse = np.float64(1) if grad_scale is None else np.float64(1) / np.float64(grad_scale)
        clip = np.float64(max_norm) / (np.sqrt(norm) * inverse + 1e-6) if max_norm > 0 else np.float64(1)
        clip = np.float64(1) if clip >= 1 else clip  # NaN stays
        skip = (found_inf is not None and found_inf != 0) or (skip_nonfinite and not np.isfinite(norm))
        return np.float32(inverse * clip), int(skip)


def trust_sums(
    family: str, group: Group, t: int, p: np.ndarray, g: np.ndarray, states: list[State], scale: np.float32 | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums of squares of each tile of the parameter and of the update before its trust ratio."""
    with np.errstate(all="ignore"):
        wide, u = widen(p), widen(g) if scale is None else widen(g) * scale
        if family == "lamb":
            u, _ = lamb_direction(group, t, wide, u, values_of(states))
        return tile_sums(wide), tile_sums(u)


def trust_ratio(family: str, group: Group, p_sums: NDArray[np.float64], u_sums: NDArray[np.float64]) -> np.float32:
    with np.errstate(all="ignore"):
        p, u = np.sqrt(total(p_sums)), np.sqrt(total(u_sums))
        if p == 0 or u == 0:
            return np.float32(1)
        return np.float32(group.trust * p / (u if family == "lamb" else u + group.weight_decay * p))
