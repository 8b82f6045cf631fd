"""``torch.ops.bitsandbytes``: its operations, with bitsandbytes' schemas and fewbits' functions as kernels.

fewbits itself calls ``torch.ops.fewbits``. These are for code that calls the others by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fewbits.compat import _op_kernels as kernels
from fewbits.compat import _op_shapes as shapes

_DEQUANTIZE_4BIT = "Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype"
_DEQUANTIZE_BLOCKWISE = "Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype"
_GEMV_4BIT = "Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize"
_UPDATE = "Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2"

# Name, schema, kernel, and shapes for tracing. Each `.out` is an overload that writes what the other returns.
_OPS: tuple[tuple[str, str, Callable[..., Any], Callable[..., Any]], ...] = (
    (
        "int8_mixed_scaled_mm",
        "(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, Tensor? bias=None) "
        "-> (Tensor, Tensor?)",
        kernels.int8_mixed_scaled_mm,
        shapes.int8_mixed_scaled_mm,
    ),
    (
        "int8_scaled_mm",
        "(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, ScalarType? dtype=None) -> Tensor",
        kernels.int8_scaled_mm,
        shapes.int8_scaled_mm,
    ),
    ("int8_linear_matmul", "(Tensor A, Tensor B) -> Tensor", kernels.int8_linear_matmul, shapes.int8_linear_matmul),
    (
        "int8_linear_matmul.out",
        "(Tensor A, Tensor B, Tensor! out) -> ()",
        kernels.into(kernels.int8_linear_matmul),
        shapes.into(shapes.int8_linear_matmul),
    ),
    (
        "int8_vectorwise_quant",
        "(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)",
        kernels.int8_vectorwise_quant,
        shapes.int8_vectorwise_quant,
    ),
    (
        "int8_vectorwise_dequant",
        "(Tensor A, Tensor stats) -> Tensor",
        kernels.int8_vectorwise_dequant,
        shapes.int8_vectorwise_dequant,
    ),
    (
        "int8_mm_dequant",
        "(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) -> Tensor",
        kernels.int8_mm_dequant,
        shapes.int8_mm_dequant,
    ),
    (
        "int8_double_quant",
        "(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
        kernels.int8_double_quant,
        shapes.int8_double_quant,
    ),
    ("dequantize_4bit", f"({_DEQUANTIZE_4BIT}) -> Tensor", kernels.dequantize_4bit, shapes.dequantize_4bit),
    (
        "dequantize_4bit.out",
        f"({_DEQUANTIZE_4BIT}, Tensor! out) -> ()",
        kernels.into(kernels.dequantize_4bit),
        shapes.into(shapes.dequantize_4bit),
    ),
    (
        "quantize_4bit",
        "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
        kernels.quantize_4bit,
        shapes.quantize_4bit,
    ),
    (
        "gemm_4bit",
        "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
        "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
        kernels.gemm_4bit,
        shapes.gemm_4bit,
    ),
    (
        "dequantize_blockwise",
        f"({_DEQUANTIZE_BLOCKWISE}) -> Tensor",
        kernels.dequantize_blockwise,
        shapes.dequantize_blockwise,
    ),
    (
        "dequantize_blockwise.out",
        f"({_DEQUANTIZE_BLOCKWISE}, Tensor! out) -> ()",
        kernels.into(kernels.dequantize_blockwise),
        shapes.into(shapes.dequantize_blockwise),
    ),
    (
        "quantize_blockwise",
        "(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
        kernels.quantize_blockwise,
        shapes.quantize_blockwise,
    ),
    ("gemv_4bit", f"({_GEMV_4BIT}) -> Tensor", kernels.gemv_4bit, shapes.gemv_4bit),
    (
        "gemv_4bit.out",
        f"({_GEMV_4BIT}, Tensor! out) -> ()",
        kernels.into(kernels.gemv_4bit),
        shapes.into(shapes.gemv_4bit),
    ),
    (
        "optimizer_update_32bit",
        f"(str optimizer_name, {_UPDATE}, Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, "
        "float beta2, float beta3, float alpha, float eps, float weight_decay, int step, float lr, float gnorm_scale, "
        "bool skip_zeros=False) -> ()",
        kernels.optimizer_update_32bit,
        shapes.nothing,
    ),
    (
        "optimizer_update_8bit_blockwise",
        f"(str optimizer_name, {_UPDATE}, float beta1, float beta2, float beta3, float alpha, float eps, int step, "
        "float lr, Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, Tensor(a7!)? absmax2, "
        "float weight_decay, float gnorm_scale, bool skip_zeros=False) -> ()",
        kernels.optimizer_update_8bit_blockwise,
        shapes.nothing,
    ),
)

_libraries: dict[str, torch.library.Library] = {}


def register(namespace: str = "bitsandbytes") -> None:
    """Register the operations in a namespace, once."""
    if namespace in _libraries:
        return
    library = _libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
    for name, schema, kernel, fake in _OPS:
        library.define(name + schema)
        library.impl(name, kernel, "CompositeExplicitAutograd")  # fewbits' functions find the device themselves
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
