"""Sums of squares in float64 and in one order, and what follows from them: clipping, trust ratios."""

from __future__ import annotations

import math

import torch

from fewbits.portable.numbers import f32, has_float64
from fewbits.portable.optim_coefficients import divide

TILE, _BLOCK, _RUN, _LANES = 4096, 256, 8, 1024


def _fold(sums: torch.Tensor) -> torch.Tensor:
    """Add the upper half of the last dimension to the lower one until one is left."""
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


def tile_sums(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of each tile of a flat tensor, where float64 is: on its device, or on the CPU.

    Runs of 8 in order, the 32 runs of a block folded by halves, the 16 blocks of a tile in order.
    """
    values = x.double() if has_float64(x.device) else x.cpu().double()
    tiles = -(-values.numel() // TILE)
    values = torch.nn.functional.pad(values, (0, tiles * TILE - values.numel()))
    squares = (values * values).view(tiles, TILE // _BLOCK, _BLOCK // _RUN, _RUN)
    runs = squares[..., 0]
    for i in range(1, _RUN):
        runs = runs + squares[..., i]
    blocks = _fold(runs)
    sums = blocks[:, 0]
    for i in range(1, TILE // _BLOCK):
        sums = sums + blocks[:, i]
    return sums


def total(partials: torch.Tensor) -> float:
    """Return the sum of the sums of tiles: 1024 lanes, each of every 1024th in order, folded by halves."""
    partials = partials.cpu()
    padding = -partials.numel() % _LANES
    rows = torch.nn.functional.pad(partials, (0, padding)).view(-1, _LANES)
    lanes = torch.zeros(_LANES, dtype=torch.float64, device="cpu")
    for row in rows:
        lanes = lanes + row
    return float(_fold(lanes))


def decide(
    partials: torch.Tensor | None, max_norm: float, grad_scale: float | None, found_inf: float | None, skip: bool
) -> tuple[float, bool]:
    """Return the factor of the gradients, and whether to leave the step out; `skip`: if a gradient is not finite."""
    norm = 0.0 if partials is None else total(partials)
    inverse = 1.0 if grad_scale is None else divide(1.0, grad_scale)
    clip = 1.0
    if max_norm > 0:
        clip = divide(max_norm, math.sqrt(norm) * inverse + 1e-6)
        clip = 1.0 if clip >= 1 else clip  # NaN stays
    leave_out = (found_inf is not None and found_inf != 0) or (skip and not math.isfinite(norm))
    return f32(inverse * clip), leave_out


def trust_ratio(p_sums: torch.Tensor, u_sums: torch.Tensor, trust: float, weight_decay: float | None) -> float:
    """Return what scales the update of a tensor; `weight_decay` is that of LARS's denominator."""
    p, u = math.sqrt(total(p_sums)), math.sqrt(total(u_sums))
    if p == 0 or u == 0:
        return 1.0
    return f32(divide(trust * p, u if weight_decay is None else u + weight_decay * p))
