"""Parts of quantized weights for tensor parallelism: rows or columns of the matrix, with not a value changed."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch

from fewbits.functional import dequantize_blockwise
from fewbits.quant_state import QuantState


class Split(NamedTuple):
    """Which part of a weight of shape (N, K) a module has: of the rows (dim 0) or of the columns (dim 1)."""

    mesh: Any
    dim: int
    shape: tuple[int, int]  # of the whole

    @property
    def rank(self) -> int:
        """The place of this process in the mesh."""
        rank: int = self.mesh.get_local_rank()
        return rank

    @property
    def world(self) -> int:
        """How many parts there are."""
        size: int = self.mesh.size()
        return size


SIZES = ("out_features", "in_features")


def check_split(
    shape: tuple[int, int], dim: int, world: int, blocksize: int | None, names: tuple[str, str] = SIZES
) -> None:
    """Raise unless a weight can be cut into so many equal parts without a change of values.

    Raises
    ------
    ValueError
        If a part would not be whole rows or columns, or, with a `blocksize`, not whole blocks.
    """
    n, k = shape
    what = names[dim]
    if shape[dim] % world:
        raise ValueError(f"{what}: expected a multiple of {world} ranks, got {shape[dim]}")
    if blocksize is None:
        return
    if dim == 0 and n // world * k % blocksize:
        raise ValueError(
            f"{what}: expected whole blocks of {blocksize} on each of {world} ranks, got {n // world} rows of {k}"
            ": a block that straddles ranks cannot be cut without quantizing it again"
        )
    if dim == 1 and k // world % blocksize:
        raise ValueError(
            f"{what}: expected whole blocks of {blocksize} in each row on each of {world} ranks, got {k // world} "
            "columns: a block that straddles ranks cannot be cut without quantizing it again"
        )


def split_4bit(
    codes: torch.Tensor, state: QuantState, dim: int, rank: int, world: int, names: tuple[str, str] = SIZES
) -> tuple[torch.Tensor, QuantState]:
    """Return the codes and the state of a part of a 4-bit weight.

    Parameters
    ----------
    codes : torch.Tensor
        Packed codes of a weight of shape ``state.shape``, (N, K), in any storage dtype.
    state : QuantState
        Their state.
    dim : int
        0: rows; 1: columns.
    rank, world : int
        Which of how many equal parts.
    names : tuple of str
        What errors call the two sizes.

    Returns
    -------
    codes : torch.Tensor
        Packed codes of the part, shape ``(k, 1)``, in the same storage dtype.
    state : QuantState
        Theirs. Where double quantization cannot be cut along, its block maxima are in float32, with the same values.

    Raises
    ------
    ValueError
        If blocks would straddle parts.
    """
    shape, blocksize = state.shape, state.blocksize
    if shape is None or blocksize is None or len(shape) != 2:
        raise ValueError(f"state.shape: expected two sizes (N, K), got {shape}")
    n, k = shape
    check_split((n, k), dim, world, blocksize, names)
    packed = codes.detach().contiguous().view(-1).view(torch.uint8)[: n * k // 2]
    part = copy.copy(state)
    per_rank = n * k // world
    if dim == 0:
        part.shape = torch.Size((n // world, k))
        mine = packed[rank * per_rank // 2 : (rank + 1) * per_rank // 2]
        blocks = slice(rank * per_rank // blocksize, (rank + 1) * per_rank // blocksize)
        nested = state.state2
        count = blocks.stop - blocks.start
        if nested is not None and nested.blocksize is not None and (world == 1 or count % nested.blocksize == 0):
            part.absmax, part.state2 = state.absmax[blocks].clone(), copy.copy(nested)
            first, last = blocks.start // nested.blocksize, -(-blocks.stop // nested.blocksize)
            part.state2.absmax = nested.absmax[first:last].clone()
        else:
            part.absmax = _maxima(part, state)[blocks].clone()
    else:
        part.shape = torch.Size((n, k // world))
        mine = packed.view(n, k // 2)[:, rank * k // world // 2 : (rank + 1) * k // world // 2]
        maxima = _maxima(part, state).view(n, k // blocksize)
        size = k // blocksize // world
        part.absmax = maxima[:, rank * size : (rank + 1) * size].contiguous().view(-1).clone()
    size = mine.numel()
    target = torch.zeros(
        -(-size // codes.element_size()) * codes.element_size(), dtype=torch.uint8, device=codes.device
    )
    target[:size] = mine.reshape(-1)
    return target.view(codes.dtype).view(-1, 1), part


def joined(split: Split, local: torch.Tensor, dim: int) -> Any:
    """Return the parts of all ranks as one distributed tensor, for state dicts."""
    from torch.distributed.tensor import DTensor, Shard

    with torch.no_grad():
        return DTensor.from_local(local.detach(), split.mesh, (Shard(dim),), run_check=False)


def part_of_bias(bias: torch.Tensor, split: Split) -> torch.Tensor:
    """Return what a rank adds: its part where outputs are cut, and where they are added up all of it or nothing."""
    if split.dim == 0:
        return bias.chunk(split.world)[split.rank].clone()
    return bias.clone() if split.rank == 0 else torch.zeros_like(bias)


def _maxima(part: QuantState, state: QuantState) -> torch.Tensor:
    """Return block maxima in float32; `part` has no double quantization any more."""
    if state.state2 is None:
        return state.absmax
    assert isinstance(state.offset, torch.Tensor)
    part.state2, part.offset, part.nested = None, None, False
    return dequantize_blockwise(state.absmax, state.state2) + state.offset


def split_8bit(
    codes: torch.Tensor, scales: torch.Tensor, dim: int, rank: int, world: int, names: tuple[str, str] = SIZES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes and the row scales of a part of an int8 weight; columns keep the scales of their whole rows."""
    check_split((codes.shape[0], codes.shape[1]), dim, world, None, names)
    part = codes.detach().chunk(world, dim)[rank].contiguous().clone()
    return part, (scales.chunk(world)[rank] if dim == 0 else scales).clone()
