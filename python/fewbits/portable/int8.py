"""LLM.int8(): rows to codes, products of codes, and what outlier columns add."""

from __future__ import annotations

import torch

from fewbits.portable.blockwise import PIECE
from fewbits.portable.numbers import f32

_INVERSE_127 = f32(f32(1.0) / 127.0)
_INVERSE_16129 = f32(f32(1.0) / 16129.0)
# Products of int8 codes are at most 2**14: so many of them have a sum that float32 holds, in whatever order it is
# taken, and codes themselves are exact in every format that a matrix unit may read float32 as.
_EXACT = 1024
_MOST_COLUMNS = 2**17 - 1


def unpack_mask(mask: torch.Tensor, k: int) -> torch.Tensor:
    """Return a bitmask of columns as one bool a column."""
    shifts = torch.arange(32, dtype=torch.int32, device=mask.device)
    return ((mask.unsqueeze(1) >> shifts) & 1).flatten()[:k].bool()


def pack_mask(columns: torch.Tensor) -> torch.Tensor:
    """Return one bool a column as a bitmask: bit ``j % 32`` of word ``j // 32``, int32."""
    words = (columns.numel() + 31) // 32
    bits = torch.zeros(words * 32, dtype=torch.int32, device=columns.device)
    bits[: columns.numel()] = columns
    shifts = torch.arange(32, dtype=torch.int32, device=columns.device)
    return (bits.view(words, 32) << shifts).sum(1, dtype=torch.int32)  # the topmost bit is the sign


@torch.no_grad()
def quantize_rows(
    x: torch.Tensor, threshold: float, codes: torch.Tensor, row_stats: torch.Tensor, mask: torch.Tensor | None
) -> None:
    """Write the codes and the largest magnitude of each row, and to `mask` the columns that hold an outlier."""
    k = x.shape[-1]
    rows, codes = x.detach().view(-1, k), codes.view(-1, k)
    columns = torch.zeros(k, dtype=torch.bool, device=x.device)
    step = max(1, PIECE // k)
    for first in range(0, rows.shape[0], step):
        part = slice(first, first + step)
        codes[part], row_stats[part], outliers = _quantized(rows[part].to(torch.float32), threshold)
        if outliers is not None:
            columns |= outliers.any(dim=0)
    if mask is not None:
        mask.copy_(pack_mask(columns))


def _quantized(values: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    magnitudes = values.abs()
    outliers = magnitudes >= f32(threshold) if threshold > 0 else None
    scale = (magnitudes if outliers is None else magnitudes.masked_fill(outliers, 0.0)).amax(dim=1)
    # One rounding: `127 / scale` would be torch's reciprocal and a product.
    factor = torch.full_like(scale, 127.0).div_(scale).unsqueeze(1)
    # Infinity in a row of infinite scale is the largest code.
    scaled = torch.where(torch.isinf(values), values, values * factor)
    zero = torch.isnan(scaled) | (torch.isnan(scale) | (scale == 0)).unsqueeze(1)
    if outliers is not None:
        zero |= outliers
    return scaled.masked_fill_(zero, 0.0).clamp_(-127, 127).round_().to(torch.int8), scale, outliers


def _check_columns(k: int) -> None:
    if k > _MOST_COLUMNS:
        raise ValueError(f"k: got {k}, expected at most {_MOST_COLUMNS} columns, whose products' sum fits int32")


@torch.no_grad()
def matmul_int32(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Write ``a @ b.T`` of int8 codes, exactly; no device need have an integer product."""
    m, k = a.shape
    _check_columns(k)
    out.zero_()
    step = max(1, PIECE // max(m, _EXACT))
    for row in range(0, b.shape[0], step):
        rows = b[row : row + step]
        product = torch.empty((m, rows.shape[0]), dtype=torch.float32, device=a.device)
        for column in range(0, k, _EXACT):
            columns = slice(column, column + _EXACT)
            # Into memory: autocast leaves such a product alone.
            torch.mm(a[:, columns].to(torch.float32), rows[:, columns].to(torch.float32).t(), out=product)
            out[:, row : row + step] += product.to(torch.int32)


@torch.no_grad()
def matmul(
    x: torch.Tensor | None,
    codes: torch.Tensor,
    row_stats: torch.Tensor,
    weight: torch.Tensor,
    col_stats: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write the scaled product of codes, plus what they leave over of the outlier columns of `x`, plus `bias`."""
    n, k = weight.shape
    _check_columns(k)
    a, result = codes.view(-1, k), out.detach().view(-1, n)
    rows, scales = row_stats.detach().view(-1, 1), col_stats.detach().view(-1)
    rest = columns = None
    if x is not None and mask is not None:
        columns = unpack_mask(mask, k).nonzero().view(-1)
        if columns.numel():
            values = x.detach().view(-1, k).index_select(1, columns).to(torch.float32)
            rest = values - a.index_select(1, columns).to(torch.float32) * (rows * _INVERSE_127)
    step = max(1, PIECE // max(1, a.shape[0]))
    for first in range(0, n, step):
        part = slice(first, first + step)
        sums = torch.empty((a.shape[0], weight[part].shape[0]), dtype=torch.int32, device=a.device)
        matmul_int32(a, weight[part], sums)
        values = sums.to(torch.float32).mul_(rows).mul_(scales[part]).mul_(_INVERSE_16129)
        if rest is not None and columns is not None:
            dense = _dequantized(weight[part].index_select(1, columns), scales[part])
            values += torch.mm(rest, dense.t(), out=torch.empty_like(values))
        if bias is not None:
            values += bias.detach()[part].to(torch.float32)
        result[:, part] = values


@torch.no_grad()
def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    col_stats: torch.Tensor,
    threshold: float,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write ``x @ W.T + bias``, rows of `x` quantized on the way."""
    k = weight.shape[1]
    _check_columns(k)
    flat = x.detach().view(-1, k)
    codes = torch.empty(flat.shape, dtype=torch.int8, device=x.device)
    row_stats = torch.empty(flat.shape[0], dtype=torch.float32, device=x.device)
    mask = torch.empty((k + 31) // 32, dtype=torch.int32, device=x.device) if threshold > 0 else None
    quantize_rows(flat, threshold, codes, row_stats, mask)
    matmul(flat, codes, row_stats, weight, col_stats, mask, bias, out)


def _dequantized(codes: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    return codes.to(torch.float32).mul_((stats * _INVERSE_127).unsqueeze(1))


class Weight:
    """A matrix in int8, of which parts are read."""

    def __init__(self, codes: torch.Tensor, stats: torch.Tensor) -> None:
        self.codes, self.stats = codes.view(-1, codes.shape[-1]), stats.detach().view(-1)

    @torch.no_grad()
    def write_panel(self, first_row: int, rows: int, first_column: int, columns: int, out: torch.Tensor) -> None:
        """Write a panel, row after row, to a flat tensor."""
        panel = out.detach()[: rows * columns].view(rows, columns)
        step = max(1, PIECE // max(1, columns))
        for first in range(0, rows, step):
            part = slice(first_row + first, first_row + min(rows, first + step))
            codes = self.codes[part, first_column : first_column + columns]
            panel[first : first + step] = _dequantized(codes, self.stats[part])
