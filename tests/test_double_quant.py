"""Double quantization: the block maxima of 4-bit codes in 8 bits, around their mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewbits.functional as F
import oracle
from arrays import DTYPES, as_numpy, assert_same_bits, dtype_name
from fewbits.functional import QuantState
from strategies import ORDINARY, blocksizes, codes_256, dtypes, fill, flat_tensors, quant_types, seeds


def check(x: torch.Tensor, blocksize: int, quant_type: str, device: torch.device) -> None:
    """Both levels of codes, the offset and the dequantized tensor are the oracle's."""
    __tracebackhide__ = True
    expected, absmax = oracle.quantize_4bit(as_numpy(x), quant_type, blocksize)
    nested = oracle.quantize_absmax(absmax)
    packed, state = F.quantize_4bit(x.to(device), blocksize=blocksize, quant_type=quant_type, compress_statistics=True)
    assert state.nested
    assert state.absmax.dtype == torch.uint8
    assert (state.state2.blocksize, state.state2.dtype) == (256, torch.float32)
    assert_same_bits(packed, expected, "packed")
    assert_same_bits(state.offset, np.array([nested.offset]), "offset")
    assert_same_bits(state.absmax, nested.codes, "absmax codes")
    assert_same_bits(state.state2.absmax, nested.absmax, "nested absmax")
    y = F.dequantize_4bit(packed, state)
    restored = oracle.dequantize_absmax(nested)
    values = oracle.dequantize_4bit(expected, x.numel(), restored, quant_type, blocksize, dtype_name(x.dtype))
    assert_same_bits(y, values, "dequantized")


@given(data=st.data(), blocksize=blocksizes, quant_type=quant_types)
def test_is_the_oracle(data: st.DataObject, blocksize: int, quant_type: str, device: torch.device) -> None:
    check(data.draw(flat_tensors(blocksize)), blocksize, quant_type, device)


@pytest.mark.parametrize("blocks", [1, 2, 255, 256, 257, 4095, 4096, 4097, 2**20 + 1])
def test_any_number_of_blocks(blocks: int, device: torch.device) -> None:
    """One and many launch blocks on a GPU, each with a short and a full last nested block."""
    rng = np.random.default_rng(blocks)
    scale = np.repeat(rng.lognormal(size=blocks).astype(np.float32), 32)
    x = rng.standard_normal(blocks * 32, dtype=np.float32) * scale
    check(torch.from_numpy(x[:-5]), 32, "nf4", device)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("blocksize", [32, 64, 512, 4096])
@pytest.mark.parametrize("order", ["any", "ascending", "descending"])
def test_sum_of_every_magnitude(dtype: torch.dtype, blocksize: int, order: str, device: torch.device) -> None:
    """Block maxima from subnormal to the largest, whose sum is still rounded only once."""
    rng = np.random.default_rng(blocksize)
    count = max(100, 2**18 // blocksize)
    largest = np.ldexp(rng.uniform(1, 2, count), rng.integers(-149, 127, count)).astype(np.float32)
    scale = {"any": largest, "ascending": np.sort(largest), "descending": -np.sort(-largest)}[order]
    scale[rng.random(count) < 0.1] = 0
    x = rng.uniform(-1, 1, (count, blocksize)).astype(np.float32) * scale[:, None]
    x[:, 0] = scale
    check(torch.from_numpy(x.reshape(-1)[:-1]).to(dtype), blocksize, "nf4", device)


@pytest.mark.parametrize("bits", [[0x5A000000, 0x3F800000], [0x5A000000, 0x3F800000, 1], [0x5A000000, 0x40400000]])
def test_sum_on_a_tie(bits: list[int], device: torch.device) -> None:
    """2**53 + 1, with and without a little more, and 2**53 + 3: what float64 must round."""
    largest = np.array(bits, dtype=np.uint32).view(np.float32)
    x = np.zeros((len(bits), 64), dtype=np.float32)
    x[:, 5] = largest
    check(torch.from_numpy(x.reshape(-1)), 64, "fp4", device)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_largest_block_maxima(dtype: torch.dtype, device: torch.device) -> None:
    """Their sum overflows float32, not float64; the mean and the differences stay finite."""
    x = fill(["largest", "infinite"], 600 * 64, 64, dtype, 3)
    check(x, 64, "fp4", device)
    state = F.quantize_4bit(x.to(device), compress_statistics=True, quant_type="fp4")[1]
    assert state.offset.isfinite()


@given(
    dtype=dtypes,
    quant_type=quant_types,
    code=codes_256(),
    blocksize=blocksizes,
    nested_blocksize=st.sampled_from([64, 256, 1024]),
    blocks=st.integers(1, 700),
    seed=seeds,
)
def test_dequantize_any_state(
    dtype: torch.dtype,
    quant_type: str,
    code: np.ndarray,
    blocksize: int,
    nested_blocksize: int,
    blocks: int,
    seed: int,
    device: torch.device,
) -> None:
    """States from elsewhere: any second code, its own block size, any offset."""
    rng = np.random.default_rng(seed)
    blocks = min(blocks, max(2, 30_000 // blocksize))
    n = blocks * blocksize - int(rng.integers(blocksize))
    packed = rng.integers(0, 256, (n + 1) // 2).astype(np.uint8)
    nested = oracle.Nested(
        rng.integers(0, 256, blocks).astype(np.uint8),
        rng.lognormal(size=-(-blocks // nested_blocksize)).astype(np.float32),
        np.float32(rng.standard_normal()),
    )
    state = QuantState(
        torch.from_numpy(nested.codes).to(device),
        shape=torch.Size([n]),
        code=F.get_4bit_type(quant_type, device=device),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=dtype,
        offset=torch.tensor(nested.offset, device=device),
        state2=QuantState(
            torch.from_numpy(nested.absmax).to(device),
            code=torch.from_numpy(code).to(device),
            blocksize=nested_blocksize,
            dtype=torch.float32,
        ),
    )
    got = F.dequantize_4bit(torch.from_numpy(packed).view(-1, 1).to(device), state)
    absmax = oracle.dequantize_absmax(nested, code, nested_blocksize)
    expected = oracle.dequantize_4bit(packed, n, absmax, quant_type, blocksize, dtype_name(dtype))
    assert_same_bits(got.reshape(-1), expected, "dequantized")


@given(data=st.data(), quant_type=quant_types)
def test_costs_little_accuracy(data: st.DataObject, quant_type: str, device: torch.device) -> None:
    """The block maxima come back within half the widest gap of the 8-bit code times their largest deviation."""
    x = data.draw(flat_tensors(64, ORDINARY)).to(device)
    _, plain = F.quantize_4bit(x, quant_type=quant_type)
    _, state = F.quantize_4bit(x, quant_type=quant_type, compress_statistics=True)
    if x.numel() == 0:
        return
    restored = F.dequantize_blockwise(state.absmax, state.state2).double() + state.offset.double()
    deviation = (plain.absmax - state.offset).abs().max().double()
    assert ((restored - plain.absmax.double()).abs() <= 0.0071 * deviation + 1e-6 * plain.absmax.max()).all()


def test_nested_blockwise_round_trip(device: torch.device) -> None:
    """``quantize_blockwise(nested=True)`` compresses its block maxima too, in blocks of the outer size."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(device)
    codes, state = F.quantize_blockwise(x, blocksize=64, nested=True)
    assert state.nested
    assert (state.absmax.dtype, state.state2.blocksize) == (torch.uint8, 64)
    error = (F.dequantize_blockwise(codes, state) - x).abs().mean()
    assert error < 0.02
