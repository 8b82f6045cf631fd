"""Parts of a quantized weight, dequantized: panels for a product, rows for an embedding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from fewbits import _native
from fewbits._backend import PORTABLE, is_portable
from fewbits._checks import DTYPES, QUANT_TYPES, check_rows
from fewbits._launch import as_float32, code_address, dense, target_queue
from fewbits.portable import fourbit

# Bytes of a panel. On the GPU enough that a product fills it, and never a full-size copy of a large head; on the CPU
# what stays in the cache between its dequantization and its use. Elsewhere nobody has measured.
PANEL_BYTES = {"cuda": 64 << 20, "cpu": 4 << 20}
_OTHER_PANEL_BYTES = 16 << 20
# A panel's size is a multiple of this where it can be: matrix kernels work in such tiles, and vectors stay aligned.
_TILE = 64

Native4bit = tuple[int, int, int, int, int, int, int, int, int, int]


class Bound(NamedTuple):
    """A weight as native calls take it, or a `Weight` of `fewbits.portable`, which has no kernel."""

    native: Any  # arguments; of 4 bits: codes, n, k, blocksize, quant_type, absmax and its nested parts
    shape: tuple[int, int]
    alive: tuple[torch.Tensor | None, ...]  # whose addresses these are
    kernel: str = "dequantize_4bit_panel"


def bind(
    B: torch.Tensor,
    absmax: torch.Tensor,
    nested_code: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    nested_blocksize: int,
    offset: torch.Tensor | None,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
) -> Bound:
    """Return the addresses and sizes of a weight whose parts have been checked."""
    n, k = shape
    codes, number = dense(B), QUANT_TYPES[quant_type]
    if is_portable(absmax.device):  # of a plain tensor: a parameter takes a microsecond to answer
        if nested_absmax is None or offset is None:
            maxima = as_float32(absmax)
        else:
            nested, mean = as_float32(nested_absmax), as_float32(offset)
            maxima = fourbit.nested_maxima(dense(absmax), nested_code, nested, nested_blocksize, mean)
        return Bound(fourbit.Weight(codes, maxima, quant_type, blocksize, (n, k)), (n, k), (), "")
    if nested_absmax is None or offset is None:
        maxima = as_float32(absmax)
        native = (codes.data_ptr(), n, k, blocksize, number, maxima.data_ptr(), 0, 0, 0, 0)
        return Bound(native, (n, k), (codes, maxima))
    maxima, nested, mean = dense(absmax), as_float32(nested_absmax), as_float32(offset)
    address, code = code_address(nested_code)
    nested_native = (maxima.data_ptr(), address, nested.data_ptr(), nested_blocksize, mean.data_ptr())
    native = (codes.data_ptr(), n, k, blocksize, number, *nested_native)
    return Bound(native, (n, k), (codes, maxima, nested, mean, code))


def panel_size(shape: tuple[int, int], dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many rows (`dim` 0) or columns (1) of a weight of `shape` a panel has."""
    size, other = shape[dim], shape[1 - dim]
    # A dtype that no kernel writes is converted from float32, which then lies beside it.
    itemsize = dtype.itemsize + (0 if dtype in DTYPES else 4)
    limit = max(1, PANEL_BYTES.get(device.type, _OTHER_PANEL_BYTES) // (other * itemsize))
    if limit >= size:
        return size
    tile = _TILE if limit >= _TILE else 1
    limit = limit // tile * tile
    panels = (size + limit - 1) // limit
    even = (size + panels - 1) // panels  # as many panels, but none that is a mere rest
    return (even + tile - 1) // tile * tile


def panels(
    weight: Bound, dim: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (first, count, values) for panels of rows (`dim` 0) or columns (1), each in the memory of the last."""
    n, k = weight.shape
    step = panel_size(weight.shape, dim, dtype, device)
    written = dtype if dtype in DTYPES else torch.float32
    dequantize = getattr(_native, weight.kernel) if weight.kernel else None
    memory = torch.empty(step * weight.shape[1 - dim], dtype=written, device=device)
    for first in range(0, weight.shape[dim], step):
        count = min(step, weight.shape[dim] - first)
        rows, columns = (count, k) if dim == 0 else (n, count)
        place = (first, rows, 0, k) if dim == 0 else (0, n, first, columns)
        if dequantize is None:
            weight.native.write_panel(*place, memory)
        else:
            dequantize(*weight.native, *place, memory.data_ptr(), DTYPES[written], *target_queue(device))
        panel = (memory if count == step else memory[: rows * columns]).view(rows, columns)
        yield first, count, panel if written is dtype else panel.to(dtype)


def multiply_panels(weight: Bound, x: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """Write ``x @ W.T + bias`` to `y`, panel after panel of rows of `W`, each into its columns."""
    n = weight.shape[0]
    for first, count, panel in panels(weight, 0, x.dtype, x.device):
        columns = y if count == n else y.narrow(1, first, count)
        if bias is None:
            torch.mm(x, panel.t(), out=columns)
        else:
            torch.addmm(bias if count == n else bias.narrow(0, first, count), x, panel.t(), out=columns)


def multiply_panels_transposed(weight: Bound, g: torch.Tensor, y: torch.Tensor) -> None:
    """Write ``g @ W`` to `y`, panel after panel of columns of `W`: no sum is rounded between two panels."""
    for first, count, panel in panels(weight, 1, g.dtype, g.device):
        torch.mm(g, panel, out=y if count == weight.shape[1] else y.narrow(1, first, count))


def dequantize_4bit_rows(
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
    """Return ``W[indices]`` in `dtype`, shape ``(*indices.shape, K)``, for the `W` of `shape` ``(N, K)``.

    An index that names no row raises IndexError on the CPU, before anything is written. Elsewhere nobody waits to see
    it: it gives a row of NaN.
    """
    parts = (B, absmax, nested_code, nested_absmax, nested_blocksize, offset, blocksize, quant_type, shape)
    check_rows(indices, *parts, dtype)
    k = shape[1]
    values = torch.empty((*indices.shape, k), dtype=dtype, device=indices.device)
    if indices.numel():
        weight, rows = bind(*parts), dense(indices)
        ordinal, queue = target_queue(indices.device)
        if ordinal == PORTABLE:
            weight.native.write_rows(rows, values)
            return values
        native: Native4bit = weight.native
        where = (rows.data_ptr(), rows.dtype == torch.int64, rows.numel(), values.data_ptr())
        _native.dequantize_4bit_rows(*native, *where, DTYPES[dtype], ordinal, queue)
    return values
