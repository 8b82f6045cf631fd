"""4-bit codes: two a byte, the first in the high nibble; their block maxima, which may be codes themselves; parts."""

from __future__ import annotations

import torch

from fewbits._checks import NESTED_BLOCKSIZE, block_count
from fewbits.portable import blockwise
from fewbits.portable.blockwise import PIECE
from fewbits.portable.tables import named, of


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Return an even number of codes as bytes."""
    return (codes[0::2] << 4) | codes[1::2]


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Return the codes of bytes."""
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)


def as_bytes(codes: torch.Tensor) -> torch.Tensor:
    """Return codes held in any storage dtype as bytes."""
    return codes.detach().view(-1).view(torch.uint8)


@torch.no_grad()
def quantize(x: torch.Tensor, quant_type: str, blocksize: int, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    """Write the codes of `x`, two a byte, and the largest magnitude of each block."""
    flat, packed, absmax, code = x.detach().view(-1), as_bytes(codes), absmax.view(-1), named(quant_type, x.device)
    n = flat.numel()
    for first in range(0, n, PIECE):
        last = min(n, first + PIECE)
        t, maxima = blockwise.normalize(flat[first:last], blocksize)
        # Blocks are whole: what pads an odd tail is 0.0, as the definition wants it.
        even = last - first + (last - first) % 2
        packed[first // 2 : (last + 1) // 2] = pack(blockwise.encode(t[:even], code))
        absmax[first // blocksize : block_count(last, blocksize)] = maxima


@torch.no_grad()
def quantize_nested(
    x: torch.Tensor,
    quant_type: str,
    blocksize: int,
    codes: torch.Tensor,
    absmax_codes: torch.Tensor,
    nested_absmax: torch.Tensor,
    offset: torch.Tensor,
) -> None:
    """Write codes, and the block maxima, less their mean, in 8 bits."""
    maxima = torch.empty(absmax_codes.shape, dtype=torch.float32, device=x.device)
    quantize(x, quant_type, blocksize, codes, maxima)
    offset.fill_(exact_mean(maxima))
    blockwise.quantize(maxima - offset, named("dynamic", x.device), NESTED_BLOCKSIZE, absmax_codes, nested_absmax)


def exact_mean(values: torch.Tensor) -> float:
    """Return the mean of finite, non-negative float32 numbers; their sum is exact and then rounded to float64.

    On the CPU, in units of the smallest subnormal: numbers of one exponent have a sum that float64 holds.
    """
    total = 0
    for part in torch.split(values.cpu(), 1 << 28):
        bits = part.view(torch.int32)
        exponent, fraction = bits >> 23, bits & 0x7FFFFF
        significand = fraction + (exponent > 0) * 0x800000
        sums = torch.bincount(exponent.clamp_(min=1) - 1, weights=significand.double())
        total += sum(int(units) << position for position, units in enumerate(sums.tolist()))
    return total / 2**149 / max(1, values.numel())


@torch.no_grad()
def nested_maxima(
    codes: torch.Tensor, code: torch.Tensor | None, absmax: torch.Tensor, blocksize: int, offset: torch.Tensor
) -> torch.Tensor:
    """Return block maxima from their codes; product and sum are rounded one after the other."""
    flat = codes.view(-1)
    return blockwise.decode(flat, absmax.view(-1), of(code, flat.device).values, blocksize).add_(offset.view(()))


@torch.no_grad()
def dequantize(packed: torch.Tensor, maxima: torch.Tensor, quant_type: str, blocksize: int, out: torch.Tensor) -> None:
    """Write the values of codes, rounded once to the dtype of `out`."""
    flat = out.detach().view(-1)
    Weight(packed, maxima, quant_type, blocksize, (1, flat.numel())).write_run(0, flat)


class Weight:
    """A matrix in 4 bits, of which parts are read."""

    def __init__(
        self, codes: torch.Tensor, maxima: torch.Tensor, quant_type: str, blocksize: int, shape: tuple[int, int]
    ) -> None:
        self.packed, self.maxima = as_bytes(codes), maxima.detach().view(-1)
        self.values = named(quant_type, codes.device).values
        self.blocksize, self.shape = blocksize, shape
        self.index_dtype = torch.int32 if shape[0] * shape[1] < 2**31 else torch.int64

    def write_run(self, start: int, out: torch.Tensor) -> None:
        """Write consecutive elements from `start` on to a flat tensor."""
        for first in range(start, start + out.numel(), PIECE):
            last = min(start + out.numel(), first + PIECE)
            block = first // self.blocksize  # an even element
            low = block * self.blocksize
            codes = unpack(self.packed[low // 2 : (last + 1) // 2])[: last - low]
            maxima = self.maxima[block : block_count(last, self.blocksize)]
            values = blockwise.decode(codes, maxima, self.values, self.blocksize)
            out[first - start : last - start] = values[first - low :]

    def _gather(self, places: torch.Tensor) -> torch.Tensor:
        """Return the elements at any places, in float32."""
        flat = places.view(-1)
        pairs = self.packed.index_select(0, flat >> 1)
        codes = torch.where((flat & 1) == 0, pairs >> 4, pairs & 15)
        maxima = self.maxima.index_select(0, flat >> (self.blocksize.bit_length() - 1))
        return self.values.index_select(0, codes.to(torch.int32)).mul_(maxima).view(places.shape)

    def _places(self, rows: torch.Tensor, first_column: int, columns: int) -> torch.Tensor:
        within = torch.arange(first_column, first_column + columns, dtype=self.index_dtype, device=rows.device)
        return rows.to(self.index_dtype).unsqueeze(1) * self.shape[1] + within

    @torch.no_grad()
    def write_panel(self, first_row: int, rows: int, first_column: int, columns: int, out: torch.Tensor) -> None:
        """Write a panel, row after row, to a flat tensor."""
        if columns == self.shape[1]:
            self.write_run(first_row * columns, out[: rows * columns])
            return
        self._write_rows(
            torch.arange(first_row, first_row + rows, dtype=self.index_dtype, device=out.device),
            (first_column, columns),
            out[: rows * columns].view(rows, columns),
        )

    def _write_rows(self, rows: torch.Tensor, columns: tuple[int, int], out: torch.Tensor) -> None:
        step = max(1, PIECE // max(1, columns[1]))
        for first in range(0, rows.numel(), step):
            out[first : first + step] = self._gather(self._places(rows[first : first + step], *columns))

    @torch.no_grad()
    def write_rows(self, indices: torch.Tensor, out: torch.Tensor) -> None:
        """Write the rows that `indices` names.

        On the CPU an index that names none raises IndexError, before anything is written. Elsewhere nobody waits to see
        it: it gives a row of NaN.
        """
        n, k = self.shape
        flat, target = indices.view(-1), out.detach().view(indices.numel(), k)
        names_none = (flat < 0) | (flat >= n)
        if indices.device.type == "cpu" and bool(names_none.any()):
            place = int(names_none.int().argmax())
            raise IndexError(
                f"indices: got {int(flat[place])} at place {place}, expected 0 to {n - 1} for a weight of {n} rows"
            )
        if target.numel() and n:
            self._write_rows(flat.clamp(0, n - 1), (0, k), target)
        target.masked_fill_(names_none.unsqueeze(1), torch.nan)
