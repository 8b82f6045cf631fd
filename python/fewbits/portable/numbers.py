"""Arithmetic that torch leaves to the device, or to a library: rounded as IEEE says wherever float64 is."""

from __future__ import annotations

import numpy as np
import torch

_has_float64: dict[torch.device, bool] = {}


def f32(x: float) -> float:
    """Round to float32, to nearest even; past its range lies infinity."""
    with np.errstate(over="ignore"):
        return float(np.float32(x))


def has_float64(device: torch.device) -> bool:
    """Return whether a device computes in float64. MPS and some XPU devices do not."""
    known = _has_float64.get(device)
    if known is None:
        try:
            known = bool((torch.ones(1, device=device).double() + 1 == 2).all())
        except (RuntimeError, TypeError):
            known = False
        _has_float64[device] = known
    return known


def square_root(x: torch.Tensor) -> torch.Tensor:
    """Return the root of float32 numbers, the nearest one where the device has float64.

    torch's own of float32 misses it in the last place now and then, on the CPU for one.
    """
    return x.double().sqrt_().to(torch.float32) if has_float64(x.device) else x.sqrt()
