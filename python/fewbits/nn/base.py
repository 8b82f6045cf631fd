"""What modules with a quantized weight have in common: moving without losing it, and loading it from state dicts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from fewbits import _checks
from fewbits.compat import _plans
from fewbits.nn.parameter import QuantizedParameter
from fewbits.nn.parts import PartedModule
from fewbits.nn.shard import Shard, gathered, shard_of, shared

if TYPE_CHECKING:
    from typing_extensions import Self


_CHECKPOINTS = "torch.distributed.checkpoint.state_dict"
_TORCH = frozenset(nn.Module().__dict__)  # what every module has, parameters among it


def _snapshot(p: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any], tuple[bool, bool, bool]]:
    # Quantized parameters get other memory when they are loaded; all others are written to.
    origin = (getattr(p, "_from_values", False), getattr(p, "_shell", False), p.requires_grad)
    return p.data if isinstance(p, QuantizedParameter) else p.detach().clone(), dict(p.__dict__), origin


def _restore(p: Any, data: torch.Tensor, attributes: dict[str, Any], origin: tuple[bool, bool, bool]) -> None:
    if not isinstance(p, QuantizedParameter):
        if not p.is_meta:
            p.data.copy_(data)
        return
    p.data = data
    p.__dict__.clear()
    p.__dict__.update(attributes)
    p._from_values, p._shell, p.requires_grad = origin


class QuantizedModule(PartedModule):
    """A module whose parameter ``weight`` has a class of its own, which quantizes it on its first move.

    Comes before torch's class among the bases.
    """

    _parameter_class: ClassVar[type[Any]]
    _with_state: ClassVar[str]  # what a quantized weight in a state dict is, and what it needs beside it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _plans.teach()

    def _adopt(self, weight: Any) -> None:
        """Take over what the module keeps of a weight that was moved or loaded."""
        raise NotImplementedError

    def _follow(self, weight: torch.Tensor) -> None:
        """Move what the module keeps to where a weight is that is a plain tensor."""
        raise NotImplementedError

    # ---- moving ----------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Apply `fn` to weight and bias. nn.Module's own way would lose the class of the weight on a move to meta."""
        weight, cls = self._parameters["weight"], self._parameter_class
        if shard_of(weight) is not None:
            return self._apply_around(fn, recurse, weight)
        if not isinstance(weight, cls):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            moved = self._parameters["weight"]
            if moved is not None and not moved.is_meta:
                self._follow(moved)
            return self
        with torch.no_grad():
            applied = fn(weight)
            if not isinstance(applied, cls):
                applied = cls(applied, weight.requires_grad and applied.is_floating_point(), **weight.__dict__)
            grad = None if weight.grad is None or applied._is_quantized() else fn(weight.grad)
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters["weight"] = weight
        if applied is not weight:
            weight.grad = None
            self._replace_weight(applied, keep_identity=applied.is_meta == weight.is_meta)
            self._parameters["weight"].grad = grad  # type: ignore[union-attr]
        self._adopt(applied)
        return self

    def _apply_around(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool, weight: Any) -> Self:
        """Apply `fn` to everything but a sharded weight, which goes where `fn` sends things, and is never cast."""
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters["weight"] = weight
        device = fn(torch.empty(0, dtype=torch.uint8, device=weight.device)).device
        if device != weight.device and device.type != "meta":
            self._parameters["weight"] = nn.Parameter(weight.detach().to(device), requires_grad=False)
        return self

    def _forget_scales(self) -> None:
        """Let go of scales of which every rank has kept its own."""

    def _replace_weight(self, weight: Any, keep_identity: bool) -> None:
        if keep_identity:
            self._parameters["weight"].data = weight  # type: ignore[union-attr]
        else:
            self._parameters["weight"] = weight

    # ---- state dicts -----------------------------------------------------------------------------------------------

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Return an iterator over buffers, as ``nn.Module.named_buffers``.

        Distributed checkpoints get what stands beside the weight in a state dict as well: with
        ``broadcast_from_rank0`` they know no other entries than parameters and buffers. They want all on one device.
        """
        buffers = super().named_buffers(prefix, recurse, remove_duplicate)
        if recurse or sys._getframe(1).f_globals.get("__name__") != _CHECKPOINTS:
            return buffers
        entries: dict[str, Any] = {}
        self._save_to_state_dict(entries, "", False)
        device = entries["weight"].device
        statistics = ((prefix + name, value.to(device)) for name, value in self._statistics(entries, "").items())
        return chain(buffers, statistics)

    def _statistics(self, state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """Return the entries of a state dict that say how to read its weight."""
        raise NotImplementedError

    def _read_weight(self, weight: Any, entry: torch.Tensor, stats: Mapping[str, Any], assign: bool) -> Any:
        """Return the quantized weight that a state dict holds, for this module's device, without touching anything."""
        raise NotImplementedError

    def _read_values(self, weight: Any, entry: torch.Tensor, device: torch.device, assign: bool) -> Any:
        """Return the floating-point weight that a state dict holds, quantized where the present one is."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as ``nn.Module.load_state_dict``; a state dict that is refused leaves the module as it was."""
        undo = self._undo()
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except Exception:
            undo()
            raise

    def _undo(self) -> Callable[[], None]:
        """Return what brings the module's parameters, and what it keeps of them, back to what they are now."""
        kept = [(name, p, None if p is None else _snapshot(p)) for name, p in self._parameters.items()]
        attributes = {key: value for key, value in self.__dict__.items() if key not in _TORCH}

        def undo() -> None:
            for name, p, snapshot in kept:
                self._parameters[name] = p
                if p is not None and snapshot is not None:
                    _restore(p, *snapshot)
            self.__dict__.update(attributes)

        return undo

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self._split is not None:
            state_dict = self._cut_entries(dict(state_dict), prefix, self._split)
        weight, name = self._parameters["weight"], f"{prefix}weight"
        load = super()._load_from_state_dict
        stats = self._statistics(state_dict, prefix)
        if stats and name not in state_dict and not strict:
            # Those of a frozen weight that was left out, as by `ignore_frozen_params` of distributed checkpoints.
            state_dict = {key: value for key, value in state_dict.items() if key not in stats}
            stats = {}
        rest = {key: value for key, value in state_dict.items() if key not in stats}
        if shard_of(weight) is not None and (name in state_dict or stats):
            try:
                self._fill_shard(weight, rest.pop(name, None), stats)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"While loading {name}: {error}")
                return
            self._load_others(load, rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            return
        if _is_elsewhere(weight) and _is_elsewhere(rest.get(name)) and self._weight_shape().numel():
            del rest[name]  # DeepSpeed's ZeRO-3 saves and loads what it has partitioned by itself
            self._load_others(load, rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            return
        if not isinstance(weight, self._parameter_class):
            load(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            return
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        loaded = None
        if name in rest or stats:
            try:
                loaded = self._read(weight, rest.pop(name, None), stats, assign)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"While loading {name}: {error}")
                return
        own_bias, bias = self._parameters.get("bias"), rest.get(f"{prefix}bias")
        if own_bias is not None and isinstance(bias, torch.Tensor):
            # torch would cast integers to numbers that they do not stand for.
            if bias.layout is not torch.strided or not bias.is_floating_point():
                error_msgs.append(
                    f"While loading {prefix}bias: expected a dense tensor of a floating-point dtype, "
                    f"got {bias.dtype} of layout {bias.layout}"
                )
                return
            if own_bias.is_meta and bias.shape == own_bias.shape and not assign:
                # There is nothing to copy into: a copy takes its place.
                rest[f"{prefix}bias"] = bias.detach().clone()
                local_metadata = {**local_metadata, "assign_to_params_buffers": True}
        if loaded is None and strict:
            missing_keys.append(name)
        errors: list[str] = []
        undo = self._undo()
        self._load_others(load, rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)
        if errors:
            undo()
            error_msgs += errors
            return
        if loaded is None:
            return
        self._replace_weight(loaded, keep_identity=not assign and not weight.is_meta)
        self._adopt(loaded)

    def _load_others(self, load: Callable[..., None], *args: Any) -> None:
        """Load everything but the weight."""
        weight, self._parameters["weight"] = self._parameters["weight"], None
        try:
            load(*args)
        finally:
            self._parameters["weight"] = weight

    def _read(self, weight: Any, entry: torch.Tensor | None, stats: Mapping[str, Any], assign: bool) -> Any:
        if not isinstance(entry, torch.Tensor):
            raise ValueError(f"weight: expected a tensor, got {type(entry).__name__}")
        has_values = self._load_device(weight, entry, assign).type != "meta"
        for name, value in {"weight": entry, **stats}.items():
            if isinstance(value, torch.Tensor):
                _checks.check_tensor(name, value)
                if has_values and value.is_meta:
                    raise ValueError(f"{name}: expected values, got a tensor on meta, which has none")
        if stats:
            return self._read_weight(weight, entry, stats, assign)
        shape = self._weight_shape()
        if entry.shape != shape:
            raise ValueError(
                f"weight: expected shape {tuple(shape)}, or {self._with_state}, got shape {tuple(entry.shape)} alone"
            )
        return self._read_values(weight, entry, self._load_device(weight, entry, assign), assign)

    def _fill_shard(self, weight: Any, entry: Any, stats: Mapping[str, Any]) -> None:
        """Put this rank's part of the weight that a state dict holds into a shard."""
        shard = shard_of(weight)
        assert shard is not None
        if hasattr(entry, "device_mesh"):
            stats = shared(weight, stats)
        stats = {key: gathered(value) if isinstance(value, torch.Tensor) else value for key, value in stats.items()}
        if isinstance(entry, torch.Tensor):
            entry = gathered(entry.detach()).to(shard.device)
        self._take_whole(weight, self._read(self._blank(shard), entry, stats, False))

    def _blank(self, shard: Shard) -> Any:
        """Return a parameter like the whole of a shard, to be loaded into."""
        raise NotImplementedError

    def _take_whole(self, weight: Any, loaded: Any) -> None:
        """Put this rank's part of a whole quantized parameter into a sharded one."""
        raise NotImplementedError

    @staticmethod
    def _load_device(weight: Any, entry: torch.Tensor, assign: bool) -> torch.device:
        return entry.device if assign or weight.is_meta else torch.device(weight.device)


def _is_elsewhere(weight: Any) -> bool:
    """Return whether an engine has left an empty tensor in the place of a weight."""
    return isinstance(weight, torch.Tensor) and not weight.numel()
