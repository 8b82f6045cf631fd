"""The formulas of the eight families on float32 tensors, an operation at a time, nothing fused.

Each takes a moment, the parameter, its gradient, the states that it has, and a trust ratio, and returns the parameter
and the states after the step. Scalars have been rounded to float32. No tensor is divided by a scalar: some devices
would multiply it by the reciprocal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fewbits.optim._families import AMSGRAD, BIAS_CORRECTION, CENTERED, DECOUPLED, NESTEROV
from fewbits.portable.numbers import f32, square_root
from fewbits.portable.optim_coefficients import Moment

States = list[torch.Tensor]
Rule = Callable[[Moment, torch.Tensor, torch.Tensor, States, float], tuple[torch.Tensor, States]]


def _kept(c: Moment, p: torch.Tensor) -> torch.Tensor:
    return p * c.keep() if c.given("weight_decay") else p


def _decayed(c: Moment, g: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return g + p * c.weight_decay if c.given("weight_decay") else g


def _average(beta: float, old: torch.Tensor, rest: float, new: torch.Tensor) -> torch.Tensor:
    return old * beta + new * rest


def _average_square(beta: float, old: torch.Tensor, rest: float, new: torch.Tensor) -> torch.Tensor:
    return old * beta + (new * rest) * new


def _averages(c: Moment, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _average(c.beta1, m, c.rest("beta1"), g), _average_square(c.beta2, v, c.rest("beta2"), g)


def _adam(c: Moment, p: torch.Tensor, g: torch.Tensor, s: States, ratio: float) -> tuple[torch.Tensor, States]:
    if c.has(DECOUPLED):
        p = _kept(c, p)
    else:
        g = _decayed(c, g, p)
    m, v = _averages(c, g, s[0], s[1])
    states, divisor = [m, v], v
    if c.has(AMSGRAD):
        divisor = torch.maximum(s[2], v)
        states.append(divisor)
    d = square_root(divisor).mul_(c.root_correction("beta2")).add_(c.eps)
    return p - (m / d).mul_(c.corrected_lr("beta1")), states


def _ademamix(c: Moment, p: torch.Tensor, g: torch.Tensor, s: States, ratio: float) -> tuple[torch.Tensor, States]:
    p = _kept(c, p)
    fast, v = _averages(c, g, s[0], s[2])
    beta3 = c.slow_decay()
    slow = _average(f32(beta3), s[1], f32(1.0 - beta3), g)
    u = fast * c.correction("beta1") + slow * c.slow_weight()
    d = square_root(v).mul_(c.root_correction("beta2")).add_(c.eps)
    return p - u.div_(d).mul_(f32(c.lr)), [fast, slow, v]


def _lion(c: Moment, p: torch.Tensor, g: torch.Tensor, s: States, ratio: float) -> tuple[torch.Tensor, States]:
    p = _kept(c, p)
    u = _average(c.beta1, s[0], c.rest("beta1"), g)
    m = _average(c.beta2, s[0], c.rest("beta2"), g)
    sign = (u > 0).to(torch.float32) - (u < 0).to(torch.float32)  # +0 for either zero
    return p - torch.where(torch.isnan(u), u, sign).mul_(f32(c.lr)), [m]


def _with_momentum(c: Moment, p: torch.Tensor, g: torch.Tensor, s: States) -> tuple[torch.Tensor, States]:
    if not c.given("beta1"):
        return p - g * f32(c.lr), []
    b = g if c.t == 1 else _average(c.beta1, s[0], c.rest("dampening"), g)
    g = g + b * c.beta1 if c.has(NESTEROV) else b
    return p - g * f32(c.lr), [b]


def _sgd(c: Moment, p: torch.Tensor, g: torch.Tensor, s: States, ratio: float) -> tuple[torch.Tensor, States]:
    return _with_momentum(c, p, _decayed(c, g, p), s)


def _lars(c: Moment, p: torch.Tensor, g: torch.Tensor, s: States, ratio: float) -> tuple[torch.Tensor, States]:
    return _with_momentum(c, p, _decayed(c, g, p) * ratio, s)


def _rmsprop(c: Moment, p: torch.Tensor, g: torch.Tensor, s: States, ratio: float) -> tuple[torch.Tensor, States]:
    g = _decayed(c, g, p)
    square = _average_square(c.beta1, s[0], c.rest("beta1"), g)
    states, variance, mean = [square], square, None
    if c.has(CENTERED):
        mean = s[-1] + (g - s[-1]).mul_(c.rest("beta1"))
        variance = square - mean * mean
    step = g / square_root(variance).add_(c.eps)
    if c.given("beta2"):
        step = s[1] * c.beta2 + step
        states.append(step)
    if mean is not None:
        states.append(mean)
    return p - step * f32(c.lr), states


def _adagrad(c: Moment, p: torch.Tensor, g: torch.Tensor, s: States, ratio: float) -> tuple[torch.Tensor, States]:
    g = _decayed(c, g, p)
    square = s[0] + g * g
    return p - (g / square_root(square).add_(c.eps)).mul_(c.decayed_lr()), [square]


def lamb_direction(c: Moment, p: torch.Tensor, g: torch.Tensor, s: States) -> tuple[torch.Tensor, States]:
    """Return LAMB's update before learning rate and trust ratio, and the states."""
    if not c.has(DECOUPLED):
        g = _decayed(c, g, p)
    m, v = _averages(c, g, s[0], s[1])
    corrected, d = m, square_root(v)
    if c.has(BIAS_CORRECTION):
        corrected, d = m * c.correction("beta1"), d.mul_(c.root_correction("beta2"))
    r = corrected / d.add_(c.eps)
    return (_decayed(c, r, p) if c.has(DECOUPLED) else r), [m, v]


def _lamb(c: Moment, p: torch.Tensor, g: torch.Tensor, s: States, ratio: float) -> tuple[torch.Tensor, States]:
    r, states = lamb_direction(c, p, g, s)
    return p - r * f32(f32(c.lr) * ratio), states


RULES: dict[str, Rule] = {
    "adam": _adam,
    "ademamix": _ademamix,
    "lion": _lion,
    "sgd": _sgd,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
    "lamb": _lamb,
    "lars": _lars,
}
