"""What an update rule computes once a tensor: in float64, in native code's order of operations, then rounded once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fewbits.portable.numbers import f32


def divide(a: float, b: float) -> float:
    """Divide as processors do: by 0, too."""
    with np.errstate(all="ignore"):
        return float(np.float64(a) / np.float64(b))


def power(base: float, exponent: int) -> float:
    """Return ``base ** exponent`` by squaring: one order of products."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def exponential(x: float) -> float:
    """Return ``e ** x`` for ``x <= 0``; the operations of native code, not those of some library."""
    if math.isnan(x):
        return x
    turns = x * 1.4426950408889634
    k = round(turns) if abs(turns) < 1000 else int(math.copysign(1000, turns))
    r = (x - k * 0.6931471803691238) - k * 1.9082149292705877e-10
    total = 1.0
    for i in range(14, 0, -1):
        total = 1.0 + total * r / i
    return total * 2.0**k


def _logarithm(x: float) -> float:
    return math.log(x) if x else -math.inf


class Moment:
    """A group's numbers at one step of one tensor. `t` counts from 1."""

    def __init__(self, group: dict[str, Any], t: int) -> None:
        self.group, self.t = group, t
        self.lr: float = group["lr"]

    def __getattr__(self, name: str) -> float:
        """Return a hyperparameter in float32."""
        return f32(self.group[name])

    def has(self, flag: int) -> bool:
        """Return whether the group chose this."""
        return bool(self.group["flags"] & flag)

    def given(self, name: str) -> bool:
        """Return whether a hyperparameter is not 0, before it is rounded."""
        return bool(self.group[name] != 0)

    def rest(self, name: str) -> float:
        """Return what a hyperparameter leaves of 1."""
        return f32(1.0 - self.group[name])

    def keep(self) -> float:
        """Return what decoupled weight decay leaves of a parameter."""
        return f32(1.0 - self.lr * self.group["weight_decay"])

    def gathered(self, name: str) -> float:
        """Return ``1 - beta ** t``, in float64: the weight that an average with decay `beta` has gathered."""
        return 1.0 - power(self.group[name], self.t)

    def correction(self, name: str) -> float:
        """Return what makes an average with decay `beta` unbiased."""
        return f32(divide(1.0, self.gathered(name)))

    def root_correction(self, name: str) -> float:
        """Return what does so for the root of an average of squares."""
        return f32(divide(1.0, math.sqrt(self.gathered(name))))

    def corrected_lr(self, name: str) -> float:
        """Return the learning rate with `correction` in it: one rounding."""
        return f32(divide(self.lr, self.gathered(name)))

    def decayed_lr(self) -> float:
        """Return Adagrad's learning rate."""
        return f32(divide(self.lr, 1.0 + (self.t - 1.0) * self.group["lr_decay"]))

    def slow_decay(self) -> float:
        """Return the decay of AdEMAMix's slow average, in float64.

        Its half-life rises linearly (Pagliardini et al. 2024, §3).
        """
        last: float = self.group["beta3"]
        if not self.group["t_beta3"]:
            return last
        fast, slow = _logarithm(self.group["beta1"]), _logarithm(last)
        part = self.t / self.group["t_beta3"]
        risen = exponential(divide(fast * slow, (1.0 - part) * slow + part * fast))
        return risen if risen < last else last

    def slow_weight(self) -> float:
        """Return the weight of AdEMAMix's slow average, which rises from 0."""
        last: float = self.group["alpha"]
        if not self.group["t_alpha"]:
            return f32(last)
        risen = self.t * last / self.group["t_alpha"]
        return f32(risen if risen < last else last)
