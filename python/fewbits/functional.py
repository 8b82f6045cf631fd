"""Blockwise quantization as functions, with the names, arguments and results of ``bitsandbytes.functional``.

A tensor is flattened and cut into blocks of `blocksize` consecutive elements. A block is stored as its largest
magnitude (``absmax``, float32) and, for each element, the code whose table value is nearest to ``x / absmax``: 8 bits,
or two 4-bit codes a byte with the first in the high nibble. Dequantizing multiplies: ``code[codes] * absmax``, in
float32, rounded once to the output dtype. NaN counts as 0 and infinity as the largest float32. CPU and CUDA give the
same bytes, and so do other devices where their float32 arithmetic is IEEE's.

The ``int8_`` functions, of LLM.int8(), have one scale a row instead; see `int8_vectorwise_quant`.

Codes are integers, so nothing here has a gradient. Any shape, stride and number of elements is taken. Every argument is
checked before anything is written.
"""

from __future__ import annotations

from typing import Any

import torch

from fewbits import _checks, _direct
from fewbits._clib import lib
from fewbits._deprecated import (
    CUBLAS_Context,
    GlobalPageManager,
    batched_igemm,
    check_matmul,
    elementwise_func,
    fill,
    get_paged,
    igemm,
    prefetch_tensor,
)
from fewbits._int8_functional import (
    int8_double_quant,
    int8_linear_matmul,
    int8_mixed_scaled_mm,
    int8_mm_dequant,
    int8_scaled_mm,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from fewbits._optim_functional import optimizer_update_8bit_blockwise, optimizer_update_32bit
from fewbits._pointers import get_ptr, is_on_gpu
from fewbits._states import backend, check_state, dequantize_as, nested_parts
from fewbits.autograd import matmul_4bit
from fewbits.codebook import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    get_4bit_type,
    shared_table,
)
from fewbits.quant_state import QuantState
from fewbits.utils import pack_dict_to_tensor, unpack_tensor_to_dict

__all__ = [
    "CUBLAS_Context",
    "GlobalPageManager",
    "QuantState",
    "batched_igemm",
    "check_matmul",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "elementwise_func",
    "fill",
    "gemv_4bit",
    "get_4bit_type",
    "get_paged",
    "get_ptr",
    "igemm",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mixed_scaled_mm",
    "int8_mm_dequant",
    "int8_scaled_mm",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "is_on_gpu",
    "lib",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "pack_dict_to_tensor",
    "prefetch_tensor",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "unpack_tensor_to_dict",
]

C = 127.0  # the largest code of an int8 row


def quantize_4bit(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """Quantize a tensor to 4 bits an element.

    Parameters
    ----------
    A : torch.Tensor
        float32, float16 or bfloat16, any shape, on any device.
    absmax : torch.Tensor, optional
        float32, one element a block: receives the block maxima.
    out : torch.Tensor, optional
        `quant_storage`, as many elements as the result: receives the codes.
    blocksize : int, optional
        A power of two from 32 to 4096; 64 by default.
    compress_statistics : bool
        Double quantization (Dettmers et al. 2023, QLoRA, §3): the block maxima, less their mean, are quantized to
        8 bits in blocks of 256 with the signed dynamic map.
    quant_type : str
        ``"nf4"`` (QLoRA, appendix E) or ``"fp4"``.
    quant_storage : torch.dtype
        Dtype under which the bytes are held. They are viewed, never converted.

    Returns
    -------
    codes : torch.Tensor
        Shape ``(k, 1)`` of `quant_storage` with ``k = ceil(ceil(n / 2) / itemsize)``, or `out`. Codes of 0.0 fill it.
    state : QuantState
        What `dequantize_4bit` needs.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that is wrong.

    Examples
    --------
    >>> codes, state = quantize_4bit(torch.tensor([-1.0, 1.0, 0.0, 0.5]), quant_type="nf4")
    >>> codes.tolist(), state.absmax.tolist()
    ([[15], [124]], [1.0])
    """
    if blocksize is None:
        blocksize = 64
    if out is None and absmax is None and not compress_statistics:
        done = _direct.quantize_4bit(A, blocksize, quant_type, quant_storage)
        if done is not None:
            return done
    _checks.check_quantize(A, blocksize, quant_type, quant_storage)
    run: Any = backend(A, absmax, out)
    code = shared_table(quant_type, A.device)
    if not compress_statistics:
        codes, maxima = run.quantize_4bit(A, blocksize, quant_type, quant_storage, out, absmax)
        return codes, QuantState(maxima, A.shape, code, blocksize, quant_type, A.dtype)
    if absmax is not None:  # the fused kernel does not keep the plain maxima
        run.quantize_4bit(A, blocksize, quant_type, quant_storage, out, absmax)
    codes, absmax_codes, nested_absmax, offset = run.quantize_4bit_nested(A, blocksize, quant_type, quant_storage, out)
    state2 = QuantState(
        nested_absmax,
        code=shared_table("dynamic", A.device),
        blocksize=_checks.NESTED_BLOCKSIZE,
        dtype=torch.float32,
    )
    return codes, QuantState(absmax_codes, A.shape, code, blocksize, quant_type, A.dtype, offset, state2)


def dequantize_4bit(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> torch.Tensor:
    """Return the tensor that 4-bit codes stand for.

    Parameters
    ----------
    A : torch.Tensor
        Codes as `quantize_4bit` returns them, in any storage dtype and shape, or transposed.
    quant_state : QuantState, optional
        What `quantize_4bit` returned with them. With it, `absmax`, `blocksize` and `quant_type` are not looked at.
    absmax : torch.Tensor, optional
        Floating point, one element a block. Needed without a `quant_state`.
    out : torch.Tensor, optional
        Receives the values. Needed without a `quant_state`, for its shape and dtype; with one it must have the state's.
    blocksize : int, optional
        64 by default.
    quant_type : str
        ``"nf4"`` or ``"fp4"``.

    Returns
    -------
    torch.Tensor
        Shape and dtype of the state, or `out`. Codes given as a row (``codes.t()``) give the transposed view.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that is wrong.

    Examples
    --------
    >>> dequantize_4bit(*quantize_4bit(torch.tensor([-1.0, 1.0, 0.0, 0.25]), quant_type="fp4")).tolist()
    [-1.0, 1.0, 0.0, 0.25]
    """
    if type(quant_state) is QuantState:
        done = _direct.dequantize_4bit(A, quant_state, quant_state.dtype, out)
        if done is not None:
            return done if A.shape[:1] != (1,) else _as_given(A, done)  # codes of no dimension are a single byte
    if quant_state is None:
        if absmax is None or out is None:
            missing = "absmax" if absmax is None else "out"
            raise ValueError(f"{missing}: expected a tensor when there is no quant_state, got None")
        _checks.check_floating("out", out)
        state = QuantState(absmax, out.shape, None, 64 if blocksize is None else blocksize, quant_type, out.dtype)
    else:
        state = check_state(quant_state)
    _checks.check_tensor("A", A)
    dtype, shape = state.dtype, state.shape
    assert dtype is not None
    assert shape is not None
    if out is not None:
        _checks.check_tensor("out", out)
        if out.shape != tuple(shape):
            raise ValueError(f"out: expected shape {tuple(shape)}, got {tuple(out.shape)}")
    return _as_given(A, dequantize_as(A, state, dtype, out))


def _as_given(A: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the values, transposed if the codes came as a row."""
    # A single storage element is a row and a column: it is taken as the column that quantize_4bit returns.
    is_row = A.dim() == 2 and A.shape[0] == 1 and A.shape[1] != 1
    return values.t() if is_row and values.dim() <= 2 else values


def quantize_fp4(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """Call `quantize_4bit` with ``quant_type="fp4"``."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def quantize_nf4(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """Call `quantize_4bit` with ``quant_type="nf4"``."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def dequantize_fp4(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
) -> torch.Tensor:
    """Call `dequantize_4bit` with ``quant_type="fp4"``."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def dequantize_nf4(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
) -> torch.Tensor:
    """Call `dequantize_4bit` with ``quant_type="nf4"``."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def gemv_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> torch.Tensor:
    """Return ``A @ W.T`` for a weight `W` held in 4 bits.

    `fewbits.matmul_4bit` under the name that decode loops call. Any number of rows is taken, not just one.

    Parameters
    ----------
    A : torch.Tensor
        Floating point, shape ``(..., K)``.
    B : torch.Tensor
        The codes of `W`, as `quantize_4bit` returns them or transposed.
    out : torch.Tensor, optional
        Shape ``(..., N)``, dtype of `A`: receives the product.
    transposed_A, transposed_B : bool
        Not looked at: the shapes in `state` say what is multiplied.
    state : QuantState
        The state of `B`; its shape is ``(N, K)``.

    Returns
    -------
    torch.Tensor
        Shape ``(..., N)``, dtype of `A`, or `out`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that is wrong.

    Examples
    --------
    >>> codes, state = quantize_4bit(torch.ones(2, 32), quant_type="nf4")
    >>> gemv_4bit(torch.ones(1, 32), codes.t(), state=state).tolist()
    [[32.0, 32.0]]
    """
    if state is None:
        raise ValueError("state: expected the state of B, got None")
    return matmul_4bit(A, B, state, out)


def quantize_blockwise(
    A: torch.Tensor,
    code: torch.Tensor | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[torch.Tensor, QuantState]:
    """Quantize a tensor to 8 bits an element.

    Parameters
    ----------
    A : torch.Tensor
        float32, float16 or bfloat16, any shape, on any device.
    code : torch.Tensor, optional
        256 floating-point values in [-1, 1], in any order; the signed dynamic map by default. Moved to where `A` is.
    absmax : torch.Tensor, optional
        float32, one element a block: receives the block maxima.
    out : torch.Tensor, optional
        uint8, as many elements as `A`: receives the codes.
    blocksize : int
        A power of two from 32 to 65536. Above 4096, plain torch operations take the place of kernels.
    nested : bool
        Whether the maxima, less their mean, are quantized in turn, with the signed dynamic map and the same block size.

    Returns
    -------
    codes : torch.Tensor
        uint8 in the shape of `A`, or `out`.
    state : QuantState
        What `dequantize_blockwise` needs.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that is wrong.

    Examples
    --------
    >>> codes, state = quantize_blockwise(torch.tensor([0.0, 2.0]))
    >>> codes.tolist(), state.absmax.tolist()
    ([127, 255], [2.0])
    """
    if absmax is None and out is None and not nested:
        done = _direct.quantize_blockwise(A, code, blocksize)
        if done is not None:
            return done
    if nested:
        _checks.check_quantize(A, blocksize)
    else:
        _checks.check_quantize_blockwise(A, None, blocksize)
    code = _own_code(code, A.device)
    run: Any = backend(A, code, absmax, out)
    codes, maxima = run.quantize_blockwise(A, code, blocksize, out, absmax)
    if not nested:
        return codes, QuantState(maxima, code=code, blocksize=blocksize, dtype=A.dtype)
    # The mean of the maxima is a sum of a fixed shape, the same on every device, which the fused 4-bit kernel computes.
    offset = run.quantize_4bit_nested(A, blocksize, "nf4", torch.uint8)[3]
    absmax_codes, state2 = quantize_blockwise(maxima - offset, blocksize=blocksize)
    return codes, QuantState(absmax_codes, code=code, blocksize=blocksize, dtype=A.dtype, offset=offset, state2=state2)


def dequantize_blockwise(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    code: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> torch.Tensor:
    """Return the tensor that 8-bit codes stand for.

    Parameters
    ----------
    A : torch.Tensor
        uint8 codes, any shape.
    quant_state : QuantState, optional
        What `quantize_blockwise` returned with them. With it, `absmax`, `code` and `blocksize` are not looked at.
    absmax : torch.Tensor, optional
        Floating point, one element a block. Needed without a `quant_state`.
    code : torch.Tensor, optional
        256 floating-point values; the signed dynamic map by default.
    out : torch.Tensor, optional
        Receives the values; the state's dtype and the shape of `A`.
    blocksize : int
        A power of two from 32 to 65536. Above 4096, plain torch operations take the place of kernels.
    nested : bool
        Not looked at: a `quant_state` knows.

    Returns
    -------
    torch.Tensor
        In the shape of `A` and the state's dtype (without a state that of `out`, else float32), or `out`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that is wrong.

    Examples
    --------
    >>> dequantize_blockwise(*quantize_blockwise(torch.tensor([0.0, 2.0]))).tolist()
    [0.0, 2.0]
    """
    if type(quant_state) is QuantState:
        done = _direct.dequantize_blockwise(A, quant_state, out)
        if done is not None:
            return done
    _checks.check_tensor("A", A)
    if out is not None:
        _checks.check_floating("out", out)
        if out.shape != A.shape:
            raise ValueError(f"out: expected shape {tuple(A.shape)}, got {tuple(out.shape)}")
    dtype: torch.dtype | None
    if quant_state is None:
        if absmax is None:
            raise ValueError("absmax: expected a tensor when there is no quant_state, got None")
        _checks.check_tensor("absmax", absmax)
        dtype = torch.float32 if out is None else out.dtype
    elif not isinstance(quant_state, QuantState):
        raise TypeError(f"quant_state: expected a QuantState, got {type(quant_state).__name__}")
    else:
        absmax, code, dtype = quant_state.absmax, quant_state.code, quant_state.dtype
        if quant_state.blocksize is None:
            raise ValueError("quant_state.blocksize: expected a power of two from 32 to 65536, got None")
        blocksize = quant_state.blocksize
        if quant_state.nested:
            offset, state2 = nested_parts(quant_state, A.device)
            absmax = dequantize_blockwise(absmax, state2) + offset
    code = _own_code(code, A.device)
    run: Any = backend(A, absmax, code, out)
    values: torch.Tensor = run.dequantize_blockwise(A, absmax, code, blocksize, dtype, out)
    return values


def _own_code(code: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    if code is None:
        return shared_table("dynamic", device)
    _checks.check_code("code", code)
    return code.to(device)
