"""The ordinary call in the fewest steps.

A decode loop makes hundreds of these calls a token, so their time on the host counts. Each function here asks, as
cheaply as Python can, whether everything is as it nearly always is (plain dense tensors on one device, nobody tracing),
and then makes the native call; otherwise it returns None and `_launch` or `_ops` do the work, or say what is wrong.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch

from fewbits import _native
from fewbits._backend import IS_NATIVE_EVERYWHERE, NATIVE_TYPES
from fewbits._checks import BLOCKSIZES, DTYPES, QUANT_TYPES
from fewbits._launch import PLAIN_TYPES, is_observed, overlap
from fewbits.codebook import is_default_map, native_table, shared_table
from fewbits.quant_state import QuantState

_Tensor, _Size, _uint8, _float32 = torch.Tensor, torch.Size, torch.uint8, torch.float32
_get_num_threads, _strided = torch.get_num_threads, torch.strided

# (sizes, strides, dtype) to new memory
_Allocator = Callable[[tuple[int, ...], tuple[int, ...], Any], torch.Tensor]


def _empty_strided(
    sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: str | torch.device
) -> torch.Tensor:
    return torch.empty_strided(sizes, strides, dtype=dtype, device=device)


# What compiled programs allocate with: it passes by the dispatcher, where nobody listens now, and takes half the time.
_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_empty_cpu: _Allocator = getattr(_guards, "_empty_strided_cpu", partial(_empty_strided, device="cpu"))
_empty_cuda: _Allocator = getattr(_guards, "_empty_strided_cuda", partial(_empty_strided, device="cuda"))
_current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda ordinal: 0)
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)


def quantize_4bit(
    A: Any, blocksize: Any, quant_type: Any, quant_storage: Any
) -> tuple[torch.Tensor, QuantState] | None:
    """Return codes and state, or None if this is not an ordinary call."""
    # The compiler looks no further than is_observed: older ones cannot follow the rest.
    if is_observed() or type(A) not in PLAIN_TYPES or type(quant_type) is not str or type(blocksize) is not int:
        return None
    number, dtype = QUANT_TYPES.get(quant_type), DTYPES.get(A.dtype)
    if number is None or dtype is None or quant_storage is not _uint8 or blocksize not in BLOCKSIZES:
        return None
    n = A.numel()
    target = target_of(A)
    if target is None or n == 0 or not A.is_contiguous() or A.is_neg():
        return None
    ordinal, queue = target
    empty = allocator(ordinal)
    codes = empty(((n + 1) // 2, 1), (1, 1), _uint8)
    absmax = empty(((n + blocksize - 1) // blocksize,), (1,), _float32)
    _native.quantize_4bit(
        A.data_ptr(), n, dtype, blocksize, number, codes.data_ptr(), absmax.data_ptr(), ordinal, queue
    )
    return codes, QuantState(absmax, A.shape, _table(quant_type, ordinal, A), blocksize, quant_type, A.dtype)


def dequantize_4bit(
    A: Any, state: QuantState, dtype: torch.dtype | None, out: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the values, or None if this is not an ordinary call."""
    if is_observed() or type(A) not in PLAIN_TYPES:
        return None
    absmax, reading = state.absmax, state._reading
    if reading is None or not _is_of(reading, state, absmax):
        reading = state._reading = _read(state)
        if reading is None:
            return None
    _, address, _, number, n, size, blocks, sizes, strides, ordinal = reading
    dtype_number, target = DTYPES.get(dtype), target_of(A)  # type: ignore[arg-type]
    if dtype_number is None or target is None or target[0] != ordinal or A.dtype is not _uint8:
        return None
    if A.numel() != size or not A.is_contiguous():
        return None
    if out is not None and not (
        type(out) is _Tensor and out.shape == sizes and fits(out, dtype, n, ordinal) and _is_apart(out, A, state)
    ):
        return None
    nested = nested_addresses(state, blocks, ordinal) if state.nested else None
    if nested is None and state.nested:
        return None
    values: torch.Tensor = allocator(ordinal)(sizes, strides, dtype) if out is None else out
    blocksize: Any = state.blocksize
    if nested is None:
        _native.dequantize_4bit(
            A.data_ptr(), n, blocksize, number, address, values.data_ptr(), dtype_number, ordinal, target[1]
        )
    else:
        _native.dequantize_4bit_nested(
            A.data_ptr(), n, blocksize, number, *nested, values.data_ptr(), dtype_number, ordinal, target[1]
        )
    if out is not None and not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return values


class Reading(NamedTuple):
    """What a state of 4-bit codes says, checked once for many calls, and the attributes that it was read from."""

    absmax: weakref.ref[torch.Tensor]  # weak: a state whose maxima are replaced gives the old ones' memory back
    address: int
    plain: tuple[Any, Any, Any, bool]  # shape, block size, type, whether nested
    number: int  # of the type
    n: int
    size: int  # bytes of codes
    blocks: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    ordinal: int


def _read(state: QuantState) -> Reading | None:
    """Return the reading of a state, or None if it is not an ordinary one."""
    absmax, shape, quant_type, nested = state.absmax, state.shape, state.quant_type, state.nested
    blocksize: Any = state.blocksize
    number = QUANT_TYPES.get(quant_type)  # type: ignore[arg-type]
    if type(absmax) is not _Tensor or type(shape) is not _Size or number is None or blocksize not in BLOCKSIZES:
        return None
    target, n = target_of(absmax), shape.numel()
    blocks = (n + blocksize - 1) // blocksize
    if target is None or n == 0 or not (nested or fits(absmax, _float32, blocks, target[0])):
        return None
    sizes = tuple(shape)
    plain = (shape, blocksize, quant_type, nested)
    place = (weakref.ref(absmax), absmax.data_ptr())
    return Reading(*place, plain, number, n, (n + 1) // 2, blocks, sizes, _strides(sizes), target[0])


def _is_of(reading: Reading, state: QuantState, absmax: torch.Tensor) -> bool:
    """Return whether a state is still what was read: by identity, and its maxima by address, too."""
    shape, blocksize, quant_type, nested = reading[2]
    return (
        reading[0]() is absmax
        and absmax.data_ptr() == reading[1]
        and state.shape is shape
        and state.blocksize is blocksize
        and state.quant_type is quant_type
        and state.nested is nested
    )


def quantize_blockwise(A: Any, code: torch.Tensor | None, blocksize: Any) -> tuple[torch.Tensor, QuantState] | None:
    """Return codes by the signed dynamic map and their state, or None if this is not an ordinary call."""
    if is_observed() or type(A) not in PLAIN_TYPES or type(blocksize) is not int or blocksize not in BLOCKSIZES:
        return None
    if code is not None and (type(code) is not _Tensor or not is_default_map(code)):
        return None
    n, dtype, target = A.numel(), DTYPES.get(A.dtype), target_of(A)
    if dtype is None or target is None or n == 0 or not A.is_contiguous() or A.is_neg():
        return None
    ordinal, queue = target
    codes = _empty(ordinal, A.shape, _uint8)
    absmax = allocator(ordinal)(((n + blocksize - 1) // blocksize,), (1,), _float32)
    _native.quantize_blockwise(
        A.data_ptr(), n, dtype, blocksize, 0, codes.data_ptr(), absmax.data_ptr(), ordinal, queue
    )
    return codes, QuantState(absmax, code=_table("dynamic", ordinal, A), blocksize=blocksize, dtype=A.dtype)


def dequantize_blockwise(A: Any, state: QuantState, out: torch.Tensor | None) -> torch.Tensor | None:
    """Return the values, or None if this is not an ordinary call."""
    absmax, code, blocksize = state.absmax, state.code, state.blocksize
    if is_observed() or type(A) not in PLAIN_TYPES or type(absmax) is not _Tensor or state.nested:
        return None
    dtype = DTYPES.get(state.dtype)  # type: ignore[arg-type]
    if dtype is None or type(code) is not _Tensor or blocksize not in BLOCKSIZES or A.dtype is not _uint8:
        return None
    assert blocksize is not None
    n, target = A.numel(), target_of(A)
    if target is None or n == 0 or not A.is_contiguous():
        return None
    ordinal, queue = target
    if not fits(absmax, _float32, (n + blocksize - 1) // blocksize, ordinal):
        return None
    if out is not None and not (
        type(out) is _Tensor
        and out.shape == A.shape
        and fits(out, state.dtype, n, ordinal)
        and _is_apart(out, A, state)
    ):
        return None
    address = _code_address(code, ordinal)
    if address is None:
        return None
    values: torch.Tensor = _empty(ordinal, A.shape, state.dtype) if out is None else out
    _native.dequantize_blockwise(
        A.data_ptr(), n, blocksize, address, absmax.data_ptr(), values.data_ptr(), dtype, ordinal, queue
    )
    if out is not None and not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return values


def nested_addresses(state: QuantState, blocks: int, ordinal: int) -> tuple[int, int, int, int, int] | None:
    """Return what the kernel reads of a nested state: absmax codes, code, nested absmax, its block size, offset."""
    absmax, offset, state2 = state.absmax, state.offset, state.state2
    if state2 is None:
        return None
    code, maxima = state2.code, state2.absmax
    blocksize: Any = state2.blocksize
    if not (
        type(offset) is _Tensor
        and type(maxima) is _Tensor
        and type(code) is _Tensor
        and blocksize in BLOCKSIZES
        and fits(absmax, _uint8, blocks, ordinal)
        and fits(offset, _float32, 1, ordinal)
        and fits(maxima, _float32, (blocks + blocksize - 1) // blocksize, ordinal)
    ):
        return None
    address = _code_address(code, ordinal)
    if address is None:
        return None
    return absmax.data_ptr(), address, maxima.data_ptr(), blocksize, offset.data_ptr()


def _table(name: str, ordinal: int, A: torch.Tensor) -> torch.Tensor:
    """Return a shared table on the device of `A`, which is asked for it only where the table is not there yet."""
    table = native_table(name, ordinal)
    return shared_table(name, A.device) if table is None else table


def _code_address(code: torch.Tensor, ordinal: int) -> int | None:
    """Return where a kernel reads a code, 0 for the one it knows, or None if it cannot."""
    if is_default_map(code):
        return 0
    return code.data_ptr() if fits(code, _float32, 256, ordinal) else None


def _is_apart(out: torch.Tensor, A: torch.Tensor, state: QuantState) -> bool:
    """Return whether `out` lies over nothing that the kernel reads."""
    maxima = None if state.state2 is None else state.state2.absmax
    read = (A, state.absmax, maxima, state.offset)
    return not any(isinstance(tensor, _Tensor) and overlap(out, tensor) for tensor in read)


def allocator(ordinal: int) -> _Allocator:
    """Return what allocates on a native device, of strides as if contiguous."""
    if ordinal < 0:
        return _empty_cpu
    if _current_device() == ordinal:
        return _empty_cuda
    return partial(_empty_strided, device=torch.device("cuda", ordinal))


def _empty(ordinal: int, shape: Sequence[int], dtype: torch.dtype | None) -> torch.Tensor:
    """Return contiguous memory on a native device, for at least one element."""
    sizes = tuple(shape)
    return allocator(ordinal)(sizes, _strides(sizes), dtype)


def _strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor that is not empty."""
    return (sizes[1], 1) if len(sizes) == 2 else tuple(prod(sizes[i + 1 :]) for i in range(len(sizes)))


def _target_of(A: torch.Tensor) -> tuple[int, int] | None:
    """Return the native device and queue of a dense tensor, None if it has none."""
    if A.layout is not _strided:
        return None
    if A.is_cuda:
        ordinal = A.get_device()
        return ordinal, _current_stream(ordinal)
    return (-1, _get_num_threads()) if A.is_cpu else None


def _target_of_if_native(A: torch.Tensor) -> tuple[int, int] | None:
    return _target_of(A) if A.device.type in NATIVE_TYPES else None


target_of = _target_of if IS_NATIVE_EVERYWHERE else _target_of_if_native


def fits(tensor: torch.Tensor, dtype: torch.dtype | None, count: int, ordinal: int) -> bool:
    """Return whether a kernel on the device `ordinal` can use a tensor as it is."""
    return (
        tensor.dtype is dtype
        and tensor.numel() == count
        and tensor.is_contiguous()
        and (tensor.is_cpu if ordinal < 0 else tensor.is_cuda and tensor.get_device() == ordinal)
        and not tensor.is_neg()
    )
