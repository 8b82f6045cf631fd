"""Kernels of ``torch.ops.bitsandbytes``: fewbits' functions, with arguments in the order of its schemas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fewbits import functional as F
from fewbits import quant_state
from fewbits._states import dequantize_as
from fewbits.autograd import matmul_4bit

int8_scaled_mm = F.int8_scaled_mm
int8_mixed_scaled_mm = F.int8_mixed_scaled_mm
int8_vectorwise_quant = F.int8_vectorwise_quant
int8_linear_matmul = F.int8_linear_matmul
int8_vectorwise_dequant = F.int8_vectorwise_dequant


def into(kernel: Callable[..., torch.Tensor]) -> Callable[..., None]:
    """Return a kernel that writes what another one returns into its last argument."""

    def write(*args: Any) -> None:
        *inputs, out = args
        kernel(*inputs, out=out)

    return write


def int8_mm_dequant(
    A: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    return F.int8_mm_dequant(A, row_stats, col_stats, None, bias, dtype)


def int8_double_quant(
    A: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return F.int8_double_quant(A, threshold=threshold)


def quantize_4bit(
    A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    codes, state = F.quantize_4bit(A, blocksize=blocksize, quant_type=quant_type, quant_storage=quant_storage)
    return codes, state.absmax


def dequantize_4bit(
    A: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    state = quant_state.QuantState(absmax, torch.Size(shape), None, blocksize, quant_type, dtype)
    return dequantize_as(A, state, dtype, out)


def gemm_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None = None,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    state = quant_state.QuantState(absmax, torch.Size(shapeB), None, blocksize, quant_type, A.dtype)
    if absmax_8bit is not None:
        for name, value in (("absmax_code", absmax_code), ("absmax_offset", absmax_offset)):
            if value is None:
                raise ValueError(f"{name}: expected a tensor beside absmax_8bit, got None")
        assert absmax_offset is not None
        state2 = quant_state.QuantState(absmax, code=absmax_code, blocksize=256, dtype=torch.float32)
        state.absmax, state.state2, state.nested = absmax_8bit, state2, True
        state.offset = absmax_offset.to(torch.float32)
    return matmul_4bit(A, B, state, bias=bias)


def gemv_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    quant_type = _type_of(code)
    state = quant_state.QuantState(absmax, torch.Size(shapeB), None, blocksize, quant_type, A.dtype)
    if absmax.dim() == 2 and absmax.dtype == torch.bfloat16:  # transposed: by this, a repacked weight is known
        layout = {"original_dtype": A.dtype, "original_qshape": (B.numel(), 1), "packing_format_for_cpu": True}
        state.__dict__.update(layout)
    return matmul_4bit(A, B, state, out)


def _type_of(code: torch.Tensor) -> str:
    """Return which 4-bit type a table is of: the kernels know types, not tables."""
    for name in ("nf4", "fp4"):
        table = F.get_4bit_type(name, device=code.device)
        if code.shape == table.shape and torch.allclose(code.float(), table, rtol=0, atol=4e-3):
            return name
    raise ValueError(f"code: expected the 16 values of nf4 or fp4, got another tensor of shape {tuple(code.shape)}")


def quantize_blockwise(A: torch.Tensor, code: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes, state = F.quantize_blockwise(A, code=code, blocksize=blocksize)
    return codes, state.absmax


def dequantize_blockwise(
    A: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    state = quant_state.QuantState(absmax, code=code, blocksize=blocksize, dtype=dtype)
    return F.dequantize_blockwise(A, state, out=out)


def optimizer_update_32bit(
    optimizer_name: str,
    g: torch.Tensor,
    p: torch.Tensor,
    state1: torch.Tensor,
    state2: torch.Tensor | None,
    unorm_vec: torch.Tensor | None,
    max_unorm: float,
    param_norm: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    step: int,
    lr: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    F.optimizer_update_32bit(
        optimizer_name,
        g,
        p,
        state1,
        beta1,
        eps,
        step,
        lr,
        state2,
        beta2,
        beta3,
        alpha,
        weight_decay,
        gnorm_scale,
        unorm_vec,
        max_unorm,
        skip_zeros,
    )


optimizer_update_8bit_blockwise = F.optimizer_update_8bit_blockwise
