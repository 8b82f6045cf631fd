"""`Linear4bit` as a module: moves, warnings, attributes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from fewbits.compat import _differences
from fewbits.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit
from linear4bit_layers import STORAGES, K, N, assert_same_layer, dense, make, randn, raw


def test_construction() -> None:
    layer = Linear4bit(K, N, False, torch.bfloat16, False, "nf4", torch.float16, "meta")
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.bias) == (K, N, None)
    assert (layer.compute_dtype, layer.compute_type_is_set, layer.quant_state) == (torch.bfloat16, True, None)
    assert layer.__dict__["quant_storage"] == torch.float16
    assert "quant_state" in layer.__dict__
    weight = layer.weight
    assert (type(weight), weight.is_meta, weight.shape) == (Params4bit, True, (N, K))
    assert (weight.quant_type, weight.compress_statistics, weight.module) == ("nf4", False, layer)
    assert weight.quant_storage == torch.float16
    assert list(layer.state_dict()) == ["weight"]
    assert not Linear4bit(K, N).compute_type_is_set
    assert Linear4bit(K, N).weight.quant_type == "fp4"


@pytest.mark.parametrize(("cls", "quant_type"), [(LinearNF4, "nf4"), (LinearFP4, "fp4")])
def test_named_types(cls: type[Linear4bit], quant_type: str) -> None:
    layer = cls(K, N, True, torch.float16, False, torch.bfloat16, "cpu")  # type: ignore[arg-type]
    assert (layer.weight.quant_type, layer.weight.compress_statistics) == (quant_type, False)
    assert (layer.compute_dtype, layer.quant_storage) == (torch.float16, torch.bfloat16)


def test_under_a_meta_device() -> None:
    with torch.device("meta"):
        layer = Linear4bit(K, N)
    assert layer.weight.is_meta
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_unquantized_forward_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"Linear4bit.*\.to\('cpu'\)"):
        make(None)(randn(1, K))


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_an_input_that_would_fit_the_transposed_weight(rows: int, device: torch.device) -> None:
    """Older programs hand matmul_4bit states of transposed weights; a layer knows better."""
    layer = LinearNF4(64, 32, bias=False).to(device)
    for _ in range(2):  # the second time its weight is prepared
        with pytest.raises(ValueError, match=rf"^x: expected a last size of 64.*got \({rows}, 32\)"):
            layer(torch.ones(rows, 32, device=device))
        layer(torch.ones(rows, 64, device=device))


def test_moving_keeps_the_parameter(device: torch.device) -> None:
    layer = make(None)
    weight, bias = layer.weight, layer.bias
    order = list(dict(layer.named_parameters()))
    assert layer.to(device) is layer
    assert layer.weight is weight
    assert layer.bias is bias
    assert list(dict(layer.named_parameters())) == order == ["weight", "bias"]
    assert layer.quant_state is weight.quant_state
    before = raw(weight)
    for move in (lambda m: m.to(device), lambda m: m.to("cpu"), lambda m: m.to(device), lambda m: m.cpu()):
        assert move(layer) is layer
        assert layer.weight is weight
        assert torch.equal(raw(weight), before)
        assert layer.quant_state is weight.quant_state


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double])
@pytest.mark.parametrize("inside", [False, True])
def test_casts_spare_the_bytes(storage: torch.dtype, cast: Callable[[nn.Module], nn.Module], inside: bool) -> None:
    layer = make(quant_storage=storage)
    before = raw(layer.weight), dense(layer, torch.float32)
    cast(nn.Sequential(layer) if inside else layer)
    assert layer.weight.dtype == storage
    assert torch.equal(raw(layer.weight), before[0])
    assert torch.equal(dense(layer, torch.float32), before[1])
    assert layer.bias.dtype == cast(nn.Linear(1, 1)).weight.dtype  # type: ignore[union-attr]
    layer.to(torch.float16)
    assert (layer.weight.dtype, layer.bias.dtype) == (storage, torch.float16)
    layer.type(torch.float32)
    assert (layer.weight.dtype, layer.bias.dtype) == (storage, torch.float32)


def test_cast_then_move() -> None:
    layer = make(None).to(torch.bfloat16)
    assert (type(layer.weight), layer.weight.dtype, layer.weight.bnb_quantized) == (Params4bit, torch.bfloat16, False)
    layer.to("cpu")
    assert layer.quant_state is not None
    assert layer.quant_state.dtype == torch.bfloat16
    state = make(None).to("cpu", torch.float16).quant_state
    assert state is not None
    assert state.dtype == torch.float16


def test_to_meta_and_back_through_a_state_dict() -> None:
    layer, expected = make(), make()
    saved = copy.deepcopy(layer.state_dict())
    layer.to("meta")
    assert (type(layer.weight), layer.weight.is_meta, layer.bias.is_meta) == (Params4bit, True, True)
    assert layer.quant_state is not None
    assert layer.quant_state.absmax.device.type == "cpu"
    layer.load_state_dict(saved)
    assert_same_layer(layer, expected)


def test_to_empty() -> None:
    layer = Linear4bit(K, N, device="meta", quant_type="nf4")
    layer.to_empty(device="cpu")
    assert (type(layer.weight), layer.weight.shape, layer.weight.bnb_quantized) == (Params4bit, (N, K), False)
    layer.load_state_dict(make().state_dict())
    assert_same_layer(layer, make())


def test_tied_layers() -> None:
    first, second = make(None), make(None)
    second.weight = first.weight
    model = nn.Sequential(first, second).to("cpu")
    assert first.weight is second.weight
    assert second.quant_state is first.quant_state
    assert torch.equal(model[0](randn(2, K)), model[1](randn(2, K)))


def test_plain_weight_is_recovered(device: torch.device) -> None:
    """FSDP, vLLM and others leave plain tensors where the parameter was."""
    for storage in STORAGES:
        layer = make(device, quant_storage=storage)
        x = randn(3, K).to(device)
        expected = layer(x)
        plain = layer.weight.data
        layer.weight = nn.Parameter(plain, requires_grad=False)  # type: ignore[assignment]
        assert torch.equal(layer(x), expected)
        del layer._parameters["weight"]
        layer.weight = plain.view(-1)  # type: ignore[assignment]
        assert torch.equal(layer(x.requires_grad_()), expected)


def test_a_parameter_that_lost_its_state_gets_it_back(device: torch.device) -> None:
    layer = Linear4bit(64, 32, quant_type="nf4").to(device)
    x = torch.randn(2, 64, device=device)
    expected, state = layer(x), layer.weight.quant_state
    layer.weight.quant_state = None
    assert torch.equal(layer(x), expected)
    assert layer.weight.quant_state is state


def test_replaced_parameter_wins() -> None:
    layer, other = make(), make()
    other.weight.data = Params4bit(randn(N, K, seed=9), quant_type="nf4").to("cpu")
    layer.weight = Params4bit(other.weight.data, requires_grad=False, **other.weight.__dict__)
    assert torch.equal(layer(randn(2, K)), other(randn(2, K)))
    assert layer.quant_state is other.weight.quant_state


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, None), (torch.float64, None)],
)
def test_compute_dtype_is_set_once(dtype: torch.dtype, expected: torch.dtype | None) -> None:
    layer = make()
    assert layer(randn(2, K).to(dtype)).dtype == dtype
    assert layer.compute_dtype == expected
    assert layer.compute_type_is_set
    layer(randn(2, K).bfloat16())
    assert layer.compute_dtype == expected


@pytest.fixture
def fresh_warnings() -> Iterator[None]:
    _differences._warned.clear()
    yield
    _differences._warned.clear()


@pytest.mark.usefixtures("fresh_warnings")
def test_each_warning_comes_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fewbits.nn"):
        for _ in range(2):
            for layer in (make(), make(compute_dtype=torch.float32), make(compute_dtype=torch.float16)):
                for _ in range(2):
                    layer(randn(1, K).half())
    messages = [record.message for record in caplog.records if record.name == "fewbits.nn"]
    assert len(messages) == 2
    assert "not set" in messages[0]
    assert "float32" in messages[1]
    assert all("compute_dtype" in message for message in messages)
    with caplog.at_level(logging.WARNING, "fewbits.nn"):
        make()(randn(1, K))
        make(compute_dtype=torch.bfloat16)(randn(1, K))
    assert len(caplog.records) == 2
