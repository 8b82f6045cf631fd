"""What the benches of matrix products share: what the machine can do, and weights that are in no cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from common import copy_rate, cuda_us, medians, wall_us


class Rates(NamedTuple):
    """What this machine does in a microsecond."""

    bytes: float
    flops: float


def measure_rates(device: torch.device, rounds: int) -> Rates:
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device).bfloat16()
    calls = [partial(torch.mm, a, a)]
    (us,) = medians([lambda: cuda_us(calls, 5) if device.type == "cuda" else wall_us(calls, 3)], rounds)
    assert us is not None
    return Rates(copy_rate(device), 2 * size**3 / us)


def copies(device: torch.device, first: object, nbytes: int, duplicate: Callable[..., object]) -> list[object]:
    """As many copies of a weight as are three times the L2."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return [first, *(duplicate(first) for _ in range(min(63, 3 * l2 // nbytes)))]
