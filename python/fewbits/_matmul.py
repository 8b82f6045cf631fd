"""Products with a 4-bit weight on plain tensors: the fused kernel, or panels of the weight and torch's own product.

    matmul_4bit       A @ W.T + bias    A (..., K), W (N, K)
    matmul_4bit_grad  G @ W             G (..., N): the gradient of A

The native product says whether a kernel took the problem. Where none did, panels of the weight are dequantized one
after another into the same memory and multiplied straight into their columns of the result: rows of `W` forward,
columns of it backward, so that no sum is rounded between two panels. Nothing else is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch

from fewbits import _native
from fewbits._backend import PORTABLE
from fewbits._checks import DTYPES, check_buffer, check_matmul_4bit
from fewbits._launch import deliver, dense, target, target_queue
from fewbits._panel import bind, multiply_panels, multiply_panels_transposed

_FEW_ROWS = 16  # for which no kernel wants a workspace, not worth the question


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
    result = target(out, size, A.dtype, A.device, A, bias)
    if not result.numel():
        return deliver(result, out)
    if not k:
        result.zero_() if bias is None else result.copy_(bias)
        return deliver(result, out)
    weight, x = bind(*parts), dense(A).view(-1, k)
    added = None if bias is None else dense(bias)
    number = DTYPES.get(A.dtype)
    if number is not None:
        ordinal, queue = target_queue(A.device)
        if ordinal != PORTABLE:
            bias_address = 0 if added is None else added.data_ptr()
            kept = _native.Weight4bit(*weight.native)
            scratch = workspace(x, x.shape[0], ordinal, kept.workspace_size)
            scratch_address = 0 if scratch is None else scratch.data_ptr()
            pointers = (*weight.native, bias_address, result.data_ptr(), scratch_address, ordinal, queue)
            if _native.matmul_4bit(x.data_ptr(), x.shape[0], number, *pointers):
                return deliver(result, out)
    multiply_panels(weight, x, added, result.view(-1, n))
    return deliver(result, out)


def workspace(x: torch.Tensor, m: int, ordinal: int, size: Callable[[int, int], int]) -> torch.Tensor | None:
    """Return memory beside `x`, as much as `size` says, with which the native product of its `m` rows is faster."""
    if ordinal < 0 or m <= _FEW_ROWS or not (wanted := size(m, ordinal)):
        return None
    return x.new_empty(wanted, dtype=torch.uint8)


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
    multiply_panels_transposed(bind(*parts), dense(grad_output).view(-1, n), result.view(-1, k))
    return result
