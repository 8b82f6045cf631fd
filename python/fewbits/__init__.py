"""Quantized tensors and models for PyTorch: 8 and 4 bits, with the API of bitsandbytes."""

from typing import TYPE_CHECKING, Any

from fewbits import functional, nn
from fewbits._native import __version__
from fewbits.autograd import MatmulLtState, matmul, matmul_4bit
from fewbits.compat import install_as_bitsandbytes

if TYPE_CHECKING:
    from fewbits import optim

__all__ = [
    "MatmulLtState",
    "__version__",
    "functional",
    "install_as_bitsandbytes",
    "matmul",
    "matmul_4bit",
    "nn",
    "optim",
]


def __getattr__(name: str) -> Any:
    """Import the optimizers when they are first asked for: not everyone trains."""
    if name == "optim":
        from importlib import import_module

        return import_module("fewbits.optim")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
