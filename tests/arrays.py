"""Between torch tensors and the NumPy arrays that ``oracle.py`` reads, and comparison by bits."""

from __future__ import annotations

import numpy as np
import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Flatten a tensor to the oracle's convention: bfloat16 as ``uint16`` bits, everything else as itself."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.int16).numpy().view(np.uint16) if flat.dtype == torch.bfloat16 else flat.numpy()


def as_tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of ``as_numpy``."""
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def _is_nan(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint16:  # bfloat16
        return (array & 0x7FFF) > 0x7F80
    return np.isnan(array) if array.dtype.kind == "f" else np.zeros(array.shape, dtype=bool)


def assert_same_bits(got: np.ndarray | torch.Tensor, expected: np.ndarray | torch.Tensor, what: str) -> None:
    """Fail unless two arrays hold the same bits; any NaN equals any NaN. The message shows the first differences."""
    __tracebackhide__ = True
    left = as_numpy(got) if isinstance(got, torch.Tensor) else got.reshape(-1)
    right = as_numpy(expected) if isinstance(expected, torch.Tensor) else expected.reshape(-1)
    assert left.dtype == right.dtype, f"{what}: dtype {left.dtype}, expected {right.dtype}"
    assert left.size == right.size, f"{what}: {left.size} elements, expected {right.size}"
    differ = _bits(left) != _bits(right)
    differ &= ~(_is_nan(left) & _is_nan(right))
    if differ.any():
        where = np.flatnonzero(differ)
        rows = "\n".join(f"  [{i}] got {left[i]!r}, expected {right[i]!r}" for i in where[:8])
        raise AssertionError(f"{what}: {where.size} of {left.size} elements differ\n{rows}")


def sample(n: int = 300, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, generator=generator).to(device, dtype)
