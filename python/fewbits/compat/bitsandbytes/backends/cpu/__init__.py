"""Kernels are in fewbits."""

from . import ops
