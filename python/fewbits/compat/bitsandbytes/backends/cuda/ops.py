"""Kernels are in fewbits, and are registered by ``bitsandbytes._ops``. Others ask here which products are fused."""

import sys

import torch

from fewbits._clib import lib

_gemm_4bit_custom_max_m = sys.maxsize


def _gemm_4bit_use_custom_fn(device_index: int, dtype: torch.dtype, M: int, N: int, K: int) -> bool:
    """Return whether a product decodes the weight as it goes: all of them do."""
    return True
