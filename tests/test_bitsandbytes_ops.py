"""``torch.ops.bitsandbytes``: bitsandbytes' schemas, fewbits' results."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewbits import functional as F
from fewbits.compat import _ops

# As bitsandbytes 0.50.2 has them.
SCHEMAS = """
int8_mixed_scaled_mm(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, Tensor? bias=None) -> (Tensor, Tensor?)
int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, ScalarType? dtype=None) -> Tensor
int8_linear_matmul(Tensor A, Tensor B) -> Tensor
int8_linear_matmul.out(Tensor A, Tensor B, Tensor! out) -> ()
int8_vectorwise_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)
int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor
int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) -> Tensor
int8_double_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)
dequantize_4bit(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor
dequantize_4bit.out(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype, Tensor! out) -> ()
quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)
gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor
dequantize_blockwise(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor
dequantize_blockwise.out(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype, Tensor! out) -> ()
quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)
gemv_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor
gemv_4bit.out(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize, Tensor! out) -> ()
optimizer_update_32bit(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, float beta3, float alpha, float eps, float weight_decay, int step, float lr, float gnorm_scale, bool skip_zeros=False) -> ()
optimizer_update_8bit_blockwise(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, float beta1, float beta2, float beta3, float alpha, float eps, int step, float lr, Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay, float gnorm_scale, bool skip_zeros=False) -> ()
""".strip().splitlines()  # noqa: E501


@pytest.fixture(scope="module", autouse=True)
def ops() -> Any:
    # Under another name: other tests may import the real bitsandbytes in this process.
    for _ in range(2):
        _ops.register("fewbits_as_bitsandbytes")
    return torch.ops.fewbits_as_bitsandbytes


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.partition("(")[0])
def test_schema(ops: Any, schema: str) -> None:
    name, _, overload = schema.partition("(")[0].partition(".")
    found = getattr(getattr(ops, name), overload or "default")._schema
    assert found == torch._C.parse_schema(f"fewbits_as_bitsandbytes::{schema}")
    assert len(_ops._OPS) == len(SCHEMAS)


def rows(device: torch.device) -> tuple[Any, ...]:
    torch.manual_seed(0)
    x = torch.randn(5, 64, device=device)
    x[1, 3] = 20.0
    weight = torch.randn(32, 64, device=device)
    CA, SCA, columns = F.int8_vectorwise_quant(x, threshold=6.0)
    CB, SCB, _ = F.int8_vectorwise_quant(weight)
    return x, weight, CA, SCA, columns, CB, SCB


def cases(device: torch.device) -> dict[str, tuple[tuple[Any, ...], Any]]:
    """Return arguments and the expected result, by operation."""
    x, weight, CA, SCA, columns, CB, SCB = rows(device)
    bias = torch.randn(32, device=device)
    product = F.int8_linear_matmul(CA, CB)
    codes, state = F.quantize_4bit(weight, quant_type="nf4")
    bytes8, state8 = F.quantize_blockwise(weight, blocksize=256)
    packed = (codes, state.absmax, 64, "nf4", [32, 64], torch.float32)
    return {
        "int8_mixed_scaled_mm": (
            (x, CA, CB, SCA, SCB, columns, bias),
            F.int8_mixed_scaled_mm(x, CA, CB, SCA, SCB, columns, bias),
        ),
        "int8_scaled_mm": (
            (CA, CB, SCA, SCB, bias, torch.float32),
            F.int8_scaled_mm(CA, CB, SCA, SCB, bias, torch.float32),
        ),
        "int8_linear_matmul": ((CA, CB), product),
        "int8_vectorwise_quant": ((x, 6.0), (CA, SCA, columns)),
        "int8_vectorwise_dequant": ((CA, SCA), F.int8_vectorwise_dequant(CA, SCA)),
        "int8_mm_dequant": (
            (product, SCA, SCB, torch.float32, bias),
            F.int8_mm_dequant(product, SCA, SCB, None, bias, torch.float32),
        ),
        "int8_double_quant": ((x, 6.0), F.int8_double_quant(x, threshold=6.0)),
        "dequantize_4bit": (packed, F.dequantize_4bit(codes, state)),
        "quantize_4bit": ((weight, 64, "nf4", torch.uint8), (codes, state.absmax)),
        "gemm_4bit": (
            (x, codes, [32, 64], state.absmax, 64, "nf4", bias),
            F.matmul_4bit(x, codes.t(), state, bias=bias),
        ),
        "dequantize_blockwise": (
            (bytes8, state8.absmax, state8.code, 256, torch.float32),
            F.dequantize_blockwise(bytes8, state8),
        ),
        "quantize_blockwise": ((weight, state8.code, 256), (bytes8, state8.absmax)),
        "gemv_4bit": (
            (x[:1], codes, [32, 64], state.absmax, state.code, 64),
            F.gemv_4bit(x[:1], codes.t(), state=state),
        ),
    }


NAMES = list(cases(torch.device("cpu")))


@pytest.mark.parametrize("name", NAMES)
def test_results(ops: Any, name: str, device: torch.device) -> None:
    arguments, expected = cases(device)[name]
    result = getattr(ops, name).default(*arguments)
    if not isinstance(expected, tuple):
        result, expected = (result,), (expected,)
    for got, wanted in zip(result, expected, strict=True):
        assert torch.equal(got, wanted) if wanted is not None else got is None
    if hasattr(getattr(ops, name), "out"):
        out = torch.zeros_like(expected[0])
        assert getattr(ops, name).out(*arguments, out) is None
        assert torch.equal(out, expected[0])


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(ops: Any, name: str, device: torch.device) -> None:
    arguments, expected = cases(device)[name]
    torch.library.opcheck(getattr(ops, name).default, arguments)
    if hasattr(getattr(ops, name), "out"):
        torch.library.opcheck(getattr(ops, name).out, (*arguments, torch.zeros_like(expected)))


@pytest.mark.parametrize("offset_dtype", [torch.float32, torch.float16])
def test_gemm_with_double_quantization(ops: Any, offset_dtype: torch.dtype, device: torch.device) -> None:
    x, weight = torch.randn(3, 64, device=device), torch.randn(32, 64, device=device)
    codes, state = F.quantize_4bit(weight, quant_type="fp4", compress_statistics=True)
    assert state.offset is not None
    assert state.state2 is not None
    state.offset = state.offset.to(offset_dtype).float()
    arguments = (x, codes, [32, 64], state.state2.absmax, 64, "fp4", None, state.absmax, state.state2.code)
    result = ops.gemm_4bit.default(*arguments, state.offset.to(offset_dtype))
    assert torch.equal(result, F.matmul_4bit(x, codes.t(), state))
    with pytest.raises(ValueError, match="absmax_offset"):
        ops.gemm_4bit.default(*arguments)


def test_bad_tables_and_buffers(ops: Any) -> None:
    x, codes, shape, absmax, _, blocksize = cases(torch.device("cpu"))["gemv_4bit"][0]
    with pytest.raises(ValueError, match="code: expected the 16 values"):
        ops.gemv_4bit.default(x, codes, shape, absmax, torch.ones(16), blocksize)
    with pytest.raises(ValueError, match="out"):
        ops.dequantize_4bit.out(codes, absmax, 64, "nf4", shape, torch.float32, torch.zeros(3))


def test_optimizers(ops: Any, device: torch.device) -> None:
    p, q = (torch.ones(300, device=device) for _ in range(2))
    g = torch.randn(300, device=device)
    first = [torch.zeros(300, device=device) for _ in range(2)]
    other = [torch.zeros(300, device=device) for _ in range(2)]
    for step in (1, 2):
        numbers = (0.0, 0.0, 0.9, 0.99, 0.0, 0.0, 1e-8, 0.1, step, 0.05, 1.0)
        ops.optimizer_update_32bit("adam", g, p, *first, None, *numbers)
        F.optimizer_update_32bit("adam", g, q, other[0], 0.9, 1e-8, step, 0.05, other[1], 0.99, weight_decay=0.1)
    assert torch.equal(p, q)
    codes = [torch.zeros(300, dtype=torch.uint8, device=device) for _ in range(2)]
    maxima = [torch.zeros(2, device=device) for _ in range(2)]
    maps = [F.create_dynamic_map(signed).to(device) for signed in (True, False)]
    before = p.clone()
    numbers8 = (0.9, 0.99, 0.0, 0.0, 1e-8, 1, 0.05)
    ops.optimizer_update_8bit_blockwise("adam", g, p, *codes, *numbers8, *maps, *maxima, 0.1, 1.0)
    assert not torch.equal(p, before)
    assert all(bool(m.all()) for m in maxima)
