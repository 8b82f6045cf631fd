"""LLM.int8() on plain tensors: rows to codes, products of codes, and both at once; see `functional` and `autograd`.

Every function checks its tensors, allocates what the caller did not give, and makes one native call. Nothing waits for
a device: the outlier columns are a bitmask there (int32 words, bit ``j % 32`` of word ``j // 32`` for column j).
"""

from __future__ import annotations

import torch

from fewbits import _checks_int8 as checks
from fewbits import _native
from fewbits._backend import PORTABLE, is_portable
from fewbits._checks import DTYPES, check_buffer, check_dtype
from fewbits._launch import as_float32, deliver, dense, target, target_queue
from fewbits._panel import Bound, multiply_panels, multiply_panels_transposed
from fewbits.portable import int8 as portable


def int8_quantize_rows(A: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (codes, largest magnitude of each row, bitmask of outlier columns: empty without a threshold)."""
    checks.check_rows(A, threshold)
    k, device = A.shape[-1], A.device
    codes = torch.empty(A.shape, dtype=torch.int8, device=device)
    m = A.shape[:-1].numel()
    row_stats = torch.empty((m,), dtype=torch.float32, device=device)
    mask = torch.zeros((checks.mask_words(k) if threshold > 0 else 0,), dtype=torch.int32, device=device)
    if not codes.numel():
        return codes, row_stats.zero_(), mask
    x = dense(A)
    ordinal, queue = target_queue(device)
    if ordinal == PORTABLE:
        portable.quantize_rows(x, float(threshold), codes, row_stats, mask if threshold > 0 else None)
        return codes, row_stats, mask
    _native.int8_quantize_rows(
        x.data_ptr(),
        m,
        k,
        DTYPES[A.dtype],
        float(threshold),
        codes.data_ptr(),
        row_stats.data_ptr(),
        mask.data_ptr() if threshold > 0 else 0,
        ordinal,
        queue,
    )
    return codes, row_stats, mask


def int8_linear(
    A: torch.Tensor,
    CB: torch.Tensor,
    SCB: torch.Tensor,
    threshold: float,
    bias: torch.Tensor | None,
    B: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``A @ W.T + bias``, rows of `A` quantized on the way. `B`, of which `W` was made, is for gradients."""
    checks.check_linear(A, CB, SCB, threshold, bias, B)
    n, k = CB.shape
    result = _result((*A.shape[:-1], n), A.dtype, A, out, A, bias)
    m = A.shape[:-1].numel()
    if not result.numel():
        return deliver(result, out)
    if not k:
        result.zero_() if bias is None else result.copy_(bias)
        return deliver(result, out)
    x, codes, scales = dense(A), dense(CB), as_float32(SCB)
    added = None if bias is None else dense(bias)
    ordinal, queue = target_queue(A.device)
    if ordinal == PORTABLE:
        portable.linear(x, codes, scales, float(threshold), added, result)
        return deliver(result, out)
    size = _native.int8_linear_workspace_size(m, n, k, ordinal)
    workspace = torch.empty((size,), dtype=torch.uint8, device=A.device)
    _native.int8_linear(
        x.data_ptr(),
        m,
        k,
        DTYPES[A.dtype],
        float(threshold),
        codes.data_ptr(),
        n,
        scales.data_ptr(),
        0 if added is None else added.data_ptr(),
        result.data_ptr(),
        workspace.data_ptr(),
        ordinal,
        queue,
    )
    return deliver(result, out)


def int8_linear_matmul(A: torch.Tensor, B: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``A @ B.T`` of codes, exactly, in int32."""
    checks.check_matmul(A, B)
    n, k = B.shape
    result = _result((*A.shape[:-1], n), torch.int32, A, out, A, B)
    m = A.shape[:-1].numel()
    if not k:
        result.zero_()
    elif result.numel():
        a, b = dense(A), dense(B)
        ordinal, queue = target_queue(A.device)
        if ordinal == PORTABLE:
            portable.matmul_int32(a.view(m, k), b, result.view(m, n))
        else:
            _native.int8_matmul_int32(a.data_ptr(), m, k, b.data_ptr(), n, result.data_ptr(), ordinal, queue)
    return deliver(result, out)


def int8_scaled_mm(
    A: torch.Tensor,
    B: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return ``A @ B.T`` of codes, scaled by the statistics of both, plus `bias`."""
    checks.check_scaled(A, B, row_stats, col_stats, bias, dtype)
    return _matmul(None, A, B, row_stats, col_stats, None, bias, dtype)


def int8_mixed_scaled_mm(
    A: torch.Tensor,
    CA: torch.Tensor,
    CB: torch.Tensor,
    SCA: torch.Tensor,
    SCB: torch.Tensor,
    outliers: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return the scaled product of codes plus, for the columns in a bitmask, what the codes of `A` leave over."""
    checks.check_mixed(A, CA, CB, SCA, SCB, outliers, bias)
    return _matmul(A, CA, CB, SCA, SCB, outliers, bias, A.dtype)


def _matmul(
    x: torch.Tensor | None,
    codes: torch.Tensor,
    weight: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    n, k = weight.shape
    result = torch.empty((*codes.shape[:-1], n), dtype=dtype, device=codes.device)
    if not result.numel():
        return result
    if not k:
        return result.zero_() if bias is None else result.copy_(bias)
    values = None if x is None else dense(x)
    a, b = dense(codes), dense(weight)
    rows, columns = as_float32(row_stats), as_float32(col_stats)
    bits = None if mask is None else dense(mask)
    added = None if bias is None else dense(bias)
    ordinal, queue = target_queue(codes.device)
    if ordinal == PORTABLE:
        portable.matmul(values, a, rows, b, columns, bits, added, result)
        return result
    _native.int8_matmul(
        0 if values is None else values.data_ptr(),
        DTYPES[dtype],
        a.data_ptr(),
        codes.shape[:-1].numel(),
        k,
        rows.data_ptr(),
        b.data_ptr(),
        n,
        columns.data_ptr(),
        0 if bits is None else bits.data_ptr(),
        0 if added is None else added.data_ptr(),
        result.data_ptr(),
        ordinal,
        queue,
    )
    return result


def int8_vectorwise_dequant(A: torch.Tensor, stats: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the values of codes, each row by its own scale."""
    checks.check_codes("A", A)
    checks.check_stats("stats", stats, "A", A)
    check_dtype("dtype", dtype)
    values = torch.empty(A.shape, dtype=dtype, device=A.device)
    if values.numel():
        n, k = A.shape[:-1].numel(), A.shape[-1]
        codes, scales = dense(A), as_float32(stats)
        ordinal, queue = target_queue(A.device)
        if ordinal == PORTABLE:
            portable.Weight(codes, scales).write_panel(0, n, 0, k, values.view(-1))
            return values
        _native.int8_dequantize_panel(
            codes.data_ptr(),
            n,
            k,
            scales.data_ptr(),
            0,
            n,
            0,
            k,
            values.data_ptr(),
            DTYPES[dtype],
            ordinal,
            queue,
        )
    return values


# ---- the weight as it is, for gradients: panels of bounded size, never all of it ------------------------------------


def int8_dense_matmul(A: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor) -> torch.Tensor:
    """Return ``A @ W.T``, nothing of `A` quantized: what the gradient of a gradient needs."""
    checks.check_dense("A", A, 1, CB, SCB)
    n, k = CB.shape
    result = torch.empty((*A.shape[:-1], n), dtype=A.dtype, device=A.device)
    if result.numel():
        multiply_panels(bind(CB, SCB), dense(A).view(-1, k), None, result.view(-1, n)) if k else result.zero_()
    return result


def int8_dense_matmul_grad(grad_output: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor) -> torch.Tensor:
    """Return ``grad_output @ W``: the gradient of `A`."""
    checks.check_dense("grad_output", grad_output, 0, CB, SCB)
    n, k = CB.shape
    result = torch.empty((*grad_output.shape[:-1], k), dtype=grad_output.dtype, device=grad_output.device)
    if result.numel():
        g, y = dense(grad_output).view(-1, n), result.view(-1, k)
        multiply_panels_transposed(bind(CB, SCB), g, y) if n else result.zero_()
    return result


def bind(CB: torch.Tensor, SCB: torch.Tensor) -> Bound:
    """Return the addresses and sizes of a weight whose parts have been checked."""
    codes, scales = dense(CB), as_float32(SCB)
    n, k = codes.shape
    if is_portable(scales.device):
        return Bound(portable.Weight(codes, scales), (n, k), (), "")
    native = (codes.data_ptr(), n, k, scales.data_ptr())
    return Bound(native, (n, k), (codes, scales), "int8_dequantize_panel")


def _result(
    shape: tuple[int, ...], dtype: torch.dtype, A: torch.Tensor, out: torch.Tensor | None, *read: torch.Tensor | None
) -> torch.Tensor:
    """Return where a product goes: the caller's `out` after a look at it, unless it lies where the kernel reads."""
    if out is not None:
        check_buffer("out", out, dtype, torch.Size(shape).numel(), f"shape {shape}", A)
    return target(out, shape, dtype, A.device, *read)
