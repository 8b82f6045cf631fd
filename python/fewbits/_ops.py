"""The operations as torch sees them: schemas, shapes for tracing, and kernels, in the namespace ``fewbits``.

``torch.compile``, ``torch.export``, fake tensors and dispatch modes go through these; a plain eager call goes straight
to `_launch`, whose functions are the kernels here. The functions at the end have its signatures and call the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fewbits import _checks, _launch

library = torch.library.Library("fewbits", "DEF")

_DEQUANTIZE_4BIT = "Tensor A, Tensor absmax, int blocksize, str quant_type, SymInt[] shape, ScalarType dtype"
_DEQUANTIZE_4BIT_NESTED = (
    "Tensor A, Tensor absmax, Tensor? nested_code, Tensor nested_absmax, int nested_blocksize, Tensor offset, "
    "int blocksize, str quant_type, SymInt[] shape, ScalarType dtype"
)
_DEQUANTIZE_BLOCKWISE = "Tensor A, Tensor absmax, Tensor? code, int blocksize, ScalarType dtype"


def register(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    # The last one is for every other device: what a kernel calls is chosen by the tensors' device (see `_backend`).
    for key in ("CPU", "CUDA", "CompositeExplicitAutograd"):
        library.impl(name, kernel, key)
    torch.library.register_fake(f"fewbits::{name}", fake, lib=library)


def _register_with_out(
    name: str, arguments: str, kernel: Callable[..., torch.Tensor], fake: Callable[..., Any]
) -> None:
    def out_kernel(*args: Any, out: torch.Tensor) -> None:
        kernel(*args, out=out)

    def out_fake(*args: Any, out: torch.Tensor) -> None:
        values = fake(*args)
        _checks.check_buffer("out", out, values.dtype, values.numel(), f"shape {tuple(values.shape)}", args[0])

    register(name, f"({arguments}) -> Tensor", kernel, fake)
    register(f"{name}.out", f"({arguments}, *, Tensor(a!) out) -> ()", out_kernel, out_fake)


def _fake_quantize_4bit(
    A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    _checks.check_quantize(A, blocksize, quant_type, quant_storage)
    n = A.numel()
    codes = A.new_empty((_checks.storage_count(n, quant_storage), 1), dtype=quant_storage)
    return codes, A.new_empty((_checks.block_count(n, blocksize),), dtype=torch.float32)


def _fake_quantize_4bit_nested(
    A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, absmax = _fake_quantize_4bit(A, blocksize, quant_type, quant_storage)
    blocks = absmax.numel()
    nested_blocks = _checks.block_count(blocks, _checks.NESTED_BLOCKSIZE)
    return (
        codes,
        A.new_empty((blocks,), dtype=torch.uint8),
        A.new_empty((nested_blocks,), dtype=torch.float32),
        A.new_empty((), dtype=torch.float32),
    )


def _fake_dequantize_4bit(
    A: torch.Tensor, absmax: torch.Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    _checks.check_dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype)
    return A.new_empty(shape, dtype=dtype)


def _fake_dequantize_4bit_nested(
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
) -> torch.Tensor:
    values = _fake_dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype)
    _checks.check_nested(A, absmax, nested_code, nested_absmax, nested_blocksize, offset)
    return values


def _fake_quantize_blockwise(
    A: torch.Tensor, code: torch.Tensor | None, blocksize: int
) -> tuple[torch.Tensor, torch.Tensor]:
    _checks.check_quantize_blockwise(A, code, blocksize)
    codes = A.new_empty(A.shape, dtype=torch.uint8)
    return codes, A.new_empty((_checks.block_count(A.numel(), blocksize),), dtype=torch.float32)


def _fake_dequantize_blockwise(
    A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor | None, blocksize: int, dtype: torch.dtype
) -> torch.Tensor:
    _checks.check_dequantize_blockwise(A, absmax, code, blocksize, dtype)
    return A.new_empty(A.shape, dtype=dtype)


register(
    "quantize_4bit",
    "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    _launch.quantize_4bit,
    _fake_quantize_4bit,
)
register(
    "quantize_4bit_nested",
    "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch.quantize_4bit_nested,
    _fake_quantize_4bit_nested,
)
_register_with_out("dequantize_4bit", _DEQUANTIZE_4BIT, _launch.dequantize_4bit, _fake_dequantize_4bit)
_register_with_out(
    "dequantize_4bit_nested", _DEQUANTIZE_4BIT_NESTED, _launch.dequantize_4bit_nested, _fake_dequantize_4bit_nested
)
register(
    "quantize_blockwise",
    "(Tensor A, Tensor? code, int blocksize) -> (Tensor, Tensor)",
    _launch.quantize_blockwise,
    _fake_quantize_blockwise,
)
_register_with_out(
    "dequantize_blockwise", _DEQUANTIZE_BLOCKWISE, _launch.dequantize_blockwise, _fake_dequantize_blockwise
)


# ---- the same signatures as `_launch`, through the dispatcher ------------------------------------------------------
# Codes are integers: nothing here has a gradient, and the inputs are detached so that autograd is not asked for one.


def _store(results: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor | None], A: torch.Tensor) -> None:
    """Copy results into the caller's buffers, once all of the buffers are known to fit."""
    for name, result, buffer in zip(("out", "absmax")[: len(results)], results, buffers, strict=True):
        if buffer is not None:
            _checks.check_buffer(name, buffer, result.dtype, result.numel(), "the size of the result", A)
    for result, buffer in zip(results, buffers, strict=True):
        if buffer is not None:
            buffer.copy_(result.view(buffer.shape))


def quantize_4bit(
    A: torch.Tensor,
    blocksize: int,
    quant_type: str,
    quant_storage: torch.dtype,
    out: torch.Tensor | None = None,
    absmax: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    codes, maxima = torch.ops.fewbits.quantize_4bit.default(A.detach(), blocksize, quant_type, quant_storage)
    _store((codes, maxima), (out, absmax), A)
    return codes if out is None else out, maxima if absmax is None else absmax


def quantize_4bit_nested(
    A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, absmax_codes, nested_absmax, offset = torch.ops.fewbits.quantize_4bit_nested.default(
        A.detach(), blocksize, quant_type, quant_storage
    )
    _store((codes,), (out,), A)
    return codes if out is None else out, absmax_codes, nested_absmax, offset


def dequantize_4bit(
    A: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    return _dequantize("dequantize_4bit", (A.detach(), absmax, blocksize, quant_type, shape, dtype), out)


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
    nested = (nested_code, nested_absmax, nested_blocksize, offset)
    return _dequantize(
        "dequantize_4bit_nested", (A.detach(), absmax, *nested, blocksize, quant_type, shape, dtype), out
    )


def quantize_blockwise(
    A: torch.Tensor,
    code: torch.Tensor | None,
    blocksize: int,
    out: torch.Tensor | None = None,
    absmax: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    codes, maxima = torch.ops.fewbits.quantize_blockwise.default(A.detach(), code, blocksize)
    _store((codes, maxima), (out, absmax), A)
    return codes if out is None else out, maxima if absmax is None else absmax


def dequantize_blockwise(
    A: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor | None,
    blocksize: int,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    return _dequantize("dequantize_blockwise", (A.detach(), absmax, code, blocksize, dtype), out)


def _dequantize(name: str, arguments: tuple[Any, ...], out: torch.Tensor | None) -> torch.Tensor:
    op = getattr(torch.ops.fewbits, name)
    if out is None:
        values: torch.Tensor = op.default(*arguments)
        return values
    op.out(*arguments, out=out)
    return out
