"""LAMB and LARS without their ratio, and LARS against its form in plain torch operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fewbits

SHAPES = [(64, 96), (4097,), (3, 5)]


def step_all(optimizers: list[torch.optim.Optimizer], params: list[list[torch.nn.Parameter]], seed: int) -> None:
    torch.manual_seed(seed)
    for tensors in zip(*params, strict=True):
        g = 0.01 * torch.randn(tensors[0].shape)
        for p in tensors:
            p.grad = g.to(p.device)
    for optimizer in optimizers:
        optimizer.step()


def copies(count: int, device: torch.device) -> list[list[torch.nn.Parameter]]:
    torch.manual_seed(0)
    values = [torch.randn(shape) for shape in SHAPES]
    return [[torch.nn.Parameter(value.clone().to(device)) for value in values] for _ in range(count)]


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(("name", "other", "kwargs", "others"), [
    ("LAMB", "AdamW", {"max_unorm": 0.0, "weight_decay": 0.1}, {"weight_decay": 0.1}),
    ("LARS", "SGD", {"max_unorm": 0.0, "momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.9, "weight_decay": 0.1}),
])  # fmt: skip
def test_without_a_ratio(
    name: str, other: str, kwargs: dict[str, Any], others: dict[str, Any], bits: int, device: torch.device
) -> None:
    first, second = params = copies(2, device)
    optimizers = [
        getattr(fewbits.optim, name)(first, lr=0.01, optim_bits=bits, **kwargs),
        getattr(fewbits.optim, other)(second, lr=0.01, optim_bits=bits, **others),
    ]
    for seed in range(5):
        step_all(optimizers, params, seed)
    for p, q in zip(first, second, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_ratio_of_some_groups(device: torch.device) -> None:
    """A coefficient of 0 in one group leaves the ratios of the others alone."""
    first, second = params = copies(2, device)
    mixed = fewbits.optim.LARS(
        [{"params": first[:1], "max_unorm": 0.0}, {"params": first[1:]}], lr=0.1, momentum=0.9, max_unorm=0.02
    )
    apart: list[torch.optim.Optimizer] = [
        fewbits.optim.LARS(second[:1], lr=0.1, momentum=0.9, max_unorm=0.0),
        fewbits.optim.LARS(second[1:], lr=0.1, momentum=0.9, max_unorm=0.02),
    ]
    for seed in range(3):
        step_all([mixed, *apart], params, seed)
    for p, q in zip(first, second, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kwargs", [
    {}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"max_unorm": 0.0},
    {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01, "max_unorm": 0.5},
])  # fmt: skip
def test_plain_torch_form(kwargs: dict[str, Any], device: torch.device) -> None:
    first, second = params = copies(2, device)
    for tensors in params:
        tensors[2].data.zero_()  # a norm of 0
    optimizers = [fewbits.optim.LARS(first, lr=0.1, **kwargs), fewbits.optim.PytorchLARS(second, lr=0.1, **kwargs)]
    for seed in range(5):
        step_all(optimizers, params, seed)
    for p, q in zip(first, second, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        if kwargs.get("momentum"):
            buffer = optimizers[1].state[q]["momentum_buffer"]
            torch.testing.assert_close(optimizers[0].state[p]["state1"], buffer, rtol=1e-5, atol=1e-7)
