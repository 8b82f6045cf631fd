"""Sharded parameters for the tests of optimizers, beside whole ones with the same values."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from optimizers import normal

# Whole blocks of 256 a row, rows that three ranks cannot share evenly, fewer rows than ranks, blocks that straddle.
ALIGNED = [(64, 256), (33, 256), (3, 2048)]
SMALL = [(300,), (7, 5)]
STRADDLING = [(50, 100), (5001,)]
SHAPES = [*ALIGNED, *SMALL, *STRADDLING]


def mesh_of(device: torch.device) -> DeviceMesh:
    return init_device_mesh(device.type, (torch.distributed.get_world_size(),))


def whole(device: torch.device, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(normal(shape, i, dtype).to(device)) for i, shape in enumerate(SHAPES)]


def sharded(mesh: DeviceMesh, params: list[Any]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in params]


def share_gradients(params: list[Any], others: list[Any]) -> None:
    """Give sharded (or replicated) parameters the gradients of whole ones."""
    for p, q in zip(params, others, strict=True):
        grad = q.grad.clone()
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad


def part(tensor: torch.Tensor, p: Any) -> torch.Tensor:
    """What this rank has of a whole tensor, if it is laid out as `p` is."""
    return (
        distribute_tensor(tensor.detach(), p.device_mesh, p.placements).to_local() if isinstance(p, DTensor) else tensor
    )


def replicated(mesh: DeviceMesh, p: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Replicate()]))
