"""A device that is not there: CPU tensors that say "cuda", mix with no others, and know no float64.

What MPS refuses, this refuses: float64 tensors, and operations between two devices. Numbers are the CPU's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda", 0)


class Elsewhere(torch.Tensor):
    """A tensor over there."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Elsewhere:
        if inner.dtype == torch.float64:
            raise TypeError("no float64 over there")
        with _disable_current_modes():
            shell = torch.empty_strided(inner.shape, inner.stride(), dtype=inner.dtype, device="meta")
        # As FakeTensor does it: memory that nobody reads, and a device that is asked for by an operation.
        self: Any = torch.Tensor._make_subclass(cls, shell, False, dispatch_device=True, device_for_backend_keys=DEVICE)
        self.inner = inner
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with Device():
            return func(*args, **(kwargs or {}))


def there(tensor: torch.Tensor) -> torch.Tensor:
    """Take a tensor over there."""
    return Elsewhere(tensor.detach().clone())


def back(tensor: torch.Tensor) -> torch.Tensor:
    assert isinstance(tensor, Elsewhere), f"on {tensor.device}"
    return tensor.inner


class Device(TorchDispatchMode):
    """Runs operations over there, and counts them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return DEVICE if isinstance(args[0], Elsewhere) else func(*args)
        original = kwargs = dict(kwargs or {})
        flat = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        mine = [value for value in flat if isinstance(value, Elsewhere)]
        target = kwargs.get("device")
        leaves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if mine and not leaves and any(not isinstance(value, Elsewhere) and value.dim() for value in flat):
            raise RuntimeError(f"{func}: tensors on two devices")
        if target is not None and torch.device(target).type == DEVICE.type:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        elif target is None and not mine:
            with _disable_current_modes():
                return func(*args, **kwargs)
        stays = bool(mine) if target is None else torch.device(target).type == DEVICE.type
        if stays and kwargs.get("dtype") == torch.float64:
            raise TypeError("no float64 over there")
        Device.count += 1
        args, kwargs = tree_map(lambda value: value.inner if isinstance(value, Elsewhere) else value, (args, kwargs))
        with _disable_current_modes():
            result = func(*args, **kwargs)
        returned = func._schema.returns
        if returned and returned[0].alias_info is not None and returned[0].alias_info.is_write:
            return original.get("out", flat[0])
        if not stays or not isinstance(result, (torch.Tensor, tuple, list)):
            return result
        return tree_map(lambda value: Elsewhere(value) if isinstance(value, torch.Tensor) else value, result)
