"""Parameters that an offloader moves to meta and brings back, in the steps that accelerate takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewbits import nn

META = torch.device("meta")


def make(name: str, storage: torch.dtype = torch.uint8) -> tuple[Any, torch.Tensor]:
    """Return a quantized layer and the values of its weight."""
    torch.manual_seed(0)
    values = torch.randn(32, 64)
    layer: Any
    if name == "4bit":
        layer = nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32, quant_storage=storage)
    else:
        layer = nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    layer.weight.data = values.clone()
    return layer.to("cpu"), values


def leave(layer: Any) -> None:
    """Put the shell of a parameter in its place."""
    old = layer.weight
    shell = old.to("meta")
    layer._parameters["weight"] = type(old)(shell, requires_grad=old.requires_grad, **old.__dict__).to("meta")
    if isinstance(layer, nn.Linear8bitLt):
        layer.state.SCB = None
    assert layer.weight.is_meta


def bring_back(layer: Any, value: torch.Tensor) -> None:
    shell = layer._parameters["weight"]
    value = value.to(shell.dtype).to("cpu")
    if isinstance(shell, nn.Int8Params):
        if value.dtype == torch.float32:
            value = value.to(torch.float16)
        new: Any = nn.Int8Params(value, requires_grad=False, **shell.__dict__).to(0).to("cpu")
        assert new.CB is not None
        assert new.SCB is not None
    else:
        new = nn.Params4bit(value, requires_grad=False, **shell.__dict__).to("cpu")
    layer._parameters["weight"] = new


@pytest.mark.skipif(torch.cuda.is_available(), reason="device 0 is another one")
@pytest.mark.parametrize("name", ["4bit", "8bit"])
@pytest.mark.parametrize("first", [True, False])
def test_values_come_back_from_a_file(name: str, first: bool) -> None:
    layer, values = make(name)
    x = torch.randn(3, 64)
    expected = layer(x)
    if not first:
        layer, _ = make(name)  # offloaded before its first product
    for _ in range(3):
        leave(layer)
        assert layer.weight.dtype == torch.float32
        bring_back(layer, values)
        assert layer.weight.dtype == (torch.uint8 if name == "4bit" else torch.int8)
        # 8-bit weights make a detour through float16 there.
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0 if name == "4bit" else 0.2)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_packed_codes_come_back_from_memory(storage: torch.dtype) -> None:
    layer, _ = make("4bit", storage)
    x = torch.randn(3, 64)
    expected, held = layer(x), layer.weight.data.clone()
    for _ in range(3):
        leave(layer)
        bring_back(layer, held)
        assert torch.equal(layer.weight.data.view(torch.uint8), held.view(torch.uint8))
        assert torch.equal(layer(x), expected)


def test_int8_codes_come_back_with_the_scales_of_the_shell() -> None:
    layer, _ = make("8bit")
    x = torch.randn(3, 64)
    codes, scales, expected = layer.weight.data.clone(), layer.weight.SCB.clone(), layer(x)
    # As from a checkpoint: nobody here has seen values.
    layer._parameters["weight"] = nn.Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)
    layer.state.CB = layer.state.SCB = None
    for _ in range(3):
        assert torch.equal(layer(x), expected)
        leave(layer)
        assert layer.weight.dtype == torch.int8
        shell = layer.weight
        layer._parameters["weight"] = nn.Int8Params(codes.to(shell.dtype), requires_grad=False, **shell.__dict__)


def test_packed_codes_find_the_state_of_their_module() -> None:
    layer, _ = make("4bit")
    state, held = layer.quant_state, layer.weight.data.clone()
    for value in (held, held.float()):
        found: Any = nn.Params4bit(value, module=layer)
        assert found.bnb_quantized
        assert found.quant_state is state
        assert torch.equal(found.data, held)
    for other in (torch.randn(32, 64), torch.randn(1024), torch.randn(1025, 1)):
        assert not nn.Params4bit(other, module=layer).bnb_quantized


def test_codes_without_scales_are_not_taken_for_values() -> None:
    layer = nn.Linear4bit(64, 32)
    packed = torch.randint(0, 256, (1024, 1)).float()
    with pytest.raises(ValueError, match="offload"):
        nn.Params4bit(packed, module=layer).to("cpu")
    codes = torch.randint(-100, 100, (8, 64)).float()
    codes[:, 3] = 127
    with pytest.raises(ValueError, match="offload"):
        nn.Int8Params(codes, requires_grad=False).to("cpu")
    codes[5] = 0
    with pytest.raises(ValueError, match="offload"):
        nn.Int8Params(codes.half(), requires_grad=False).to("cpu")
    for values in (codes + 0.5, codes.clamp(max=126), torch.zeros(8, 64), torch.randn(8, 64)):
        assert nn.Int8Params(values, requires_grad=False).to("cpu").dtype == torch.int8
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="offload"):
            nn.Int8Params(codes.to(torch.int8), requires_grad=False).to(0)


def test_a_shell_is_one_on_meta_only() -> None:
    for name in ("4bit", "8bit"):
        layer, values = make(name)
        shell = layer.weight.to("meta")
        assert shell.dtype == torch.float32
        assert not shell.data.is_floating_point()
        unquantized = type(shell)(values, requires_grad=False).to("meta")
        assert unquantized.dtype == torch.float32
        assert not unquantized._is_shell()
        pretend = type(shell)(torch.empty(3, 1, dtype=torch.int8, device=META), requires_grad=False)
        assert pretend.dtype == torch.int8


def test_a_plain_linear_layer_refuses_codes() -> None:
    values, x, plain = torch.randn(32, 64), torch.randn(3, 64), torch.nn.Linear(64, 32)
    plain.weight = nn.Int8Params(values, requires_grad=False).to("cpu")
    with pytest.raises(ValueError, match="offload"):
        plain(x)
    plain.weight = nn.Int8Params(values, requires_grad=True, has_fp16_weights=True)
    assert torch.equal(plain(x), torch.nn.functional.linear(x, values, plain.bias))
