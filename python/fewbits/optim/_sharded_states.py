"""States of distributed parameters in state dicts: distributed tensors, which checkpoints can cut otherwise.

In memory a state is a plain tensor, the shard's. In a state dict it is a `DTensor` laid out as its parameter is:

    state1          the codes, or the values of a 32-bit state, in the shape of the parameter
    absmax1         the maxima of its blocks, (rows, columns / 256), where every row is whole blocks
    state1_values   float32, in the place of both, where blocks do not end where rows do

The first form is exact for any number of ranks, because a shard of rows is whole blocks. The second is exact as long
as blocks stay what they are: the lowest code, below which a block's maximum can lie, stands for the maximum itself, so
that quantizing again gives the same bytes. With other shards, blocks are quantized anew.

FSDP1 gathers what has the shape of its flat parameters, in one dtype: there all states are float32 values, under the
names of 32-bit states, and those of parameters with 8-bit states are quantized again when they are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from fewbits._checks import block_count
from fewbits.codebook import TABLES, shared_table
from fewbits.functional import dequantize_blockwise, quantize_blockwise
from fewbits.optim import _distributed, _states
from fewbits.optim._paged_states import local

VALUES = {"state1_values": "state1", "state2_values": "state2"}
_PLANES = ("state1", "state2", "state3")
_AVERAGES = ("state1_fast", "state1_slow")  # the two of AdEMAMix


def exported(family: str, p: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a distributed parameter for a state dict. Tensors share memory where their form allows it."""
    result = {key: value for key, value in state.items() if key not in (*_PLANES, "absmax1", "absmax2")}
    in_rows = has_whole_rows(p)
    for name in _PLANES:
        if name not in state:
            continue
        halves = _halves(family, name)
        plane = state[name]
        if plane.dtype != torch.uint8:
            result[name] = _wrap(plane, p, p.shape, halves)
            continue
        maxima = state[_states.maxima_name(name)]
        if in_rows:
            shape = _grid(p.shape)
            grid = maxima.reshape(*([2] if halves == 2 else []), *_grid(local(p).shape))
            result[name] = _wrap(plane, p, p.shape, halves)
            result[_states.maxima_name(name)] = _wrap(grid, p, shape, halves)
        else:
            result[f"{name}_values"] = _wrap(decode(name, plane, maxima, halves), p, p.shape, halves)
    return result


def flattened(family: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a parameter that FSDP1 has flattened for a state dict."""
    result = {key: value for key, value in state.items() if key not in _states.QUANT_KEYS}
    for name in _PLANES:
        if name not in state:
            continue
        plane, halves = state[name], _halves(family, name)
        if plane.dtype == torch.uint8:
            plane = decode(name, plane, state[_states.maxima_name(name)], halves)
        if halves == 2:
            result.update(zip(_AVERAGES, plane, strict=True))
        else:
            result[name] = plane
    return result


def unflattened(family: str, given: Mapping[str, Any], bits: int) -> dict[str, Any]:
    """Return what `flattened` returned as states of so many bits."""
    flat = dict(given)
    if all(name in flat for name in _AVERAGES):
        flat["state1"] = torch.stack([flat.pop(name) for name in _AVERAGES])
    for name in _PLANES:
        plane = flat.get(name)
        if bits == 8 and isinstance(plane, torch.Tensor) and plane.is_floating_point():
            flat[name], flat[_states.maxima_name(name)] = encode(name, plane.float(), _halves(family, name))
            flat[_states.map_name(name)] = shared_table(_states.MAPS[_states.map_name(name)], plane.device)
    return flat


def imported(where: str, family: str, p: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a state dict holds as plain tensors of this process's part of a parameter.

    Takes what `exported` returned, on any number of ranks, or gathered; and states of whole parameters.

    Raises
    ------
    ValueError
        If a distributed tensor lies on another mesh, or shapes are neither those of the whole nor of the shard.
    """
    flat = {key: value for key, value in given.items() if key not in VALUES}
    for key, name in VALUES.items():
        if key in given:
            halves = _halves(family, name)
            values = _part(f"{where}[{key!r}]", given[key], p, halves)
            flat[name], flat[_states.maxima_name(name)] = encode(name, values.float(), halves)
            flat[_states.map_name(name)] = shared_table(_states.MAPS[_states.map_name(name)], values.device)
    for name in _PLANES:
        plane = flat.get(name)
        if not isinstance(plane, torch.Tensor) or f"{name}_values" in given:
            continue
        halves, key = _halves(family, name), _states.maxima_name(name)
        maxima = flat.get(key)
        if plane.dtype != torch.uint8 or not isinstance(maxima, torch.Tensor):
            flat[name] = _part(f"{where}[{name!r}]", plane, p, halves)
        elif _distributed.is_distributed(plane) or not _is_whole(plane, p, halves):
            flat[name] = _part(f"{where}[{name!r}]", plane, p, halves)
            if _distributed.is_distributed(maxima):
                maxima = _part(f"{where}[{key!r}]", maxima, p, halves)
            flat[key] = _flat_maxima(maxima, halves)
        else:
            flat[name], flat[key] = _cut(f"{where}[{name!r}]", name, plane, _flat_maxima(maxima, halves), p, halves)
        map_key = _states.map_name(name)
        if flat[name].dtype == torch.uint8 and map_key in _states.MAPS:
            flat.setdefault(map_key, shared_table(_states.MAPS[map_key], flat[name].device))
    return flat


def has_whole_rows(p: Any) -> bool:
    """Return whether the blocks of a shard are those of its rows, and every rank has whole ones."""
    if len(p.shape) < 2 or prod(p.shape[1:]) % _states.BLOCKSIZE:
        return False
    columns = [i for i in _distributed.sharded_dims(p) if p.placements[i].dim != 0]
    if not columns:
        return True
    cuts = prod(p.device_mesh.size(i) for i in columns)
    return len(p.shape) == 2 and p.shape[1] % (cuts * _states.BLOCKSIZE) == 0


def decode(name: str, codes: torch.Tensor, maxima: torch.Tensor, halves: int) -> torch.Tensor:
    """Return float32 values that `encode` turns into the same codes."""
    table = torch.tensor(TABLES[_states.MAPS[_states.map_name(name)]], device=codes.device)
    if table[0] < 0:
        table[0] = -1.0
    planes = [
        dequantize_blockwise(plane, absmax=absmax, code=table, blocksize=_states.BLOCKSIZE)
        for plane, absmax in zip(
            codes.reshape(halves, -1), maxima.reshape(halves, -1).to(codes.device).float(), strict=True
        )
    ]
    return torch.stack(planes).view(codes.shape)


def encode(name: str, values: torch.Tensor, halves: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and block maxima."""
    table = shared_table(_states.MAPS[_states.map_name(name)], values.device)
    planes, maxima = [], []
    for half in values.reshape(halves, -1):
        codes, state = quantize_blockwise(half.contiguous(), code=table, blocksize=_states.BLOCKSIZE)
        planes.append(codes)
        maxima.append(state.absmax)
    absmax = torch.stack(maxima)
    return torch.stack(planes).view(values.shape), absmax if halves == 2 else absmax.view(-1)


def _halves(family: str, name: str) -> int:
    return 2 if family == "ademamix" and name == "state1" else 1


def _grid(shape: Any) -> tuple[int, int]:
    return shape[0], prod(shape[1:]) // _states.BLOCKSIZE


def _flat_maxima(maxima: torch.Tensor, halves: int) -> torch.Tensor:
    return maxima.reshape(2, -1) if halves == 2 else maxima.reshape(-1)


def _placements(p: Any, halves: int) -> Any:
    """Return the placements of a state, which may have a dimension before those of its parameter."""
    if halves == 1:
        return p.placements
    if any(type(placement).__name__ == "_StridedShard" for placement in p.placements):
        raise ValueError(f"params: expected shards that are ranges for this optimizer, got placements {p.placements}")
    return tuple(type(q)(q.dim + 1) if hasattr(q, "dim") else q for q in p.placements)


def _wrap(shard: torch.Tensor, p: Any, shape: Any, halves: int) -> torch.Tensor:
    """Return a distributed tensor of shards that lie as those of `p` do."""
    whole = torch.Size((2, *shape) if halves == 2 else shape)
    strides = [prod(whole[i + 1 :]) for i in range(len(whole))]
    whole_tensor: torch.Tensor = type(p.data).from_local(
        shard, p.device_mesh, _placements(p, halves), run_check=False, shape=whole, stride=tuple(strides)
    )
    return whole_tensor


def _is_whole(tensor: torch.Tensor, p: Any, halves: int) -> bool:
    return _distributed.is_distributed(p) and tensor.numel() == halves * p.numel() and p.numel() != local(p).numel()


def _part(where: str, tensor: Any, p: Any, halves: int) -> torch.Tensor:
    """Return this process's part of a state in the shape of its parameter."""
    if _distributed.is_distributed(tensor):
        shard: torch.Tensor
        if not _distributed.is_distributed(p):
            shard = tensor.full_tensor()
            return shard
        if tensor.device_mesh != p.device_mesh:
            raise ValueError(f"{where}: expected a tensor on the mesh of its parameter, got one on another")
        placements = _placements(p, halves)
        if tuple(tensor.placements) != tuple(placements):
            tensor = tensor.redistribute(placements=placements)
        shard = local(tensor)
        return shard
    if not _is_whole(tensor, p, halves):
        shard = tensor
        return shard
    return _slice(where, tensor.reshape((2, *p.shape) if halves == 2 else p.shape), p, halves)


def _slice(where: str, whole: torch.Tensor, p: Any, halves: int) -> torch.Tensor:
    if any(type(placement).__name__ == "_StridedShard" for placement in p.placements):
        raise ValueError(f"{where}: expected a distributed tensor for placements {p.placements}, got a whole one")
    sizes, offsets = _distributed.bounds(p.shape, p)
    shard = whole
    for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        shard = shard.narrow(dim + halves - 1, min(offset, whole.shape[dim + halves - 1]) if size else 0, size)
    return shard.contiguous()


def _cut(
    where: str, name: str, codes: torch.Tensor, maxima: torch.Tensor, p: Any, halves: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this process's part of the 8-bit state of a whole parameter."""
    if maxima.numel() != halves * block_count(p.numel(), _states.BLOCKSIZE):
        raise ValueError(
            f"{where}: expected {halves * block_count(p.numel(), _states.BLOCKSIZE)} block maxima beside it, "
            f"got {maxima.numel()}"
        )
    return encode(name, _part(where, decode(name, codes, maxima, halves), p, halves), halves)
