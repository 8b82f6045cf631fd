"""`_matmul` as torch sees it: the ops ``fewbits::matmul_4bit`` and ``fewbits::matmul_4bit_grad``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fewbits import _checks, _matmul
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


register("matmul_4bit", f"(Tensor A, {_WEIGHT}, Tensor? bias) -> Tensor", _matmul.matmul_4bit, _fake_matmul_4bit)
register(
    "matmul_4bit_grad",
    f"(Tensor grad_output, {_WEIGHT}) -> Tensor",
    _matmul.matmul_4bit_grad,
    _fake_matmul_4bit_grad,
)


# ---- the same signatures as `_matmul`, through the dispatcher ------------------------------------------------------

matmul_4bit = torch.ops.fewbits.matmul_4bit.default
matmul_4bit_grad = torch.ops.fewbits.matmul_4bit_grad.default
