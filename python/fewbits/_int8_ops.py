"""`_int8` as torch sees it: ops, their shapes for tracing, and calls through them."""

from __future__ import annotations

import torch

from fewbits import _checks, _int8
from fewbits import _checks_int8 as checks
from fewbits._ops import register


def _fake_quantize_rows(A: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    checks.check_rows(A, threshold)
    rows = 1
    for size in A.shape[:-1]:
        rows *= size
    words = checks.mask_words(A.shape[-1]) if threshold > 0 else 0
    codes = A.new_empty(A.shape, dtype=torch.int8)
    return codes, A.new_empty((rows,), dtype=torch.float32), A.new_empty((words,), dtype=torch.int32)


def _fake_linear(
    A: torch.Tensor,
    CB: torch.Tensor,
    SCB: torch.Tensor,
    threshold: float,
    bias: torch.Tensor | None,
    B: torch.Tensor | None,
) -> torch.Tensor:
    checks.check_linear(A, CB, SCB, threshold, bias, B)
    return A.new_empty((*A.shape[:-1], CB.shape[0]))


def _fake_linear_matmul(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    checks.check_matmul(A, B)
    return A.new_empty((*A.shape[:-1], B.shape[0]), dtype=torch.int32)


def _fake_scaled_mm(
    A: torch.Tensor,
    B: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    checks.check_scaled(A, B, row_stats, col_stats, bias, dtype)
    return A.new_empty((*A.shape[:-1], B.shape[0]), dtype=dtype)


def _fake_mixed_scaled_mm(
    A: torch.Tensor,
    CA: torch.Tensor,
    CB: torch.Tensor,
    SCA: torch.Tensor,
    SCB: torch.Tensor,
    outliers: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    checks.check_mixed(A, CA, CB, SCA, SCB, outliers, bias)
    return A.new_empty((*A.shape[:-1], CB.shape[0]))


def _fake_vectorwise_dequant(A: torch.Tensor, stats: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    checks.check_codes("A", A)
    checks.check_stats("stats", stats, "A", A)
    _checks.check_dtype("dtype", dtype)
    return A.new_empty(A.shape, dtype=dtype)


def _fake_dense_matmul(A: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor) -> torch.Tensor:
    checks.check_dense("A", A, 1, CB, SCB)
    return A.new_empty((*A.shape[:-1], CB.shape[0]))


def _fake_dense_matmul_grad(grad_output: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor) -> torch.Tensor:
    checks.check_dense("grad_output", grad_output, 0, CB, SCB)
    return grad_output.new_empty((*grad_output.shape[:-1], CB.shape[1]))


register(
    "int8_quantize_rows",
    "(Tensor A, float threshold) -> (Tensor, Tensor, Tensor)",
    _int8.int8_quantize_rows,
    _fake_quantize_rows,
)
register(
    "int8_linear",
    "(Tensor A, Tensor CB, Tensor SCB, float threshold, Tensor? bias, Tensor? B) -> Tensor",
    _int8.int8_linear,
    _fake_linear,
)
register("int8_linear_matmul", "(Tensor A, Tensor B) -> Tensor", _int8.int8_linear_matmul, _fake_linear_matmul)
register(
    "int8_scaled_mm",
    "(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias, ScalarType dtype) -> Tensor",
    _int8.int8_scaled_mm,
    _fake_scaled_mm,
)
register(
    "int8_mixed_scaled_mm",
    "(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor outliers, Tensor? bias) -> Tensor",
    _int8.int8_mixed_scaled_mm,
    _fake_mixed_scaled_mm,
)
register(
    "int8_vectorwise_dequant",
    "(Tensor A, Tensor stats, ScalarType dtype) -> Tensor",
    _int8.int8_vectorwise_dequant,
    _fake_vectorwise_dequant,
)
register(
    "int8_dense_matmul", "(Tensor A, Tensor CB, Tensor SCB) -> Tensor", _int8.int8_dense_matmul, _fake_dense_matmul
)
register(
    "int8_dense_matmul_grad",
    "(Tensor grad_output, Tensor CB, Tensor SCB) -> Tensor",
    _int8.int8_dense_matmul_grad,
    _fake_dense_matmul_grad,
)


# ---- the same signatures as `_int8`, through the dispatcher ---------------------------------------------------------
# Codes are integers: quantizing has no gradient, and its inputs are detached so that autograd is not asked for one.


def int8_quantize_rows(A: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    results: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    results = torch.ops.fewbits.int8_quantize_rows.default(A.detach(), threshold)
    return results


def int8_linear_matmul(A: torch.Tensor, B: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.fewbits.int8_linear_matmul.default(A, B)
    if out is None:
        return product
    _checks.check_buffer("out", out, torch.int32, product.numel(), f"shape {tuple(product.shape)}", A)
    return out.copy_(product.view(out.shape))


def int8_scaled_mm(
    A: torch.Tensor,
    B: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    added = None if bias is None else bias.detach()
    product: torch.Tensor = torch.ops.fewbits.int8_scaled_mm.default(
        A, B, row_stats.detach(), col_stats.detach(), added, dtype
    )
    return product


def int8_mixed_scaled_mm(
    A: torch.Tensor,
    CA: torch.Tensor,
    CB: torch.Tensor,
    SCA: torch.Tensor,
    SCB: torch.Tensor,
    outliers: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    added = None if bias is None else bias.detach()
    product: torch.Tensor = torch.ops.fewbits.int8_mixed_scaled_mm.default(
        A.detach(), CA, CB, SCA.detach(), SCB.detach(), outliers, added
    )
    return product


def int8_vectorwise_dequant(A: torch.Tensor, stats: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values: torch.Tensor = torch.ops.fewbits.int8_vectorwise_dequant.default(A, stats.detach(), dtype)
    return values


int8_linear = torch.ops.fewbits.int8_linear.default
int8_dense_matmul = torch.ops.fewbits.int8_dense_matmul.default
int8_dense_matmul_grad = torch.ops.fewbits.int8_dense_matmul_grad.default
