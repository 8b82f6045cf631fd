"""Products with a 4-bit weight on plain tensors: the fused kernel, or panels of the weight and torch's own product.

    matmul_4bit       A @ W.T + bias    A (..., K), W (N, K)
    matmul_4bit_grad  G @ W             G (..., N): the gradient of A

The native product says whether a kernel took the problem. Where none did, panels of the weight are dequantized one
after another into the same memory and multiplied straight into their columns of the result: rows of `W` forward,
columns of it backward, so that no sum is rounded between two panels. Nothing else is allocated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch

from fewbits import _native
from fewbits._checks import DTYPES, QUANT_TYPES, check_buffer, check_matmul_4bit
from fewbits._launch import as_float32, code_address, deliver, dense, target, target_queue

# Bytes of a panel. On the GPU enough that a product fills it, and never a full-size copy of a large head; on the CPU
# what stays in the cache between its dequantization and its use.
PANEL_BYTES = {"cuda": 64 << 20, "cpu": 2 << 20}
# A panel's size is a multiple of this where it can be: matrix kernels work in such tiles, and vectors stay aligned.
_TILE = 64


_Native = tuple[int, int, int, int, int, int, int, int, int, int]


class _Weight(NamedTuple):
    """A weight as native calls take it."""

    native: _Native  # codes, n, k, blocksize, quant_type, absmax and its nested parts
    shape: tuple[int, int]
    alive: tuple[torch.Tensor | None, ...]  # whose addresses these are


def _bind(
    B: torch.Tensor,
    absmax: torch.Tensor,
    nested_code: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    nested_blocksize: int,
    offset: torch.Tensor | None,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
) -> _Weight:
    n, k = shape
    codes, number = dense(B), QUANT_TYPES[quant_type]
    if nested_absmax is None or offset is None:
        maxima = as_float32(absmax)
        native = (codes.data_ptr(), n, k, blocksize, number, maxima.data_ptr(), 0, 0, 0, 0)
        return _Weight(native, (n, k), (codes, maxima))
    maxima, nested, mean = dense(absmax), as_float32(nested_absmax), as_float32(offset)
    address, code = code_address(nested_code)
    nested_native = (maxima.data_ptr(), address, nested.data_ptr(), nested_blocksize, mean.data_ptr())
    native = (codes.data_ptr(), n, k, blocksize, number, *nested_native)
    return _Weight(native, (n, k), (codes, maxima, nested, mean, code))


def matmul_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    absmax: torch.Tensor,
    nested_code: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    nested_blocksize: int,
    offset: torch.Tensor | None,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    bias: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``A @ W.T + bias``, shape ``(..., N)``, for the `W` of `shape` ``(N, K)``; see `autograd.matmul_4bit`."""
    parts = (B, absmax, nested_code, nested_absmax, nested_blocksize, offset, blocksize, quant_type, shape)
    check_matmul_4bit("A", A, 1, *parts, bias)
    n, k = shape
    size = (*A.shape[:-1], n)
    if out is not None:
        check_buffer("out", out, A.dtype, prod(size), f"shape {size}", A)
    result = target(out, size, A.dtype, A.device)
    if not result.numel():
        return deliver(result, out)
    if not k:
        result.zero_() if bias is None else result.copy_(bias)
        return deliver(result, out)
    weight, x = _bind(*parts), dense(A).view(-1, k)
    added = None if bias is None else dense(bias)
    number = DTYPES.get(A.dtype)
    if number is not None:
        bias_address = 0 if added is None else added.data_ptr()
        pointers = (*weight.native, bias_address, result.data_ptr(), *target_queue(A.device))
        if _native.matmul_4bit(x.data_ptr(), x.shape[0], number, *pointers):
            return deliver(result, out)
    y = result.view(-1, n)
    for first, count, panel in _panels(weight, 0, A.dtype, A.device):
        columns = y.narrow(1, first, count)
        if added is None:
            torch.mm(x, panel.t(), out=columns)
        else:
            torch.addmm(added.narrow(0, first, count), x, panel.t(), out=columns)
    return deliver(result, out)


def matmul_4bit_grad(
    grad_output: torch.Tensor,
    B: torch.Tensor,
    absmax: torch.Tensor,
    nested_code: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    nested_blocksize: int,
    offset: torch.Tensor | None,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
) -> torch.Tensor:
    """Return ``grad_output @ W``, shape ``(..., K)``, for the `W` of `shape` ``(N, K)``."""
    parts = (B, absmax, nested_code, nested_absmax, nested_blocksize, offset, blocksize, quant_type, shape)
    check_matmul_4bit("grad_output", grad_output, 0, *parts, None)
    n, k = shape
    dtype, device = grad_output.dtype, grad_output.device
    result = torch.empty((*grad_output.shape[:-1], k), dtype=dtype, device=device)
    if not result.numel():
        return result
    if not n:
        return result.zero_()
    weight, g = _bind(*parts), dense(grad_output).view(-1, n)
    y = result.view(-1, k)
    for first, count, panel in _panels(weight, 1, dtype, device):
        torch.mm(g, panel, out=y.narrow(1, first, count))
    return result


def panel_size(shape: tuple[int, int], dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many rows (`dim` 0) or columns (1) of a weight of `shape` a panel has."""
    size, other = shape[dim], shape[1 - dim]
    # A dtype that no kernel writes is converted from float32, which then lies beside it.
    itemsize = dtype.itemsize + (0 if dtype in DTYPES else 4)
    limit = max(1, PANEL_BYTES[device.type] // (other * itemsize))
    if limit >= size:
        return size
    tile = _TILE if limit >= _TILE else 1
    limit = limit // tile * tile
    panels = (size + limit - 1) // limit
    even = (size + panels - 1) // panels  # as many panels, but none that is a mere rest
    return (even + tile - 1) // tile * tile


def _panels(
    weight: _Weight, dim: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (first, count, values) for panels of rows (`dim` 0) or columns (1), each in the memory of the last."""
    n, k = weight.shape
    step = panel_size(weight.shape, dim, dtype, device)
    written = dtype if dtype in DTYPES else torch.float32
    memory = torch.empty(step * weight.shape[1 - dim], dtype=written, device=device)
    for first in range(0, weight.shape[dim], step):
        count = min(step, weight.shape[dim] - first)
        rows, columns = (count, k) if dim == 0 else (n, count)
        place = (first, rows, 0, k) if dim == 0 else (0, n, first, columns)
        _native.dequantize_4bit_panel(*weight.native, *place, memory.data_ptr(), DTYPES[written], *target_queue(device))
        yield first, count, memory[: rows * columns].view(rows, columns).to(dtype)
