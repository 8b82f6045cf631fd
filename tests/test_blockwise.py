"""Blockwise quantization, 8-bit and 4-bit: the same bytes as the oracle, on every device and by every code path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import corpus
import fewbits.functional as F
import oracle
from arrays import BLOCKSIZES, DTYPES, as_numpy, as_tensor, assert_same_bits, dtype_name
from fewbits import _native
from fewbits.functional import QuantState
from strategies import (
    ORDINARY,
    RECIPES,
    blocksizes,
    codes_256,
    dtypes,
    fill,
    flat_tensors,
    quant_types,
    seeds,
    strided_tensors,
)
from tolerances import PUBLISHED_ERROR, PUBLISHED_SLACK, UNIT_ROUNDOFF

DYNAMIC = oracle.dynamic_map()


def check_4bit(x: torch.Tensor, blocksize: int, quant_type: str, device: torch.device) -> None:
    """Codes, absmax and the dequantized tensor of ``x`` are the oracle's."""
    __tracebackhide__ = True
    expected, expected_absmax = oracle.quantize_4bit(as_numpy(x), quant_type, blocksize)
    packed, state = F.quantize_4bit(x.to(device), blocksize=blocksize, quant_type=quant_type)
    assert packed.shape == ((x.numel() + 1) // 2, 1)
    assert packed.device.type == state.absmax.device.type == device.type
    assert_same_bits(state.absmax, expected_absmax, "absmax")
    assert_same_bits(packed, expected, "packed")
    y = F.dequantize_4bit(packed, state)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    values = oracle.dequantize_4bit(expected, x.numel(), expected_absmax, quant_type, blocksize, dtype_name(x.dtype))
    assert_same_bits(y, values, "dequantized")


def check_8bit(x: torch.Tensor, blocksize: int, code: np.ndarray | None, device: torch.device) -> None:
    """As ``check_4bit``; ``code`` None is the default code."""
    __tracebackhide__ = True
    table = DYNAMIC if code is None else code
    given_code = None if code is None else torch.from_numpy(code).to(device)
    expected, expected_absmax = oracle.quantize_blockwise(as_numpy(x), table, blocksize)
    codes, state = F.quantize_blockwise(x.to(device), code=given_code, blocksize=blocksize)
    assert (codes.shape, codes.dtype) == (x.shape, torch.uint8)
    assert_same_bits(state.absmax, expected_absmax, "absmax")
    assert_same_bits(codes, expected, "codes")
    y = F.dequantize_blockwise(codes, state)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    values = oracle.dequantize_blockwise(expected, expected_absmax, table, blocksize, dtype_name(x.dtype))
    assert_same_bits(y, values, "dequantized")


# ---- bytes ---------------------------------------------------------------------------------------------------------


@given(data=st.data(), blocksize=blocksizes, quant_type=quant_types)
def test_4bit_is_the_oracle(data: st.DataObject, blocksize: int, quant_type: str, device: torch.device) -> None:
    check_4bit(data.draw(flat_tensors(blocksize)), blocksize, quant_type, device)


@given(data=st.data(), blocksize=blocksizes)
def test_8bit_is_the_oracle(data: st.DataObject, blocksize: int, device: torch.device) -> None:
    check_8bit(data.draw(flat_tensors(blocksize)), blocksize, None, device)


@given(data=st.data(), blocksize=blocksizes, code=codes_256())
def test_8bit_with_any_code(data: st.DataObject, blocksize: int, code: np.ndarray, device: torch.device) -> None:
    check_8bit(data.draw(flat_tensors(blocksize)), blocksize, code, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("blocksize", [8192, 16384, 32768, 65536])
def test_large_blocks(dtype: torch.dtype, blocksize: int, device: torch.device) -> None:
    """Of 8-bit codes alone; computed without a kernel, in several pieces of whole blocks."""
    count = max(len(RECIPES), (1 << 21) // blocksize + 1) * blocksize + 77
    x = fill(list(RECIPES), count, blocksize, dtype, seed=1)
    check_8bit(x, blocksize, None, device)
    _, state = F.quantize_blockwise(x.to(device), blocksize=blocksize)
    assert QuantState.from_dict(state.as_dict(), device) == state
    for refused in (F.quantize_4bit, lambda x, blocksize: F.quantize_blockwise(x, blocksize=blocksize, nested=True)):
        with pytest.raises(ValueError, match="blocksize: expected a power of two from 32 to 4096"):
            refused(x.to(device), blocksize=blocksize)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_dtype_and_blocksize(dtype: torch.dtype, blocksize: int, device: torch.device) -> None:
    """Every recipe at once, with a tail: the grid that hypothesis only samples."""
    x = fill(list(RECIPES), len(RECIPES) * blocksize + blocksize // 2 + 1, blocksize, dtype, seed=blocksize)
    check_8bit(x, blocksize, None, device)
    for quant_type in ("nf4", "fp4"):
        check_4bit(x, blocksize, quant_type, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
def test_every_16_bit_number(dtype: torch.dtype, device: torch.device) -> None:
    """All 65536 bit patterns, in an order that mixes magnitudes within a block."""
    patterns = np.random.default_rng(0).permutation(2**16).astype(np.uint16)
    x = as_tensor(patterns if dtype == torch.bfloat16 else patterns.view(np.float16), dtype)
    check_8bit(x, 256, None, device)
    for quant_type in ("nf4", "fp4"):
        check_4bit(x, 64, quant_type, device)


@given(x=strided_tensors(), quant_type=quant_types)
def test_layout_does_not_matter(x: torch.Tensor, quant_type: str, device: torch.device) -> None:
    check_4bit(x, 64, quant_type, device)
    check_8bit(x, 64, None, device)


@pytest.mark.parametrize("offset", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_any_address(offset: int, dtype: torch.dtype, device: torch.device) -> None:
    """Contiguous slices at every misalignment, of the input and of ``out=``."""
    n, blocksize = 3 * 64 + 5, 64
    x = fill(["normal"], n + offset, blocksize, dtype, offset).to(device)[offset:]
    expected, absmax = oracle.quantize_blockwise(as_numpy(x), DYNAMIC, blocksize)
    codes = torch.full((n + offset,), 255, dtype=torch.uint8, device=device)
    F.quantize_blockwise(x, blocksize=blocksize, out=codes[offset:])
    assert_same_bits(codes[offset:], expected, "codes")
    assert_same_bits(codes[:offset], np.full(offset, 255, np.uint8), "bytes before out=")
    out = torch.full((n + offset,), 7.0, dtype=dtype, device=device)
    state = QuantState(torch.from_numpy(absmax).to(device), code=None, blocksize=blocksize, dtype=dtype)
    state.code = torch.from_numpy(DYNAMIC).to(device)
    F.dequantize_blockwise(codes[offset:], state, out=out[offset:])
    values = oracle.dequantize_blockwise(expected, absmax, DYNAMIC, blocksize, dtype_name(dtype))
    assert_same_bits(out[offset:], values, "dequantized")
    assert out[:offset].tolist() == [7.0] * offset


@given(
    dtype=dtypes,
    blocksize=blocksizes,
    n=st.integers(0, 9000),
    seed=seeds,
    quant_type=st.sampled_from(["nf4", "fp4", "dynamic"]),
)
def test_dequantize_any_codes_and_absmax(
    dtype: torch.dtype, blocksize: int, n: int, seed: int, quant_type: str, device: torch.device
) -> None:
    """Codes that no quantizer wrote, under block maxima of every size, infinity and NaN included."""
    rng = np.random.default_rng(seed)
    absmax = np.abs(fill(list(RECIPES), -(-n // blocksize), 1, torch.float32, seed).numpy())
    state = QuantState(torch.from_numpy(absmax).to(device), shape=torch.Size([n]), blocksize=blocksize, dtype=dtype)
    if quant_type == "dynamic":
        codes = rng.integers(0, 256, n).astype(np.uint8)
        state.code = torch.from_numpy(DYNAMIC).to(device)
        got = F.dequantize_blockwise(torch.from_numpy(codes).to(device), state)
        expected = oracle.dequantize_blockwise(codes, absmax, DYNAMIC, blocksize, dtype_name(dtype))
    else:
        codes = rng.integers(0, 256, (n + 1) // 2).astype(np.uint8)
        state.code, state.quant_type = F.get_4bit_type(quant_type, device=device), quant_type
        got = F.dequantize_4bit(torch.from_numpy(codes).view(-1, 1).to(device), state)
        expected = oracle.dequantize_4bit(codes, n, absmax, quant_type, blocksize, dtype_name(dtype))
    assert_same_bits(got, expected, "dequantized")


# ---- properties ----------------------------------------------------------------------------------------------------


@given(data=st.data(), blocksize=blocksizes, quant_type=quant_types)
def test_idempotence_4bit(data: st.DataObject, blocksize: int, quant_type: str, device: torch.device) -> None:
    """What was quantized once is a fixed point, in float32: a rounded output is another tensor."""
    x = data.draw(flat_tensors(blocksize, ORDINARY)).float().to(device)
    once = F.dequantize_4bit(*F.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type))
    twice = F.dequantize_4bit(*F.quantize_4bit(once, blocksize=blocksize, quant_type=quant_type))
    assert torch.equal(once, twice)


@given(data=st.data(), blocksize=blocksizes)
def test_idempotence_8bit(data: st.DataObject, blocksize: int, device: torch.device) -> None:
    """The code has no -1, so that each block's largest magnitude is made positive first."""
    x = data.draw(flat_tensors(blocksize, ORDINARY)).float()
    assume(x.numel())
    for block in x.split(blocksize):
        block[block.abs().argmax()].abs_()
    once = F.dequantize_blockwise(*F.quantize_blockwise(x.to(device), blocksize=blocksize))
    twice = F.dequantize_blockwise(*F.quantize_blockwise(once, blocksize=blocksize))
    assert torch.equal(once, twice)


@given(
    blocksize=blocksizes,
    dtype=dtypes,
    seed=seeds,
    intruder=st.sampled_from([r for r in RECIPES if r not in ORDINARY]),
    where=st.integers(0, 4),
)
def test_blocks_are_independent(
    blocksize: int, dtype: torch.dtype, seed: int, intruder: str, where: int, device: torch.device
) -> None:
    """Whatever one block holds, infinities and NaN included, the bytes of the others stay."""
    calm = fill(["normal"] * 5, 5 * blocksize, blocksize, dtype, seed)
    changed = calm.clone()
    block = slice(where * blocksize, (where + 1) * blocksize)
    changed[block] = fill([intruder], blocksize, blocksize, dtype, seed)
    others = torch.ones(5 * blocksize, dtype=torch.bool)
    others[block] = False

    def outputs(x: torch.Tensor) -> list[torch.Tensor]:
        codes, state = F.quantize_blockwise(x.to(device), blocksize=blocksize)
        packed, state4 = F.quantize_4bit(x.to(device), blocksize=blocksize, quant_type="nf4")
        values = [F.dequantize_blockwise(codes, state), F.dequantize_4bit(packed, state4)]
        return [codes.cpu()[others], packed.cpu().view(-1)[others[::2]], *(v.cpu()[others] for v in values)]

    for got, expected in zip(outputs(changed), outputs(calm), strict=True):
        assert_same_bits(got, expected, f"blocks beside {intruder}")


@given(dtype=dtypes, seed=seeds, exponent=st.integers(-8, 8))
def test_scale_by_a_power_of_two(dtype: torch.dtype, seed: int, exponent: int, device: torch.device) -> None:
    """Codes do not change, absmax does exactly."""
    x = fill(["nf4 thresholds"], 512, 64, torch.float32, seed).clamp(-1, 1).to(dtype)
    x = torch.where(x.abs() < 2.0**-4, torch.zeros_like(x), x)  # nothing may leave float16's normal range
    scaled = x * 2.0**exponent
    for quantize in (F.quantize_nf4, F.quantize_fp4, F.quantize_blockwise):
        codes, state = quantize(x.to(device), blocksize=64)
        codes_scaled, state_scaled = quantize(scaled.to(device), blocksize=64)
        assert_same_bits(codes_scaled, codes, "codes")
        assert_same_bits(state_scaled.absmax, state.absmax * 2.0**exponent, "absmax")


@given(data=st.data(), blocksize=blocksizes)
def test_sign_symmetry_of_fp4(data: st.DataObject, blocksize: int, device: torch.device) -> None:
    """FP4 is symmetric: away from ties and zeros, a changed sign flips the sign bit and nothing else."""
    x = data.draw(flat_tensors(blocksize, ORDINARY))
    t, _ = oracle.normalize(as_numpy(x), blocksize)
    tie = np.isin(np.abs(t), np.abs(oracle.midpoints(np.sort(oracle.FP4)))) | (t == 0)
    codes, mirrored = (
        oracle.unpack(as_numpy(F.quantize_fp4(v.to(device), blocksize=blocksize)[0]), x.numel()) for v in (x, -x)
    )
    np.testing.assert_array_equal(codes[~tie] ^ 8, mirrored[~tie])


@given(data=st.data(), blocksize=blocksizes)
def test_sign_symmetry_of_the_dynamic_map(data: st.DataObject, blocksize: int, device: torch.device) -> None:
    """code[254 - i] == -code[i]; only +1 has no twin."""
    x = data.draw(flat_tensors(blocksize, ORDINARY))
    t, _ = oracle.normalize(as_numpy(x), blocksize)
    mids = oracle.midpoints(DYNAMIC)
    symmetric = ~np.isin(np.abs(t), np.abs(mids)) & (np.abs(t) < mids[-1])
    codes, mirrored = (as_numpy(F.quantize_blockwise(v.to(device), blocksize=blocksize)[0]) for v in (x, -x))
    np.testing.assert_array_equal(254 - codes[symmetric].astype(int), mirrored[symmetric])


@given(data=st.data(), blocksize=blocksizes, name=st.sampled_from(["nf4", "fp4", "dynamic"]))
def test_error_bound(data: st.DataObject, blocksize: int, name: str, device: torch.device) -> None:
    """No value moves by more than half the widest gap of the code, times absmax, and the roundings."""
    x = data.draw(flat_tensors(blocksize, (*ORDINARY, "zeros", "constant", "nf4 thresholds")))
    x = torch.where(x.isfinite(), x, torch.ones_like(x))
    table = np.sort(DYNAMIC if name == "dynamic" else oracle.TABLES[name]).astype(np.float64)
    half_gap = np.diff(np.append(-1.0, table) if name == "dynamic" else table).max() / 2
    quantize = {"nf4": F.quantize_nf4, "fp4": F.quantize_fp4, "dynamic": F.quantize_blockwise}[name]
    codes, state = quantize(x.to(device), blocksize=blocksize)
    dequantize = F.dequantize_blockwise if name == "dynamic" else F.dequantize_4bit
    y = dequantize(codes, state).cpu().double()
    absmax = state.absmax.cpu().double().repeat_interleave(blocksize)[: x.numel()]
    slack = UNIT_ROUNDOFF[x.dtype] + 4 * UNIT_ROUNDOFF[torch.float32]
    error = (y - x.double()).abs()
    assert (error <= (half_gap + slack) * absmax + 2.0**-24 * (x.dtype == torch.float16) + 2.0**-133).all()


@pytest.mark.parametrize(("name", "blocksize"), PUBLISHED_ERROR)
def test_published_error(name: str, blocksize: int, device: torch.device) -> None:
    """Mean absolute error on N(0, 1)."""
    x = torch.randn(2**20, generator=torch.Generator().manual_seed(2023)).to(device)
    if name == "dynamic":
        y = F.dequantize_blockwise(*F.quantize_blockwise(x, blocksize=blocksize))
    else:
        y = F.dequantize_4bit(*F.quantize_4bit(x, blocksize=blocksize, quant_type=name))
    error = (y - x).abs().mean().item()
    assert error == pytest.approx(PUBLISHED_ERROR[name, blocksize], abs=PUBLISHED_SLACK[name, blocksize])


# ---- edges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (0, 64), (4, 0, 8)])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x = torch.empty(shape, dtype=dtype, device=device)
    for nested in (False, True):
        packed, state = F.quantize_4bit(x, compress_statistics=nested, quant_type="nf4")
        assert packed.numel() == state.absmax.numel() == 0
        y = F.dequantize_4bit(packed, state)
        assert (y.shape, y.dtype, y.device) == (x.shape, dtype, x.device)
    codes, state = F.quantize_blockwise(x)
    assert codes.shape == shape
    assert F.dequantize_blockwise(codes, state).shape == shape


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_pad_nibble_is_zero(quant_type: str, device: torch.device) -> None:
    packed, _ = F.quantize_4bit(torch.ones(65, device=device), blocksize=64, quant_type=quant_type)
    assert packed.view(-1)[-1].item() & 15 == oracle.ZERO_CODE[quant_type]


def test_wrong_device_index() -> None:
    """A device that is not there raises, and names what is missing; the CPU goes on working."""
    x, codes, absmax = torch.ones(64), torch.zeros(32, dtype=torch.uint8), torch.zeros(1)
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)device|driver|cuda"):
        _native.quantize_4bit(x.data_ptr(), 64, 0, 64, 0, codes.data_ptr(), absmax.data_ptr(), 99, 0)
    check_4bit(x, 64, "nf4", torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=dtype_name)
def test_past_two_to_the_31(dtype: torch.dtype, device: torch.device) -> None:
    """Index arithmetic: the last blocks of a tensor of more than 2**31 elements are right."""
    blocksize, n = 64, 2**31 + 64 * 1000 + 17
    tail = fill(["normal", "wide"], 64 * 1000 + 17, blocksize, dtype, 1)
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 3 * n * dtype.itemsize:
        pytest.skip("too little memory on the GPU")
    x = torch.zeros(n, dtype=dtype, device=device)
    x[2**31 :] = tail.to(device)
    packed, state = F.quantize_4bit(x, blocksize=blocksize, quant_type="nf4")
    expected, absmax = oracle.quantize_4bit(as_numpy(tail), "nf4", blocksize)
    assert_same_bits(packed.view(-1)[2**30 :], expected, "packed")
    assert_same_bits(state.absmax[2**25 :], absmax, "absmax")
    assert (packed.view(-1)[: 2**30] == 0x77).all()
    y = F.dequantize_4bit(packed, state)
    assert_same_bits(
        y[2**31 :], oracle.dequantize_4bit(expected, tail.numel(), absmax, "nf4", blocksize, dtype_name(dtype)), "4-bit"
    )
    del y, packed, state
    codes, state = F.quantize_blockwise(x, blocksize=blocksize)
    expected, absmax = oracle.quantize_blockwise(as_numpy(tail), DYNAMIC, blocksize)
    assert_same_bits(codes[2**31 :], expected, "codes")
    y = F.dequantize_blockwise(codes, state)
    values = oracle.dequantize_blockwise(expected, absmax, DYNAMIC, blocksize, dtype_name(dtype))
    assert_same_bits(y[2**31 :], values, "8-bit")


# ---- paths and devices ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def default_digests() -> dict[str, str]:
    return corpus.digests()


@pytest.mark.parametrize("path", ["portable", "avx2", "avx512", "avx512bf16"])
def test_every_simd_path_gives_the_same_bytes(path: str, default_digests: dict[str, str]) -> None:
    needs = {"avx2": "avx2", "avx512": "avx512bw", "avx512bf16": "avx512bf16"}
    features = _native.cpu_info()["features"]
    if path in needs and needs[path] not in features:
        pytest.skip(f"this CPU has no {needs[path]}")
    program = Path(corpus.__file__)
    environment = {**os.environ, "FEWBITS_SIMD": path}
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["path"] == path
    differ = [name for name, digest in default_digests.items() if result["digests"][name] != digest]
    assert not differ, f"{path} writes other bytes for {differ}"


@pytest.mark.cuda
def test_cuda_bytes_are_the_cpu_bytes(cuda: torch.device, default_digests: dict[str, str]) -> None:
    digests = corpus.digests(cuda)
    differ = [name for name, digest in default_digests.items() if digests[name] != digest]
    assert not differ, f"CUDA writes other bytes for {differ}"


@pytest.mark.parametrize("threads", [1, 3])
def test_thread_count_does_not_matter(threads: int) -> None:
    x = fill([*RECIPES], 300_007, 64, torch.bfloat16, 5)
    expected = [as_numpy(t).tobytes() for t in corpus.run(64, x)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert [as_numpy(t).tobytes() for t in corpus.run(64, x)] == expected
    finally:
        torch.set_num_threads(before)


def test_large_tensor(device: torch.device) -> None:
    """A million elements: many threads, many thread blocks, whole waves."""
    x = fill(["normal", "wide", "nf4 thresholds"], 2**20 + 77, 64, torch.bfloat16, 8)
    check_4bit(x, 64, "nf4", device)
    check_8bit(x, 256, None, device)
