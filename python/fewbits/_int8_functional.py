"""LLM.int8() as functions, with the names, arguments and results of ``bitsandbytes.functional`` and its operations.

A row is stored as int8 codes and one float32, its largest magnitude: ``codes = rint(x * (127 / largest))``, ties to
even, and ``x ≈ codes * largest / 127``. float32, float16 and bfloat16 are read as they are. A row of zeros has a scale
of 0; a row with a NaN has a scale of NaN and codes of 0, so that its products are NaN and no other row's are.
"""

from __future__ import annotations

from typing import Any

import torch

from fewbits import _checks, _int8, _int8_ops, _launch
from fewbits import _checks_int8 as checks
from fewbits.portable.int8 import pack_mask, unpack_mask

__all__ = [
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mixed_scaled_mm",
    "int8_mm_dequant",
    "int8_scaled_mm",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
]


def _backend(*tensors: torch.Tensor | None) -> Any:
    return _int8 if _launch.is_direct(*tensors) else _int8_ops


def int8_vectorwise_quant(
    A: torch.Tensor, threshold: float = 0.0, *, return_outliers: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize each row of a tensor to int8.

    Parameters
    ----------
    A : torch.Tensor
        float32, float16 or bfloat16, shape ``(..., K)``.
    threshold : float
        An element of this magnitude or more is an outlier: it does not count for the scale of its row, and the columns
        that hold one get codes of 0. 0: there are none.
    return_outliers : bool
        Whether to list the outlier columns, for which the host must wait. If not, only the outliers themselves get
        codes of 0.

    Returns
    -------
    codes : torch.Tensor
        int8 in the shape of `A`.
    row_stats : torch.Tensor
        float32, one element a row: its largest magnitude.
    outlier_cols : torch.Tensor or None
        int64, the outlier columns in ascending order; None without a threshold or if not asked for.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that is wrong.

    Examples
    --------
    >>> codes, row_stats, columns = int8_vectorwise_quant(torch.tensor([[2.0, -1.0, 9.0]]), threshold=6.0)
    >>> codes.tolist(), row_stats.tolist(), columns.tolist()
    ([[127, -64, 0]], [2.0], [2])
    """
    checks.check_rows(A, threshold)
    codes, row_stats, mask = _backend(A).int8_quantize_rows(A, threshold)
    if not threshold > 0 or not return_outliers:
        return codes, row_stats, None
    columns = unpack_mask(mask, A.shape[-1])
    outlier_cols = columns.nonzero().flatten()
    if codes.dim() > 1 and row_stats.numel() > 1:  # of one row all outliers are 0 as it is
        codes = codes.masked_fill_(columns, 0)
    return codes, row_stats, outlier_cols


def _bitmask(columns: torch.Tensor, k: int) -> torch.Tensor:
    """Return a list of columns as a bitmask, without a look at it from the host."""
    return pack_mask(torch.zeros(k, dtype=torch.bool, device=columns.device).index_fill(0, columns, True))


def int8_vectorwise_dequant(A: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    """Return the values that int8 codes stand for.

    Parameters
    ----------
    A : torch.Tensor
        int8 codes, shape ``(..., K)``.
    stats : torch.Tensor
        The largest magnitude of each row.

    Returns
    -------
    torch.Tensor
        float32 in the shape of `A`: ``A * stats / 127``.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that is wrong.

    Examples
    --------
    >>> int8_vectorwise_dequant(torch.tensor([[127, -64]], dtype=torch.int8), torch.tensor([254.0])).tolist()
    [[254.0, -128.0]]
    """
    checks.check_codes("A", A)
    checks.check_stats("stats", stats, "A", A)
    values: torch.Tensor = _backend(A, stats).int8_vectorwise_dequant(A, stats, torch.float32)
    return values


def int8_double_quant(
    A: torch.Tensor,
    col_stats: torch.Tensor | None = None,
    row_stats: torch.Tensor | None = None,
    out_col: torch.Tensor | None = None,
    out_row: torch.Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize a matrix to int8 twice: by rows and by columns.

    Parameters
    ----------
    A : torch.Tensor
        float32, float16 or bfloat16, shape ``(..., K)``; leading dimensions count as one.
    col_stats, row_stats : torch.Tensor, optional
        float32, one element a column and one a row: receive the largest magnitudes.
    out_col, out_row : torch.Tensor, optional
        int8 in the shape of `A`: receive the codes.
    threshold : float
        As of `int8_vectorwise_quant`. Of the codes by columns, the outliers alone are 0.

    Returns
    -------
    out_row, out_col : torch.Tensor
        int8 in the shape of `A`: codes scaled by row, and codes scaled by column.
    row_stats, col_stats : torch.Tensor
        float32: the largest magnitude of each row, and of each column.
    outlier_cols : torch.Tensor or None
        As of `int8_vectorwise_quant`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that is wrong.

    Examples
    --------
    >>> by_row, by_column, row_stats, col_stats, _ = int8_double_quant(torch.tensor([[1.0, 2.0], [4.0, 4.0]]))
    >>> by_row.tolist(), by_column.tolist()
    ([[64, 127], [127, 127]], [[32, 64], [127, 127]])
    """
    checks.check_rows(A, threshold)
    rows, k = A.shape[:-1].numel(), A.shape[-1]
    buffers = (
        ("col_stats", col_stats, torch.float32, k),
        ("row_stats", row_stats, torch.float32, rows),
        ("out_col", out_col, torch.int8, A.numel()),
        ("out_row", out_row, torch.int8, A.numel()),
    )
    for name, buffer, dtype, count in buffers:
        if buffer is not None:
            _checks.check_buffer(name, buffer, dtype, count, f"for A of shape {tuple(A.shape)}", A)
    by_row, largest_of_rows, outlier_cols = int8_vectorwise_quant(A, threshold)
    transposed = A.reshape(-1, k).t()
    by_column, largest_of_columns, _ = int8_vectorwise_quant(transposed, threshold, return_outliers=False)
    by_column = by_column.t().contiguous().view(A.shape)
    return (
        _deliver(by_row, out_row),
        _deliver(by_column, out_col),
        _deliver(largest_of_rows, row_stats),
        _deliver(largest_of_columns, col_stats),
        outlier_cols,
    )


def _deliver(result: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    return result if buffer is None else buffer.copy_(result.view(buffer.shape))


def int8_linear_matmul(
    A: torch.Tensor, B: torch.Tensor, out: torch.Tensor | None = None, dtype: torch.dtype = torch.int32
) -> torch.Tensor:
    """Return ``A @ B.T`` of int8 codes, exactly.

    Parameters
    ----------
    A : torch.Tensor
        int8, shape ``(..., K)``. K is at most 131071: the sum of so many products fits int32.
    B : torch.Tensor
        int8, shape ``(N, K)``.
    out : torch.Tensor, optional
        int32, as many elements as the result: receives it.
    dtype : torch.dtype
        torch.int32.

    Returns
    -------
    torch.Tensor
        int32, shape ``(..., N)``, or `out`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that is wrong.

    Examples
    --------
    >>> codes = torch.tensor([[100, 27]], dtype=torch.int8)
    >>> int8_linear_matmul(codes, codes).tolist()
    [[10729]]
    """
    if dtype != torch.int32:
        raise ValueError(f"dtype: expected torch.int32, got {dtype}")
    product: torch.Tensor = _backend(A, B, out).int8_linear_matmul(A, B, out)
    return product


def int8_mm_dequant(
    A: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Scale an int32 product of codes: ``A * row_stats * col_stats / 127**2 + bias``.

    `int8_scaled_mm` computes product and scaling at once, without the int32 product in memory.

    Parameters
    ----------
    A : torch.Tensor
        int32, shape ``(..., N)``, from `int8_linear_matmul`.
    row_stats, col_stats : torch.Tensor
        The largest magnitudes of the rows of either factor: one a row of `A`, and `N`.
    out : torch.Tensor, optional
        Floating point in the shape of `A`: receives the result.
    bias : torch.Tensor, optional
        Floating point, shape ``(N,)``.
    dtype : torch.dtype, optional
        Of the result: float32, float16 or bfloat16; by default that of `out`, else float16.

    Returns
    -------
    torch.Tensor
        Shape of `A`: float32 arithmetic, rounded once. Or `out`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that is wrong.

    Examples
    --------
    >>> product = torch.tensor([[127 * 127]], dtype=torch.int32)
    >>> int8_mm_dequant(product, torch.tensor([2.0]), torch.tensor([3.0])).tolist()
    [[6.0]]
    """
    checks.check_accumulator(A, row_stats, col_stats)
    if dtype is None:
        dtype = torch.float16 if out is None else out.dtype
    _checks.check_dtype("dtype", dtype)
    if bias is not None:
        _checks.check_tensor("bias", bias)
        checks.check_bias(bias, A.shape[-1], bias.dtype, A)
    if out is not None:
        _checks.check_buffer("out", out, dtype, A.numel(), f"shape {tuple(A.shape)}", A)
    rows = row_stats.detach().to(torch.float32).view(*A.shape[:-1], 1)
    columns = col_stats.detach().to(torch.float32).view(-1)
    values = A.to(torch.float32).mul_(rows).mul_(columns).mul_(1 / 127**2)
    if bias is not None:
        values += bias.detach().to(torch.float32)
    return _deliver(values.to(dtype), out)


def int8_scaled_mm(
    A: torch.Tensor,
    B: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the product of two quantized matrices: ``A @ B.T * row_stats * col_stats / 127**2 + bias``.

    Parameters
    ----------
    A : torch.Tensor
        int8, shape ``(..., K)``.
    B : torch.Tensor
        int8, shape ``(N, K)``.
    row_stats, col_stats : torch.Tensor
        The largest magnitudes of the rows of `A` and of `B`.
    bias : torch.Tensor, optional
        Floating point, shape ``(N,)``.
    dtype : torch.dtype, optional
        Of the result: float32, float16 (the default) or bfloat16.

    Returns
    -------
    torch.Tensor
        Shape ``(..., N)``: an exact int32 sum, scaled in float32, rounded once.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that is wrong.

    Examples
    --------
    >>> a, row_stats, _ = int8_vectorwise_quant(torch.tensor([[1.0, 1.0]]))
    >>> int8_scaled_mm(a, a, row_stats, row_stats).tolist()
    [[2.0]]
    """
    dtype = torch.float16 if dtype is None else dtype
    _checks.check_dtype("dtype", dtype)
    if bias is not None:
        _checks.check_tensor("bias", bias)
        bias = bias.to(dtype)
    product: torch.Tensor = _backend(A, B, row_stats, col_stats, bias).int8_scaled_mm(
        A, B, row_stats, col_stats, bias, dtype
    )
    return product


def int8_mixed_scaled_mm(
    A: torch.Tensor,
    CA: torch.Tensor,
    CB: torch.Tensor,
    SCA: torch.Tensor,
    SCB: torch.Tensor,
    outlier_cols: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the product of codes with the outlier columns in floating point (Dettmers et al. 2022, §3.2).

    Parameters
    ----------
    A : torch.Tensor
        float32, float16 or bfloat16, shape ``(..., K)``: the activations.
    CA, SCA : torch.Tensor
        Their codes and row maxima, from `int8_vectorwise_quant` with a threshold.
    CB, SCB : torch.Tensor
        Codes of the weight, shape ``(N, K)``, and its row maxima.
    outlier_cols : torch.Tensor, optional
        int64: the columns of `A` that are multiplied in floating point.
    bias : torch.Tensor, optional
        Floating point, shape ``(N,)``.

    Returns
    -------
    product : torch.Tensor
        Shape ``(..., N)``, dtype of `A`, rounded once.
    subA : torch.Tensor or None
        The outlier columns of `A`; None without `outlier_cols`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that is wrong.

    Examples
    --------
    >>> x, w = torch.tensor([[1.0, 100.0]]), torch.tensor([[1.0, 1.0]])
    >>> ca, sca, columns = int8_vectorwise_quant(x, threshold=6.0)
    >>> cb, scb, _ = int8_vectorwise_quant(w)
    >>> int8_mixed_scaled_mm(x, ca, cb, sca, scb, columns)[0].tolist()
    [[101.0]]
    """
    _checks.check_floating("A", A)
    if bias is not None:
        _checks.check_tensor("bias", bias)
        bias = bias.to(A.dtype)
    if outlier_cols is None:
        return int8_scaled_mm(CA, CB, SCA, SCB, bias, A.dtype), None
    _checks.check_tensor("outlier_cols", outlier_cols)
    if outlier_cols.dim() != 1 or outlier_cols.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            "outlier_cols: expected one dimension of torch.int64, "
            f"got shape {tuple(outlier_cols.shape)} of {outlier_cols.dtype}"
        )
    _checks.check_same_device("A", A, "outlier_cols", outlier_cols)
    columns = outlier_cols.to(torch.int64)
    mask = _bitmask(columns, A.shape[-1])
    product: torch.Tensor = _backend(A, CA, CB, SCA, SCB, bias).int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, mask, bias)
    return product, A.detach().index_select(-1, columns)
