"""What the int8 operations accept; see `_checks`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from fewbits._checks import check_count, check_dtype, check_floating, check_same_device, check_tensor


def check_threshold(threshold: float) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold: expected a number, got {type(threshold).__name__}")
    if not threshold >= 0:
        raise ValueError(f"threshold: expected 0 or more, got {threshold!r}")


def check_rows(A: torch.Tensor, threshold: float = 0.0) -> None:
    """Raise unless `A` has rows that can be quantized."""
    check_floating("A", A)
    if A.dim() == 0:
        raise ValueError("A: expected at least one dimension, got a scalar")
    check_threshold(threshold)


def check_codes(name: str, codes: torch.Tensor) -> None:
    check_tensor(name, codes)
    if codes.dtype != torch.int8:
        raise ValueError(f"{name}: expected torch.int8 codes, got {codes.dtype}")
    if codes.dim() == 0:
        raise ValueError(f"{name}: expected at least one dimension, got a scalar")


def check_stats(name: str, stats: torch.Tensor, codes_name: str, codes: torch.Tensor) -> None:
    """Raise unless `stats` has a scale for each row of `codes`."""
    check_tensor(name, stats)
    check_same_device(name, stats, codes_name, codes)
    if not stats.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point dtype, got {stats.dtype}")
    check_count(name, stats, prod(codes.shape[:-1]), f"one a row of {codes_name}")


def check_weight(name: str, codes: torch.Tensor, stats_name: str, stats: torch.Tensor) -> None:
    check_codes(name, codes)
    if codes.dim() != 2:
        raise ValueError(f"{name}: expected two dimensions (N, K), got shape {tuple(codes.shape)}")
    check_stats(stats_name, stats, name, codes)


def check_last_size(name: str, A: torch.Tensor, size: int, shape: Sequence[int]) -> None:
    if A.dim() == 0 or A.shape[-1] != size:
        raise ValueError(f"{name}: expected a last size of {size} for a weight of {tuple(shape)}, got {tuple(A.shape)}")


def check_bias(bias: torch.Tensor | None, rows: int, dtype: torch.dtype, A: torch.Tensor) -> None:
    if bias is None:
        return
    check_tensor("bias", bias)
    check_same_device("A", A, "bias", bias)
    if bias.shape != (rows,) or bias.dtype != dtype:
        raise ValueError(f"bias: expected shape ({rows},) of {dtype}, got {tuple(bias.shape)} of {bias.dtype}")


def check_linear(
    A: torch.Tensor,
    CB: torch.Tensor,
    SCB: torch.Tensor,
    threshold: float,
    bias: torch.Tensor | None,
    B: torch.Tensor | None = None,
) -> None:
    """Raise unless the product of activations with an int8 weight exists. `B` is what the weight was made of."""
    check_rows(A, threshold)
    check_weight("CB", CB, "SCB", SCB)
    check_same_device("A", A, "CB", CB)
    check_last_size("A", A, CB.shape[1], CB.shape)
    check_bias(bias, CB.shape[0], A.dtype, A)
    if B is not None and B.shape != CB.shape:
        raise ValueError(f"B: expected shape {tuple(CB.shape)} as CB, got {tuple(B.shape)}")


def check_dense(name: str, A: torch.Tensor, dim: int, CB: torch.Tensor, SCB: torch.Tensor) -> None:
    """Raise unless the last size of `A` fits size `dim` of the weight."""
    check_tensor(name, A)
    if not A.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point dtype, got {A.dtype}")
    check_weight("CB", CB, "SCB", SCB)
    check_same_device(name, A, "CB", CB)
    check_last_size(name, A, CB.shape[dim], CB.shape)


def check_matmul(A: torch.Tensor, B: torch.Tensor) -> None:
    """Raise unless ``A @ B.T`` of codes exists."""
    check_codes("A", A)
    check_codes("B", B)
    if B.dim() != 2:
        raise ValueError(f"B: expected two dimensions (N, K), got shape {tuple(B.shape)}")
    check_same_device("A", A, "B", B)
    check_last_size("A", A, B.shape[1], B.shape)


def check_scaled(
    A: torch.Tensor,
    B: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> None:
    check_matmul(A, B)
    check_stats("row_stats", row_stats, "A", A)
    check_stats("col_stats", col_stats, "B", B)
    check_dtype("dtype", dtype)
    check_bias(bias, B.shape[0], dtype, A)


def check_mixed(
    A: torch.Tensor,
    CA: torch.Tensor,
    CB: torch.Tensor,
    SCA: torch.Tensor,
    SCB: torch.Tensor,
    outliers: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Raise unless the product with outlier columns exists. `outliers` is a bitmask of columns."""
    check_floating("A", A)
    check_codes("CA", CA)
    if CA.shape != A.shape:
        raise ValueError(f"CA: expected shape {tuple(A.shape)} as A, got {tuple(CA.shape)}")
    check_same_device("A", A, "CA", CA)
    check_stats("SCA", SCA, "CA", CA)
    check_weight("CB", CB, "SCB", SCB)
    check_same_device("A", A, "CB", CB)
    check_last_size("A", A, CB.shape[1], CB.shape)
    check_same_device("A", A, "outliers", outliers)
    check_count("outliers", outliers, mask_words(A.shape[-1]), f"a bit for each of {A.shape[-1]} columns")
    check_bias(bias, CB.shape[0], A.dtype, A)


def mask_words(k: int) -> int:
    """Return how many 32-bit words hold a bit for each of k columns."""
    return (k + 31) // 32


def check_accumulator(A: torch.Tensor, row_stats: torch.Tensor, col_stats: torch.Tensor) -> None:
    """Raise unless `A` is an int32 product that these statistics scale."""
    check_tensor("A", A)
    if A.dtype != torch.int32 or A.dim() == 0:
        raise ValueError(f"A: expected a torch.int32 product, got shape {tuple(A.shape)} of {A.dtype}")
    check_stats("row_stats", row_stats, "A", A)
    check_tensor("col_stats", col_stats)
    check_same_device("A", A, "col_stats", col_stats)
    check_count("col_stats", col_stats, A.shape[-1], "one a column of A")
