"""Kernels are in fewbits, and are registered by ``bitsandbytes._ops``."""

from fewbits._clib import lib
