"""Quantization kernels on raw addresses.

`device` is a CUDA ordinal and `queue` the raw handle of a stream of that device, or -1 and the number of CPU threads.
`dtype`: 0 float32, 1 float16, 2 bfloat16. `quant_type`: 0 nf4, 1 fp4. An address of 0 means "absent".

LLM.int8(): `codes` int8[m][k], `row_scale` float32[m], `mask` uint32[ceil(k / 32)], a bit for each column that holds an
outlier: set, never cleared. `weight` int8[n][k], `col_scale` float32[n]. A `threshold` of 0 means no outliers.

Tables of the `optim_` functions, which lie on the device:

- `tensors`: int64[count][OPTIM_FIELDS]: addresses of p, state1, state2, state3, absmax1, absmax2; n; address of the
  int64 step counter; first tile; index into the groups; ordinal of the tensor; offset of this piece within it, a
  multiple of 256; 1 where the entry advances its counter; three spare. `gradients`: int64[count], their addresses.
- `tiles`: int32[tile_count], the entry of each tile of OPTIM_TILE elements.
- `groups` (host): records of sixteen 8-byte words: lr, address of a float32 lr or 0, beta1, beta2, beta3, alpha,
  t_alpha, t_beta3, eps, weight_decay, dampening, lr_decay, trust (float64 all but the address), then flags: 1 decoupled
  weight decay, 2 amsgrad, 4 nesterov, 8 centered, 16 bias correction; two spare.
- `workspace`: OPTIM_WORKSPACE bytes, zeroed once (CUDA). `control`: float32 factor of the gradients, uint32 that is not
  0 where the step is left out.
- `partials`: float64, one a tile (`optim_norms` of kind 0) or two (kind 1). `ratios`: float32[count].

`Whereabouts` remembers where the parameters of an optimizer are that take part in a step, what their gradients are
like, and where `sentinels` are, one a member. `of` is None where `tensor`, a class, does not offer DLPack's exchange
API, or a tensor is not as `find` wants them. `find` gives the addresses of the members' gradients (int64) and the
gradients if all is as it was: the parameters of the groups are the same objects, without gaps, at the same `places`;
who took no part has no gradient; gradients have no gaps, and dtype, device and number of elements as before; sentinels
are where they were. None says that something is different or not known. Negation that has not been carried out is not
seen.
"""

from typing import Any, final

__all__ = [
    "OPTIM_FAMILIES",
    "OPTIM_FIELDS",
    "OPTIM_GROUPS",
    "OPTIM_TILE",
    "OPTIM_WORKSPACE",
    "Error",
    "Int8Weight",
    "Weight4bit",
    "Whereabouts",
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
    "int8_dequantize_panel",
    "int8_linear",
    "int8_linear_workspace_size",
    "int8_matmul",
    "int8_matmul_int32",
    "int8_quantize_rows",
    "matmul_4bit",
    "nested_workspace_size",
    "optim_control",
    "optim_norms",
    "optim_step",
    "optim_trust",
    "quantize_4bit",
    "quantize_4bit_nested",
    "quantize_blockwise",
    "remember_table",
]

__version__: str
built_with_cuda: bool
OPTIM_FAMILIES: tuple[str, ...]
OPTIM_FIELDS: int
OPTIM_GROUPS: int
OPTIM_TILE: int
OPTIM_WORKSPACE: int

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
    def workspace_size(self, m: int, device: int) -> int: ...
    def matmul(
        self, x: int, m: int, dtype: int, bias: int, out: int, workspace: int, device: int, queue: int, version: int
    ) -> bool: ...

def int8_quantize_rows(
    x: int,
    m: int,
    k: int,
    dtype: int,
    threshold: float,
    codes: int,
    row_scale: int,
    mask: int,
    device: int,
    queue: int,
) -> None: ...
def int8_matmul(
    x: int,
    dtype: int,
    codes: int,
    m: int,
    k: int,
    row_scale: int,
    weight: int,
    n: int,
    col_scale: int,
    mask: int,
    bias: int,
    out: int,
    device: int,
    queue: int,
) -> None: ...
def int8_linear(
    x: int,
    m: int,
    k: int,
    dtype: int,
    threshold: float,
    weight: int,
    n: int,
    col_scale: int,
    bias: int,
    out: int,
    workspace: int,
    device: int,
    queue: int,
) -> None: ...
def int8_linear_workspace_size(m: int, n: int, k: int, device: int) -> int: ...
def int8_matmul_int32(a: int, m: int, k: int, b: int, n: int, out: int, device: int, queue: int) -> None: ...
def int8_dequantize_panel(
    weight: int,
    n: int,
    k: int,
    col_scale: int,
    first_row: int,
    rows: int,
    first_column: int,
    columns: int,
    out: int,
    dtype: int,
    device: int,
    queue: int,
) -> None: ...

@final
class Int8Weight:
    def __new__(cls, weight: int, n: int, k: int, col_scale: int) -> Int8Weight: ...
    def linear(
        self,
        x: int,
        m: int,
        dtype: int,
        threshold: float,
        bias: int,
        out: int,
        workspace: int,
        mask: int,
        device: int,
        queue: int,
    ) -> None: ...
    def masks(self, x: int, m: int, workspace: int, device: int) -> tuple[int, int]: ...

def optim_step(
    family: int,
    bits: int,
    dtype_p: int,
    dtype_g: int,
    tensors: int,
    count: int,
    gradients: int,
    tiles: int,
    tile_count: int,
    groups: bytes,
    workspace: int,
    control: int,
    ratios: int,
    seed: int,
    stochastic: bool,
    device: int,
    queue: int,
) -> None: ...
def optim_norms(
    kind: int,
    family: int,
    bits: int,
    dtype_p: int,
    dtype_g: int,
    tensors: int,
    count: int,
    gradients: int,
    tiles: int,
    tile_count: int,
    groups: bytes,
    control: int,
    partials: int,
    device: int,
    queue: int,
) -> None: ...
def optim_control(
    partials: int,
    count: int,
    max_norm: float,
    grad_scale: int,
    found_inf: int,
    skip_nonfinite: bool,
    control: int,
    device: int,
    queue: int,
) -> None: ...
def optim_trust(
    partials: int,
    tensors: int,
    count: int,
    tile_count: int,
    family: int,
    groups: bytes,
    ratios: int,
    device: int,
    queue: int,
) -> None: ...
def codebook(name: str) -> list[float]: ...
def remember_table(address: int, quant_type: int) -> None: ...
def driver_info() -> dict[str, Any]: ...
def cpu_info() -> dict[str, Any]: ...
def images() -> list[str]: ...

@final
class Whereabouts:
    @staticmethod
    def of(
        tensor: type,
        parameter: type,
        params: list[Any],
        takes_part: list[bool],
        places: list[int],
        sentinels: list[Any],
        sentinel_places: list[int],
    ) -> Whereabouts | None: ...
    def find(self, groups: list[dict[str, Any]], sentinels: list[Any]) -> tuple[bytes, list[Any]] | None: ...
