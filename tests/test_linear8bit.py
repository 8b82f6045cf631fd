"""`Linear8bitLt` as a module: products, gradients, moves, and the life of codes and scales."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fewbits
import fewbits.functional as F
from arrays import DTYPES
from fewbits.nn import Embedding8bit, Int8Params, Linear8bitLt
from linear8bit_layers import K, N, activations, assert_same_layer, dense, make, randn, raw, scales
from products import distance

no_grad = pytest.mark.usefixtures("_no_grad")


@pytest.fixture
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def test_construction() -> None:
    layer = Linear8bitLt(K, N, False, False, 6.0, 3, "meta")
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.bias, layer.index) == (K, N, None, 3)
    state = layer.state
    assert (state.threshold, state.has_fp16_weights, state.CB, state.SCB) == (6.0, False, None, None)
    assert (type(layer.weight), layer.weight.is_meta, layer.weight.shape) == (Int8Params, True, (N, K))
    assert layer.weight.__dict__ == {"has_fp16_weights": False, "CB": None, "SCB": None}
    assert not layer.weight.requires_grad
    assert list(layer.state_dict()) == ["weight"]
    trained = Linear8bitLt(K, N)
    assert trained.state.has_fp16_weights
    assert trained.weight.requires_grad
    assert trained.index is None
    with torch.device("meta"):
        assert list(Linear8bitLt(K, N).state_dict()) == ["weight", "bias"]


def test_signatures() -> None:
    assert list(inspect.signature(Linear8bitLt).parameters) == [
        *("input_features", "output_features", "bias", "has_fp16_weights", "threshold", "index", "device")
    ]
    assert list(inspect.signature(Int8Params).parameters) == [
        *("data", "requires_grad", "has_fp16_weights", "CB", "SCB", "kwargs")
    ]
    assert list(inspect.signature(Embedding8bit).parameters) == ["num_embeddings", "embedding_dim", "device", "dtype"]


@no_grad
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, K), (5, K), (2, 3, K), (K,), (2, 1, 2, K), (0, K)])
def test_products(
    dtype: torch.dtype, threshold: float, bias: bool, shape: tuple[int, ...], device: torch.device
) -> None:
    """The long way, the short way and the function agree bit for bit, and are near the dense product."""
    layer = make(device, threshold=threshold, bias=bias).to(dtype)
    x = activations(*shape, outliers=2 if 0 not in shape else 0).to(device, dtype)
    slow, fast = layer(x), layer(x)
    assert slow.dtype == dtype
    assert slow.shape == (*shape[:-1], N)
    assert torch.equal(slow, fast)
    state = copy.copy(layer.state)
    assert torch.equal(fewbits.matmul(x, layer.weight.data, state=state, bias=layer.bias), slow)
    if slow.numel():
        truth = nn.functional.linear(
            x.double(), dense(layer).double(), None if layer.bias is None else layer.bias.double()
        )
        assert distance(slow, truth) < (0.06 if threshold == 0 else 0.02)


@no_grad
def test_the_short_way_is_taken(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    layer, x = make(device), activations(3, K).to(device)
    expected = layer(x)
    monkeypatch.setattr("fewbits.nn.linear8bit.multiply", None)
    assert torch.equal(layer(x), expected)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)


@no_grad
def test_the_short_way_notices_changes(device: torch.device) -> None:
    layer, x = make(device), activations(3, K).to(device)
    first = layer(x)
    layer(x)
    other = make(device)
    other.weight.data = Int8Params(randn(N, K, seed=9), requires_grad=False).to(device)
    expected = other(x)
    assert not torch.equal(first, expected)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), expected)
    layer(x)
    layer.weight = Int8Params(randn(N, K), requires_grad=False).to(device)
    assert torch.equal(layer(x), first)
    layer(x)
    layer.weight.data = other.weight.data
    layer.weight.SCB = scales(other)
    assert torch.equal(layer(x), expected)
    layer(x)
    layer.state.SCB = scales(layer) * 2
    assert not torch.equal(layer(x), expected)
    layer.state.threshold = 0.0
    assert not torch.equal(layer(x), layer.state.SCB)


def test_no_warning_whatever_the_dtype(caplog: pytest.LogCaptureFixture, device: torch.device) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG):
        warnings.simplefilter("error")
        for dtype in DTYPES:
            make(device)(activations(3, K).to(device, dtype)).sum()
    assert not caplog.records


@no_grad
def test_life_of_codes_and_scales(device: torch.device) -> None:
    layer = make(device)
    weight, state = layer.weight, layer.state
    assert weight.CB is not None
    assert weight.CB.data_ptr() == weight.data_ptr()
    assert weight.SCB is not None
    assert (weight.SCB.dtype, weight.SCB.shape) == (torch.float32, (N,))
    assert (state.CB, state.SCB) == (None, None)
    codes, SCB = weight.data, weight.SCB
    x = activations(2, K).to(device)
    expected = layer(x)
    assert layer.weight is weight
    assert (weight.CB, weight.SCB) == (None, None)
    assert state.SCB is SCB
    assert state.CB is not None
    assert state.CB.data_ptr() == codes.data_ptr() == weight.data_ptr()
    assert not state.is_training or layer.training
    # Offloading hooks reset the state and put the scales back from outside.
    state.SCB = state.CxB = None
    weight.SCB = SCB
    assert torch.equal(layer(x), expected)
    state.reset_grads()
    layer.weight = Int8Params(codes, requires_grad=False, **{**weight.__dict__, "SCB": SCB}).to(device)
    assert torch.equal(layer(x), expected)


@no_grad
def test_scales_set_before_the_codes_arrive() -> None:
    expected = make()
    layer = Linear8bitLt(K, N, has_fp16_weights=False, threshold=6.0, device="meta")
    layer.weight.data = layer.weight.data.to(torch.int8)
    layer.weight.SCB = scales(expected)
    old = layer.weight.__dict__
    assert set(old) == {"CB", "SCB", "has_fp16_weights"}
    layer.weight = Int8Params(expected.weight.data, requires_grad=False, **old).to("cpu")
    layer.bias = expected.bias
    assert_same_layer(layer, expected)


@no_grad
def test_an_unquantized_weight_is_quantized_by_the_first_product() -> None:
    layer, expected = make(None), make()
    x = activations(2, K)
    assert torch.equal(layer(x), expected(x))
    assert layer.weight.dtype == torch.int8
    with pytest.raises(RuntimeError, match=r"\.to\('cpu'\)"):
        make(None, threshold=0.0).to("meta")(torch.empty(2, K, device="meta"))


@no_grad
@pytest.mark.parametrize("warm", [False, True])
def test_moves_and_casts_spare_the_codes(warm: bool, device: torch.device) -> None:
    layer, x = make(), activations(2, K)
    weight, before, SCB = layer.weight, raw(layer.weight), scales(layer).clone()
    expected = make()(x)
    for move in (
        lambda m: m.to(device),
        lambda m: m.half(),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: nn.Sequential(m).to(device)[0],
        lambda m: m.cpu().float(),
    ):
        if warm:
            layer(x.to(layer.weight.device))
        assert move(layer) is layer
        assert layer.weight is weight
        assert torch.equal(raw(layer.weight), before)
        assert torch.equal(scales(layer).cpu(), SCB)
        assert scales(layer).device == layer.weight.device
        if warm:
            assert layer.state.CB is not None
            assert layer.state.CB.data_ptr() == layer.weight.data_ptr()
    assert torch.allclose(layer(x), expected, atol=1e-2)  # the bias was rounded


@no_grad
def test_cast_before_the_move(device: torch.device) -> None:
    layer = make(None).to(torch.bfloat16).to(device)
    codes, stats, _ = F.int8_vectorwise_quant(randn(N, K).bfloat16())
    assert torch.equal(layer.weight.cpu(), codes)
    assert torch.equal(scales(layer).cpu(), stats)
    assert make(None).double().to(device).weight.dtype == torch.int8


@no_grad
def test_to_meta_and_back(device: torch.device) -> None:
    layer, expected = make(device), make(device)
    saved = copy.deepcopy(layer.state_dict())
    layer.to("meta")
    assert (type(layer.weight), layer.weight.is_meta, layer.weight.CB) == (Int8Params, True, None)
    assert layer.weight.SCB is not None
    assert not layer.weight.SCB.is_meta
    layer.load_state_dict(saved)
    assert_same_layer(layer, expected)
    empty = Linear8bitLt(K, N, has_fp16_weights=False, threshold=6.0, device="meta").to_empty(device="cpu")
    assert (type(empty.weight), empty.weight.dtype) == (Int8Params, torch.float32)


def test_device_ordinals_without_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    weight = Int8Params(randn(N, K), requires_grad=False).to(0).to("cpu")
    assert weight.dtype == torch.int8
    assert weight.CB is not None
    assert weight.SCB is not None


@no_grad
def test_no_scales_anywhere() -> None:
    layer = make(None)
    layer.weight.data = torch.ones(N, K, dtype=torch.int8)
    with pytest.raises(RuntimeError, match=r"weight\.SCB and state\.SCB"):
        layer(randn(1, K))


@no_grad
def test_a_weight_of_two_layers(device: torch.device) -> None:
    first, second = make(None), make(None)
    second.weight = first.weight
    model = nn.Sequential(first, second).to(device)
    assert first.weight is second.weight
    x = activations(2, K).to(device)
    for _ in range(2):
        assert torch.equal(model[0](x), model[1](x))
    assert torch.equal(model[1].state_dict()["SCB"], model[0].state_dict()["SCB"])
