"""The layout in which bitsandbytes holds 4-bit weights for AVX512-BF16, to and from the ordinary one.

Nothing computes in it, since products read the ordinary layout at full speed. A weight that comes in it, with a state
that says so, is brought back for each product; one in a pickle is brought back as it is read.
"""

from __future__ import annotations

import copy

import torch

from fewbits import _native
from fewbits.functional import dequantize_blockwise, quantize_blockwise
from fewbits.quant_state import QuantState

_HALF = 32  # codes of a group in the low nibbles, and as many in the high ones


def has_avx512bf16() -> bool:
    """Return whether the CPU has AVX512-BF16. No weight needs to be repacked for it."""
    return "avx512bf16" in _native.cpu_info()["features"]


def _convert_weight_packed_for_cpu(
    qweight: torch.Tensor, quant_state: QuantState, block_n: int = 32
) -> tuple[torch.Tensor, QuantState]:
    """Repack a weight, and change its state to match: maxima as bfloat16, transposed, without double quantization."""
    state, shape = quant_state, quant_state.shape
    if shape is None or len(shape) != 2 or shape[0] % block_n or shape[1] % 2:
        raise ValueError(f"quant_state.shape: expected (a multiple of {block_n}, an even number), got {shape}")
    n, k = shape
    assert state.blocksize is not None
    if k % state.blocksize:
        raise ValueError(f"quant_state.shape: expected rows of whole blocks of {state.blocksize}, got {k}")
    extra = state.__dict__
    if qweight.dtype != torch.uint8:
        extra["original_storage_type"] = qweight.dtype
        qweight = qweight.view(torch.uint8)
    extra |= {
        "original_dtype": state.dtype,
        "original_nested": state.nested,
        "original_qshape": qweight.shape,
        "packing_format_for_cpu": True,
    }
    packed = qweight.reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(n // block_n, block_n, k // 2, 2)
    groups = codes.transpose(1, 2).reshape(-1, 2, _HALF)
    absmax = state.absmax
    if state.nested:
        assert state.offset is not None
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
        state.nested, state.state2, state.offset = False, None, None
    state.absmax = absmax.float().view(n, k // state.blocksize).T.to(torch.bfloat16).contiguous()
    state.dtype = torch.bfloat16
    return (groups[:, 1] << 4 | groups[:, 0]).view(n, k // 2), state


def _convert_weight_packed_for_cpu_inverse(
    packed_weight: torch.Tensor, quant_state: QuantState, block_n: int = 32
) -> tuple[torch.Tensor, QuantState]:
    """Bring a repacked weight and its state back. The maxima keep the rounding to bfloat16 that they have had."""
    state = quant_state
    extra = state.__dict__
    if not extra.get("packing_format_for_cpu"):
        raise ValueError("quant_state: expected that of a weight in the layout for the CPU, got another")
    if packed_weight.dtype != torch.uint8 or packed_weight.dim() != 2 or packed_weight.shape[0] % block_n:
        raise ValueError(
            f"packed_weight: expected torch.uint8 of shape (a multiple of {block_n}, K / 2), "
            f"got {packed_weight.dtype} of {tuple(packed_weight.shape)}"
        )
    n, half_k = packed_weight.shape
    groups = packed_weight.reshape(-1, _HALF)
    codes = torch.cat([groups & 15, groups >> 4], dim=1).view(n // block_n, half_k, block_n, 2)
    pairs = codes.transpose(1, 2).reshape(-1, 2)
    weight = (pairs[:, 0] << 4 | pairs[:, 1]).view(extra["original_qshape"])
    state.absmax = state.absmax.T.reshape(-1).float()
    if extra["original_nested"]:
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = quantize_blockwise(state.absmax - state.offset, blocksize=256)
        state.nested = True
    state.dtype = extra["original_dtype"]
    extra["packing_format_for_cpu"] = False
    storage = extra.get("original_storage_type")
    return weight if storage is None else weight.view(storage), state


def ordinary(packed_weight: torch.Tensor, quant_state: QuantState) -> tuple[torch.Tensor, QuantState]:
    """Return a repacked weight, transposed or not, in the ordinary layout, with a state of its own."""
    state = copy.copy(quant_state)
    state.__dict__["original_nested"] = False  # the maxima have been rounded once: not a second time
    assert state.shape is not None
    rows, columns = state.shape
    is_row = packed_weight.shape != (rows, columns // 2) or (2 * rows == columns and not packed_weight.is_contiguous())
    packed = packed_weight.t() if is_row else packed_weight
    return _convert_weight_packed_for_cpu_inverse(packed, state)
