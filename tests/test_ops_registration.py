"""The operations as torch.library knows them: opcheck, shapes of the fake kernels, checks when called directly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewbits.functional as F
from arrays import BLOCKSIZES, DTYPES, assert_same_bits
from linear8bit_layers import OPS as INT8

ops = torch.ops.fewbits
NAMES = ["dequantize_4bit", "dequantize_4bit_nested", "dequantize_blockwise"]


def arguments(name: str, device: torch.device | str = "cpu", n: int = 300, **kwargs: Any) -> tuple[Any, ...]:
    dtype, blocksize = kwargs.get("dtype", torch.float32), kwargs.get("blocksize", 64)
    quant_type, storage = kwargs.get("quant_type", "nf4"), kwargs.get("storage", torch.uint8)
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(device, dtype)
    code = F.create_linear_map().to(device) if kwargs.get("code") else None
    if name.startswith("quantize_4bit"):
        return x, blocksize, quant_type, storage
    if name == "quantize_blockwise":
        return x, code, blocksize
    if name == "dequantize_blockwise":
        codes, absmax = ops.quantize_blockwise(x, code, blocksize)
        return codes, absmax, code, blocksize, dtype
    if name in PRODUCTS or name == "dequantize_4bit_rows":
        k = max(1, n // 10)
        weight = product_weight(x, (n // k, k), blocksize, quant_type, storage, code)
        if name == "dequantize_4bit_rows":
            indices = torch.arange(n // k, dtype=torch.int32, device=device).flip(0)
            return indices, *weight, dtype
        A = x[: n // k * k].view((n // k, k) if name == "matmul_4bit" else (k, n // k))
        return (A, *weight, A.new_ones(n // k)) if name == "matmul_4bit" else (A, *weight)
    if name == "dequantize_4bit":
        codes, absmax = ops.quantize_4bit(x, blocksize, quant_type, storage)
        return codes, absmax, blocksize, quant_type, [n], dtype
    codes, absmax, nested_absmax, offset = ops.quantize_4bit_nested(x, blocksize, quant_type, storage)
    return codes, absmax, code, nested_absmax, 256, offset, blocksize, quant_type, [n], dtype


def product_weight(
    x: torch.Tensor,
    shape: tuple[int, int],
    blocksize: int,
    quant_type: str,
    storage: torch.dtype,
    code: torch.Tensor | None,
) -> tuple[Any, ...]:
    """A weight in parts; with a code, nested."""
    x = x[: shape[0] * shape[1]]
    if code is None:
        codes, absmax = ops.quantize_4bit(x, blocksize, quant_type, storage)
        return codes, absmax, None, None, 0, None, blocksize, quant_type, list(shape)
    codes, absmax, nested_absmax, offset = ops.quantize_4bit_nested(x, blocksize, quant_type, storage)
    return codes, absmax, code, nested_absmax, 256, offset, blocksize, quant_type, list(shape)


QUANTIZERS = ["quantize_4bit", "quantize_4bit_nested", "quantize_blockwise"]
PRODUCTS = ["matmul_4bit", "matmul_4bit_grad"]
ALL = [*QUANTIZERS, *NAMES, *PRODUCTS, "dequantize_4bit_rows"]


def test_every_op_is_here() -> None:
    registered = {
        name.removeprefix("fewbits::") for name in torch._C._dispatch_get_all_op_names() if "fewbits::" in name
    }
    assert registered == {*ALL, *INT8, *(f"{name}.out" for name in NAMES)}
    for name in registered:
        for key in ("CPU", "CUDA", "Meta"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fewbits::{name}", key), (name, key)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("n", [0, 1, 300])
@pytest.mark.parametrize("code", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_opcheck(name: str, n: int, code: bool, storage: torch.dtype, device: torch.device) -> None:
    given = arguments(name, device, n, code=code, storage=storage)
    torch.library.opcheck(getattr(ops, name).default, given)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("code", [False, True])
def test_opcheck_with_gradients(name: str, code: bool, device: torch.device) -> None:
    given = [
        value.requires_grad_() if isinstance(value, torch.Tensor) and value.shape[-1:] in [(30,), (10,)] else value
        for value in arguments(name, device, code=code)
    ]
    assert given[0].requires_grad
    torch.library.opcheck(getattr(ops, name).default, tuple(given))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_out(name: str, device: torch.device) -> None:
    given = arguments(name, device)
    torch.library.opcheck(getattr(ops, name).out, given, {"out": torch.zeros(300, device=device)})


@given(
    name=st.sampled_from(ALL),
    n=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
    blocksize=st.sampled_from(BLOCKSIZES),
    storage=st.sampled_from([torch.uint8, torch.float16, torch.float64]),
)
def test_fake_shapes_are_the_real_ones(
    name: str, n: int, dtype: torch.dtype, blocksize: int, storage: torch.dtype
) -> None:
    given = arguments(name, n=n, dtype=dtype, blocksize=blocksize, storage=storage)
    real = getattr(ops, name)(*given)
    fake = getattr(ops, name)(*(value.to("meta") if isinstance(value, torch.Tensor) else value for value in given))
    pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
    for left, right in pairs:
        assert right.is_meta
        assert (left.shape, left.dtype, left.stride()) == (right.shape, right.dtype, right.stride())


@pytest.mark.parametrize("name", NAMES)
def test_out_variants(name: str, device: torch.device) -> None:
    given = arguments(name, device)
    expected = getattr(ops, name)(*given)
    out = torch.zeros(300, device=device)
    assert getattr(ops, name).out(*given, out=out) is None
    assert_same_bits(out, expected, "out")
    with pytest.raises(ValueError, match=r"out.*300.*299"):
        getattr(ops, name).out(*given, out=torch.zeros(299, device=device))
    with pytest.raises(ValueError, match=r"out.*float32.*float16"):
        getattr(ops, name).out(*given, out=torch.zeros(300, device=device).half())


def product(
    A: torch.Tensor,
    codes: int = 75,
    absmax: torch.Tensor | None = None,
    nested: tuple[Any, ...] = (None, None, 0, None),
    bias: torch.Tensor | None = None,
    shape: list[int] | None = None,
    op: Any = None,
) -> object:
    """A product with a weight of 5 × 30."""
    B = torch.zeros(codes, dtype=torch.uint8, device=A.device)
    absmax = torch.ones(3, device=A.device) if absmax is None else absmax
    weight = (B, absmax, *nested, 64, "nf4", shape or [5, 30])
    return ops.matmul_4bit(A, *weight, bias) if op is None else op(A, *weight)


def rows(indices: torch.Tensor, *weight: Any) -> object:
    return ops.dequantize_4bit_rows(indices, *weight, torch.float32)


WRONG: list[tuple[str, Callable[[torch.Tensor], object]]] = [
    ("A.*int64", lambda x: ops.quantize_4bit(x.long(), 64, "nf4", torch.uint8)),
    ("blocksize.*48", lambda x: ops.quantize_4bit(x, 48, "nf4", torch.uint8)),
    ("quant_type.*nf5", lambda x: ops.quantize_4bit_nested(x, 64, "nf5", torch.uint8)),
    ("code.*256.*16", lambda x: ops.quantize_blockwise(x, x[:16].float(), 64)),
    ("A.*32.*300", lambda x: ops.dequantize_4bit(x.to(torch.uint8), x[:1], 64, "nf4", [64], torch.float32)),
    ("absmax.*1.*300", lambda x: ops.dequantize_4bit(x[:32].to(torch.uint8), x, 64, "nf4", [64], torch.float32)),
    ("dtype.*int32", lambda x: ops.dequantize_4bit(x[:32].to(torch.uint8), x[:1], 64, "nf4", [64], torch.int32)),
    ("A.*uint8", lambda x: ops.dequantize_blockwise(x, x[:5], None, 64, torch.float32)),
    ("A.*last size of 30.*300", lambda x: product(x)),
    ("B.*75.*74", lambda x: product(x[:30], codes=74)),
    ("absmax.*floating.*int32", lambda x: product(x[:30], absmax=x[:3].int())),
    ("offset.*None", lambda x: product(x[:30], nested=(None, x[:1], 256, None))),
    ("absmax.*uint8.*float32", lambda x: product(x[:30], nested=(None, x[:1], 256, x[0]))),
    ("bias.*5.*float32.*5.*float16", lambda x: product(x[:30], bias=x[:5].half())),
    ("bias.*5.*4", lambda x: product(x[:30], bias=x[:4])),
    ("shape.*N, K", lambda x: product(x[:30], shape=[150])),
    ("indices.*int32 or torch.int64.*float32", lambda x: product(x[:5], op=rows)),
    ("grad_output.*last size of 5.*30", lambda x: product(x[:30], op=ops.matmul_4bit_grad)),
]


@pytest.mark.parametrize(("match", "call"), WRONG)
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_ops_check_for_themselves(match: str, call: Callable[[torch.Tensor], object], where: str) -> None:
    """Real and fake kernels refuse the same arguments, so that a trace fails where the run would."""
    with pytest.raises(ValueError, match=f"^{match}"):
        call(torch.ones(300, device=where))


@pytest.mark.cuda
def test_capture_in_a_graph(cuda: torch.device) -> None:
    """Every op allocates and launches, and nothing else: a graph replays it on new data."""
    x = torch.randn(4096, device=cuda)

    def everything() -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for nested in (False, True):
            codes, state = F.quantize_4bit(
                x, compress_statistics=nested, quant_type="nf4", quant_storage=torch.bfloat16
            )
            codes8, state8 = F.quantize_blockwise(x, blocksize=256, nested=nested)
            found += [codes, codes8, F.dequantize_4bit(codes, state), F.dequantize_blockwise(codes8, state8)]
        return found

    everything()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    x.copy_(torch.randn(4096, generator=torch.Generator().manual_seed(1)))
    graph.replay()
    for got, expected in zip(captured, everything(), strict=True):
        assert_same_bits(got, expected, "replayed")
