"""What ``torch.ops.bitsandbytes`` returns, in shapes and dtypes, for tracing; the checks are those of fewbits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fewbits import _checks, _checks_int8, _int8_ops, _ops


def into(shape: Callable[..., torch.Tensor]) -> Callable[..., None]:
    """Return the check of an operation that writes what another one returns into its last argument."""

    def check(*args: Any) -> None:
        *inputs, out = args
        values = shape(*inputs)
        _checks.check_buffer("out", out, values.dtype, values.numel(), f"shape {tuple(values.shape)}", inputs[0])

    return check


def nothing(*args: Any, **kwargs: Any) -> None:
    """Return nothing, as an operation that changes its arguments."""


def _outliers(A: torch.Tensor) -> torch.Tensor:
    """Return as many columns as turn out to hold outliers."""
    return A.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


def int8_mixed_scaled_mm(
    A: torch.Tensor,
    CA: torch.Tensor,
    CB: torch.Tensor,
    SCA: torch.Tensor,
    SCB: torch.Tensor,
    outlier_cols: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    product = A.new_empty((*CA.shape[:-1], CB.shape[0]))
    return product, None if outlier_cols is None else A.new_empty((*A.shape[:-1], outlier_cols.shape[0]))


def int8_scaled_mm(
    A: torch.Tensor,
    B: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return A.new_empty((*A.shape[:-1], B.shape[0]), dtype=dtype or torch.float16)


def int8_linear_matmul(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return _int8_ops._fake_linear_matmul(A, B)


def int8_vectorwise_quant(
    A: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    codes, row_stats, _ = _int8_ops._fake_quantize_rows(A, threshold)
    return codes, row_stats, _outliers(A) if threshold > 0.0 else None


def int8_vectorwise_dequant(A: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    return _int8_ops._fake_vectorwise_dequant(A, stats, torch.float32)


def int8_mm_dequant(
    A: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    _checks_int8.check_accumulator(A, row_stats, col_stats)
    return torch.empty_like(A, dtype=dtype or torch.float16)


def int8_double_quant(
    A: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    codes, row_stats, outlier_cols = int8_vectorwise_quant(A, threshold)
    return codes, torch.empty_like(codes), row_stats, row_stats.new_empty((A.shape[-1],)), outlier_cols


quantize_4bit = _ops._fake_quantize_4bit
dequantize_4bit = _ops._fake_dequantize_4bit
quantize_blockwise = _ops._fake_quantize_blockwise
dequantize_blockwise = _ops._fake_dequantize_blockwise


def gemm_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None = None,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    torch._check(len(shapeB) == 2, lambda: f"shapeB: expected two sizes (N, K), got {list(shapeB)}")
    torch._check(
        A.shape[-1] == shapeB[1], lambda: f"A: expected a last size of {shapeB[1]}, got shape {tuple(A.shape)}"
    )
    return A.new_empty((*A.shape[:-1], shapeB[0]))


def gemv_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
) -> torch.Tensor:
    return gemm_4bit(A, B, shapeB, absmax, blocksize, "nf4")
