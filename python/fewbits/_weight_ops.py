"""`_matmul` and the rows of `_panel` as torch sees them: ops, their shapes for tracing, and calls through them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fewbits import _checks, _matmul, _panel
from fewbits._ops import register

_WEIGHT = (
    "Tensor B, Tensor absmax, Tensor? nested_code, Tensor? nested_absmax, int nested_blocksize, Tensor? offset, "
    "int blocksize, str quant_type, SymInt[] shape"
)


def _fake_matmul_4bit(
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
) -> torch.Tensor:
    parts = (B, absmax, nested_code, nested_absmax, nested_blocksize, offset, blocksize, quant_type, shape)
    _checks.check_matmul_4bit("A", A, 1, *parts, bias)
    return A.new_empty((*A.shape[:-1], shape[0]))


def _fake_matmul_4bit_grad(
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
    parts = (B, absmax, nested_code, nested_absmax, nested_blocksize, offset, blocksize, quant_type, shape)
    _checks.check_matmul_4bit("grad_output", grad_output, 0, *parts, None)
    return grad_output.new_empty((*grad_output.shape[:-1], shape[1]))


def _fake_dequantize_4bit_rows(
    indices: torch.Tensor,
    B: torch.Tensor,
    absmax: torch.Tensor,
    nested_code: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    nested_blocksize: int,
    offset: torch.Tensor | None,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    parts = (B, absmax, nested_code, nested_absmax, nested_blocksize, offset, blocksize, quant_type, shape)
    _checks.check_rows(indices, *parts, dtype)
    return indices.new_empty((*indices.shape, shape[1]), dtype=dtype)


register("matmul_4bit", f"(Tensor A, {_WEIGHT}, Tensor? bias) -> Tensor", _matmul.matmul_4bit, _fake_matmul_4bit)
register(
    "matmul_4bit_grad",
    f"(Tensor grad_output, {_WEIGHT}) -> Tensor",
    _matmul.matmul_4bit_grad,
    _fake_matmul_4bit_grad,
)
register(
    "dequantize_4bit_rows",
    f"(Tensor indices, {_WEIGHT}, ScalarType dtype) -> Tensor",
    _panel.dequantize_4bit_rows,
    _fake_dequantize_4bit_rows,
)


# ---- the same signatures as the kernels, through the dispatcher ----------------------------------------------------

matmul_4bit = torch.ops.fewbits.matmul_4bit.default
matmul_4bit_grad = torch.ops.fewbits.matmul_4bit_grad.default
dequantize_4bit_rows = torch.ops.fewbits.dequantize_4bit_rows.default
