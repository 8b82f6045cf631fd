"""The portable backend on a device that is not the CPU and has no float64, as far as that can be had here.

See ``elsewhere.py``: whatever mixes devices or asks for float64 there raises, and results must be over there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fewbits.optim
from arrays import DTYPES, assert_same_bits, dtype_name
from elsewhere import DEVICE, Device, Elsewhere, back, there
from fewbits import _backend, _int8, _launch, _matmul, _panel
from fewbits.optim import _states
from fewbits.optim._families import FAMILIES, pack
from fewbits.portable import numbers
from fewbits.portable.optim import PortableBundle, entry_of
from linear8bit_layers import activations, randn
from portable_mode import portable

# What FakeTensorMode needs for a device that this torch knows only by name.
_guard = getattr(torch._C, "_ensureCUDADeviceGuardSet", None)
pytestmark = [
    pytest.mark.skipif(_backend.FORCED != "", reason="compares with native code"),
    pytest.mark.skipif(_guard is None, reason="this torch has no stand-in for a device"),
]


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Let that device be."""
    assert _guard is not None
    _guard()
    with portable(piece=8192), mock.patch.dict(numbers._has_float64, clear=True), FakeTensorMode(), Device():
        yield
        assert not numbers.has_float64(DEVICE)


def assert_same(call: Any, *args: Any) -> None:
    """The same values as from native code on the CPU, over there."""
    __tracebackhide__ = True
    expected = call(*args)
    with elsewhere():
        got = call(*(there(arg) if isinstance(arg, torch.Tensor) else arg for arg in args))
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for i, (left, right) in enumerate(pairs):
        assert_same_bits(back(left), right, f"result {i}")


def test_the_stand_in_refuses() -> None:
    with elsewhere():
        x = there(torch.ones(3))
        assert x.device == DEVICE
        with pytest.raises(TypeError, match="no float64"):
            x.double()
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3)
        assert isinstance(x[1:] * 2, Elsewhere)
        assert type(x.cpu()) is torch.Tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_blocks(dtype: torch.dtype) -> None:
    x = randn(9001).to(dtype)
    code = torch.linspace(-1, 1, 256).flip(0)
    for table in (None, code):
        assert_same(_launch.quantize_blockwise, x, table, 256)
        codes, absmax = _launch.quantize_blockwise(x, table, 256)
        assert_same(_launch.dequantize_blockwise, codes, absmax, table, 256, dtype)
    for quant_type in ("nf4", "fp4"):
        assert_same(_launch.quantize_4bit, x, 64, quant_type, torch.float16)
        packed, maxima = _launch.quantize_4bit(x, 64, quant_type, torch.float16)
        assert_same(_launch.dequantize_4bit, packed, maxima, 64, quant_type, (9001,), dtype)
        assert_same(_launch.quantize_4bit_nested, x, 32, quant_type, torch.uint8)
        packed, inner, outer, offset = _launch.quantize_4bit_nested(x, 32, quant_type, torch.uint8)
        nested = (None, outer, 256, offset, 32, quant_type, (9001,), dtype)
        assert_same(_launch.dequantize_4bit_nested, packed, inner, *nested)


def weight(nested: bool) -> tuple[Any, ...]:
    w = randn(40, 96)
    if not nested:
        codes, absmax = _launch.quantize_4bit(w, 64, "nf4", torch.uint8)
        return codes, absmax, None, None, 0, None, 64, "nf4", (40, 96)
    codes, absmax, outer, offset = _launch.quantize_4bit_nested(w, 64, "nf4", torch.uint8)
    return codes, absmax, None, outer, 256, offset, 64, "nf4", (40, 96)


@pytest.mark.parametrize("nested", [False, True])
def test_weights(nested: bool) -> None:
    parts = weight(nested)
    assert_same(_panel.dequantize_4bit_rows, torch.tensor([[3, 39], [0, 3]]), *parts, torch.bfloat16)
    x, g, bias = randn(3, 96), randn(3, 40), randn(40)
    products = [(_matmul.matmul_4bit, (x, *parts, bias)), (_matmul.matmul_4bit_grad, (g, *parts))]
    for product, args in products:
        expected = product(*args)
        with elsewhere(), mock.patch.object(_panel, "_OTHER_PANEL_BYTES", 4096):
            got = product(*(there(arg) if isinstance(arg, torch.Tensor) else arg for arg in args))
        torch.testing.assert_close(back(got), expected)


def test_an_index_of_no_row_gives_nan() -> None:
    """Nobody waits to see it."""
    codes, absmax, *rest = weight(False)
    with elsewhere():
        got = _panel.dequantize_4bit_rows(
            there(torch.tensor([1, -1, 40, 2])), there(codes), there(absmax), *rest, torch.float32
        )
    assert back(got).isnan().all(dim=1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_int8(dtype: torch.dtype) -> None:
    x, w = activations(5, 96).to(dtype), randn(40, 96)
    codes, stats, _ = _int8.int8_quantize_rows(w)
    for threshold in (0.0, 6.0):
        assert_same(_int8.int8_quantize_rows, x, threshold)
    assert_same(_int8.int8_linear_matmul, codes[:7], codes)
    assert_same(_int8.int8_linear, x, codes, stats, 0.0, randn(40).to(dtype))
    assert_same(_int8.int8_scaled_mm, codes[:7], codes, stats[:7], stats, None, dtype)
    assert_same(_int8.int8_vectorwise_dequant, codes, stats, dtype)
    with elsewhere():
        mixed = _int8.int8_linear(there(x), there(codes), there(stats), 6.0, None)
    torch.testing.assert_close(back(mixed), _int8.int8_linear(x, codes, stats, 6.0, None))


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", ["AdamW", "AdEMAMix", "Lion", "SGD", "RMSprop", "Adagrad", "LAMB", "LARS"])
def test_optimizers(name: str, bits: int) -> None:
    """The steps of a bundle, with clipping and stochastic rounding, against native steps on the CPU."""
    kwargs: dict[str, Any] = {"lr": 0.01, "momentum": 0.9} if name in ("SGD", "LARS") else {"lr": 0.01}
    kwargs |= {"weight_decay": 0.1, "max_grad_norm": 0.5, "stochastic_rounding": True, "seed": 5}
    p = torch.nn.Parameter(randn(90, 100).bfloat16())
    optimizer = getattr(fewbits.optim, f"{name}{bits}bit")([p], **kwargs)
    p.grad = randn(90, 100, seed=1).bfloat16()
    optimizer.step()
    config = optimizer._watch.plan.configs[0]
    own, state = p.detach().clone(), {key: value.clone() for key, value in optimizer.state[p].items()}
    p.grad = grad = randn(90, 100, seed=2).bfloat16()
    optimizer.step()
    with elsewhere():
        moved = {key: there(value) for key, value in state.items() if key not in _states.MAPS}
        q = there(own)
        bundle = PortableBundle(optimizer, DEVICE)
        bundle.entries = [entry_of(bundle.name, 0, 0, q, moved, config)]
        bundle.send([0], [there(grad)], False)
        bundle.control = there(torch.zeros(2, dtype=torch.int32))
        bundle.decide(bundle.norms(), 0.5, None, None, False)
        bundle.step(1, False)
        assert back(moved["step"]).item() == 2
    # Roots are the CPU's own here, where float64 is not: now and then the last place differs.
    same = (back(q) == p.detach()).float().mean()
    assert same > 0.99
    torch.testing.assert_close(back(q).float(), p.detach().float(), rtol=2e-2, atol=1e-4)
    if bits == 32:
        torch.testing.assert_close(back(moved["state1"]), optimizer.state[p]["state1"])


def test_a_learning_rate_over_there() -> None:
    """It is read at every step, since no kernel will."""
    from fewbits.optim._config import Config

    with elsewhere():
        optimizer = SimpleNamespace(optimizer_name="lion", defaults={}, args=SimpleNamespace(max_unorm=0.0))
        group = {"lr": there(torch.tensor(0.5)), "betas": (0.9, 0.99), "weight_decay": 0.0}
        optimizer._decoupled = True
        config = Config(optimizer, group, None, DEVICE)  # type: ignore[arg-type]
        config.refresh()
    values = {**group, "decoupled": True}
    assert config.record == pack(FAMILIES["lion"], values, 0.5, 0)
