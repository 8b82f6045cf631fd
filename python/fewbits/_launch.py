"""From tensors to native calls: checks, buffers, the device and its queue.

Every function takes tensors, checks all of them, allocates what the caller did not give, and makes one native call.
Nothing here copies to the host, waits for a device, or allocates other than through torch, so every call can be
captured in a CUDA graph. `_ops` registers the same functions with the dispatcher; `functional` chooses between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from fewbits import _native
from fewbits._backend import IS_NATIVE_EVERYWHERE, NATIVE_TYPES, PORTABLE
from fewbits._checks import (
    DTYPES,
    LARGE_BLOCKSIZES,
    NESTED_BLOCKSIZE,
    QUANT_TYPES,
    block_count,
    check_absmax,
    check_buffer,
    check_dequantize_4bit,
    check_dequantize_blockwise,
    check_nested,
    check_quantize,
    check_quantize_blockwise,
    storage_count,
)
from fewbits.codebook import TABLES, is_default_map
from fewbits.portable import blockwise, fourbit, tables

# Two codes of 0.0: what pads the last storage element of a `quant_storage` wider than a byte.
_PAD_BYTES = {name: TABLES[name].index(0.0) * 0x11 for name in QUANT_TYPES}

# Tensor classes whose bytes can be handed over as they are. Modules add their parameter classes.
PLAIN_TYPES: set[type] = {torch.Tensor, torch.nn.Parameter}


# An export, which only is_compiling knows of, is a dispatch mode, too.
_is_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transforms, _is_traced = torch._C._functorch.peek_interpreter_stack, torch._C._is_tracing


def is_observed() -> bool:
    """Return whether somebody traces, transforms or intercepts torch's operations now."""
    # `bool` of it all would take as long as one of them.
    return (
        _is_compiling()
        or _dispatch_modes() != 0
        or _function_modes() != 0
        or _transforms() is not None
        or _is_traced() is not False
    )


def is_unusual() -> bool:
    """Return whether calls are observed, or forward-mode derivatives taken; callers have asked for the compiler."""
    # Not by way of the others: it is asked on the shortest way of all.
    return bool(
        _dispatch_modes()
        or _function_modes()
        or _transforms() is not None
        or _is_traced()
        or forward_ad._current_level >= 0
    )


def is_transformed() -> bool:
    """Return whether functorch transforms, or forward-mode derivatives are taken, now."""
    return bool(_transforms() is not None or forward_ad._current_level >= 0)


def _only_default_device() -> bool:
    """Return whether the one observer is what ``torch.set_default_device`` leaves, which concerns factories only."""
    return (
        _function_modes() == 1
        and type(torch._C._get_function_stack_at(0)) is DeviceContext
        and not _dispatch_modes()
        and _transforms() is None
        and not _is_traced()
    )


def is_direct(*tensors: torch.Tensor | None) -> bool:
    """Return whether native code may read these tensors' memory now."""
    if torch.compiler.is_compiling() or (is_observed() and not _only_default_device()):
        return False
    return all(
        t is None
        or (type(t) in PLAIN_TYPES and not t.is_meta and not torch._C._functorch.is_functorch_wrapped_tensor(t))
        for t in tensors
    )


# ---- memory --------------------------------------------------------------------------------------------------------


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with its elements in memory order and as they read (lazy negation carried out)."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def as_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return block maxima, tables and offsets as the kernels read them."""
    return dense(tensor if tensor.dtype == torch.float32 else tensor.to(torch.float32))


def target(
    buffer: torch.Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *inputs: torch.Tensor | None,
) -> torch.Tensor:
    """Return where a kernel writes: the caller's buffer, or new memory.

    New where there is no buffer, where it has gaps, and where it lies over one of the kernel's `inputs`, of which other
    threads are still reading what one would write.
    """
    usable = buffer is not None and buffer.is_contiguous() and not buffer.is_neg()
    if buffer is not None and usable and not any(t is not None and overlap(buffer, t) for t in inputs):
        return buffer
    return torch.empty(shape, dtype=dtype, device=device)


def deliver(result: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    if buffer is None:
        return result
    if result is not buffer:
        return buffer.copy_(result.view(buffer.shape))
    if not buffer.is_inference():
        torch.autograd.graph.increment_version(buffer)  # autograd did not see the write
    return buffer


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors lie over one another: all that is between the first and the last element of each."""
    if a.device != b.device:
        return False
    first, second = a.data_ptr(), b.data_ptr()
    return first < second + _extent(b) and second < first + _extent(a)


def _extent(tensor: torch.Tensor) -> int:
    """Return the bytes from a tensor's first element to the end of its last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


def _target_queue(device: torch.device) -> tuple[int, int]:
    """Return a device as native code names it, and where its work goes: a CUDA stream, or a number of threads.

    PORTABLE and 0 where native code has nothing to say.
    """
    kind = device.type
    if kind == "cuda":
        index = device.index
        return index, torch._C._cuda_getCurrentRawStream(index)
    return (-1, torch.get_num_threads()) if kind == "cpu" else (PORTABLE, 0)


def _target_queue_if_native(device: torch.device) -> tuple[int, int]:
    return _target_queue(device) if device.type in NATIVE_TYPES else (PORTABLE, 0)


target_queue = _target_queue if IS_NATIVE_EVERYWHERE else _target_queue_if_native


def codes_target(
    n: int,
    quant_type: str,
    quant_storage: torch.dtype,
    device: torch.device,
    out: torch.Tensor | None,
    *inputs: torch.Tensor,
) -> torch.Tensor:
    count = storage_count(n, quant_storage)
    codes = target(out, (count, 1), quant_storage, device, *inputs)
    used, size = (n + 1) // 2, count * quant_storage.itemsize
    if size > used:
        codes.view(-1).view(torch.uint8)[used:].fill_(_PAD_BYTES[quant_type])
    return codes


def code_address(code: torch.Tensor | None) -> tuple[int, torch.Tensor | None]:
    """Return the address of a code (0 for the signed dynamic map) and the tensor that must outlive the call."""
    if code is None or is_default_map(code):
        return 0, None
    code = as_float32(code)
    return code.data_ptr(), code


# ---- launches ------------------------------------------------------------------------------------------------------


def quantize_4bit(
    A: torch.Tensor,
    blocksize: int,
    quant_type: str,
    quant_storage: torch.dtype,
    out: torch.Tensor | None = None,
    absmax: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes, absmax) of the flattened `A`; see `functional.quantize_4bit`."""
    check_quantize(A, blocksize, quant_type, quant_storage)
    n, device = A.numel(), A.device
    blocks = (n + blocksize - 1) // blocksize
    if out is not None:
        check_buffer("out", out, quant_storage, storage_count(n, quant_storage), f"{n} codes, two a byte", A)
    if absmax is not None:
        check_buffer("absmax", absmax, torch.float32, blocks, f"{n} elements in blocks of {blocksize}", A)
    x = dense(A)
    codes = codes_target(n, quant_type, quant_storage, device, out, x)
    maxima = target(absmax, (blocks,), torch.float32, device, x)
    ordinal, queue = target_queue(device)
    if n and ordinal == PORTABLE:
        fourbit.quantize(x, quant_type, blocksize, codes, maxima)
    elif n:
        _native.quantize_4bit(
            x.data_ptr(),
            n,
            DTYPES[A.dtype],
            blocksize,
            QUANT_TYPES[quant_type],
            codes.data_ptr(),
            maxima.data_ptr(),
            ordinal,
            queue,
        )
    return deliver(codes, out), deliver(maxima, absmax)


def quantize_4bit_nested(
    A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (codes, absmax codes, nested absmax, offset): double quantization in one native call."""
    check_quantize(A, blocksize, quant_type, quant_storage)
    n, device = A.numel(), A.device
    if out is not None:
        check_buffer("out", out, quant_storage, storage_count(n, quant_storage), f"{n} codes, two a byte", A)
    blocks = block_count(n, blocksize)
    x = dense(A)
    codes = codes_target(n, quant_type, quant_storage, device, out, x)
    absmax_codes = torch.empty((blocks,), dtype=torch.uint8, device=device)
    nested_absmax = torch.empty((block_count(blocks, NESTED_BLOCKSIZE),), dtype=torch.float32, device=device)
    if not n:
        return deliver(codes, out), absmax_codes, nested_absmax, torch.zeros((), dtype=torch.float32, device=device)
    offset = torch.empty((), dtype=torch.float32, device=device)
    ordinal, queue = target_queue(device)
    if ordinal == PORTABLE:
        fourbit.quantize_nested(x, quant_type, blocksize, codes, absmax_codes, nested_absmax, offset)
        return deliver(codes, out), absmax_codes, nested_absmax, offset
    size = _native.nested_workspace_size(n, blocksize)
    workspace = torch.empty((size,), dtype=torch.uint8, device=device)
    _native.quantize_4bit_nested(
        x.data_ptr(),
        n,
        DTYPES[A.dtype],
        blocksize,
        QUANT_TYPES[quant_type],
        codes.data_ptr(),
        absmax_codes.data_ptr(),
        nested_absmax.data_ptr(),
        offset.data_ptr(),
        workspace.data_ptr(),
        ordinal,
        queue,
    )
    return deliver(codes, out), absmax_codes, nested_absmax, offset


def dequantize_4bit(
    A: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``code * absmax`` in `dtype` and `shape`."""
    check_dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype)
    check_absmax("absmax", absmax)
    n, device = prod(shape), A.device
    if out is not None:
        check_buffer("out", out, dtype, n, f"shape {tuple(shape)}", A)
    packed, maxima = dense(A), as_float32(absmax)
    values = target(out, shape, dtype, device, packed, maxima)
    ordinal, queue = target_queue(device)
    if n and ordinal == PORTABLE:
        fourbit.dequantize(packed, maxima, quant_type, blocksize, values)
    elif n:
        _native.dequantize_4bit(
            packed.data_ptr(),
            n,
            blocksize,
            QUANT_TYPES[quant_type],
            maxima.data_ptr(),
            values.data_ptr(),
            DTYPES[dtype],
            ordinal,
            queue,
        )
    return deliver(values, out)


def dequantize_4bit_nested(
    A: torch.Tensor,
    absmax: torch.Tensor,
    nested_code: torch.Tensor | None,
    nested_absmax: torch.Tensor,
    nested_blocksize: int,
    offset: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what `dequantize_4bit` does, from maxima that are 8-bit codes themselves."""
    check_dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype)
    check_nested(A, absmax, nested_code, nested_absmax, nested_blocksize, offset)
    n, device = prod(shape), A.device
    if out is not None:
        check_buffer("out", out, dtype, n, f"shape {tuple(shape)}", A)
    packed, absmax_codes = dense(A), dense(absmax)
    address, _code = code_address(nested_code)
    maxima, mean = as_float32(nested_absmax), as_float32(offset)
    values = target(out, shape, dtype, device, packed, absmax_codes, maxima, mean)
    ordinal, queue = target_queue(device)
    if n and ordinal == PORTABLE:
        decoded = fourbit.nested_maxima(absmax_codes, nested_code, maxima, nested_blocksize, mean)
        fourbit.dequantize(packed, decoded, quant_type, blocksize, values)
    elif n:
        _native.dequantize_4bit_nested(
            packed.data_ptr(),
            n,
            blocksize,
            QUANT_TYPES[quant_type],
            absmax_codes.data_ptr(),
            address,
            maxima.data_ptr(),
            nested_blocksize,
            mean.data_ptr(),
            values.data_ptr(),
            DTYPES[dtype],
            ordinal,
            queue,
        )
    return deliver(values, out)


def quantize_blockwise(
    A: torch.Tensor,
    code: torch.Tensor | None,
    blocksize: int,
    out: torch.Tensor | None = None,
    absmax: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes in the shape of `A`, absmax); no `code` means the signed dynamic map."""
    check_quantize_blockwise(A, code, blocksize)
    n, device = A.numel(), A.device
    blocks = block_count(n, blocksize)
    if out is not None:
        check_buffer("out", out, torch.uint8, n, "one code an element", A)
    if absmax is not None:
        check_buffer("absmax", absmax, torch.float32, blocks, f"{n} elements in blocks of {blocksize}", A)
    x = dense(A)
    address, _code = code_address(code)
    codes = target(out, A.shape, torch.uint8, device, x)
    maxima = target(absmax, (blocks,), torch.float32, device, x)
    ordinal, queue = target_queue(device)
    if n and (ordinal == PORTABLE or blocksize in LARGE_BLOCKSIZES):
        blockwise.quantize(x, tables.of(code, device), blocksize, codes, maxima)
    elif n:
        _native.quantize_blockwise(
            x.data_ptr(),
            n,
            DTYPES[A.dtype],
            blocksize,
            address,
            codes.data_ptr(),
            maxima.data_ptr(),
            ordinal,
            queue,
        )
    return deliver(codes, out), deliver(maxima, absmax)


def dequantize_blockwise(
    A: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor | None,
    blocksize: int,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``code[A] * absmax`` in `dtype` and the shape of `A`."""
    check_dequantize_blockwise(A, absmax, code, blocksize, dtype)
    n, device = A.numel(), A.device
    if out is not None:
        check_buffer("out", out, dtype, n, "one value a code", A)
    packed, maxima = dense(A), as_float32(absmax)
    address, _code = code_address(code)
    values = target(out, A.shape, dtype, device, packed, maxima)
    ordinal, queue = target_queue(device)
    if n and (ordinal == PORTABLE or blocksize in LARGE_BLOCKSIZES):
        blockwise.dequantize(packed, maxima, tables.of(code, device).values, blocksize, values)
    elif n:
        _native.dequantize_blockwise(
            packed.data_ptr(),
            n,
            blocksize,
            address,
            maxima.data_ptr(),
            values.data_ptr(),
            DTYPES[dtype],
            ordinal,
            queue,
        )
    return deliver(values, out)
