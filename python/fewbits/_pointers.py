"""Addresses, streams and devices of tensors, for code that calls native functions itself."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["get_ptr", "is_on_gpu"]


def get_ptr(A: torch.Tensor | None) -> ctypes.c_void_p | None:
    """Return the address of a tensor's first element.

    Parameters
    ----------
    A : torch.Tensor, optional
        With memory of its own.

    Returns
    -------
    ctypes.c_void_p or None
        None for None.

    Examples
    --------
    >>> values = torch.ones(2)
    >>> get_ptr(values).value == values.data_ptr()
    True
    """
    return None if A is None else ctypes.c_void_p(A.data_ptr())


def is_on_gpu(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Raise unless all tensors are on one device, which may be the CPU.

    Parameters
    ----------
    tensors : iterable of torch.Tensor or None
        None, and tensors whose attribute ``is_paged`` is true, may be among them.

    Returns
    -------
    bool
        True.

    Raises
    ------
    RuntimeError
        Naming the shapes and devices.

    Examples
    --------
    >>> is_on_gpu([torch.ones(1), None])
    True
    """
    looked_at = [t for t in tensors if t is not None and not getattr(t, "is_paged", False)]
    if len({t.device for t in looked_at}) > 1:
        found = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in looked_at)
        raise RuntimeError(f"tensors: expected all of them on one device, got {found}")
    return True


def _get_tensor_stream(tensor: torch.Tensor) -> ctypes.c_void_p:
    """Return the raw handle of the current stream of a tensor's device; that of the current device for a CPU tensor."""
    if tensor.device.type == "xpu":
        return ctypes.c_void_p(torch._C._xpu_getCurrentRawStream(tensor.device.index))
    index = tensor.device.index if tensor.device.type == "cuda" else torch.cuda.current_device()
    return ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(index))


def _cuda_device_of(a: torch.Tensor) -> AbstractContextManager[object]:
    """Return a context in which a tensor's CUDA device is the current one."""
    return torch.cuda.device_of(a) if a.is_cuda else nullcontext()
