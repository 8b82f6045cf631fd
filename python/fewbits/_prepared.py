"""A product without gradients in the fewest steps: from a module's forward to one native call.

A decode loop makes hundreds of these calls a token, so their time on the host counts. What native code needs of a
weight is read once into a `Prepared`, which `Params4bit` keeps. Every call compares it with what it was read from, by
identity and address, so that a move, a loaded state dict, an assignment to ``.data`` or a swapped state is noticed.
Whatever is not as it nearly always is returns None: `autograd.matmul_4bit` then does the work, or says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from fewbits import _native
from fewbits._checks import BLOCKSIZES, DTYPES, QUANT_TYPES, storage_count
from fewbits._direct import fits, nested_addresses, target_of
from fewbits._launch import PLAIN_TYPES, is_observed
from fewbits._matmul import workspace
from fewbits._panel import Bound, multiply_panels
from fewbits.quant_state import QuantState

_Tensor, _float32 = torch.Tensor, torch.float32
_is_grad_enabled, _get_num_threads = torch.is_grad_enabled, torch.get_num_threads
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transforms, _is_traced = torch._C._functorch.peek_interpreter_stack, torch._C._is_tracing
_is_autocast_cuda = torch.is_autocast_enabled
# Asks no subclass's __torch_function__, which takes longer than all the rest.
_storage_address: Callable[[torch.Tensor], int] = getattr(
    torch._C, "_data_address", lambda tensor: tensor.untyped_storage().data_ptr()
)

_Native = tuple[int, int, int, int, int, int, int, int, int, int]


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
    )

    def __init__(self, B: torch.Tensor, state: QuantState, native: _Native, ordinal: int) -> None:
        self.matmul, self.n, self.k = _native.Weight4bit(*native).matmul, native[1], native[2]
        self.bound = Bound(native, (self.n, self.k), ())
        self.device, self.ordinal, self.base = B.device, ordinal, _storage_address(B)
        self.absmax, self.absmax_address = state.absmax, state.absmax.data_ptr()
        self.plain = (state.shape, state.blocksize, state.quant_type)
        self.nested = _nested_of(state, native[6]) if state.nested else None


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


def prepare(B: Any, state: QuantState) -> Prepared | None:
    """Return a weight prepared, or None if there is something about it that native code cannot take as it is."""
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
    native: _Native
    if state.nested:
        parts = nested_addresses(state, blocks, ordinal)
        if parts is None:
            return None
        native = (B.data_ptr(), n, k, blocksize, number, *parts)
    elif fits(absmax, _float32, blocks, ordinal):
        native = (B.data_ptr(), n, k, blocksize, number, absmax.data_ptr(), 0, 0, 0, 0)
    else:
        return None
    return Prepared(B, state, native, ordinal)


def multiply(
    prepared: Prepared, B: torch.Tensor, state: QuantState, A: Any, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Return ``A @ W.T + bias`` for the weight of codes and a state.

    None if what was prepared describes them no longer, or if this is not an ordinary call without gradients. Not for
    the compiler: the caller asks for it before.
    """
    absmax, (sizes, blocksize, quant_type), nested = prepared.absmax, prepared.plain, prepared.nested
    if not (
        state.absmax is absmax
        and absmax.data_ptr() == prepared.absmax_address
        and state.shape is sizes
        and state.blocksize is blocksize
        and state.quant_type is quant_type
        and _storage_address(B) == prepared.base
        and (not state.nested if nested is None else _is_same(nested, state))
    ):
        B.__dict__.pop("prepared", None)
        return None
    if (
        type(A) is not _Tensor
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
    # Sizes one by one take half the time of a tuple.
    if len(shape) == 3:
        batch, length, k = shape
        m = batch * length
        if k != prepared.k or not m:
            return None
        y = A.new_empty(batch, length, n)
    elif len(shape) == 2:
        m, k = shape
        if k != prepared.k or not m:
            return None
        y = A.new_empty(m, n)
    else:
        k = prepared.k
        m = A.numel() // k
        if shape[-1:] != (k,) or not m:
            return None
        y = A.new_empty(*shape[:-1], n)
    scratch = workspace(A, m, n, k, ordinal)
    address = 0 if scratch is None else scratch.data_ptr()
    if not prepared.matmul(A.data_ptr(), m, number, bias_address, y.data_ptr(), address, ordinal, queue):
        multiply_panels(prepared.bound, A.view(m, k), bias, y.view(m, n))
    return y


def matmul_4bit(A: Any, B: Any, state: QuantState, bias: torch.Tensor | None) -> torch.Tensor | None:
    """Return `multiply`'s result for a weight that nobody has prepared. Not for the compiler either."""
    if is_observed() or type(A) is not _Tensor or (A.requires_grad and _is_grad_enabled()):
        return None
    if bias is not None and not isinstance(bias, _Tensor):
        return None
    prepared = prepare(B, state)
    return None if prepared is None else multiply(prepared, B, state, A, bias)
