"""What the operations accept: dtypes, block sizes, and checks that name the argument, the expected and the given."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
QUANT_TYPES = {"nf4": 0, "fp4": 1}
BLOCKSIZES = tuple(2**k for k in range(5, 13))
# Larger blocks, of 8-bit codes alone: no kernel has them, so that plain torch operations serve every device.
LARGE_BLOCKSIZES = tuple(2**k for k in range(13, 17))
NESTED_BLOCKSIZE = 256


def block_count(n: int, blocksize: int) -> int:
    return (n + blocksize - 1) // blocksize


def storage_count(n: int, quant_storage: torch.dtype) -> int:
    """Return how many `quant_storage` elements hold n 4-bit codes: no byte is cut off, the last one may be padded."""
    itemsize = quant_storage.itemsize
    return ((n + 1) // 2 + itemsize - 1) // itemsize


def check_tensor(name: str, tensor: object) -> None:
    """Raise unless `tensor` is a dense tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {tensor.layout}")


def check_floating(name: str, tensor: torch.Tensor) -> None:
    check_tensor(name, tensor)
    check_dtype(name, tensor.dtype)


def check_dtype(name: str, dtype: torch.dtype | None) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"{name}: expected float32, float16 or bfloat16, got {dtype}")


def check_blocksize(blocksize: int, name: str = "blocksize") -> None:
    if blocksize not in BLOCKSIZES or isinstance(blocksize, float):
        raise ValueError(f"{name}: expected a power of two from 32 to 4096, got {blocksize!r}")


def check_blocksize_8bit(blocksize: int) -> None:
    if blocksize not in BLOCKSIZES + LARGE_BLOCKSIZES or isinstance(blocksize, float):
        raise ValueError(f"blocksize: expected a power of two from 32 to 65536, got {blocksize!r}")


def check_quant_type(quant_type: str) -> None:
    if not isinstance(quant_type, str) or quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type: expected 'nf4' or 'fp4', got {quant_type!r}")


def check_quant_storage(quant_storage: torch.dtype) -> None:
    if not isinstance(quant_storage, torch.dtype):
        raise TypeError(f"quant_storage: expected a torch.dtype, got {quant_storage!r}")


def check_same_device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} and {other_name}: expected one device, got {name} on {tensor.device} "
            f"and {other_name} on {other.device}"
        )


def check_count(name: str, tensor: torch.Tensor, count: int, why: str) -> None:
    if tensor.numel() != count:
        raise ValueError(
            f"{name}: expected {count} elements ({why}), got {tensor.numel()} in shape {tuple(tensor.shape)}"
        )


def check_buffer(name: str, buffer: torch.Tensor, dtype: torch.dtype, count: int, why: str, A: torch.Tensor) -> None:
    """Raise unless `buffer` can take `count` results of `dtype` computed from `A`."""
    check_tensor(name, buffer)
    check_same_device(name, buffer, "A", A)
    if buffer.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, got {buffer.dtype}")
    check_count(name, buffer, count, why)
    if torch._debug_has_internal_overlap(buffer) == 1:
        raise ValueError(f"{name}: expected a tensor of distinct elements, got strides {tuple(buffer.stride())}")


def check_quantize(
    A: torch.Tensor, blocksize: int, quant_type: str | None = None, quant_storage: torch.dtype = torch.uint8
) -> None:
    check_floating("A", A)
    check_blocksize(blocksize)
    if quant_type is not None:
        check_quant_type(quant_type)
        check_quant_storage(quant_storage)


def check_quantize_blockwise(A: torch.Tensor, code: torch.Tensor | None, blocksize: int) -> None:
    check_floating("A", A)
    check_blocksize_8bit(blocksize)
    if code is not None:
        check_code("code", code)
        check_same_device("A", A, "code", code)


def check_dequantize_4bit(
    A: torch.Tensor, absmax: torch.Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> None:
    check_codes_4bit("A", A, absmax, blocksize, quant_type, shape)
    check_dtype("dtype", dtype)


def check_codes_4bit(
    name: str, A: torch.Tensor, absmax: torch.Tensor, blocksize: int, quant_type: str, shape: Sequence[int]
) -> None:
    check_tensor(name, A)
    check_tensor("absmax", absmax)
    check_blocksize(blocksize)
    check_quant_type(quant_type)
    check_same_device(name, A, "absmax", absmax)
    n = prod(shape)
    count = storage_count(n, A.dtype)
    if A.numel() != count:
        check_count(name, A, count, f"{n} codes, two a byte, in {A.dtype}")
    blocks = block_count(n, blocksize)
    if absmax.numel() != blocks:
        check_count("absmax", absmax, blocks, f"{n} elements in blocks of {blocksize}")


def check_nested(
    A: torch.Tensor,
    absmax: torch.Tensor,
    nested_code: torch.Tensor | None,
    nested_absmax: torch.Tensor,
    nested_blocksize: int,
    offset: torch.Tensor,
) -> None:
    if absmax.dtype != torch.uint8:
        raise ValueError(f"absmax: expected torch.uint8 with double quantization, got {absmax.dtype}")
    check_tensor("nested_absmax", nested_absmax)
    check_same_device("A", A, "nested_absmax", nested_absmax)
    check_absmax("nested_absmax", nested_absmax)
    check_blocksize(nested_blocksize, "nested_blocksize")
    blocks = block_count(absmax.numel(), nested_blocksize)
    check_count("nested_absmax", nested_absmax, blocks, f"{absmax.numel()} maxima in blocks of {nested_blocksize}")
    check_tensor("offset", offset)
    check_same_device("A", A, "offset", offset)
    check_count("offset", offset, 1, "the mean of the maxima")
    if nested_code is not None:
        check_code("nested_code", nested_code)
        check_same_device("A", A, "nested_code", nested_code)


def check_weight_4bit(
    B: torch.Tensor,
    absmax: torch.Tensor,
    nested_code: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    nested_blocksize: int,
    offset: torch.Tensor | None,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
) -> None:
    """Raise unless these are the codes and the scales of a matrix of `shape`."""
    if len(shape) != 2:
        raise ValueError(f"shape: expected two sizes (N, K), got {tuple(shape)}")
    check_codes_4bit("B", B, absmax, blocksize, quant_type, shape)
    if nested_absmax is None:
        check_absmax("absmax", absmax)
    elif offset is None:
        raise ValueError("offset: expected a tensor beside nested_absmax, got None")
    else:
        check_nested(B, absmax, nested_code, nested_absmax, nested_blocksize, offset)


def check_matmul_4bit(
    name: str,
    A: torch.Tensor,
    dim: int,
    B: torch.Tensor,
    absmax: torch.Tensor,
    nested_code: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    nested_blocksize: int,
    offset: torch.Tensor | None,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    bias: torch.Tensor | None,
) -> None:
    """Raise unless the last size of `A` fits size `dim` of the weight, and the bias the other one."""
    check_tensor(name, A)
    if not A.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point dtype, got {A.dtype}")
    check_same_device(name, A, "B", B)
    check_weight_4bit(B, absmax, nested_code, nested_absmax, nested_blocksize, offset, blocksize, quant_type, shape)
    if A.dim() == 0 or A.shape[-1] != shape[dim]:
        raise ValueError(
            f"{name}: expected a last size of {shape[dim]} for a weight of {tuple(shape)}, got {tuple(A.shape)}"
        )
    if bias is not None:
        check_tensor("bias", bias)
        check_same_device(name, A, "bias", bias)
        if bias.shape != (shape[0],) or bias.dtype != A.dtype:
            raise ValueError(
                f"bias: expected shape ({shape[0]},) of {A.dtype}, got {tuple(bias.shape)} of {bias.dtype}"
            )


def check_rows(
    indices: torch.Tensor,
    B: torch.Tensor,
    absmax: torch.Tensor,
    nested_code: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    nested_blocksize: int,
    offset: torch.Tensor | None,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> None:
    check_tensor("indices", indices)
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices: expected torch.int32 or torch.int64, got {indices.dtype}")
    check_dtype("dtype", dtype)
    check_same_device("indices", indices, "B", B)
    check_weight_4bit(B, absmax, nested_code, nested_absmax, nested_blocksize, offset, blocksize, quant_type, shape)


def check_absmax(name: str, absmax: torch.Tensor) -> None:
    if not absmax.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point dtype, got {absmax.dtype}")


def check_code(name: str, code: torch.Tensor) -> None:
    check_tensor(name, code)
    if not code.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point dtype, got {code.dtype}")
    check_count(name, code, 256, "one value a code")


def check_dequantize_blockwise(
    A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor | None, blocksize: int, dtype: torch.dtype
) -> None:
    check_tensor("A", A)
    if A.dtype != torch.uint8:
        raise ValueError(f"A: expected torch.uint8 codes, got {A.dtype}")
    check_tensor("absmax", absmax)
    check_same_device("A", A, "absmax", absmax)
    check_absmax("absmax", absmax)
    check_blocksize_8bit(blocksize)
    check_dtype("dtype", dtype)
    n = A.numel()
    check_count("absmax", absmax, block_count(n, blocksize), f"{n} elements in blocks of {blocksize}")
    if code is not None:
        check_code("code", code)
        check_same_device("A", A, "code", code)
