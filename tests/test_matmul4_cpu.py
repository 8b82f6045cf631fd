"""Products with 4-bit weights on the CPU: accuracy, threads, and every SIMD path, by the native call.

``python test_matmul4_cpu.py`` prints, as JSON, the relative errors of a set of products on the path that
``FEWBITS_SIMD`` names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import fewbits.functional as F
from fewbits import _native
from fewbits.quant_state import QuantState
from tolerances import MATMUL_RATIO

NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# (M, N, K, block size): around every switch of method; rows of whole blocks, ragged ones, ones that begin in mid-byte.
SHAPES = [
    (1, 512, 1024, 64),
    (3, 200, 768, 32),
    (8, 100, 4096, 4096),
    (9, 257, 320, 64),
    (16, 300, 1000, 64),
    (17, 96, 2048, 128),
    (27, 301, 515, 64),
    (33, 129, 333, 512),
    (70, 200, 1536, 64),
    (300, 64, 640, 256),
]


def multiply(
    x: torch.Tensor, codes: torch.Tensor, state: QuantState, bias: torch.Tensor | None, threads: int = 2
) -> torch.Tensor | None:
    """The native product, or None where it leaves the problem to panels."""
    assert state.shape is not None
    assert state.blocksize is not None
    n, k = state.shape
    out = torch.full((x.shape[0], n), torch.nan, dtype=x.dtype)
    nested: tuple[int, ...] = (0, 0, 0, 0)
    if state.nested:
        second = state.state2
        assert second is not None
        assert second.code is not None
        assert state.offset is not None
        nested = (second.code.data_ptr(), second.absmax.data_ptr(), second.blocksize or 0, state.offset.data_ptr())
    taken = _native.matmul_4bit(
        x.data_ptr(),
        x.shape[0],
        NUMBERS[x.dtype],
        codes.data_ptr(),
        n,
        k,
        state.blocksize,
        ["nf4", "fp4"].index(str(state.quant_type)),
        state.absmax.data_ptr(),
        *nested,
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        0,
        -1,
        threads,
    )
    return out if taken else None


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def errors(
    m: int, n: int, k: int, blocksize: int, dtype: torch.dtype, quant_type: str, nested: bool
) -> tuple[float | None, float]:
    """Relative errors of ours and of F.linear on dequantized weights, over float64 with the exact weights."""
    generator = torch.Generator().manual_seed(m * n + k)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    x = torch.randn(m, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    codes, state = F.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested)
    values = torch.tensor(_native.codebook(quant_type), dtype=torch.float64)
    scales = state.absmax
    if state.nested:
        assert state.state2 is not None
        scales = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    nibbles = torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], 1).view(-1)[: n * k].long()
    blocks = torch.arange(n * k) // blocksize
    exact_weight = (values[nibbles] * scales.double()[blocks]).view(n, k)
    exact = x.double() @ exact_weight.t() + bias.double()
    plain = torch.nn.functional.linear(x, F.dequantize_4bit(codes, state).to(dtype), bias)
    y = multiply(x, codes, state, bias)
    return None if y is None else relative_error(y, exact), relative_error(plain, exact)


def all_errors() -> dict[str, tuple[float | None, float]]:
    found = {}
    for name, dtype in NAMES.items():
        for shape in SHAPES:
            for quant_type, nested in (("nf4", False), ("fp4", True)):
                kind = f"{name} {quant_type}{' nested' if nested else ''} {shape}"
                found[kind] = errors(*shape, dtype, quant_type, nested)
    return found


@pytest.mark.parametrize("path", ["portable", "avx2", "avx512", "avx512bf16"])
def test_every_path_is_as_exact_as_linear(path: str) -> None:
    needs = {"avx2": "fma", "avx512": "avx512bw", "avx512bf16": "avx512bf16"}
    if path in needs and needs[path] not in _native.cpu_info()["features"]:
        pytest.skip(f"this CPU has no {needs[path]}")
    environment = {**os.environ, "FEWBITS_SIMD": path}
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["path"] == path
    taken = {name: pair for name, pair in result["errors"].items() if pair[0] is not None}
    assert len(taken) > len(result["errors"]) / 2
    worse = {name: (ours, plain) for name, (ours, plain) in taken.items() if not ours <= MATMUL_RATIO * plain}
    assert not worse, f"{path} (ours, F.linear): {worse}"


@pytest.fixture(scope="module", params=list(NAMES))
def weight(request: pytest.FixtureRequest) -> tuple[torch.dtype, torch.Tensor, QuantState]:
    torch.manual_seed(0)
    codes, state = F.quantize_4bit(torch.randn(1000, 1024) / 32)
    return NAMES[request.param], codes, state


@pytest.mark.parametrize("m", [1, 7, 24, 100])
def test_threads_and_repetition_do_not_matter(weight: tuple[torch.dtype, torch.Tensor, QuantState], m: int) -> None:
    dtype, codes, state = weight
    x = torch.randn(m, 1024).to(dtype)
    first = multiply(x, codes, state, None, 1)
    if first is None:
        pytest.skip("left to panels here")
    for call in range(20):
        again = multiply(x, codes, state, None, 1 + call % 5)
        assert again is not None
        assert torch.equal(first, again)


@pytest.mark.parametrize("m", [1, 16, 30])
def test_rows_do_not_see_each_other(weight: tuple[torch.dtype, torch.Tensor, QuantState], m: int) -> None:
    """A row keeps its bits when the other rows of its batch change, whatever they become."""
    dtype, codes, state = weight
    x = torch.randn(m + 1, 1024).to(dtype)
    first = multiply(x, codes, state, None)
    others = x.clone()
    others[1:] = torch.nan
    second = multiply(others, codes, state, None)
    if first is None or second is None:
        pytest.skip("left to panels here")
    assert torch.equal(first[0], second[0])
    assert second[1:].isnan().all()


def test_identity_gives_back_the_tokens() -> None:
    eye = torch.eye(256)
    codes, state = F.quantize_4bit(eye)
    for dtype in NUMBERS:
        for m in (1, 5, 16, 40):
            x = torch.randn(m, 256).to(dtype)
            y = multiply(x, codes, state, None)
            if y is not None:
                assert torch.equal(y, x), (dtype, m)


def test_float32_is_not_rounded_to_bfloat16() -> None:
    ours, _ = errors(4, 300, 1024, 64, torch.float32, "nf4", False)
    assert ours is None or ours < 1e-6


if __name__ == "__main__":
    print(json.dumps({"path": _native.cpu_info()["path"], "errors": all_errors()}))


@pytest.mark.parametrize(
    ("name", "outcome"), [("tiles", "True"), ("few", "True"), ("panels", "False"), ("nonsense", "FEWBITS_MATMUL4")]
)
def test_a_path_can_be_forced(name: str, outcome: str) -> None:
    program = """
import torch
from fewbits import _native
codes, absmax = torch.zeros(1024, dtype=torch.uint8), torch.ones(32)
x, out = torch.ones(2, 64), torch.empty(2, 32)
try:
    print(_native.matmul_4bit(x.data_ptr(), 2, 0, codes.data_ptr(), 32, 64, 64, 0, absmax.data_ptr(), 0, 0, 0, 0, 0,
                              out.data_ptr(), 0, -1, 1))
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "FEWBITS_MATMUL4": name}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert outcome in run.stdout
