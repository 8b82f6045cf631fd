"""Shards of quantized weights: what FSDP2 (`torch.distributed.fsdp.fully_shard`) keeps, gathers and gives to layers.

``fully_shard`` cuts a parameter with ``torch.chunk``, makes zeros for this rank's piece with ``new_zeros`` and copies
the piece there. Quantized parameters answer these calls: what comes out is a `Shard`, a tensor of this rank's codes
that has its part of the scales with it. Both are gathered together, as bytes, whatever dtype they are held under and
whatever a mixed-precision policy says. The gathered parameter is a quantized one again, with the scales of all ranks.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import torch

_keep = torch.ops.aten
# Operations whose result is the same shard, or this rank's part of it; all others see a plain tensor of codes.
_KEEPING = {
    *(_keep.detach.default, _keep.alias.default, _keep.clone.default, _keep.slice.Tensor, _keep._pin_memory.default),
    _keep._to_copy.default,
}


# FSDP2 of older torch makes a parameter that wants a gradient before it makes one that does not, which integers cannot
# be: there, a shard of bytes goes by the name of another dtype of one byte. Nothing computes with it.
_NAME = torch.float8_e4m3fn if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13) else None


class Recipe:
    """What it takes to make the whole of all ranks' shards.

    Parameters
    ----------
    parameter : QuantizedParameter
        The whole.
    scales : torch.Tensor
        One for each block, or row, of it; until `cut`, which keeps this rank's part.
    """

    def __init__(self, parameter: Any, scales: torch.Tensor) -> None:
        self.size, self.dtype = parameter.shape, parameter.dtype
        self.scales, self.total = scales, scales.numel()
        self.count: int | None = None  # of this rank's scales; the rest is padding
        self.modules: list[weakref.ref[Any]] = []
        self.prepared: Any = None  # of the gathered parameter, where it lay last

    def cut(self, rank: int, world: int) -> None:
        """Keep the scales of one rank: as many on each, as `torch.chunk` deals them out."""
        if self.count is not None:
            return
        size = -(-self.total // world)
        part = self.scales.reshape(-1)[min(rank * size, self.total) : (rank + 1) * size]
        self.scales = part.new_zeros(size)
        self.count = part.numel()
        self.scales[: self.count] = part
        for reference in self.modules:
            if (module := reference()) is not None:
                module._forget_scales()

    def moved(self, scales: torch.Tensor) -> Recipe:
        """Return the same with the scales elsewhere."""
        other: Recipe = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.scales = scales
        return other

    def own_scales(self) -> torch.Tensor:
        """Return this rank's scales without padding."""
        return self.scales[: self.count]

    def whole(self, codes: torch.Tensor, scales: torch.Tensor) -> Any:
        """Return the parameter that lies in gathered memory."""
        raise NotImplementedError

    def scales_of(self, parameter: Any) -> torch.Tensor:
        """Return the scales of a gathered parameter."""
        raise NotImplementedError

    def refresh(self, parameter: Any) -> None:
        """Prepare a parameter whose memory has been gathered again: but for addresses it is what it was."""
        prepared = None if self.prepared is None else self.elsewhere(parameter)
        parameter.prepared = self.prepared = self.prepare(parameter) if prepared is None else prepared

    def prepare(self, parameter: Any) -> Any:
        """Return what products need of a gathered parameter."""
        raise NotImplementedError

    def elsewhere(self, parameter: Any) -> Any:
        """Return what was prepared before for where the parameter is now, or None if that will not do."""
        raise NotImplementedError


class Shard(torch.Tensor):
    """The codes of a quantized weight that one rank has, with a `Recipe`. But for FSDP2 it is a tensor of codes."""

    recipe: Recipe
    inputs: tuple[int, torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None = None  # gathered last, from where
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, codes: torch.Tensor, recipe: Recipe) -> Shard:  # noqa: D102
        if _NAME is not None and not codes.is_floating_point():
            codes = codes.view(_NAME)
        self: Shard = torch.Tensor._make_subclass(cls, codes)
        self.recipe = recipe
        return self

    def __init__(self, codes: torch.Tensor, recipe: Recipe) -> None: ...

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        source = args[0] if args else None
        if func is _keep.copy_.default:
            return _fill(source, *args[1:], **kwargs)
        with torch._C._DisableTorchDispatch():
            result = func(*args, **kwargs)
        if isinstance(source, Shard) and func in _KEEPING and result.dtype == source.dtype:
            recipe, scales = source.recipe, source.recipe.scales
            if func is _keep._pin_memory.default:
                recipe = recipe.moved(scales.pin_memory())
            elif result.device != source.device:
                recipe = recipe.moved(scales.to(result.device, non_blocking=bool(kwargs.get("non_blocking"))))
            return Shard(result, recipe)
        if isinstance(source, Shard) and func is _keep.new_zeros.default and result.dim() == source.dim():
            return Shard(result, source.recipe)  # older torch pads with it
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Shard:
        if id(self) not in memo:
            memo[id(self)] = Shard(plain(self).clone(), self.recipe.moved(self.recipe.scales.clone()))
        copy: Shard = memo[id(self)]
        return copy

    # ---- what FSDP2 calls; the form with the mesh alone, which allows inputs of any size -----------------------------

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[torch.Tensor, ...], Any]:
        """Return what is gathered: this rank's codes and scales, padded to the size that they have on the first."""
        recipe, known = self.recipe, self.inputs
        if known is not None and known[0] == self.data_ptr() and known[1] is recipe.scales:
            return known[2], None
        world = mesh.size()
        recipe.cut(mesh.get_local_rank(), world)
        size = torch.Size((-(-recipe.size[0] // world), *recipe.size[1:]))
        codes, kept = _padded(plain(self), size)
        inputs = codes.view(torch.uint8).view(-1), recipe.scales
        self.inputs = (self.data_ptr(), recipe.scales, inputs) if kept else None
        return inputs, None

    def fsdp_post_all_gather(
        self, outputs: tuple[torch.Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Any = None
    ) -> Any:
        """Return the whole parameter in the memory that was gathered into. `param_dtype` is for values, not codes."""
        recipe, alone = self.recipe, len(outputs) == 1  # a single rank gathers nothing but the first input
        if out is None:
            codes = outputs[0].view(-1).view(recipe.dtype)[: recipe.size.numel()].view(recipe.size)
            scales = torch.empty_like(recipe.scales, device=codes.device) if alone else outputs[1]
            out = recipe.whole(codes, scales.view(-1)[: recipe.total])
            result = out, ()
        else:
            result = None
        if alone:
            recipe.scales_of(out).data.copy_(recipe.scales, non_blocking=True)  # no write that autograd must know of
        recipe.refresh(out)
        return result


# FSDP2 asks for it at every gather; to find it out takes longer than the gather's preparation.
Shard.fsdp_pre_all_gather.__signature__ = inspect.signature(Shard.fsdp_pre_all_gather)  # type: ignore[attr-defined]


def _padded(codes: torch.Tensor, size: torch.Size) -> tuple[torch.Tensor, bool]:
    """Return codes with what is behind them, up to a size, and whether that is their memory."""
    if codes.shape == size:
        return codes, True
    end = codes.storage_offset() + size.numel()
    if codes.is_contiguous() and end * codes.element_size() <= codes.untyped_storage().nbytes():
        return codes.as_strided(size, tuple(size[i + 1 :].numel() for i in range(len(size)))), True
    padded = codes.new_empty(size)  # what is in the padding, nobody reads
    padded[: codes.shape[0]] = codes
    return padded, False


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the codes as a tensor of torch's own, in their dtype."""
    if type(tensor) is not Shard:
        return tensor
    with torch._C._DisableTorchDispatch():
        codes = tensor.as_subclass(torch.Tensor)
    return codes if codes.dtype == tensor.recipe.dtype else codes.view(tensor.recipe.dtype)


def _fill(target: Any, source: Any, non_blocking: bool = False) -> Any:
    """Copy codes as they are, and keep the scales of the piece that they are."""
    if isinstance(target, Shard) and (cut := getattr(source, "_cut", None)) is not None:
        target.recipe.cut(*cut)
    with torch._C._DisableTorchDispatch():
        plain(target).copy_(plain(source), non_blocking=non_blocking)
    return target


def shard_of(weight: Any) -> Shard | None:
    """Return this rank's shard of a weight, or None if it is something else."""
    shard = getattr(weight, "_local_tensor", None)
    return shard if isinstance(shard, Shard) else None


# ---- sharded weights in state dicts --------------------------------------------------------------------------------


def _rank(weight: Any) -> tuple[int, int]:
    """Return which of how many shards of a distributed weight is here."""
    for dim, placement in enumerate(weight.placements):
        if hasattr(placement, "dim"):
            return weight.device_mesh.get_local_rank(dim), weight.device_mesh.size(dim)
    return 0, 1


def distributed(weight: Any) -> tuple[Any, Any]:
    """Return the codes and the scales of a sharded weight as distributed tensors of plain ones, in their memory."""
    shard = shard_of(weight)
    assert shard is not None
    recipe = shard.recipe
    recipe.cut(*_rank(weight))

    def wrap(local: torch.Tensor, size: torch.Size) -> Any:
        strides = tuple(size[i + 1 :].numel() for i in range(len(size)))
        mesh, placements = weight.device_mesh, weight.placements
        return type(weight.data).from_local(local, mesh, placements, run_check=False, shape=size, stride=strides)

    with torch.no_grad():
        return wrap(plain(shard), recipe.size), wrap(recipe.own_scales(), torch.Size((recipe.total,)))


def gathered(tensor: Any) -> torch.Tensor:
    """Return all of a tensor, distributed or not. Every rank must call this."""
    if shard_of(tensor) is not None:
        tensor = distributed(tensor)[0]  # the codes in their own dtype
    elif _NAME is not None and hasattr(tensor, "full_tensor") and tensor.dtype == _NAME:
        tensor = type(tensor).from_local(
            tensor.to_local().view(torch.uint8),
            *(tensor.device_mesh, tensor.placements),
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
    if not hasattr(tensor, "full_tensor"):
        return tensor  # type: ignore[no-any-return]
    # What was moved to the CPU, as for a checkpoint, is gathered where the mesh is.
    whole: torch.Tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()
    return whole


def distribute_alike(tensor: torch.Tensor, other: Any) -> Any:
    """Return a tensor that every rank has whole, distributed as another one is. Every rank must call this."""
    if not hasattr(other, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh = other.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, other.placements).to(other.device)


def shared(weight: Any, entries: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a state dict has beside a distributed weight, where some ranks have it and others have nothing.

    ``set_model_state_dict(..., broadcast_from_rank0=True)`` broadcasts parameters only. Every rank must call this.
    """
    mesh = weight.device_mesh
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        have: list[Any] = [None] * mesh.size(dim)
        torch.distributed.all_gather_object(have, bool(entries), group=group)
        if any(have) and not all(have):
            one = [{key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in entries.items()}]
            source = torch.distributed.get_global_rank(group, have.index(True))
            torch.distributed.broadcast_object_list(one, src=source, group=group)
            entries = entries or one[0]
    return entries


def fill(weight: Any, codes: torch.Tensor, scales: torch.Tensor) -> Any:
    """Put this rank's part of whole codes and scales into a sharded weight; return its recipe."""
    shard = shard_of(weight)
    assert shard is not None
    recipe, (rank, world) = shard.recipe, _rank(weight)
    recipe.cut(rank, world)
    size = -(-recipe.size[0] // world)
    with torch.no_grad():
        plain(shard).copy_(codes.view(recipe.size)[min(rank * size, recipe.size[0]) : (rank + 1) * size])
        begin = min(rank * recipe.scales.numel(), recipe.total)
        part = scales.reshape(-1)[begin : begin + recipe.own_scales().numel()]
        recipe.own_scales().copy_(part)
    return recipe
