"""One weight to the tensors that a checkpoint stores, and the error of that."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import torch

from . import functional as F
from ._selection import BLOCKWISE8_STATE, Format

# Elements of a piece, where rows are quantized and the error is measured: 1 MB of float32, a multiple of every block
# size. Up to five such pieces live at once, so that a larger one would show beside a tensor of 16 MB.
CHUNK = 1 << 18
_DOT = 1 << 15


def quantize_int8_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix to int8 with one scale a row.

    ``codes = rint(x * (127 / max|row|))`` in float32 from the weight's own dtype, ties to even; NaN counts as 0 and
    infinities as the largest finite float32, as everywhere in fewbits.

    Parameters
    ----------
    weight : torch.Tensor
        ``(rows, columns)``, floating point.

    Returns
    -------
    codes : torch.Tensor
        int8, of the weight's shape.
    row_scale : torch.Tensor
        float32 ``(rows,)``, the largest magnitude of each row; the weight is about ``codes * row_scale / 127``.

    Raises
    ------
    ValueError
        If the weight is not a matrix of floats.

    Examples
    --------
    >>> codes, row_scale = quantize_int8_rows(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
    >>> codes.tolist(), row_scale.tolist()
    ([[64, -127], [0, 0]], [2.0, 0.0])
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight: got {weight.dtype} of shape {tuple(weight.shape)}, expected a matrix of floats")
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    row_scale = torch.zeros(rows, dtype=torch.float32, device=weight.device)
    if columns == 0:
        return codes, row_scale
    largest = torch.finfo(torch.float32).max
    step = max(1, CHUNK // columns)
    for begin in range(0, rows, step):
        x = torch.nan_to_num(weight[begin : begin + step].float(), nan=0.0, posinf=largest, neginf=-largest)
        scale = torch.maximum(x.amax(dim=1), -x.amin(dim=1)).abs()
        factor = torch.full_like(scale, 127.0).div_(scale)  # `127 / scale` rounds twice: a reciprocal, a product
        # Rows whose maximum lies below 127 / FLT_MAX have no finite factor; zero rows stay zero.
        small = torch.isinf(factor)
        divisor = scale.where(small & (scale > 0), 1.0)
        x.div_(divisor.unsqueeze(1)).mul_(factor.where(~small, 127.0).unsqueeze(1)).round_()
        codes[begin : begin + step] = x
        row_scale[begin : begin + step] = scale
    return codes, row_scale


def quantize_weight(
    name: str, weight: torch.Tensor, quant_format: Format, blocksize: int | None, double_quant: bool
) -> tuple[dict[str, torch.Tensor], Callable[[int, int], torch.Tensor]]:
    """Quantize one weight.

    Returns
    -------
    tensors : dict of str to torch.Tensor
        What the checkpoint stores.
    dequantize : callable
        ``(begin, end)`` to the float32 values of these elements; ``begin`` is a multiple of ``CHUNK``, except that
        ``int8rows`` takes any.
    """
    if quant_format == "int8rows" or blocksize is None:
        codes, row_scale = quantize_int8_rows(weight)
        columns = codes.shape[1]
        module = name.removesuffix("weight")
        tensors = {name: codes, f"{module}SCB": row_scale, f"{module}weight_format": torch.zeros((), dtype=torch.uint8)}

        def rows(begin: int, end: int) -> torch.Tensor:
            first, last = begin // columns, -(-end // columns)
            values = codes[first:last].float() * (row_scale[first:last] / 127).unsqueeze(1)
            return values.view(-1)[begin - first * columns : end - first * columns]

        return tensors, rows
    if quant_format == "blockwise8":
        codes, state = F.quantize_blockwise(weight, blocksize=blocksize)
        blob = {
            "quant_type": quant_format,
            "blocksize": blocksize,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "shape": list(weight.shape),
        }
        packed = torch.tensor(list(json.dumps(blob).encode()), dtype=torch.uint8)
        assert state.code is not None  # an 8-bit state has its table
        stats = {"absmax": state.absmax, "quant_map": state.code, BLOCKWISE8_STATE: packed}

        def blocks(begin: int, end: int) -> torch.Tensor:
            absmax = state.absmax[begin // blocksize : -(-end // blocksize)]
            part = F.QuantState(absmax, code=state.code, blocksize=blocksize, dtype=torch.float32)
            return F.dequantize_blockwise(codes.view(-1)[begin:end], part)

        return {name: codes} | {f"{name}.{k}": v for k, v in stats.items()}, blocks

    codes, state = F.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=double_quant, quant_type=quant_format
    )
    absmax = state.absmax
    if state.state2 is not None and state.offset is not None:
        absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset

    def nibbles(begin: int, end: int) -> torch.Tensor:
        part = F.QuantState(
            absmax[begin // blocksize : -(-end // blocksize)],
            shape=torch.Size((end - begin,)),
            code=state.code,
            blocksize=blocksize,
            quant_type=quant_format,
            dtype=torch.float32,
        )
        return F.dequantize_4bit(codes.view(-1)[begin // 2 : (end + 1) // 2].view(-1, 1), part)

    return {name: codes} | {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}, nibbles


def relative_error(weight: torch.Tensor, dequantize: Callable[[int, int], torch.Tensor]) -> float:
    """``||W - dequantized||_F / ||W||_F``, a piece at a time; NaN or infinite where W is not finite."""
    flat = weight.reshape(-1)
    difference = norm = 0.0
    for begin in range(0, flat.numel(), CHUNK):
        end = min(begin + CHUNK, flat.numel())
        x = flat[begin:end].float()
        norm += _sum_of_squares(x)
        difference += _sum_of_squares(x - dequantize(begin, end).view(-1))
    if norm == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return math.sqrt(difference / norm)


def _sum_of_squares(x: torch.Tensor) -> float:
    # Float32 dot products of short pieces are ten times as fast as a float64 norm and good to six digits, unless
    # squares leave the range of float32.
    pieces: tuple[torch.Tensor, ...] = torch.split(x, _DOT)
    total = math.fsum(float(torch.dot(piece, piece)) for piece in pieces)
    if 1e-25 < total < 1e35:
        return total
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
