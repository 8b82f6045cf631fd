"""Kernels are in fewbits."""
