"""Blocks of numbers to codes and back."""

from __future__ import annotations

import torch

from fewbits._checks import block_count
from fewbits.portable.tables import Code

# Elements of a piece: a multiple of every block size and of an optimizer's tiles, with which temporary memory stays
# below a hundred megabytes.
PIECE = 1 << 21

_LARGEST = torch.finfo(torch.float32).max


def normalize(x: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a flat tensor, scaled to [-1, 1] block by block, in whole blocks, and the largest magnitudes."""
    n, blocks = x.numel(), block_count(x.numel(), blocksize)
    values = torch.nan_to_num(x.to(torch.float32), nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)
    if n != blocks * blocksize:
        values = torch.cat([values, values.new_zeros(blocks * blocksize - n)])
    values = values.view(blocks, blocksize)
    absmax = values.abs().amax(dim=1)
    inverse = torch.ones_like(absmax).div_(absmax)
    # Blocks whose reciprocal overflows divide; blocks of zeros stay zeros.
    divides = torch.isinf(inverse)
    zero = absmax == 0
    factor = inverse.masked_fill_(divides, 1.0).masked_fill_(zero, 0.0)
    divisor = absmax.masked_fill(~divides | zero, 1.0)
    return (values * factor.unsqueeze(1)).div_(divisor.unsqueeze(1)).view(-1), absmax


def encode(t: torch.Tensor, code: Code) -> torch.Tensor:
    """Return the code of the value nearest to each `t`, uint8; a tie takes the lower one."""
    rank = torch.bucketize(t, code.thresholds, out_int32=True)
    if code.signed_zero:
        rank += t >= 0
    return rank.to(torch.uint8) if code.order is None else code.order.index_select(0, rank)


def decode(codes: torch.Tensor, absmax: torch.Tensor, values: torch.Tensor, blocksize: int) -> torch.Tensor:
    """Return ``values[codes] * absmax`` of flat codes, in float32."""
    n = codes.numel()
    looked_up = values.index_select(0, codes.to(torch.int32))
    whole = n // blocksize * blocksize
    looked_up[:whole].view(-1, blocksize).mul_(absmax[: n // blocksize].unsqueeze(1))
    if n > whole:
        looked_up[whole:].mul_(absmax[n // blocksize])
    return looked_up


@torch.no_grad()
def quantize(x: torch.Tensor, code: Code, blocksize: int, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    """Write the codes of `x` and the largest magnitude of each block."""
    flat, codes, absmax = x.detach().view(-1), codes.view(-1), absmax.view(-1)
    n = flat.numel()
    for first in range(0, n, PIECE):
        last = min(n, first + PIECE)
        t, maxima = normalize(flat[first:last], blocksize)
        codes[first:last] = encode(t[: last - first], code)
        absmax[first // blocksize : block_count(last, blocksize)] = maxima


@torch.no_grad()
def dequantize(
    codes: torch.Tensor, absmax: torch.Tensor, values: torch.Tensor, blocksize: int, out: torch.Tensor
) -> None:
    """Write ``values[codes] * absmax``, rounded once to the dtype of `out`."""
    flat, absmax, out = codes.view(-1), absmax.detach().view(-1), out.detach().view(-1)
    n = flat.numel()
    for first in range(0, n, PIECE):
        last = min(n, first + PIECE)
        maxima = absmax[first // blocksize : block_count(last, blocksize)]
        out[first:last] = decode(flat[first:last], maxima, values, blocksize)
