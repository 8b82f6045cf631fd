"""Code tables on a device, with what encoding needs of them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fewbits.codebook import TABLES, shared_table


class Code(NamedTuple):
    """Values of codes, and the way back."""

    values: torch.Tensor  # float32, by code
    thresholds: torch.Tensor  # float32, ascending: the rank of t is how many of them lie below it
    order: torch.Tensor | None  # uint8, the code of each rank, where it is not the rank itself
    signed_zero: bool = False  # whether the rank counts `t >= 0` as well: two zeros are told apart by the sign


_cache: dict[tuple[str, torch.device], Code] = {}


def named(name: str, device: torch.device) -> Code:
    """Return one of `TABLES` on a device."""
    code = _cache.get((name, device))
    if code is None:
        # Inference tensors cannot be used by autograd later on, and the cache outlives any inference_mode block.
        with torch.inference_mode(False), torch.no_grad():
            values = torch.tensor(TABLES[name], dtype=torch.float32, device="cpu")
            code = _fp4(values, device) if name == "fp4" else _made(values, device)
        if type(code.values) is torch.Tensor:  # a fake tensor must not outlive the mode that made it
            _cache[name, device] = code
    return code


def of(code: torch.Tensor | None, device: torch.device) -> Code:
    """Return a 256-entry code, the signed dynamic map if there is none."""
    if code is None or code is shared_table("dynamic", device):
        return named("dynamic", device)
    return _made(code.detach().to("cpu", torch.float32).reshape(-1), device)


def _middles(ascending: torch.Tensor) -> torch.Tensor:
    """Return the float32 nearest to the middle of each pair of neighbours. On the CPU, which has float64."""
    exact = ascending.double()
    return ((exact[:-1] + exact[1:]) / 2).float()


def _made(values: torch.Tensor, device: torch.device) -> Code:
    ascending, order = torch.sort(values, stable=True)
    is_sorted = bool((order == torch.arange(order.numel(), device="cpu")).all())
    codes = None if is_sorted else order.to(torch.uint8).to(device)
    return Code(values.to(device), _middles(ascending).to(device), codes)


def _fp4(values: torch.Tensor, device: torch.device) -> Code:
    """Return FP4, where code 8, -0.0, lies below code 0. No threshold separates them: the sign does."""
    magnitudes = torch.argsort(values[:8])
    order = torch.cat([magnitudes.flip(0) + 8, magnitudes])
    middles = _middles(values[order])
    thresholds = torch.cat([middles[:7], middles[8:]])
    return Code(values.to(device), thresholds.to(device), order.to(torch.uint8).to(device), signed_zero=True)
