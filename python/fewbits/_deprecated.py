"""Functions of bitsandbytes that it has marked as deprecated or that concern its own paging: here for old code."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fewbits._int8_functional import int8_linear_matmul

__all__ = [
    "CUBLAS_Context",
    "GlobalPageManager",
    "batched_igemm",
    "check_matmul",
    "elementwise_func",
    "fill",
    "get_paged",
    "igemm",
    "prefetch_tensor",
]

FIRST_CUDA_DEVICE = torch.device("cuda", index=0)

_F = TypeVar("_F", bound=Callable[..., Any])


def _deprecated(instead: str) -> Callable[[_F], _F]:
    """Return a decorator that warns at every call. FutureWarning is shown to users, as bitsandbytes does."""

    def decorate(function: _F) -> _F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            warnings.warn(f"{function.__name__} is deprecated: use {instead}", FutureWarning, stacklevel=2)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


# ---- int8 products -------------------------------------------------------------------------------------------------


def _product_shape(
    A: torch.Tensor, B: torch.Tensor, transposed_A: bool, transposed_B: bool, expected_type: torch.dtype
) -> tuple[int, ...]:
    if A.dtype != expected_type or B.dtype != expected_type:
        raise TypeError(f"A, B: expected {expected_type}, got {A.dtype} and {B.dtype}")
    if (A.dim(), B.dim()) not in ((2, 2), (3, 2), (3, 3)):
        raise ValueError(f"A, B: expected 2 or 3 dimensions each, got {tuple(A.shape)} and {tuple(B.shape)}")
    *batch, rows, inner = A.mT.shape if transposed_A else A.shape
    *batch_B, inner_B, columns = B.mT.shape if transposed_B else B.shape
    if inner != inner_B or (batch_B and batch_B != batch):
        raise ValueError(
            f"A, B: expected shapes whose product exists, got {tuple(A.shape)} and {tuple(B.shape)} "
            f"with transposed_A={transposed_A} and transposed_B={transposed_B}"
        )
    return (*batch, rows, columns)


@_deprecated("torch's own checks")
def check_matmul(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None,
    transposed_A: bool,
    transposed_B: bool,
    expected_type: torch.dtype = torch.int8,
) -> tuple[int, ...]:
    """Return the shape of a product, or raise if there is none.

    .. deprecated:: 0.1

    Parameters
    ----------
    A, B : torch.Tensor
        Two or three dimensions each.
    out : torch.Tensor, optional
        Whose shape is returned in place of the product's.
    transposed_A, transposed_B : bool
        Whether the last two dimensions of a factor are exchanged.
    expected_type : torch.dtype
        Of both.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that is wrong.
    """
    shape = _product_shape(A, B, transposed_A, transposed_B, expected_type)
    return shape if out is None else tuple(out.shape)


def _igemm(
    A: torch.Tensor, B: torch.Tensor, out: torch.Tensor | None, transposed_A: bool, transposed_B: bool
) -> torch.Tensor:
    if out is not None and out.dim() == 2 and A.dim() == 3 == B.dim():  # a sum over batches, as a weight's gradient is
        return _igemm(A.flatten(0, 1), B.flatten(0, 1), out, True, False)
    shape = _product_shape(A, B, transposed_A, transposed_B, torch.int8)
    if out is not None and (tuple(out.shape) != shape or out.dtype != torch.int32 or out.device != A.device):
        raise ValueError(
            f"out: expected shape {shape} of torch.int32 on {A.device}, "
            f"got {tuple(out.shape)} of {out.dtype} on {out.device}"
        )
    A = A.mT if transposed_A else A
    B = B if transposed_B else B.mT  # rows are the output features, as int8_linear_matmul has them
    if B.dim() == 2:
        product = int8_linear_matmul(A.contiguous(), B.contiguous())
    else:
        pairs = zip(A.contiguous(), B.contiguous(), strict=True)
        parts = [int8_linear_matmul(a, b) for a, b in pairs]
        product = torch.stack(parts) if parts else A.new_zeros(shape, dtype=torch.int32)
    return product if out is None else out.copy_(product)


@_deprecated("int8_linear_matmul")
def igemm(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
) -> torch.Tensor:
    """Return the product of two int8 matrices, or batches of them, in int32.

    .. deprecated:: 0.1
        Use `int8_linear_matmul`.

    Parameters
    ----------
    A, B : torch.Tensor
        int8, two or three dimensions each; a `B` of two serves a whole batch of `A`.
    out : torch.Tensor, optional
        int32, the shape of the product: receives it.
    transposed_A, transposed_B : bool
        Whether the last two dimensions of a factor are exchanged.

    Returns
    -------
    torch.Tensor
        int32, or `out`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that is wrong.
    """
    return _igemm(A, B, out, transposed_A, transposed_B)


@_deprecated("int8_linear_matmul")
def batched_igemm(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
) -> torch.Tensor:
    """Return the products of two batches of int8 matrices, as `igemm`.

    .. deprecated:: 0.1
        Use `int8_linear_matmul`.

    Raises
    ------
    ValueError
        If there are not three dimensions on both sides.
    """
    if A.dim() != 3 or B.dim() != 3:
        raise ValueError(f"A, B: expected 3 dimensions each, got {tuple(A.shape)} and {tuple(B.shape)}")
    return _igemm(A, B, out, transposed_A, transposed_B)


class CUBLAS_Context:  # noqa: N801  (bitsandbytes' name)
    """Gives the handle of cuBLAS for a device. A singleton: see `get_instance`."""

    _instance: CUBLAS_Context | None = None

    def __init__(self) -> None:
        raise RuntimeError("CUBLAS_Context: expected a call of CUBLAS_Context.get_instance()")

    def initialize(self) -> None:
        """Forget all handles."""
        self.context: dict[int, ctypes.c_void_p] = {}

    @classmethod
    def get_instance(cls) -> CUBLAS_Context:
        """Return the one instance."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def get_context(self, device: torch.device) -> ctypes.c_void_p:
        """Return torch's own handle for a CUDA device."""
        if device.index not in self.context:
            with torch.cuda.device(device):
                self.context[device.index] = ctypes.c_void_p(torch.cuda.current_blas_handle())
        return self.context[device.index]


# ---- paged tensors: page-locked host memory, which the optimizers here move themselves ------------------------------


class GlobalPageManager:
    """Lists paged tensors. A singleton: see `get_instance`."""

    _instance: GlobalPageManager | None = None

    def __init__(self) -> None:
        raise RuntimeError("GlobalPageManager: expected a call of GlobalPageManager.get_instance()")

    def initialize(self) -> None:
        """Forget all tensors."""
        self.paged_tensors: list[torch.Tensor] = []

    @classmethod
    def get_instance(cls) -> GlobalPageManager:
        """Return the one instance."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def prefetch_all(self, to_cpu: bool = False) -> None:
        """Call `prefetch_tensor` for each tensor, the last one first."""
        for tensor in reversed(self.paged_tensors):
            prefetch_tensor(tensor, to_cpu)


def get_paged(
    *shape: int, dtype: torch.dtype = torch.float32, device: torch.device = FIRST_CUDA_DEVICE
) -> torch.Tensor:
    """Return zeros in page-locked host memory, which a GPU reads and writes at the speed of its bus.

    Parameters
    ----------
    *shape : int
        The sizes.
    dtype : torch.dtype
        Of the elements.
    device : torch.device
        The GPU that will use them.

    Returns
    -------
    torch.Tensor
        On the CPU, with the attributes ``is_paged`` (True) and ``page_deviceid``. Page-locked where there is CUDA.
    """
    values: Any = torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=torch.cuda.is_available())
    values.is_paged, values.page_deviceid = True, device.index
    tensor: torch.Tensor = values
    return tensor


def prefetch_tensor(A: torch.Tensor, to_cpu: bool = False) -> None:
    """Do nothing but look: page-locked memory has no pages to move ahead.

    Raises
    ------
    ValueError
        If the tensor is not from `get_paged`.
    """
    if not getattr(A, "is_paged", False):
        raise ValueError("A: expected a tensor from get_paged, got one without is_paged")


def elementwise_func(
    func_name: str, A: torch.Tensor, B: torch.Tensor | None, value: float, prefetch: bool = True
) -> None:
    """Change a tensor in place: ``"fill"`` with `value`, ``"arange"``, or ``"_mul"`` by `B`.

    Raises
    ------
    NotImplementedError
        For another name, or another dtype than float32 and (to fill) uint8.
    """
    known = {"fill": (torch.float32, torch.uint8), "arange": (torch.float32,), "_mul": (torch.float32,)}
    if A.dtype not in known.get(func_name, ()):
        raise NotImplementedError(f"func_name: expected one of {', '.join(known)}, got {func_name!r} for {A.dtype}")
    if func_name == "fill":
        A.fill_(value)
    elif func_name == "arange":
        A.copy_(torch.arange(A.numel(), dtype=A.dtype, device=A.device).view(A.shape))
    elif B is None:
        raise ValueError("B: expected a tensor to multiply by, got None")
    else:
        A.mul_(B)


def fill(A: torch.Tensor, value: float, device: torch.device | None = None, prefetch: bool = True) -> None:
    """Fill a float32 or uint8 tensor with a number."""
    elementwise_func("fill", A, None, value)


def _mul(A: torch.Tensor, B: torch.Tensor, device: torch.device | None = None) -> None:
    """Multiply a float32 tensor by another, in place."""
    elementwise_func("_mul", A, B, 0)
