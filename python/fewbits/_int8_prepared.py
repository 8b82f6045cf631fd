"""An int8 product in the fewest steps; see `_prepared`, whose rules hold here."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fewbits import _native
from fewbits._call import Arguments, Product, arguments, storage_address, wants_grad
from fewbits._checks_int8 import mask_words
from fewbits._direct import fits, target_of
from fewbits._int8 import bind
from fewbits._int8_product import Weight, dense
from fewbits._launch import PLAIN_TYPES
from fewbits._panel import Bound
from fewbits.portable.int8 import unpack_mask

_Tensor, _float32, _int8, _uint8 = torch.Tensor, torch.float32, torch.int8, torch.uint8
_SIZES = 64  # remembered workspace sizes; decode loops use a few numbers of rows
_MASKS = 16  # rows that may have a mask each
_KEPT_BYTES = 32 << 10  # a workspace of no more is kept for the sake of the masks in it; of a larger one they are apart


class Found(NamedTuple):
    """Where a product with a threshold left the bitmasks of the outlier columns."""

    memory: torch.Tensor  # a workspace, or the masks alone
    apart: bool
    x: int  # address and rows of the activations
    m: int
    k: int
    weight: _native.Int8Weight
    ordinal: int

    def columns(self) -> torch.Tensor:
        """Return the columns, int64 and ascending. That waits for the device."""
        base, words = self.memory.data_ptr(), mask_words(self.k)
        address, count = self.weight.masks(self.x, self.m, base, self.ordinal)
        offset = 0 if self.apart else address - base
        masks = self.memory[offset : offset + 4 * words * count].view(torch.int32).view(count, words)
        return torch.stack([unpack_mask(mask, self.k) for mask in masks]).any(0).nonzero().view(-1)


class Prepared8:
    """An int8 weight as native code takes it, and what it was read from."""

    __slots__ = ("base", "bound", "device", "found", "k", "n", "native", "ordinal", "scales", "scales_address", "sizes")

    def __init__(self, CB: torch.Tensor, SCB: torch.Tensor, ordinal: int) -> None:
        self.n, self.k = CB.shape
        self.device, self.ordinal, self.scales = CB.device, ordinal, SCB
        self.sizes: dict[int, int] = {}
        self.found: Found | None = None
        self._at(bind(CB, SCB)._replace(alive=()), storage_address(CB), SCB.data_ptr())

    def _at(self, bound: Bound, base: int, scales_address: int) -> None:
        self.bound, self.native = bound, _native.Int8Weight(*bound.native)
        self.base, self.scales_address = base, scales_address

    def elsewhere(self, CB: torch.Tensor, SCB: torch.Tensor) -> Prepared8 | None:
        """Return the same for codes and scales whose memory was given back and taken again; None if they are others."""
        if SCB is not self.scales:
            return None
        base, address = storage_address(CB), SCB.data_ptr()
        if base == self.base and address == self.scales_address:
            return self
        other: Prepared8 = object.__new__(Prepared8)
        other.n, other.k, other.sizes, other.found = self.n, self.k, self.sizes, None
        other.device, other.ordinal, other.scales = self.device, self.ordinal, SCB
        codes, n, k, _ = self.bound.native
        other._at(self.bound._replace(native=(codes - self.base + base, n, k, address)), base, address)
        return other

    def describes(self, CB: torch.Tensor, SCB: torch.Tensor) -> bool:
        """Return whether codes and scales are still what this was read from."""
        return SCB is self.scales and SCB.data_ptr() == self.scales_address and storage_address(CB) == self.base

    def workspace_size(self, m: int) -> int:
        """Return how many bytes of workspace m rows need."""
        size = self.sizes.get(m)
        if size is None:
            if len(self.sizes) >= _SIZES:
                self.sizes.clear()
            size = self.sizes[m] = _native.int8_linear_workspace_size(m, self.n, self.k, self.ordinal)
        return size


def prepare(CB: Any, SCB: Any) -> Prepared8 | None:
    """Return a weight prepared, or None if there is something about it that native code cannot take as it is."""
    if type(CB) not in PLAIN_TYPES or type(SCB) is not _Tensor or CB.dtype is not _int8 or CB.dim() != 2:
        return None
    place = target_of(CB)
    if place is None or not CB.numel() or not CB.is_contiguous() or not fits(SCB, _float32, CB.shape[0], place[0]):
        return None
    return Prepared8(CB, SCB, place[0])


class _Held:
    """A weight for the gradients of a product with it."""

    __slots__ = ("codes", "prepared", "scales", "threshold")

    def __init__(self, prepared: Prepared8, codes: torch.Tensor, scales: torch.Tensor, threshold: float) -> None:
        self.prepared, self.codes, self.scales, self.threshold = prepared, codes, scales, threshold

    def run(self, A: torch.Tensor, bias: torch.Tensor | None, call: Arguments) -> torch.Tensor:
        return _run(self.prepared, A, self.threshold, call)

    def parts(self) -> tuple[torch.Tensor | None, ...]:
        return self.codes, self.scales, None  # no activations

    def current(self) -> Prepared8 | None:
        if self.prepared.describes(self.codes, self.scales):
            return self.prepared
        # What FSDP2 gathers again for the backward pass may lie elsewhere.
        if not getattr(self.codes, "gathered", False):
            return None
        again: Any = getattr(self.codes, "prepared", None)
        return again if again is not None and again.describes(self.codes, self.scales) else None

    def grad(self, grad_output: torch.Tensor) -> torch.Tensor:
        return dense(grad_output, Weight(self.codes.data, self.scales), transposed=True)


def multiply(
    prepared: Prepared8, CB: torch.Tensor, SCB: Any, A: Any, threshold: Any, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Return ``A @ W.T + bias``, or None where the long way must be taken. Not for the compiler: the caller asks."""
    if SCB is None:
        return None
    if not prepared.describes(CB, SCB):
        CB.__dict__.pop("prepared", None)
        return None
    if type(threshold) is not float:
        return None
    call = arguments(prepared, A, bias)
    if call is None:
        return None
    if wants_grad(A, bias):
        result: torch.Tensor = Product.apply(A, bias, _Held(prepared, CB, SCB, threshold), call)
        return result
    return _run(prepared, A, threshold, call)


def _run(prepared: Prepared8, A: torch.Tensor, threshold: float, call: Arguments) -> torch.Tensor:
    m, number, bias_address, y, queue = call
    size = prepared.workspace_size(m)
    workspace = A.new_empty(size, dtype=_uint8) if size else None
    address, x, masks = 0 if workspace is None else workspace.data_ptr(), A.data_ptr(), 0
    weight, ordinal = prepared.native, prepared.ordinal
    if threshold and workspace is not None:
        memory, k, apart = workspace, prepared.k, size > _KEPT_BYTES
        if apart:
            memory = A.new_empty(4 * mask_words(k) * min(m, _MASKS), dtype=_uint8)
            masks = memory.data_ptr()
        prepared.found = Found(memory, apart, x, m, k, weight, ordinal)
    weight.linear(x, m, number, threshold, bias_address, y.data_ptr(), address, masks, ordinal, queue)
    return y
