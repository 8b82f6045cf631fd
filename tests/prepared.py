"""What the tests of the short way from ``Linear4bit.forward`` to native code share.

A kernel that takes every product stands in for the fused ones on the short way, and none takes any on the long way, so
that both ways are the same on every machine.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fewbits.functional as F
from fewbits import _native
from fewbits.nn import Linear4bit, Params4bit

N, K = 24, 96
TYPES = (torch.float32, torch.float16, torch.bfloat16)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    count = torch.Size(shape).numel()
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class Kernel:
    """How often a product was asked for."""

    calls = 0

    def __init__(self) -> None:
        self.versions: list[int] = []


class Weight:
    """What stands for `_native.Weight4bit`: it multiplies by the addresses that it is given."""

    kernel: Kernel

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def workspace_size(self, m: int, device: int) -> int:
        return 0

    def matmul(
        self, x: int, m: int, number: int, bias: int, out: int, workspace: int, device: int, queue: int, version: int
    ) -> bool:
        self.kernel.calls += 1
        self.kernel.versions.append(version)
        _, n, k, *_ = self.numbers
        dtype = TYPES[number]
        panel = torch.empty(n, k, dtype=dtype)
        _native.dequantize_4bit_panel(*self.numbers, 0, n, 0, k, panel.data_ptr(), number, device, queue)  # type: ignore[call-arg]
        added = at(bias, (n,), dtype) if bias else None
        at(out, (m, n), dtype).copy_(nn.functional.linear(at(x, (m, k), dtype), panel, added))
        return True


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """For a fixture: the kernel that takes every product."""
    Weight.kernel = Kernel()
    monkeypatch.setattr(_native, "Weight4bit", Weight)
    monkeypatch.setattr(_native, "matmul_4bit", lambda *_: False)
    with torch.no_grad():
        yield Weight.kernel


def make(seed: int = 0, n: int = N, k: int = K, bias: bool = True, **kwargs: Any) -> Linear4bit:
    layer = Linear4bit(k, n, bias=bias, **{"quant_type": "nf4", "compute_dtype": torch.float32, **kwargs})
    layer.weight.data = randn(n, k, seed=seed)
    if bias:
        layer.bias.data = randn(n, seed=seed + 1)
    return layer.to("cpu")


def expected(layer: Linear4bit, x: torch.Tensor) -> torch.Tensor:
    weight = layer.weight
    state = weight.quant_state if isinstance(weight, Params4bit) else layer.quant_state
    assert state is not None
    state = copy.copy(state)
    state.dtype = x.dtype
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return nn.functional.linear(x, F.dequantize_4bit(weight.data, state), bias)


def warm(layer: Linear4bit, x: torch.Tensor, kernel: Kernel) -> None:
    layer(x)
    before = kernel.calls
    layer(x)
    assert kernel.calls == before + 1, "the short way is not taken"
