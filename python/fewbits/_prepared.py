"""A product with a 4-bit weight in the fewest steps: from a module's forward to one native call.

What native code needs of a weight is read once into a `Prepared`, which `Params4bit` keeps. Every call compares it with
what it was read from, by identity and address, so that a move, a loaded state dict, an assignment to ``.data`` or a
swapped state is noticed. Where it does not serve, `autograd.matmul_4bit` does the work, or says what is wrong.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch

from fewbits import _native
from fewbits._call import Arguments, Product, arguments, storage_address, wants_grad
from fewbits._checks import BLOCKSIZES, QUANT_TYPES, storage_count
from fewbits._direct import fits, nested_addresses, target_of
from fewbits._launch import PLAIN_TYPES, is_observed
from fewbits._matmul import workspace
from fewbits._panel import Bound, Native4bit, multiply_panels
from fewbits._product import product
from fewbits._states import weight_parts
from fewbits.quant_state import QuantState

_Tensor, _float32 = torch.Tensor, torch.float32


class Prepared:
    """A 4-bit weight as native code takes it, and what it was read from."""

    __slots__ = (
        "absmax",
        "absmax_address",
        "base",
        "bound",
        "device",
        "k",
        "matmul",
        "n",
        "nested",
        "ordinal",
        "plain",
        "workspace_size",
        "writes",
    )

    def __init__(
        self, B: torch.Tensor, state: QuantState, native: Native4bit, ordinal: int, writes: torch.Tensor | None
    ) -> None:
        self.device, self.ordinal, self.n, self.k = B.device, ordinal, native[1], native[2]
        self.absmax = state.absmax
        self._at(native, storage_address(B), state.absmax.data_ptr())
        self.plain = (state.shape, state.blocksize, state.quant_type)
        self.nested = _nested_of(state, native[6]) if state.nested else None
        self.writes = writes

    def _at(self, native: Native4bit, base: int, absmax_address: int) -> None:
        weight = _native.Weight4bit(*native)
        self.matmul, self.workspace_size = weight.matmul, weight.workspace_size
        self.bound = Bound(native, (self.n, self.k), ())
        self.base, self.absmax_address = base, absmax_address

    def elsewhere(self, B: torch.Tensor, state: QuantState) -> Prepared | None:
        """Return the same for codes and maxima whose memory was given back and taken again.

        None if more than addresses has changed. What was checked when this was made is not checked again.
        """
        if not self._is_of(state):
            return None
        base, address = storage_address(B), state.absmax.data_ptr()
        if base == self.base and address == self.absmax_address:
            return self
        other: Prepared = object.__new__(Prepared)
        other.device, other.ordinal, other.n, other.k = self.device, self.ordinal, self.n, self.k
        other.absmax, other.plain, other.nested, other.writes = self.absmax, self.plain, self.nested, self.writes
        native = self.bound.native
        other._at((native[0] - self.base + base, *native[1:5], address, *native[6:]), base, address)
        return other

    def describes(self, B: torch.Tensor, state: QuantState) -> bool:
        """Return whether codes and a state are still what this was read from."""
        return self.absmax.data_ptr() == self.absmax_address and storage_address(B) == self.base and self._is_of(state)

    def _is_of(self, state: QuantState) -> bool:
        """Return whether a state is the one that this was read from, wherever its block maxima lie."""
        (shape, blocksize, quant_type), nested = self.plain, self.nested
        return (
            state.absmax is self.absmax
            and state.shape is shape
            and state.blocksize is blocksize
            and state.quant_type is quant_type
            and (not state.nested if nested is None else _is_same(nested, state))
        )


_Nested = tuple[QuantState, torch.Tensor, int, torch.Tensor, int, torch.Tensor, int, int]


def _nested_of(state: QuantState, code_address: int) -> _Nested:
    state2, offset = state.state2, state.offset
    assert state2 is not None
    assert offset is not None
    assert state2.code is not None
    assert state2.blocksize is not None
    absmax = state2.absmax
    return state2, absmax, absmax.data_ptr(), state2.code, code_address, offset, offset.data_ptr(), state2.blocksize


def _is_same(nested: _Nested, state: QuantState) -> bool:
    state2, absmax, absmax_address, code, code_address, offset, offset_address, blocksize = nested
    return (
        state.nested
        and state.state2 is state2
        and state2.absmax is absmax
        and absmax.data_ptr() == absmax_address
        and state2.code is code
        and (not code_address or code.data_ptr() == code_address)
        and state.offset is offset
        and offset.data_ptr() == offset_address
        and state2.blocksize is blocksize
    )


def count_writes(codes: torch.Tensor, state: QuantState) -> torch.Tensor | None:
    """Return a tensor without memory whose version is that of codes, or None if nobody counts what is written to them.

    A getter of a subclass's attribute goes through its ``__torch_function__``; this one's does not.
    """
    if codes.is_inference() or state.absmax.is_inference():
        return None
    with torch._C.DisableTorchFunctionSubclass():
        writes = codes.detach()  # shares the count, and the memory, which it must not keep alive
    writes.data = torch.empty(0, dtype=writes.dtype, device=writes.device)
    return writes


def prepare(B: Any, state: QuantState, writes: torch.Tensor | None = None) -> Prepared | None:
    """Return a weight prepared, or None if there is something about it that native code cannot take as it is.

    With `count_writes`'s result kernels may start with the weight while the kernel before them still runs, once one has
    waited and nobody has written to the weight since.
    """
    absmax, shape = state.absmax, state.shape
    blocksize: Any = state.blocksize
    if type(B) not in PLAIN_TYPES or type(absmax) is not _Tensor or type(shape) is not torch.Size or len(shape) != 2:
        return None
    number, place = QUANT_TYPES.get(state.quant_type), target_of(B)  # type: ignore[arg-type]
    n, k = shape
    if number is None or place is None or blocksize not in BLOCKSIZES or not n * k:
        return None
    ordinal, blocks = place[0], (n * k + blocksize - 1) // blocksize
    if B.numel() != storage_count(n * k, B.dtype) or not B.is_contiguous() or B.is_neg():
        return None
    native: Native4bit
    if state.nested:
        parts = nested_addresses(state, blocks, ordinal)
        if parts is None:
            return None
        native = (B.data_ptr(), n, k, blocksize, number, *parts)
    elif fits(absmax, _float32, blocks, ordinal):
        native = (B.data_ptr(), n, k, blocksize, number, absmax.data_ptr(), 0, 0, 0, 0)
    else:
        return None
    return Prepared(B, state, native, ordinal, writes)


class _Held:
    """A weight for the gradients of a product with it."""

    __slots__ = ("codes", "prepared", "state")

    def __init__(self, prepared: Prepared, codes: torch.Tensor, state: QuantState) -> None:
        self.prepared, self.codes, self.state = prepared, codes, state

    def run(self, A: torch.Tensor, bias: torch.Tensor | None, call: Arguments) -> torch.Tensor:
        return _run(self.prepared, A, bias, call)

    def parts(self) -> tuple[torch.Tensor | None, ...]:
        nested = self.prepared.nested
        if nested is None:
            return self.codes, self.prepared.absmax, None, None, None
        _, absmax, _, code, _, offset, _, _ = nested
        return self.codes, self.prepared.absmax, code, absmax, offset

    def current(self) -> Prepared | None:
        if self.prepared.describes(self.codes, self.state):
            return self.prepared
        # What FSDP2 gathers again for the backward pass may lie elsewhere.
        if not getattr(self.codes, "gathered", False):
            return None
        again: Prepared | None = getattr(self.codes, "prepared", None)
        return again if again is not None and again.describes(self.codes, self.state) else None

    def grad(self, grad_output: torch.Tensor) -> torch.Tensor:
        return product(grad_output, None, True, weight_parts(self.codes.data, self.state))


def multiply(
    prepared: Prepared, B: torch.Tensor, state: QuantState, A: Any, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Return ``A @ W.T + bias`` for the weight of codes and a state.

    None if what was prepared describes them no longer, or if this is not an ordinary call. Not for the compiler: the
    caller asks for it before.
    """
    if not prepared.describes(B, state):
        B.__dict__.pop("prepared", None)
        return None
    return _multiply(prepared, B, state, A, bias)


def _multiply(
    prepared: Prepared, B: torch.Tensor, state: QuantState, A: Any, bias: torch.Tensor | None
) -> torch.Tensor | None:
    call = arguments(prepared, A, bias)
    if call is None:
        return None
    if wants_grad(A, bias):
        result: torch.Tensor = Product.apply(A, bias, _Held(prepared, B, state), call)
        return result
    return _run(prepared, A, bias, call)


def _run(prepared: Prepared, A: torch.Tensor, bias: torch.Tensor | None, call: Arguments) -> torch.Tensor:
    (m, number, bias_address, y, queue), n, k, ordinal = call, prepared.n, prepared.k, prepared.ordinal
    writes = prepared.writes
    version = -1 if writes is None else writes._version + prepared.absmax._version
    scratch = workspace(A, m, ordinal, prepared.workspace_size)
    address = 0 if scratch is None else scratch.data_ptr()
    if not prepared.matmul(A.data_ptr(), m, number, bias_address, y.data_ptr(), address, ordinal, queue, version):
        multiply_panels(prepared.bound, A.view(m, k), bias, y.view(m, n))
    return y


class _Kept(NamedTuple):
    """What was prepared for a state, as long as that lives."""

    state: weakref.ref[QuantState]
    codes: weakref.ref[torch.Tensor]  # not a view of them
    part: tuple[int, int]  # of which this is what was multiplied: address and elements
    prepared: Prepared


_kept: dict[int, _Kept] = {}  # by the id of the state


def matmul_4bit(A: Any, B: Any, state: QuantState, bias: torch.Tensor | None) -> torch.Tensor | None:
    """Return `multiply`'s result for codes and a state that no parameter keeps. Not for the compiler either."""
    if is_observed() or type(A) is not _Tensor or (bias is not None and not isinstance(bias, _Tensor)):
        return None
    if type(B) not in PLAIN_TYPES:
        return None
    codes = B if B._base is None else B._base
    kept = _kept.get(id(state))
    if (
        kept is not None
        and kept.codes() is codes
        and kept.part == (B.data_ptr(), B.numel())
        and B.is_contiguous()
        and kept.prepared.describes(B, state)
    ):
        prepared: Prepared | None = kept.prepared
    else:
        prepared = _keep(B, codes, state)
    return None if prepared is None else _multiply(prepared, B, state, A, bias)


def _keep(B: torch.Tensor, codes: torch.Tensor, state: QuantState) -> Prepared | None:
    prepared, key = prepare(B, state, count_writes(codes, state)), id(state)
    if prepared is not None:

        def forget(dead: weakref.ref[QuantState]) -> None:
            if key in _kept and _kept[key].state is dead:
                del _kept[key]

        _kept[key] = _Kept(weakref.ref(state, forget), weakref.ref(codes), (B.data_ptr(), B.numel()), prepared)
    return prepared
