"""Parts of a 4-bit weight: any rectangle and any rows have the bits of the whole, dequantized and sliced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewbits.functional as F
from arrays import assert_same_bits
from fewbits import _native, _panel
from fewbits._checks import DTYPES as NUMBERS
from fewbits._launch import target_queue
from strategies import blocksizes, dtypes, fill, quant_types, seeds

RECIPES = ["normal", "wide", "zeros", "huge", "subnormal", "nan"]


class Weight:
    """A weight of n × k, whose codes start `shift` bytes into their memory."""

    def __init__(
        self, n: int, k: int, blocksize: int, quant_type: str, nested: bool, device: torch.device, shift: int, seed: int
    ) -> None:
        self.n, self.k = n, k
        values = fill(RECIPES, n * k, blocksize, torch.float32, seed).view(n, k).to(device)
        codes, self.state = F.quantize_4bit(
            values, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
        )
        memory = torch.zeros(codes.numel() + shift, dtype=torch.uint8, device=device)
        self.codes = memory[shift:].copy_(codes.view(-1))
        state2 = self.state.state2
        parts: tuple[Any, ...] = (None, None, 0, None)
        if state2 is not None:
            parts = (state2.code, state2.absmax, state2.blocksize, self.state.offset)
        self.bound = _panel.bind(self.codes, self.state.absmax, *parts, blocksize, quant_type, (n, k))

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        self.state.dtype = dtype
        return F.dequantize_4bit(self.codes, self.state)


def poisoned(rows: int, columns: int, dtype: torch.dtype, device: torch.device, shift: int) -> torch.Tensor:
    """Memory of -7 with room for a result and 8 elements on either side."""
    return torch.full((shift + 16 + rows * columns,), -7.0, dtype=dtype, device=device)


def assert_written(memory: torch.Tensor, shift: int, expected: torch.Tensor) -> None:
    start, end = 8 + shift, 8 + shift + expected.numel()
    assert_same_bits(memory[start:end], expected.contiguous(), "panel")
    assert bool((memory[:start] == -7).all()), "written before the panel"
    assert bool((memory[end:] == -7).all()), "written after the panel"


shifts = st.sampled_from([0, 0, 1, 3])


def cut(data: st.DataObject, size: int, whole: int) -> tuple[int, int]:
    """(first, count) within `size`: anything, or multiples of `whole`."""
    unit = data.draw(st.sampled_from([1, whole]))
    first = data.draw(st.integers(0, size // unit)) * unit
    return first, data.draw(st.integers(0, (size - first) // unit)) * unit


@given(
    data=st.data(),
    n=st.integers(1, 40),
    k=st.one_of(st.integers(1, 200), st.integers(1, 12).map(lambda i: 32 * i)),
    blocksize=blocksizes,
    quant_type=quant_types,
    nested=st.booleans(),
    dtype=dtypes,
    shift=shifts,
    out_shift=shifts,
    seed=seeds,
)
def test_rectangles(
    data: st.DataObject,
    n: int,
    k: int,
    blocksize: int,
    quant_type: str,
    nested: bool,
    dtype: torch.dtype,
    shift: int,
    out_shift: int,
    seed: int,
    device: torch.device,
) -> None:
    weight = Weight(n, k, blocksize, quant_type, nested, device, shift, seed)
    (first_row, rows), (first_column, columns) = cut(data, n, 1), cut(data, k, 32)
    memory = poisoned(rows, columns, dtype, device, out_shift)
    place = (first_row, rows, first_column, columns)
    where = (memory[8 + out_shift :].data_ptr(), NUMBERS[dtype], *target_queue(memory.device))
    _native.dequantize_4bit_panel(*weight.bound.native, *place, *where)
    expected = weight.dequantized(dtype)[first_row : first_row + rows, first_column : first_column + columns]
    assert_written(memory, out_shift, expected)


@given(
    n=st.integers(1, 40),
    k=st.one_of(st.integers(1, 200), st.integers(1, 12).map(lambda i: 32 * i)),
    blocksize=blocksizes,
    nested=st.booleans(),
    dtype=dtypes,
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    picks=st.lists(st.integers(0, 2**31 - 1), max_size=50),
    shift=shifts,
    out_shift=shifts,
    seed=seeds,
)
def test_rows_by_index(
    n: int,
    k: int,
    blocksize: int,
    nested: bool,
    dtype: torch.dtype,
    index_dtype: torch.dtype,
    picks: list[int],
    shift: int,
    out_shift: int,
    seed: int,
    device: torch.device,
) -> None:
    weight = Weight(n, k, blocksize, "nf4", nested, device, shift, seed)
    indices = torch.tensor([pick % n for pick in picks], dtype=index_dtype, device=device)
    memory = poisoned(len(picks), k, dtype, device, out_shift)
    address = memory[8 + out_shift :].data_ptr()
    where = (indices.data_ptr(), index_dtype == torch.int64, len(picks), address)
    _native.dequantize_4bit_rows(*weight.bound.native, *where, NUMBERS[dtype], *target_queue(memory.device))
    assert_written(memory, out_shift, weight.dequantized(dtype)[indices.long()])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("k", [64, 33])
def test_an_index_of_no_row(dtype: torch.dtype, bad: int, k: int, device: torch.device) -> None:
    """On the CPU an IndexError, and nothing is written; on CUDA that row is NaN, and the others are right."""
    weight = Weight(5, k, 64, "fp4", True, device, 0, 0)
    indices = torch.tensor([4, bad, 2], dtype=dtype, device=device)
    memory = poisoned(3, k, torch.float32, device, 0)
    where = (indices.data_ptr(), dtype == torch.int64, 3, memory[8:].data_ptr())
    call = (*weight.bound.native, *where, NUMBERS[torch.float32], *target_queue(memory.device))
    if device.type == "cpu":
        with pytest.raises(IndexError, match=rf"indices: got {bad} at place 1, expected 0 to 4"):
            _native.dequantize_4bit_rows(*call)
        assert bool((memory == -7).all())
        return
    _native.dequantize_4bit_rows(*call)
    expected = weight.dequantized(torch.float32)[[4, 0, 2]]
    expected[1] = torch.nan
    assert_written(memory, 0, expected)


WRONG: list[tuple[str, tuple[int, int, int, int]]] = [
    ("rows: got 2 from 4 on.*5", (4, 2, 0, 64)),
    ("rows: got 6 from 0 on.*5", (0, 6, 0, 64)),
    ("rows.*from 18446744073709551615 on", (2**64 - 1, 2, 0, 64)),
    ("columns: got 32 from 33 on.*64", (0, 5, 33, 32)),
    ("columns: got 65 from 0 on.*64", (0, 5, 0, 65)),
]


@pytest.mark.parametrize(("match", "place"), WRONG)
def test_a_part_must_lie_within(match: str, place: tuple[int, int, int, int]) -> None:
    weight = Weight(5, 64, 64, "nf4", False, torch.device("cpu"), 0, 0)
    memory = torch.full((8 * 64,), -7.0)
    with pytest.raises(ValueError, match=f"^{match}"):
        _native.dequantize_4bit_panel(*weight.bound.native, *place, memory.data_ptr(), 0, -1, 1)
    assert bool((memory == -7).all())


@pytest.mark.parametrize("position", [0, 5])
def test_null_addresses(position: int) -> None:
    weight = Weight(5, 64, 64, "nf4", False, torch.device("cpu"), 0, 0)
    native = list(weight.bound.native)
    native[position] = 0
    memory = torch.empty(64)
    with pytest.raises(ValueError, match="null address"):
        _native.dequantize_4bit_panel(*native, 0, 1, 0, 64, memory.data_ptr(), 0, -1, 1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"^out: got a null address"):
        _native.dequantize_4bit_panel(*weight.bound.native, 0, 1, 0, 64, 0, 0, -1, 1)
    with pytest.raises(ValueError, match=r"^indices: got a null address"):
        _native.dequantize_4bit_rows(*weight.bound.native, 0, True, 1, memory.data_ptr(), 0, -1, 1)


@pytest.mark.cuda
@pytest.mark.parametrize("nested", [False, True])
def test_large_panels(nested: bool, cuda: torch.device) -> None:
    """More tiles than a wave of blocks, widths that no tile divides, and element offsets past 2**31."""
    weight = Weight(5000, 4096, 64, "nf4", nested, cuda, 0, 0)
    dense = weight.dequantized(torch.bfloat16)
    for first_column, columns in ((0, 4096), (1024, 1152), (64, 8), (4088, 8), (3, 1000)):
        memory = poisoned(5000, columns, torch.bfloat16, cuda, 0)
        _native.dequantize_4bit_panel(
            *weight.bound.native,
            *(0, 5000, first_column, columns, memory[8:].data_ptr(), NUMBERS[torch.bfloat16], *target_queue(cuda)),
        )
        assert_written(memory, 0, dense[:, first_column : first_column + columns])
    n, k = 2**19 + 3, 4096
    codes = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device=cuda)
    absmax = torch.rand(n * k // 64, device=cuda)
    bound = _panel.bind(codes, absmax, None, None, 0, None, 64, "nf4", (n, k))
    memory = poisoned(3, k, torch.bfloat16, cuda, 0)
    _native.dequantize_4bit_panel(
        *bound.native, n - 3, 3, 0, k, memory[8:].data_ptr(), NUMBERS[torch.bfloat16], *target_queue(cuda)
    )
    state = F.QuantState(absmax[-3 * k // 64 :], torch.Size((3, k)), None, 64, "nf4", torch.bfloat16)
    assert_written(memory, 0, F.dequantize_4bit(codes[-3 * k // 2 :], state))
