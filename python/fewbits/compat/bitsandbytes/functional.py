"""The operations as functions."""

from typing import Any

from fewbits._cpu_layout import (
    _convert_weight_packed_for_cpu,
    _convert_weight_packed_for_cpu_inverse,
    has_avx512bf16,
)
from fewbits._deprecated import FIRST_CUDA_DEVICE, _mul
from fewbits._pointers import _cuda_device_of, _get_tensor_stream
from fewbits.functional import (
    C,
    CUBLAS_Context,
    GlobalPageManager,
    QuantState,
    batched_igemm,
    check_matmul,
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    dequantize_4bit,
    dequantize_blockwise,
    dequantize_fp4,
    dequantize_nf4,
    elementwise_func,
    fill,
    gemv_4bit,
    get_4bit_type,
    get_paged,
    get_ptr,
    igemm,
    int8_double_quant,
    int8_linear_matmul,
    int8_mm_dequant,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    is_on_gpu,
    lib,
    optimizer_update_8bit_blockwise,
    optimizer_update_32bit,
    pack_dict_to_tensor,
    prefetch_tensor,
    quantize_4bit,
    quantize_blockwise,
    quantize_fp4,
    quantize_nf4,
    unpack_tensor_to_dict,
)

name2qmap: dict[str, Any] = {}  # nothing is kept here: fewbits has one table for all
