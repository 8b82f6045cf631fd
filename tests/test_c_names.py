"""The native library's functions under bitsandbytes' C names, called through ctypes."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int32, c_void_p
from typing import Any

import pytest
import torch

from fewbits import functional as F
from fewbits.functional import get_ptr, lib

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What unsloth binds, and refuses to do without.
BOUND = (
    "cdequantize_blockwise_fp32",
    "cdequantize_blockwise_fp16_nf4",
    "cdequantize_blockwise_bf16_nf4",
    "cdequantize_blockwise_fp32_nf4",
    "cgemm_4bit_inference_naive_fp16",
    "cgemm_4bit_inference_naive_bf16",
)


def stream_of(device: torch.device) -> c_void_p:
    return c_void_p(torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None)


@pytest.mark.parametrize("name", BOUND)
def test_they_are_native(name: str) -> None:
    function = getattr(lib, name)
    assert hasattr(function, "restype")
    assert getattr(lib, name) is lib[name]
    assert ctypes.cast(function, c_void_p).value


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="cnothing"):
        lib.cnothing  # noqa: B018
    assert not hasattr(lib, "__wrapped__")


@pytest.mark.parametrize("suffix", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 4096, 70001])
def test_dequantize_blockwise(suffix: str, n: int, device: torch.device) -> None:
    codes, state = F.quantize_blockwise(torch.randn(n, dtype=DTYPES[suffix], device=device), blocksize=256)
    out = torch.full((n,), 9.0, dtype=DTYPES[suffix], device=device)
    done = lib[f"cdequantize_blockwise_{suffix}"](
        get_ptr(state.code),
        get_ptr(codes),
        get_ptr(state.absmax),
        get_ptr(out),
        c_int(256),
        c_int(n),
        stream_of(device),
    )
    assert done == 0
    assert torch.equal(out, F.dequantize_blockwise(codes, state))


@pytest.mark.parametrize("suffix", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("n", [0, 1, 64, 70001])
def test_dequantize_4bit(suffix: str, quant_type: str, n: int, device: torch.device) -> None:
    x = torch.randn(n, dtype=DTYPES[suffix], device=device)
    codes, state = F.quantize_4bit(x, blocksize=64, quant_type=quant_type)
    out = torch.full((n,), 9.0, dtype=DTYPES[suffix], device=device)
    arguments = (get_ptr(codes), get_ptr(state.absmax), get_ptr(out), c_int(64), c_int(n), stream_of(device))
    assert lib[f"cdequantize_blockwise_{suffix}_{quant_type}"](get_ptr(None), *arguments) == 0
    assert torch.equal(out, F.dequantize_4bit(codes, state).view(-1))


def gemv_arguments(A: Any, codes: Any, absmax: Any, table: Any, out: Any, m: int, k: int, blocksize: int) -> list[Any]:
    pointers = [get_ptr(tensor) for tensor in (A, codes, absmax, table, out)]
    sizes = [c_int32(m), c_int32((k + 1) // 2), c_int32(m), c_int32(blocksize)]
    return [c_int32(m), c_int32(1), c_int32(k), *pointers, *sizes, stream_of(A.device)]


@pytest.mark.parametrize("suffix", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("m", "k"), [(1, 64), (512, 256), (129, 1056)])
def test_gemv(suffix: str, quant_type: str, shared: bool, m: int, k: int, device: torch.device) -> None:
    A, B = (torch.randn(*shape, dtype=DTYPES[suffix], device=device) for shape in ((1, k), (m, k)))
    codes, state = F.quantize_4bit(B, blocksize=32, quant_type=quant_type)
    table = state.code if shared else F.get_4bit_type(quant_type, device=device)
    out = torch.full((1, m), 9.0, dtype=DTYPES[suffix], device=device)
    function = lib[f"cgemm_4bit_inference_naive_{suffix}"]
    assert function(*gemv_arguments(A, codes, state.absmax, table, out, m, k, 32)) == 0
    assert torch.equal(out, F.gemv_4bit(A, codes.t(), state=state))


def dequantize(**changes: Any) -> None:
    codes, state = F.quantize_4bit(torch.ones(256))
    out = torch.zeros(256)
    arguments = {
        **{"code": None, "A": get_ptr(codes), "absmax": get_ptr(state.absmax), "out": get_ptr(out)},
        **{"blocksize": c_int(64), "n": c_int(256), "stream": None, **changes},
    }
    try:
        lib.cdequantize_blockwise_fp32_fp4(*arguments.values())
    finally:
        assert not out.any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"blocksize": c_int(48)}, "blocksize: got 48"),
        ({"blocksize": c_int(-64)}, "blocksize: got -64"),
        ({"n": c_int(-1)}, "n: got -1"),
        ({"A": None}, "null address"),
        ({"absmax": None}, "null address"),
        ({"out": None}, "null address"),
    ],
)
def test_bad_sizes_and_addresses_raise(changes: dict[str, Any], words: str) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            dequantize(**changes)


def test_bad_products_raise() -> None:
    A, B = torch.randn(1, 64), torch.randn(8, 64)
    codes, state = F.quantize_4bit(B, quant_type="nf4")
    out = torch.zeros(1, 8)
    good = gemv_arguments(A, codes, state.absmax, state.code, out, 8, 64, 64)
    bad: list[tuple[int, Any, str]] = [
        (0, c_int32(-1), "m: got -1"),
        (1, c_int32(2), "n: got 2"),
        (2, c_int32(63), "ldb"),
        (9, c_int32(64), "ldb: got 64"),
        (11, c_int32(100), "block ?size"),
        (6, None, "datatype: got a null address"),
        (6, get_ptr(torch.ones(16)), "datatype: got other values"),
        (3, None, "A: got a null address"),
        (4, None, "B: got a null address"),
        (5, None, "null address"),
        (7, None, "out: got a null address"),
    ]
    for place, value, words in bad:
        arguments = list(good)
        arguments[place] = value
        with pytest.raises(ValueError, match=words):
            lib.cgemm_4bit_inference_naive_fp32(*arguments)
        assert not out.any()
    assert lib.cgemm_4bit_inference_naive_fp32(*good) == 0
    assert torch.equal(out, F.gemv_4bit(A, codes.t(), state=state))


def test_remembered_tables() -> None:
    from fewbits import _native

    with pytest.raises(ValueError, match="quant_type"):
        _native.remember_table(16, 2)


@pytest.mark.cuda
def test_addresses_on_two_devices(cuda: torch.device) -> None:
    codes, state = F.quantize_4bit(torch.ones(256))
    out = torch.zeros(256, device=cuda)
    arguments = (get_ptr(codes), get_ptr(state.absmax), get_ptr(out), c_int(64), c_int(256), stream_of(cuda))
    with pytest.raises(ValueError, match="several devices"):
        lib.cdequantize_blockwise_fp32_fp4(None, *arguments)
    assert not out.any()


@pytest.mark.cuda
def test_in_a_graph(cuda: torch.device) -> None:
    A, B = torch.randn(1, 256, device=cuda), torch.randn(64, 256, device=cuda)
    codes, state = F.quantize_4bit(B, quant_type="nf4")
    out = torch.zeros(1, 64, device=cuda)
    graph = torch.cuda.CUDAGraph()
    lib.cgemm_4bit_inference_naive_fp32(*gemv_arguments(A, codes, state.absmax, state.code, out, 64, 256, 64))
    with torch.cuda.graph(graph):
        lib.cgemm_4bit_inference_naive_fp32(*gemv_arguments(A, codes, state.absmax, state.code, out, 64, 256, 64))
    A.fill_(1.0)
    graph.replay()
    assert torch.equal(out, F.gemv_4bit(A, codes.t(), state=state))
