"""Products against float64: a bound for each element, and one error for all of them."""

from __future__ import annotations

import torch
from torch import nn

from tolerances import UNIT_ROUNDOFF


def distance(got: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return float((got.double() - truth).norm() / truth.norm())


def truth_of(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return nn.functional.linear(x.double(), weight, None if bias is None else bias.double())


def assert_rounded_once(
    got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """The bound that holds for each element: weights and result rounded to the dtype once, sums in float32."""
    __tracebackhide__ = True
    truth = truth_of(x, weight, bias)
    magnitude = truth_of(x.abs(), weight.abs(), None if bias is None else bias.abs())
    k, unit = x.shape[-1], UNIT_ROUNDOFF[got.dtype]
    allowed = 1.01 * unit * (truth.abs() + magnitude) + (k + 4) * 2.0**-24 * magnitude
    smallest = torch.finfo(got.dtype).smallest_normal
    worst = ((got.double() - truth).abs() - allowed - smallest * unit).max() if got.numel() else torch.tensor(0.0)
    assert worst <= 0, f"{worst} past the bound"
