"""Quantization kernels on raw addresses.

`device` is a CUDA ordinal and `queue` the raw handle of a stream of that device, or -1 and the number of CPU threads.
`dtype`: 0 float32, 1 float16, 2 bfloat16. `quant_type`: 0 nf4, 1 fp4. An address of 0 means "absent".
"""

from typing import Any, final

__all__ = [
    "Error",
    "Weight4bit",
    "__version__",
    "built_with_cuda",
    "codebook",
    "cpu_info",
    "dequantize_4bit",
    "dequantize_4bit_nested",
    "dequantize_4bit_panel",
    "dequantize_4bit_rows",
    "dequantize_blockwise",
    "driver_info",
    "images",
    "matmul_4bit",
    "matmul_4bit_workspace_size",
    "nested_workspace_size",
    "quantize_4bit",
    "quantize_4bit_nested",
    "quantize_blockwise",
]

__version__: str
built_with_cuda: bool

class Error(RuntimeError): ...

def quantize_blockwise(
    x: int, n: int, dtype: int, blocksize: int, code: int, codes: int, absmax: int, device: int, queue: int
) -> None: ...
def dequantize_blockwise(
    codes: int, n: int, blocksize: int, code: int, absmax: int, out: int, dtype: int, device: int, queue: int
) -> None: ...
def quantize_4bit(
    x: int, n: int, dtype: int, blocksize: int, quant_type: int, codes: int, absmax: int, device: int, queue: int
) -> None: ...
def quantize_4bit_nested(
    x: int,
    n: int,
    dtype: int,
    blocksize: int,
    quant_type: int,
    codes: int,
    absmax_codes: int,
    nested_absmax: int,
    offset: int,
    workspace: int,
    device: int,
    queue: int,
) -> None: ...
def nested_workspace_size(n: int, blocksize: int) -> int: ...
def dequantize_4bit(
    codes: int, n: int, blocksize: int, quant_type: int, absmax: int, out: int, dtype: int, device: int, queue: int
) -> None: ...
def dequantize_4bit_nested(
    codes: int,
    n: int,
    blocksize: int,
    quant_type: int,
    absmax_codes: int,
    nested_code: int,
    nested_absmax: int,
    nested_blocksize: int,
    offset: int,
    out: int,
    dtype: int,
    device: int,
    queue: int,
) -> None: ...
def matmul_4bit(
    x: int,
    m: int,
    dtype: int,
    codes: int,
    n: int,
    k: int,
    blocksize: int,
    quant_type: int,
    absmax: int,
    nested_code: int,
    nested_absmax: int,
    nested_blocksize: int,
    offset: int,
    bias: int,
    out: int,
    workspace: int,
    device: int,
    queue: int,
) -> bool: ...
def matmul_4bit_workspace_size(m: int, n: int, k: int, device: int) -> int: ...
def dequantize_4bit_panel(
    codes: int,
    n: int,
    k: int,
    blocksize: int,
    quant_type: int,
    absmax: int,
    nested_code: int,
    nested_absmax: int,
    nested_blocksize: int,
    offset: int,
    first_row: int,
    rows: int,
    first_column: int,
    columns: int,
    out: int,
    dtype: int,
    device: int,
    queue: int,
) -> None: ...
def dequantize_4bit_rows(
    codes: int,
    n: int,
    k: int,
    blocksize: int,
    quant_type: int,
    absmax: int,
    nested_code: int,
    nested_absmax: int,
    nested_blocksize: int,
    offset: int,
    indices: int,
    wide: bool,
    count: int,
    out: int,
    dtype: int,
    device: int,
    queue: int,
) -> None: ...

@final
class Weight4bit:
    def __new__(
        cls,
        codes: int,
        n: int,
        k: int,
        blocksize: int,
        quant_type: int,
        absmax: int,
        nested_code: int,
        nested_absmax: int,
        nested_blocksize: int,
        offset: int,
    ) -> Weight4bit: ...
    def matmul(
        self, x: int, m: int, dtype: int, bias: int, out: int, workspace: int, device: int, queue: int
    ) -> bool: ...

def codebook(name: str) -> list[float]: ...
def driver_info() -> dict[str, Any]: ...
def cpu_info() -> dict[str, Any]: ...
def images() -> list[str]: ...
