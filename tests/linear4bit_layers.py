"""Layers for the tests of `Linear4bit`."""

from __future__ import annotations

import copy
from typing import Any

import torch

import fewbits.functional as F
from fewbits.nn import Linear4bit, Params4bit

N, K = 24, 96
STORAGES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(device: torch.device | str | None = "cpu", n: int = N, k: int = K, **kwargs: Any) -> Linear4bit:
    """A layer with known values; no device: not quantized."""
    layer = Linear4bit(k, n, **{"quant_type": "nf4", **kwargs})
    layer.weight.data = randn(n, k)
    if layer.bias is not None:
        layer.bias.data = randn(n, seed=1)
    return layer if device is None else layer.to(device)


def dense(layer: Linear4bit, dtype: torch.dtype) -> torch.Tensor:
    assert layer.quant_state is not None
    state = copy.copy(layer.quant_state)
    state.dtype = dtype
    return F.dequantize_4bit(layer.weight.data, state)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def assert_same_layer(got: Linear4bit, expected: Linear4bit) -> None:
    assert type(got.weight) is Params4bit
    assert got.quant_state is got.weight.quant_state
    left, right = got.state_dict(), expected.state_dict()
    assert list(left) == list(right)
    for key in left:
        assert torch.equal(raw(left[key]), raw(right[key])), key
    x = randn(2, expected.in_features).to(got.weight.device)
    assert torch.equal(got(x), expected.to(got.weight.device)(x))
