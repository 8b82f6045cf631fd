"""The functions that the native library exports under bitsandbytes' C names, as ctypes sees them.

They take addresses as ``ctypes.c_void_p``, of the CPU's or a GPU's memory, and a raw stream for their work:

- ``cdequantize_blockwise_{fp32,fp16,bf16}``, and the same with ``_nf4`` and ``_fp4``: code, codes, absmax, out, block
  size, number of elements, stream
- ``cgemm_4bit_inference_naive_{fp32,fp16,bf16}``, for one row of A: rows of B, 1, k, A, B, absmax, the 16 values of nf4
  or fp4, out, three strides, block size, stream

Bad sizes and failed launches raise.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from fewbits import _native
from fewbits._cuda_specs import CUDASpecs

__all__ = ["NativeLibrary", "lib"]


class NativeLibrary:
    """The native library. An attribute is an exported function, or an AttributeError that names it.

    Parameters
    ----------
    lib : ctypes.CDLL, optional
        Another library in its place.

    Attributes
    ----------
    compiled_with_cuda : bool
        Whether the CUDA kernels are in it.
    """

    compiled_with_cuda: bool = bool(_native.built_with_cuda)

    def __init__(self, lib: ctypes.CDLL | None = None) -> None:
        self._lib = lib

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self._lib is None:
            path: str = _native.__file__
            self._lib = ctypes.PyDLL(path)  # loaded already: a handle, whose calls raise what goes wrong
        try:
            return getattr(self._lib, name)
        except AttributeError:
            raise AttributeError(f"fewbits exports no C function {name!r}") from None

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


lib = NativeLibrary()


# ---- bitsandbytes' own names: its several libraries are one here --------------------------------------------------


class CudaBNBNativeLibrary(NativeLibrary):
    """The native library of a build with CUDA."""


class XpuBNBNativeLibrary(NativeLibrary):
    """The native library of a build with XPU kernels, of which there is none."""


class ErrorHandlerMockBNBNativeLibrary(NativeLibrary):
    """What stands for a library that could not be loaded, of which there is none: its functions raise an error.

    Parameters
    ----------
    error_msg : str
        The error's words.
    """

    def __init__(self, error_msg: str) -> None:
        super().__init__()
        self.error_msg = error_msg

    def __getattr__(self, name: str) -> Any:
        def throw_on_call(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(self.error_msg)

        return throw_on_call


def get_native_library() -> NativeLibrary:
    """Return `lib`."""
    return lib


def get_cuda_bnb_library_path(cuda_specs: CUDASpecs) -> Path:
    """Return where the native library is, whatever CUDA there is."""
    return Path(_native.__file__)


def get_xpu_bnb_library_path() -> Path:
    """Return where the native library is; there are no kernels for XPU in it."""
    return Path(_native.__file__)


def get_available_cuda_binary_versions() -> list[str]:
    """Return the CUDA that kernels were compiled with: it serves all versions of the driver from 525."""
    return ["12.9"] if _native.built_with_cuda else []


def parse_cuda_version(version_str: str) -> str:
    """Return a version such as ``"129"`` with its dot, ``"12.9"``; other text as it is."""
    return f"{version_str[:-1]}.{version_str[-1]}" if version_str.isdigit() and len(version_str) > 1 else version_str
