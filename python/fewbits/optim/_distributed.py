"""Parameters of which this process has a shard: its gradient, its place in the whole, and sums over all shards.

A shard is stepped like any other tensor: blocks of 8-bit states are those of the shard. Where norms are asked for, the
sums of squares of each tensor are added up over the processes among which it is sharded; nothing else is communicated.
Whoever is not distributed never comes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from fewbits.optim._states import BLOCKSIZE

# The dimensions of a mesh over which a tensor is sharded, by the names of their process groups. Empty: it is whole.
Groups = tuple[str, ...]


def is_distributed(tensor: Any) -> bool:
    return hasattr(tensor, "_local_tensor")


def is_flattened(p: Any) -> bool:
    """Return whether a parameter is, or is a view of, the flat parameter of an FSDP1 module."""
    return bool(getattr(p, "_fsdp_flattened", False))


def whole_numel(p: Any) -> int:
    """Return how many elements a parameter has on all ranks together.

    A view that FSDP1 makes with ``use_orig_params=True`` does not know: that is its own number.
    """
    size = getattr(p, "_unpadded_unsharded_size", None)
    return int(p.numel() if size is None else size.numel())


def sharded_dims(p: Any) -> list[int]:
    """Return the dimensions of the mesh of a distributed tensor over which it is sharded."""
    return [i for i, placement in enumerate(p.placements) if hasattr(placement, "dim")]


def groups_of(p: Any) -> Groups:
    if not is_distributed(p):
        return ()
    return tuple(p.device_mesh.get_group(dim).group_name for dim in sharded_dims(p))


def local_gradient(p: Any, grad: Any) -> Any:
    """Return this process's part of a gradient, laid out as the parameter is."""
    if not is_distributed(grad):
        return grad
    if is_distributed(p) and grad.placements != p.placements:  # such as partial sums, of replicated parameters
        grad = grad.redistribute(placements=p.placements)
    shard = grad._local_tensor
    return shard.wait() if hasattr(shard, "wait") else shard  # a collective may be under way


def check_placement(where: str, p: Any) -> None:
    """Raise unless a distributed parameter is whole or in shards."""
    if any(placement.is_partial() for placement in p.placements):
        raise ValueError(f"{where}: expected a parameter in shards or replicated, got placements {p.placements}")


def bounds(shape: Sequence[int], p: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape and the offsets of this process's part of a tensor laid out as `p` is."""
    try:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as compute
    except ImportError:  # torch < 2.5
        from torch.distributed._tensor._utils import (  # type: ignore[import-not-found, no-redef, unused-ignore]
            compute_local_shape_and_global_offset as compute,
        )
    size, offsets = compute(torch.Size(shape), p.device_mesh, p.placements)
    return tuple(size), tuple(offsets)


def first_element(p: Any) -> int:
    """Return where a shard begins in the flattened parameter, to a whole block: stochastic rounding counts from there.

    0 where a shard is no range of the flattened parameter.
    """
    if not is_distributed(p) or any(getattr(placement, "dim", 0) != 0 for placement in p.placements):
        return 0
    if any(type(placement).__name__ == "_StridedShard" for placement in p.placements):
        return 0
    _, offsets = bounds(p.shape, p)
    first: int = int(offsets[0]) * prod(p.shape[1:])
    return first // BLOCKSIZE * BLOCKSIZE


class Reducer:
    """Adds up sums over the ranks that have the other shards.

    Every process of a mesh has the same parameters in the same order, hence the same groups in the same order.
    """

    def __init__(self, owners: Sequence[Any]) -> None:
        self.keys: list[Groups] = list(dict.fromkeys(map(groups_of, owners)))
        self.number = {key: i for i, key in enumerate(self.keys)}
        self.owners = {key: p for p in owners if (key := groups_of(p))}
        self.number_of = [self.number[groups_of(p)] for p in owners]

    def all_reduce(self, sums: torch.Tensor, number: int) -> torch.Tensor:
        """Return sums over the shards of the tensors of one kind, on the device that they came from."""
        key = self.keys[number]
        if not key:
            return sums
        mesh = self.owners[key].device_mesh
        device = torch.device(mesh.device_type)
        if sums.device.type == device.type:
            device = sums.device
        elif device.type != "cpu":
            device = torch.device(device.type, torch.get_device_module(device).current_device())
        result = sums.to(device, copy=True)
        for dim in sharded_dims(self.owners[key]):
            torch.distributed.all_reduce(result, group=mesh.get_group(dim))
        return result.to(sums.device)

    def reduce_rows(self, rows: torch.Tensor, owners: Sequence[int]) -> torch.Tensor:
        """Return rows of sums, one a tensor, over all shards of each; `owners`: which parameter each row is of."""
        result = rows.clone()
        for number in range(len(self.keys)):
            mine = [i for i, owner in enumerate(owners) if self.number_of[owner] == number]
            if mine:
                index = torch.tensor(mine, device=rows.device)
                result[index] = self.all_reduce(rows[index], number)
        return result

    def reduce_total(self, parts: Sequence[tuple[torch.Tensor, Sequence[int]]], home: torch.device) -> torch.Tensor:
        """Return sums, one a kind of sharding, of the rows of all devices."""
        totals = torch.zeros(len(self.keys), dtype=torch.float64, device=home)
        for rows, owners in parts:
            for number in range(len(self.keys)):
                mine = [i for i, owner in enumerate(owners) if self.number_of[owner] == number]
                if mine:
                    totals[number] += rows[torch.tensor(mine, device=rows.device)].sum().to(home)
        return torch.cat([self.all_reduce(totals[i : i + 1], i) for i in range(len(self.keys))])


def sums_of_rows(partials: torch.Tensor, tiles: Sequence[int]) -> torch.Tensor:
    """Return the sums of the tiles of each tensor; `tiles`: how many each has."""
    lengths = torch.tensor(tiles, dtype=torch.int64, device=partials.device)
    if not partials.shape[0]:
        return partials.new_zeros(len(tiles), *partials.shape[1:])
    return torch.segment_reduce(partials, "sum", lengths=lengths, axis=0, initial=0.0)
