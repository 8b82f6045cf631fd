"""The optimizers by name, and how tests make and drive them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fewbits.optim

FAMILIES = ("Adam", "AdamW", "AdEMAMix", "Lion", "SGD", "RMSprop", "Adagrad", "LAMB", "LARS")
PAGED = ("Adam", "AdamW", "AdEMAMix", "Lion")
NAMES = [f"{family}{bits}" for family in FAMILIES for bits in ("", "8bit", "32bit")]
PAGED_NAMES = [f"Paged{family}{bits}" for family in PAGED for bits in ("", "8bit", "32bit")]
ALL = [*NAMES, *PAGED_NAMES]

# What has no default, and what makes every state come to be.
REQUIRED: dict[str, dict[str, Any]] = {"SGD": {"lr": 0.01, "momentum": 0.9}, "LARS": {"lr": 0.1, "momentum": 0.9}}


def family_of(name: str) -> str:
    return name.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit")


def make(name: str, params: Any, **kwargs: Any) -> torch.optim.Optimizer:
    """An optimizer by name; CPU parameters of a paged one are no reason to warn here."""
    return getattr(fewbits.optim, name)(params, **{**REQUIRED.get(family_of(name), {}), **kwargs})


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same numbers on every device and with every torch."""
    values = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(np.asarray(values)).to(dtype)


def parameters(
    shapes: list[tuple[int, ...]], device: torch.device | str, dtype: torch.dtype = torch.float32
) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(normal(shape, i, dtype).to(device)) for i, shape in enumerate(shapes)]


def give_gradients(params: list[Any], step: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> None:
    """Fresh gradients, the same for every optimizer, device and dtype up to rounding."""
    for i, p in enumerate(params):
        g = normal(tuple(p.shape), 1000 * (step + 1) + i, torch.float32) * scale
        if dtype is not None and dtype != p.dtype:
            if not hasattr(p, "grad_dtype"):
                pytest.skip("this torch has gradients in the parameter's dtype only")
            p.grad_dtype = dtype
        p.grad = g.to(p.device, p.dtype if dtype is None else dtype)
