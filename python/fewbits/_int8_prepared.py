"""An int8 product without gradients in the fewest steps; see `_prepared`, whose rules hold here.

What native code needs of a weight is read once into a `Prepared8`, which `Int8Params` keeps, and compared on every call
with what it was read from. Whatever is not as it nearly always is returns None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from fewbits import _native
from fewbits._checks import DTYPES
from fewbits._direct import fits, target_of
from fewbits._launch import PLAIN_TYPES
from fewbits._prepared import (
    _dispatch_modes,
    _function_modes,
    _get_num_threads,
    _is_autocast_cuda,
    _is_grad_enabled,
    _is_traced,
    _storage_address,
    _transforms,
)

_Tensor, _float32, _int8, _uint8 = torch.Tensor, torch.float32, torch.int8, torch.uint8
_SIZES = 64  # remembered workspace sizes; decode loops use a few numbers of rows


class Prepared8:
    """An int8 weight as native code takes it, and what it was read from."""

    __slots__ = ("base", "device", "k", "linear", "n", "ordinal", "scales", "scales_address", "sizes")

    def __init__(self, CB: torch.Tensor, SCB: torch.Tensor, ordinal: int) -> None:
        self.n, self.k = CB.shape
        self.linear = _native.Int8Weight(CB.data_ptr(), self.n, self.k, SCB.data_ptr()).linear
        self.device, self.ordinal, self.base = CB.device, ordinal, _storage_address(CB)
        self.scales, self.scales_address = SCB, SCB.data_ptr()
        self.sizes: dict[tuple[int, bool], int] = {}

    def workspace_size(self, m: int, mixed: bool) -> int:
        """Return how many bytes of workspace m rows need."""
        size = self.sizes.get((m, mixed))
        if size is None:
            if len(self.sizes) >= _SIZES:
                self.sizes.clear()
            size = self.sizes[m, mixed] = _native.int8_linear_workspace_size(m, self.n, self.k, mixed, self.ordinal)
        return size


def prepare(CB: Any, SCB: Any) -> Prepared8 | None:
    """Return a weight prepared, or None if there is something about it that native code cannot take as it is."""
    if type(CB) not in PLAIN_TYPES or type(SCB) is not _Tensor or CB.dtype is not _int8 or CB.dim() != 2:
        return None
    place = target_of(CB)
    if place is None or not CB.numel() or not CB.is_contiguous() or not fits(SCB, _float32, CB.shape[0], place[0]):
        return None
    return Prepared8(CB, SCB, place[0])


def multiply(
    prepared: Prepared8, CB: torch.Tensor, SCB: Any, A: Any, threshold: Any, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Return ``A @ W.T + bias``, or None where the long way must be taken. Not for the compiler: the caller asks."""
    if SCB is None:
        return None
    if SCB is not prepared.scales or SCB.data_ptr() != prepared.scales_address or _storage_address(CB) != prepared.base:
        CB.__dict__.pop("prepared", None)
        return None
    if (
        type(A) is not _Tensor
        or type(threshold) is not float
        or _dispatch_modes()
        or _function_modes()
        or _transforms() is not None
        or _is_traced()
        or forward_ad._current_level >= 0
    ):
        return None
    dtype, shape, n, ordinal = A.dtype, A.shape, prepared.n, prepared.ordinal
    number = DTYPES.get(dtype)
    if number is None or A.device != prepared.device or not A.is_contiguous() or A.is_neg():
        return None
    if ordinal >= 0:
        if _is_autocast_cuda():
            return None
        queue = torch._C._cuda_getCurrentRawStream(ordinal)
    else:
        if torch.is_autocast_enabled("cpu"):
            return None
        queue = _get_num_threads()
    if bias is None:
        bias_address = 0
        if A.requires_grad and _is_grad_enabled():
            return None
    else:
        if (bias.requires_grad or A.requires_grad) and _is_grad_enabled():
            return None
        if type(bias) not in PLAIN_TYPES or not (bias.dim() == 1 and fits(bias, dtype, n, ordinal)):
            return None
        bias_address = bias.data_ptr()
    k = prepared.k
    # Sizes one by one take half the time of a tuple.
    if len(shape) == 3:
        batch, length, columns = shape
        m = batch * length
        if columns != k or not m:
            return None
        y = A.new_empty(batch, length, n)
    elif len(shape) == 2:
        m, columns = shape
        if columns != k or not m:
            return None
        y = A.new_empty(m, n)
    else:
        m = A.numel() // k
        if shape[-1:] != (k,) or not m:
            return None
        y = A.new_empty(*shape[:-1], n)
    size = prepared.workspace_size(m, threshold > 0.0)
    workspace = A.new_empty(size, dtype=_uint8) if size else None
    address = 0 if workspace is None else workspace.data_ptr()
    prepared.linear(A.data_ptr(), m, number, threshold, bias_address, y.data_ptr(), address, ordinal, queue)
    return y
