"""The functions as an API: signatures, what they return, and `out=` and `absmax=`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewbits.functional as F
from arrays import BLOCKSIZES, assert_same_bits, sample

QUANT_TYPES = ["nf4", "fp4"]
STORAGES = [
    torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.int32, torch.float32, torch.float64, torch.complex128
]  # fmt: skip

N = 300


# ---- signatures -----------------------------------------------------------------------------------------------------

SIGNATURES = {
    "quantize_4bit": "A absmax=None out=None blocksize=None compress_statistics=False quant_type='fp4' "
    "quant_storage=torch.uint8",
    "dequantize_4bit": "A quant_state=None absmax=None out=None blocksize=None quant_type='fp4'",
    "quantize_fp4": "A absmax=None out=None blocksize=None compress_statistics=False quant_storage=torch.uint8",
    "quantize_nf4": "A absmax=None out=None blocksize=None compress_statistics=False quant_storage=torch.uint8",
    "dequantize_fp4": "A quant_state=None absmax=None out=None blocksize=None",
    "dequantize_nf4": "A quant_state=None absmax=None out=None blocksize=None",
    "quantize_blockwise": "A code=None absmax=None out=None blocksize=4096 nested=False",
    "dequantize_blockwise": "A quant_state=None absmax=None code=None out=None blocksize=4096 nested=False",
    "get_4bit_type": "typename device=None blocksize=64",
    "create_dynamic_map": "signed=True max_exponent_bits=7 total_bits=8",
    "create_linear_map": "signed=True total_bits=8 add_zero=True",
    "create_fp8_map": "signed=True exponent_bits=5 precision_bits=2 total_bits=8",
    "create_normal_map": "offset=0.9677083 use_extra_value=True",
}


def describe(function: Callable[..., Any]) -> str:
    parameters = inspect.signature(function).parameters.values()
    return " ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    assert describe(getattr(F, name)) == SIGNATURES[name]


def test_bitsandbytes_has_these_signatures() -> None:
    peer = pytest.importorskip("bitsandbytes.functional")
    assert {name: describe(getattr(peer, name)) for name in SIGNATURES} == SIGNATURES


# ---- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_state_of_4bit(quant_type: str, nested: bool, device: torch.device) -> None:
    x = sample(device=device, dtype=torch.bfloat16).view(3, 100)
    codes, state = F.quantize_4bit(x, quant_type=quant_type, compress_statistics=nested)
    assert (codes.shape, codes.dtype, codes.device) == ((150, 1), torch.uint8, x.device)
    assert (state.shape, state.dtype, state.blocksize, state.quant_type) == (x.shape, x.dtype, 64, quant_type)
    assert state.code is not None
    assert state.code.shape == (16,)
    assert state.nested is nested
    if not nested:
        assert (state.absmax.dtype, state.absmax.shape, state.offset, state.state2) == (torch.float32, (5,), None, None)
        return
    assert (state.absmax.dtype, state.absmax.shape) == (torch.uint8, (5,))
    assert state.offset is not None
    assert state.state2 is not None
    assert (state.offset.shape, state.offset.dtype, state.offset.device) == ((), torch.float32, x.device)
    inner = state.state2
    assert (inner.absmax.shape, inner.blocksize, inner.dtype, inner.nested) == ((1,), 256, torch.float32, False)
    assert inner.code is not None
    assert inner.code.shape == (256,)


def test_state_of_8bit(device: torch.device) -> None:
    x = sample(device=device, dtype=torch.float16).view(3, 100)
    codes, state = F.quantize_blockwise(x, blocksize=64)
    assert (codes.shape, codes.dtype) == (x.shape, torch.uint8)
    assert (state.shape, state.dtype, state.blocksize, state.quant_type) == (None, x.dtype, 64, None)
    assert not state.nested


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_wrappers(quant_type: str, device: torch.device) -> None:
    x = sample(device=device)
    codes, state = getattr(F, f"quantize_{quant_type}")(x, None, None, 128, True, torch.bfloat16)
    expected, expected_state = F.quantize_4bit(x, None, None, 128, True, quant_type, torch.bfloat16)
    assert_same_bits(codes, expected, "codes")
    assert state == expected_state
    dequantize = getattr(F, f"dequantize_{quant_type}")
    assert_same_bits(dequantize(codes, state), F.dequantize_4bit(expected, expected_state), "values")
    plain, plain_state = F.quantize_4bit(x, quant_type=quant_type)
    out = torch.empty_like(x)
    assert dequantize(plain, None, plain_state.absmax, out, 64) is out
    assert_same_bits(out, F.dequantize_4bit(plain, plain_state), "values without a state")


@given(
    n=st.integers(0, 200),
    storage=st.sampled_from(STORAGES),
    quant_type=st.sampled_from(QUANT_TYPES),
    nested=st.booleans(),
)
def test_storage_keeps_every_byte(n: int, storage: torch.dtype, quant_type: str, nested: bool) -> None:
    x = sample(n)
    expected, _ = F.quantize_4bit(x, quant_type=quant_type, compress_statistics=nested)
    codes, state = F.quantize_4bit(x, quant_type=quant_type, compress_statistics=nested, quant_storage=storage)
    size = storage.itemsize
    count = ((n + 1) // 2 + size - 1) // size
    assert (codes.shape, codes.dtype) == ((count, 1), storage)
    held = codes.view(-1).view(torch.uint8)
    assert torch.equal(held[: expected.numel()], expected.view(-1))
    assert (held[expected.numel() :] == (0x77 if quant_type == "nf4" else 0)).all()
    assert_same_bits(F.dequantize_4bit(codes, state), F.dequantize_4bit(expected, state), "values")


def test_row_of_codes_gives_the_transpose(device: torch.device) -> None:
    x = sample(device=device).view(3, 100)
    codes, state = F.quantize_4bit(x, quant_type="nf4")
    values = F.dequantize_4bit(codes, state)
    transposed = F.dequantize_4bit(codes.t(), state)
    assert transposed.shape == (100, 3)
    assert transposed.stride() == (1, 100)
    assert torch.equal(transposed, values.t())
    assert F.dequantize_4bit(codes.view(-1), state).shape == x.shape


@pytest.mark.parametrize("shape", [(1, 1), (2,), (1, 2), (2, 1)])
def test_one_storage_element_is_not_a_row(shape: tuple[int, ...]) -> None:
    x = sample(torch.Size(shape).numel()).view(shape)
    assert F.dequantize_4bit(*F.quantize_4bit(x)).shape == shape


def test_more_than_two_dimensions(device: torch.device) -> None:
    x = sample(device=device).view(3, 2, 50)
    codes, state = F.quantize_4bit(x)
    assert F.dequantize_4bit(codes, state).shape == x.shape
    assert F.dequantize_4bit(codes.t(), state).shape == x.shape  # there is no .t() of it


@pytest.mark.parametrize("blocksize", [None, 64])
def test_default_blocksize(blocksize: int | None) -> None:
    assert F.quantize_4bit(sample(), blocksize=blocksize)[1].blocksize == 64
    assert F.quantize_blockwise(sample())[1].blocksize == 4096


def test_nested_8bit(device: torch.device) -> None:
    x = sample(3000, device)
    codes, state = F.quantize_blockwise(x, blocksize=64, nested=True)
    plain, plain_state = F.quantize_blockwise(x, blocksize=64)
    assert torch.equal(codes, plain)
    assert state.nested
    assert state.state2 is not None
    assert state.offset is not None
    assert (state.state2.blocksize, state.absmax.dtype) == (64, torch.uint8)
    torch.testing.assert_close(state.offset, plain_state.absmax.mean())
    torch.testing.assert_close(
        F.dequantize_blockwise(codes, state), F.dequantize_blockwise(plain, plain_state), rtol=0.02, atol=1e-3
    )


# ---- out= and absmax= -----------------------------------------------------------------------------------------------


def buffers(n: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    return {
        "dense": torch.zeros(n, dtype=dtype, device=device),
        "other shape": torch.zeros((1, n, 1), dtype=dtype, device=device),
        "strided": torch.zeros((n, 3), dtype=dtype, device=device)[:, 1],
        "offset": torch.zeros(n + 5, dtype=dtype, device=device)[5:],
    }


@pytest.mark.parametrize("kind", ["dense", "other shape", "strided", "offset"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
def test_4bit_buffers(kind: str, storage: torch.dtype, nested: bool, device: torch.device) -> None:
    x = sample(N + 1, device)
    expected, expected_state = F.quantize_4bit(x, compress_statistics=nested, quant_storage=storage)
    plain_state = F.quantize_4bit(x)[1]
    out = buffers(expected.numel(), storage, device)[kind]
    absmax = buffers(plain_state.absmax.numel(), torch.float32, device)[kind]
    versions = out._version, absmax._version
    codes, state = F.quantize_4bit(x, absmax, out, compress_statistics=nested, quant_storage=storage)
    assert codes is out
    assert out._version > versions[0], "autograd would not notice the write"
    assert absmax._version > versions[1]
    assert_same_bits(out.reshape(-1).clone(), expected, "codes")
    assert_same_bits(absmax.reshape(-1).clone(), plain_state.absmax, "absmax")
    assert state == expected_state if nested or kind != "other shape" else state.absmax is absmax
    assert_same_bits(F.dequantize_4bit(codes, state), F.dequantize_4bit(expected, expected_state), "values")


@pytest.mark.parametrize("kind", ["dense", "other shape", "strided", "offset"])
def test_8bit_buffers(kind: str, device: torch.device) -> None:
    x = sample(device=device)
    expected, expected_state = F.quantize_blockwise(x, blocksize=64)
    out = buffers(N, torch.uint8, device)[kind]
    absmax = buffers(5, torch.float32, device)[kind]
    codes, state = F.quantize_blockwise(x, None, absmax, out, 64)
    assert codes is out
    assert state.absmax is absmax
    assert_same_bits(out.reshape(-1).clone(), expected, "codes")
    assert_same_bits(absmax.reshape(-1).clone(), expected_state.absmax, "absmax")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantize_into_a_buffer(nested: bool, dtype: torch.dtype, device: torch.device) -> None:
    x = sample(device=device, dtype=dtype).view(3, 100)
    codes, state = F.quantize_4bit(x, compress_statistics=nested)
    expected = F.dequantize_4bit(codes, state)
    wide = torch.zeros(3, 200, dtype=dtype, device=device)
    for out in (torch.zeros_like(x), wide[:, ::2], torch.zeros(100, 3, dtype=dtype, device=device).t()):
        version = out._version
        assert F.dequantize_4bit(codes, state, out=out) is out
        assert_same_bits(out.contiguous(), expected, "values")
        assert out._version > version, "autograd would not notice the write"
    assert not wide[:, 1::2].any(), "wrote between the elements of out"
    codes, state = F.quantize_blockwise(x, nested=nested)
    out = torch.zeros_like(x)
    assert F.dequantize_blockwise(codes, state, out=out) is out
    assert_same_bits(out, F.dequantize_blockwise(codes, state), "values")


def test_without_a_state(device: torch.device) -> None:
    x = sample(device=device, dtype=torch.float16)
    codes, state = F.quantize_4bit(x, blocksize=128, quant_type="nf4")
    out = torch.empty_like(x)
    F.dequantize_4bit(codes, absmax=state.absmax, out=out, blocksize=128, quant_type="nf4")
    assert_same_bits(out, F.dequantize_4bit(codes, state), "4 bits")
    code = F.create_linear_map().to(device)
    codes, state = F.quantize_blockwise(x, code, blocksize=128)
    values = F.dequantize_blockwise(codes, absmax=state.absmax, code=code, blocksize=128)
    assert values.dtype == torch.float32
    assert_same_bits(values.half(), F.dequantize_blockwise(codes, state), "8 bits")
    F.dequantize_blockwise(codes, absmax=state.absmax, code=code, out=out, blocksize=128)
    assert_same_bits(out, F.dequantize_blockwise(codes, state), "8 bits into float16")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_absmax_and_code_of_other_float_dtypes(dtype: torch.dtype) -> None:
    x = torch.full((128,), 0.5)
    codes, state = F.quantize_4bit(x)
    state.absmax = state.absmax.to(dtype).view(2, 1)
    assert torch.equal(F.dequantize_4bit(codes, state), x)
    code = torch.linspace(-1, 1, 256).to(dtype)
    codes8, state8 = F.quantize_blockwise(x, code)
    assert torch.equal(F.dequantize_blockwise(codes8, state8), x)


def test_transient_views(device: torch.device) -> None:
    """Lazily negated views hold the wrong sign in memory."""
    z = torch.complex(sample(device=device), sample(N, device) + 1)
    view = z.conj().imag
    assert view.is_neg()
    for x in (view, view[::2], torch._neg_view(sample(device=device))):
        assert_same_bits(F.quantize_4bit(x)[0], F.quantize_4bit(x.clone())[0], "4 bits")
        assert_same_bits(F.quantize_blockwise(x)[0], F.quantize_blockwise(x.clone())[0], "8 bits")


def test_inputs_are_left_alone(device: torch.device) -> None:
    x = sample(device=device)
    keep = x.clone()
    for nested in (False, True):
        codes, state = F.quantize_4bit(x, compress_statistics=nested)
        before = codes.clone(), state.absmax.clone()
        F.dequantize_4bit(codes, state)
        assert torch.equal(codes, before[0])
        assert torch.equal(state.absmax, before[1])
    assert torch.equal(x, keep)


def test_no_gradient() -> None:
    x = sample().requires_grad_()
    for codes, state in (F.quantize_4bit(x), F.quantize_4bit(x, compress_statistics=True), F.quantize_blockwise(x)):
        assert not codes.requires_grad
        assert not state.absmax.requires_grad
    codes, state = F.quantize_4bit(x, quant_storage=torch.float32)
    assert not F.dequantize_4bit(codes.requires_grad_(), state).requires_grad


def test_meta_tensors() -> None:
    x = torch.empty(3, 101, device="meta", dtype=torch.bfloat16)
    codes, state = F.quantize_4bit(x, compress_statistics=True, quant_storage=torch.float16)
    assert (codes.is_meta, codes.shape, codes.dtype) == (True, (76, 1), torch.float16)
    assert (state.absmax.is_meta, state.absmax.shape) == (True, (5,))
    values = F.dequantize_4bit(codes, state)
    assert (values.is_meta, values.shape, values.dtype) == (True, x.shape, x.dtype)
    codes, state = F.quantize_blockwise(x)
    assert F.dequantize_blockwise(codes, state).shape == x.shape


def test_under_a_default_device(device: torch.device) -> None:
    x = sample(device=device)
    expected = F.quantize_4bit(x, compress_statistics=True)
    with torch.device("meta"):
        codes, state = F.quantize_4bit(x, compress_statistics=True)
        assert codes.device == x.device
        assert torch.equal(codes, expected[0])
        values = F.dequantize_4bit(codes, state)
    assert torch.equal(values, F.dequantize_4bit(*expected))


def test_offset_may_be_a_number() -> None:
    codes, state = F.quantize_4bit(sample(), compress_statistics=True)
    expected = F.dequantize_4bit(codes, state)
    assert state.offset is not None
    state.offset = state.offset.item()  # type: ignore[assignment]
    assert torch.equal(F.dequantize_4bit(codes, state), expected)


def test_a_state_can_be_unnested() -> None:
    codes, state = F.quantize_4bit(sample(), compress_statistics=True)
    expected = F.dequantize_4bit(codes, state)
    state.absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    state.nested, state.state2, state.offset = False, None, None
    assert torch.equal(F.dequantize_4bit(codes, state), expected)


# ---- calls of every kind ---------------------------------------------------------------------------------------------


@given(data=st.data())
def test_direct_and_dispatched_calls_agree(data: st.DataObject) -> None:
    """A plain call and one under a dispatch mode run different Python and the same kernels."""
    n = data.draw(st.integers(0, 700), "n")
    blocksize = data.draw(st.sampled_from(BLOCKSIZES), "blocksize")
    quant_type = data.draw(st.sampled_from(QUANT_TYPES), "quant_type")
    nested = data.draw(st.booleans(), "nested")
    storage = data.draw(st.sampled_from(STORAGES), "storage")
    x = sample(n)

    def run() -> list[torch.Tensor]:
        codes, state = F.quantize_4bit(x, None, None, blocksize, nested, quant_type, storage)
        codes8, state8 = F.quantize_blockwise(x, blocksize=blocksize, nested=nested)
        out = torch.zeros_like(x)
        F.dequantize_4bit(codes, state, out=out)
        parts = [codes.view(-1).view(torch.uint8), state.absmax, codes8, state8.absmax, out]
        return [*parts, F.dequantize_4bit(codes, state), F.dequantize_blockwise(codes8, state8)]

    direct = run()
    with _Passing() as mode:
        dispatched = run()
    assert mode.seen >= 5
    for left, right in zip(direct, dispatched, strict=True):
        assert_same_bits(left, right, "direct and dispatched")


class _Passing(torch.utils._python_dispatch.TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += func.namespace == "fewbits"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("nested", [False, True])
def test_state_of_a_list_of_sizes(nested: bool, device: torch.device) -> None:
    """As whoever reads a state from JSON leaves it."""
    codes, state = F.quantize_4bit(sample(device=device), compress_statistics=nested)
    expected = F.dequantize_4bit(codes, state).view(3, 100)
    state.shape = [3, 100]  # type: ignore[assignment]
    out = torch.zeros(3, 100, device=device)
    assert F.dequantize_4bit(codes, state, out=out) is out
    assert_same_bits(out, expected, "values")


@pytest.mark.parametrize("nested", [False, True])
def test_codes_of_no_dimension(nested: bool, device: torch.device) -> None:
    codes, state = F.quantize_4bit(torch.tensor([1.0, -1.0], device=device), compress_statistics=nested)
    expected = F.dequantize_4bit(codes, state)
    assert_same_bits(F.dequantize_4bit(codes.squeeze(), state), expected, "values")


# ---- buffers over the memory that is read ----------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_codes_over_the_values(nested: bool, device: torch.device) -> None:
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(1)).to(device)
    expected, _ = F.quantize_4bit(x, compress_statistics=nested)
    memory = x.clone()
    out = memory.view(torch.uint8)[-expected.numel() :]  # of the last values, which are read last
    assert F.quantize_4bit(memory, out=out, compress_statistics=nested)[0] is out
    assert_same_bits(out.clone().view(-1, 1), expected, "codes")
    expected = F.quantize_blockwise(x)[0]
    memory = x.clone()
    out = memory.view(torch.uint8)[-expected.numel() :]
    F.quantize_blockwise(memory, out=out)
    assert_same_bits(out.clone(), expected, "8-bit codes")


@pytest.mark.parametrize("nested", [False, True])
def test_values_over_the_codes(nested: bool, device: torch.device) -> None:
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(1)).to(device)
    codes, state = F.quantize_4bit(x, compress_statistics=nested)
    expected, out = F.dequantize_4bit(codes, state), torch.zeros_like(x)
    memory = out.view(torch.uint8)[: codes.numel()].copy_(codes.view(-1))  # values are written over the next codes
    F.dequantize_4bit(memory.view(-1, 1), state, out=out)
    assert_same_bits(out, expected, "values")
    absmax = out.view(state.absmax.dtype)[: state.absmax.numel()].copy_(state.absmax)
    state.absmax = absmax
    F.dequantize_4bit(codes, state, out=out)
    assert_same_bits(out, expected, "values over the maxima")
    codes, state = F.quantize_blockwise(x)
    expected, out = F.dequantize_blockwise(codes, state), torch.zeros_like(x)
    F.dequantize_blockwise(out.view(torch.uint8)[: codes.numel()].copy_(codes), state, out=out)
    assert_same_bits(out, expected, "values of 8 bits")
