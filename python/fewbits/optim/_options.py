"""Arguments that all optimizers have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

Params = Iterable[Any]


class Options(TypedDict, total=False):
    """Keyword arguments of every optimizer."""

    stochastic_rounding: bool
    seed: int
    max_grad_norm: float | None
    skip_nonfinite: bool
    page_budget: int | float | None


class MockArgs:
    """Attributes made of a mapping: what ``args=`` of an optimizer looks like.

    Examples
    --------
    >>> MockArgs({"optim_bits": 8}).optim_bits
    8
    """

    def __init__(self, initial_data: Mapping[str, Any]) -> None:
        for key, value in initial_data.items():
            setattr(self, key, value)


# What `args` of an optimizer has, and what it is where nobody says otherwise.
ARGS = {"optim_bits": 32, "min_8bit_size": 4096, "max_unorm": 0.0, "skip_zeros": False}
