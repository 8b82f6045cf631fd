"""The portable backend: native code's bytes, for tensors in blocks, rows and 4-bit weights. Optimizers stand apart."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewbits
import fewbits.functional as F
from arrays import DTYPES, assert_same_bits, dtype_name
from fewbits import _backend, _native, _panel
from fewbits.nn import Embedding4bit, Linear4bit, Linear8bitLt
from fewbits.portable import int8 as portable_int8
from fewbits.portable.fourbit import exact_mean
from linear8bit_layers import activations, randn
from portable_mode import SMALL_PIECE, portable
from products import assert_rounded_once, distance, truth_of
from strategies import blocksizes, codes_256, dtypes, flat_tensors, quant_types, seeds, strided_tensors
from tolerances import INT8_OUTLIERS, MATMUL_RATIO

pytestmark = pytest.mark.skipif(_backend.FORCED != "", reason="compares with native code")
STORAGES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]


def both(run: Any, piece: int = SMALL_PIECE) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return what native and portable code make of the same call."""
    native = run()
    with portable(piece):
        mine = run()
    return native, mine


def assert_same(run: Any, piece: int = SMALL_PIECE) -> None:
    __tracebackhide__ = True
    for i, (expected, got) in enumerate(zip(*both(run, piece), strict=True)):
        assert got.shape == expected.shape
        assert_same_bits(got, expected, f"result {i}")


# ---- who serves whom -----------------------------------------------------------------------------------------------

_PROBE = """
import torch
torch.version.hip = {hip}
import fewbits._backend as backend
from fewbits import _direct, _launch
device, x = torch.device("cuda", 0), torch.ones(64)
print(sorted(backend.NATIVE_TYPES), backend.is_portable(device), _launch.target_queue(torch.device("cpu"))[0],
      _launch.target_queue(torch.device("xpu", 0))[0], _direct.target_of(x) is None)
"""


@pytest.mark.parametrize(
    ("hip", "forced", "expected"),
    [
        (None, "", "['cpu', 'cuda'] False -1 -2 False"),
        (None, "portable", "[] True -2 -2 True"),
        ("'6.4'", "", "['cpu'] True -1 -2 False"),
    ],
)
def test_choice(hip: str | None, forced: str, expected: str) -> None:
    environment = {**os.environ, "FEWBITS_BACKEND": forced}
    command = [sys.executable, "-c", _PROBE.format(hip=hip)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip() == expected, done.stderr


def test_unknown_backend() -> None:
    environment = {**os.environ, "FEWBITS_BACKEND": "fast"}
    done = subprocess.run([sys.executable, "-c", "import fewbits"], capture_output=True, check=False, env=environment)
    assert done.returncode == 1
    assert b"FEWBITS_BACKEND: expected 'portable' or nothing, got 'fast'" in done.stderr


@pytest.mark.parametrize("key", ["XPU", "MPS", "PrivateUse1"])
def test_every_device_has_a_kernel(key: str) -> None:
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("fewbits::"):
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key), name


def test_native_code_is_not_called() -> None:
    """What these tests compare with is not what they compare."""
    with portable(), pytest.raises(AssertionError, match="native code"):
        _native.quantize_blockwise(0, 0, 0, 0, 0, 0, 0, 0, 0)


# ---- blocks --------------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_blockwise(data: st.DataObject) -> None:
    blocksize = data.draw(blocksizes)
    x = data.draw(flat_tensors(blocksize))
    code = torch.from_numpy(data.draw(codes_256())) if data.draw(st.booleans()) else None
    out_dtype = data.draw(dtypes)

    def run() -> list[torch.Tensor]:
        codes, state = F.quantize_blockwise(x, code=code, blocksize=blocksize)
        out = torch.empty(x.shape, dtype=out_dtype)
        F.dequantize_blockwise(codes, absmax=state.absmax, code=code, blocksize=blocksize, out=out)
        return [codes, state.absmax, out, F.dequantize_blockwise(codes, state)]

    assert_same(run)


@given(data=st.data())
def test_any_codes(data: st.DataObject) -> None:
    """Every code times every maximum, to each dtype."""
    rng = np.random.default_rng(data.draw(seeds))
    codes = torch.from_numpy(rng.integers(0, 256, 1000).astype(np.uint8))
    scale = rng.choice([0.0, -1.0, 1e-45, 1e-38, 1.0, 65504.0, 3e38, np.inf, np.nan], 32)
    absmax, out_dtype = torch.from_numpy(scale.astype(np.float32)), data.draw(dtypes)
    quant_type = data.draw(quant_types)

    def run() -> list[torch.Tensor]:
        wide = torch.empty(1000, dtype=out_dtype)
        F.dequantize_blockwise(codes, absmax=absmax, blocksize=32, out=wide)
        packed = torch.empty(1000, dtype=out_dtype)
        F.dequantize_4bit(codes[:500], absmax=absmax, blocksize=32, quant_type=quant_type, out=packed)
        return [wide, packed]

    assert_same(run)


@given(data=st.data())
def test_4bit(data: st.DataObject) -> None:
    blocksize, quant_type = data.draw(blocksizes), data.draw(quant_types)
    x, nested = data.draw(flat_tensors(blocksize)), data.draw(st.booleans())
    storage = data.draw(st.sampled_from(STORAGES))

    def run() -> list[torch.Tensor]:
        codes, state = F.quantize_4bit(x, None, None, blocksize, nested, quant_type, storage)
        parts = [codes.view(-1).view(torch.uint8), state.absmax, F.dequantize_4bit(codes, state)]
        if state.state2 is not None and state.offset is not None:
            parts += [state.state2.absmax, state.offset]
        return parts

    assert_same(run)


@given(x=strided_tensors(), quant_type=quant_types)
def test_strides(x: torch.Tensor, quant_type: str) -> None:
    def run() -> list[torch.Tensor]:
        codes, state = F.quantize_4bit(x, quant_type=quant_type, compress_statistics=True)
        codes8, state8 = F.quantize_blockwise(x, blocksize=64, nested=True)
        values = [F.dequantize_4bit(codes, state), F.dequantize_blockwise(codes8, state8)]
        return [codes, state.absmax, codes8, state8.absmax, *values]

    assert_same(run)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_more_than_a_piece(dtype: torch.dtype) -> None:
    """As it is, not in pieces made small for a test."""
    x = randn((1 << 21) + 77).to(dtype)

    def run() -> list[torch.Tensor]:
        codes, state = F.quantize_4bit(x, quant_type="fp4", compress_statistics=True)
        codes8, state8 = F.quantize_blockwise(x)
        values = [F.dequantize_4bit(codes, state), F.dequantize_blockwise(codes8, state8)]
        return [codes, state.absmax, codes8, state8.absmax, *values]

    native, mine = run(), both(run, 1 << 21)[1]
    assert all(torch.equal(left, right) for left, right in zip(native, mine, strict=True))


@given(data=st.data())
def test_mean_of_maxima(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(seeds))
    bits = rng.integers(0, 0x7F80_0000, data.draw(st.integers(0, 300)), dtype=np.uint32)
    values = bits.view(np.float32) if data.draw(st.booleans()) else np.full(7, bits[:1].view(np.float32).sum())
    expected = math.fsum(values.tolist()) / max(1, values.size)
    assert exact_mean(torch.from_numpy(values)) == expected


# ---- 4-bit weights -------------------------------------------------------------------------------------------------


def weight_of(n: int, k: int, nested: bool, blocksize: int = 64) -> tuple[torch.Tensor, F.QuantState]:
    return F.quantize_4bit(randn(n, k), None, None, blocksize, nested, "nf4")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("n", "k"), [(5, 64), (7, 33), (200, 97), (1, 1)])
def test_panels(n: int, k: int, nested: bool) -> None:
    codes, state = weight_of(n, k, nested, 32)
    parts: Any = (codes, state.absmax, None, None, 0, None, 32, "nf4", (n, k))
    if state.state2 is not None:
        parts = (codes, state.absmax, state.state2.code, state.state2.absmax, 256, state.offset, 32, "nf4", (n, k))

    def run() -> list[torch.Tensor]:
        weight, device = _panel.bind(*parts), torch.device("cpu")
        return [
            panel.to(torch.float32, copy=True)  # float64 holds float32 numbers; the next panel has this memory
            for dim in (0, 1)
            for dtype in (*DTYPES, torch.float64)
            for _, _, panel in _panel.panels(weight, dim, dtype, device)
        ]

    limit = {"cpu": 4 * max(n, k) * 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_panel, "PANEL_BYTES", limit)
        assert_same(run, piece=256)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("nested", [False, True])
def test_embedding_rows(index: torch.dtype, nested: bool) -> None:
    layer = Embedding4bit(50, 33, dtype=torch.bfloat16, quant_type="nf4" if nested else "fp4").to("cpu")
    rows = torch.tensor([[0, 49, 7], [7, 3, 48]], dtype=index)
    assert_same(lambda: [layer(rows), layer(rows[:, :0]), layer(rows.t())], piece=64)


@pytest.mark.parametrize("row", [-1, 50, 2**31 - 1])
def test_an_index_of_no_row(row: int) -> None:
    layer = Embedding4bit(50, 33).to("cpu")
    rows = torch.tensor([1, row, 99])
    with pytest.raises(IndexError) as native:
        layer(rows)
    with portable(), pytest.raises(IndexError) as mine:
        layer(rows)
    assert str(mine.value) == str(native.value)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("m", [1, 9])
def test_product(dtype: torch.dtype, bias: bool, m: int) -> None:
    codes, state = weight_of(72, 320, True)
    weight = F.dequantize_4bit(codes, state)
    x, added = randn(m, 320, seed=3).to(dtype), randn(72, seed=4).to(dtype) if bias else None
    with portable():
        y = fewbits.matmul_4bit(x, codes, state, bias=added)
    assert (y.dtype, y.shape) == (dtype, (m, 72))
    if dtype == torch.float64:
        return
    assert_rounded_once(y, x, weight.double(), added)
    plain = torch.nn.functional.linear(x, weight.to(dtype), added)
    truth = truth_of(x, weight.double(), added)
    assert distance(y, truth) <= MATMUL_RATIO * distance(plain, truth)


def test_gradients_and_autocast() -> None:
    codes, state = weight_of(40, 96, False)
    weight = F.dequantize_4bit(codes, state)
    x, bias = randn(3, 96).requires_grad_(), randn(40).requires_grad_()
    with portable():
        fewbits.matmul_4bit(x, codes, state, bias=bias).sum().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = fewbits.matmul_4bit(x, codes, state)
    assert x.grad is not None
    assert bias.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 96))
    assert bias.grad.tolist() == [3.0] * 40
    assert low.dtype == torch.bfloat16


def test_layers_compile() -> None:
    """One op for the compiler, whoever serves the device."""
    layer, layer8 = Linear4bit(64, 32).to("cpu"), Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
    x = randn(2, 64)
    with portable():
        for module in (layer, layer8):
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), module(x))


# ---- LLM.int8() ----------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_int8_rows(data: st.DataObject) -> None:
    k = data.draw(st.sampled_from([1, 31, 32, 33, 100]))
    flat = data.draw(flat_tensors(32))
    x = flat[: flat.numel() // k * k].view(-1, k)
    threshold = data.draw(st.sampled_from([0.0, 0.5, 6.0, 1e-3]))

    def run() -> list[torch.Tensor]:
        codes, stats, columns = F.int8_vectorwise_quant(x, threshold)
        parts = [codes, stats, F.int8_vectorwise_dequant(codes, stats)]
        return parts if columns is None else [*parts, columns.int()]

    assert_same(run, piece=512)


@given(bits=st.lists(st.booleans(), max_size=100))
def test_masks(bits: list[bool]) -> None:
    columns = torch.tensor(bits, dtype=torch.bool)
    assert torch.equal(portable_int8.unpack_mask(portable_int8.pack_mask(columns), len(bits)), columns)


def test_int8_products_are_exact() -> None:
    """Past 2**24, where float32 ends, up to where int32 does; -128 is a code too."""
    lowest = torch.full((2, 131_071), -128, dtype=torch.int8)
    mixed = torch.randint(-128, 128, (3, 5000), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    for a, b in ((lowest, lowest), (mixed, mixed[:2]), (mixed[:, :1], mixed[:, :1])):
        assert_same(lambda a=a, b=b: [F.int8_linear_matmul(a, b)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(lambda a=a, b=b: [F.int8_linear_matmul(a, b)])


def test_too_many_columns() -> None:
    codes, stats = torch.ones(1, 131_072, dtype=torch.int8), torch.ones(1)
    calls: list[Any] = [
        lambda: F.int8_linear_matmul(codes, codes),
        lambda: F.int8_scaled_mm(codes, codes, stats, stats),
        lambda: fewbits.matmul(codes.float(), codes, state=state_of(codes, stats)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="131072") as native:
            call()
        with portable(), pytest.raises(ValueError, match="131072") as mine:
            call()
        assert str(mine.value) == str(native.value)


def state_of(codes: torch.Tensor, stats: torch.Tensor) -> fewbits.MatmulLtState:
    state = fewbits.MatmulLtState()
    state.CB, state.SCB, state.has_fp16_weights = codes, stats, False
    return state


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("bias", [False, True])
def test_int8_linear(dtype: torch.dtype, bias: bool) -> None:
    codes, stats, _ = F.int8_vectorwise_quant(randn(40, 96))
    x, added, grad = randn(2, 3, 96).to(dtype), randn(40).to(dtype) if bias else None, randn(2, 3, 40).to(dtype)

    def run() -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        y = fewbits.matmul(leaf, codes, state=state_of(codes, stats), bias=added)
        y.backward(grad)
        assert leaf.grad is not None
        return [y, leaf.grad]

    assert_same(run)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_int8_outliers(dtype: torch.dtype) -> None:
    codes, stats, _ = F.int8_vectorwise_quant(randn(40, 96))
    x = activations(5, 96).to(dtype)
    (native,), (mine,) = both(lambda: [fewbits.matmul(x, codes, state=state_of(codes, stats), threshold=6.0)])
    largest = x.abs().double() + x.abs().amax(1, keepdim=True)
    magnitude = largest @ (codes.abs().double() * stats.unsqueeze(1) / 127).t()
    assert bool(((native.double() - mine.double()).abs() <= 2 * INT8_OUTLIERS[dtype] * magnitude).all())


def test_a_weight_of_two_layers() -> None:
    """There is no prepared weight from which the second layer could have the scales that the first one took."""
    first, second = (Linear8bitLt(32, 8, bias=False, has_fp16_weights=False) for _ in range(2))
    second.weight = first.weight
    model = torch.nn.ModuleList([first, second]).to("cpu")
    x = randn(1, 32)
    with portable(), torch.no_grad():
        for _ in range(2):
            assert torch.equal(model[0](x), model[1](x))
