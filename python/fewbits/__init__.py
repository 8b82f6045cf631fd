"""Quantized tensors and models for PyTorch: 8 and 4 bits, with the API of bitsandbytes."""

from fewbits import functional, nn, optim
from fewbits._native import __version__
from fewbits.autograd import matmul_4bit

__all__ = ["__version__", "functional", "matmul_4bit", "nn", "optim"]
