"""Layers for the tests of `Linear8bitLt`, and their product in float64."""

from __future__ import annotations

from typing import Any

import torch

import fewbits.functional as F
from fewbits.nn import Int8Params, Linear8bitLt

N, K = 24, 96

OPS = [
    "int8_dense_matmul",
    "int8_dense_matmul_grad",
    "int8_linear",
    "int8_linear_matmul",
    "int8_mixed_scaled_mm",
    "int8_quantize_rows",
    "int8_scaled_mm",
    "int8_vectorwise_dequant",
]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(device: torch.device | str | None = "cpu", n: int = N, k: int = K, **kwargs: Any) -> Linear8bitLt:
    """A layer with known values; no device: not quantized."""
    layer = Linear8bitLt(k, n, **{"has_fp16_weights": False, "threshold": 6.0, **kwargs})
    layer.weight.data = randn(n, k)
    if layer.bias is not None:
        layer.bias.data = randn(n, seed=1)
    return layer if device is None else layer.to(device)


def activations(*shape: int, outliers: int = 2, seed: int = 5) -> torch.Tensor:
    """Normal numbers with a few columns that hold one outlier each."""
    x = randn(*shape, seed=seed)
    flat = x.view(-1, shape[-1])
    for i in range(outliers):
        flat[i % flat.shape[0], (7 * i + 3) % shape[-1]] = 20.0 + i
    return x


def scales(layer: Linear8bitLt) -> torch.Tensor:
    SCB = layer.weight.SCB if getattr(layer.weight, "SCB", None) is not None else layer.state.SCB
    assert SCB is not None
    return SCB


def dense(layer: Linear8bitLt) -> torch.Tensor:
    """The weight that a quantized layer stands for."""
    return F.int8_vectorwise_dequant(layer.weight.data, scales(layer))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def assert_same_layer(got: Linear8bitLt, expected: Linear8bitLt) -> None:
    assert type(got.weight) is Int8Params
    left, right = got.state_dict(), expected.state_dict()
    assert list(left) == list(right)
    for key in left:
        assert torch.equal(raw(left[key]), raw(right[key])), key
    x = activations(2, expected.in_features).to(got.weight.device)
    assert torch.equal(got(x), expected.to(got.weight.device)(x))
