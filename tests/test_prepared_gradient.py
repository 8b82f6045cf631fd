"""Gradients of products with a prepared weight: the short way gives what the long way gives, and notices changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fewbits.nn
from fewbits import _call

N, K = 48, 96


def four(nested: bool = False, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    options = {"quant_type": "nf4", "compute_dtype": torch.float32, "compress_statistics": nested}
    return fewbits.nn.Linear4bit(K, N, bias=bias, **options).to("cpu")


def eight(threshold: float = 0.0, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layer = fewbits.nn.Linear8bitLt(K, N, bias=bias, has_fp16_weights=False, threshold=threshold).to("cpu")
    if layer.bias is not None:
        layer.bias.requires_grad_()
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "nf4": four,
    "nf4 nested": lambda: four(nested=True),
    "nf4 without bias": lambda: four(bias=False),
    "int8": eight,
    "int8 threshold": lambda: eight(2.5),
    "int8 without bias": lambda: eight(bias=False),
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes every forward and backward that went the short way."""
    seen: list[str] = []
    forward, transposed = _call.Product.forward, _call.multiply_panels_transposed

    def noted(ctx: Any, *args: Any) -> torch.Tensor:
        seen.append("forward")
        return forward(ctx, *args)

    def noted_transposed(*args: Any) -> None:
        seen.append("backward")
        transposed(*args)

    monkeypatch.setattr(_call.Product, "forward", staticmethod(noted))
    monkeypatch.setattr(_call, "multiply_panels_transposed", noted_transposed)
    return seen


def prepared(make: Callable[[], nn.Module]) -> nn.Module:
    layer = make()
    with torch.no_grad():
        for _ in range(2):  # the first prepares
            layer(torch.ones(1, K))
    assert layer.weight.prepared is not None
    return layer


def gradients(layer: nn.Module, x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    wanted = [x] if layer.bias is None else [x, layer.bias]
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, wanted, g)]


@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K), (2, 1, 2, K)])
@pytest.mark.parametrize("name", LAYERS)
def test_same_as_the_long_way(
    name: str, shape: tuple[int, ...], short: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x, g = prepared(LAYERS[name]), torch.randn(shape), torch.randn(*shape[:-1], N)
    got = gradients(layer, x, g)
    assert short == ["forward", "backward"]
    layer.weight.prepared = None
    monkeypatch.setattr(_call, "arguments", None)  # nobody may ask
    monkeypatch.setattr("fewbits._prepared.prepare", lambda *args: None)
    monkeypatch.setattr("fewbits._int8_prepared.prepare", lambda *args: None)
    expected = gradients(layer, x, g)
    assert short == ["forward", "backward"]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype is theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_have_gradients(name: str, short: list[str]) -> None:
    layer = prepared(LAYERS[name])
    x = torch.randn(3, K, requires_grad=True)
    g = torch.randn(3, N, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x), x, g, create_graph=True)
    v = torch.randn_like(x)
    (second,) = torch.autograd.grad((grad * v).sum(), g)
    with torch.no_grad():
        linear = torch.autograd.functional.jvp(lambda x: layer(x), x.detach(), v)[1] if "int8" not in name else None
    assert "forward" in short
    assert second.shape == g.shape
    if linear is not None:
        torch.testing.assert_close(second, linear, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_written_to_before_the_backward_raises(name: str) -> None:
    layer = prepared(LAYERS[name])
    x = torch.randn(3, K, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        layer.weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["nf4", "nf4 nested", "int8"])
def test_a_weight_that_moved_before_the_backward(name: str, short: list[str]) -> None:
    layer = prepared(LAYERS[name])
    x, g = torch.randn(3, K), torch.randn(3, N)
    expected = gradients(layer, x, g)[1]
    short.clear()
    given = x.clone().requires_grad_()
    y = layer(given)
    layer.weight.data = layer.weight.data.clone()
    (grad,) = torch.autograd.grad(y, given, g)
    assert short == ["forward"]
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["nf4", "int8 threshold"])
def test_checkpointed(name: str, reentrant: bool, short: list[str]) -> None:
    layer, x = prepared(LAYERS[name]), torch.randn(3, K)
    expected = gradients(layer, x, torch.ones(3, N))[1]
    short.clear()
    given = x.clone().requires_grad_()
    checkpoint(layer, given, use_reentrant=reentrant).sum().backward()
    assert short.count("backward") == 1
    torch.testing.assert_close(given.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_checkpointed_from_the_first_call_on(name: str, reentrant: bool, short: list[str]) -> None:
    layer, x = LAYERS[name](), torch.randn(3, K)
    given = x.clone().requires_grad_()
    checkpoint(layer, given, use_reentrant=reentrant).sum().backward()  # prepared in between
    assert "forward" in short  # of the recomputation
    expected = gradients(layer, x, torch.ones(3, N))[1]
    torch.testing.assert_close(given.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_saves_what_the_long_way_saves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, saved = prepared(LAYERS[name]), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append((tensor.shape, tensor.dtype, tensor.data_ptr()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(3, K, requires_grad=True))
        ours = list(saved)
        saved.clear()
        monkeypatch.setattr("fewbits._prepared.arguments", lambda *args: None)
        monkeypatch.setattr("fewbits._int8_prepared.arguments", lambda *args: None)
        layer(torch.randn(3, K, requires_grad=True))
    assert ours
    assert ours == saved


@pytest.mark.parametrize("name", ["nf4 without bias", "int8 without bias"])
def test_autocast_to_the_dtype_that_is_there(name: str, short: list[str]) -> None:
    layer = prepared(LAYERS[name])
    if name.startswith("nf4"):
        layer.compute_dtype = torch.bfloat16
    x = torch.randn(3, K, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert short == ["forward"]
        assert layer(x.float()).dtype == (torch.float32 if name.startswith("nf4") else torch.bfloat16)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("make_grad", [lambda g: g.expand(3, N), lambda g: g.repeat(3, 2)[:, ::2], torch._neg_view])
def test_gradients_of_any_layout(make_grad: Callable[[torch.Tensor], torch.Tensor]) -> None:
    layer, x = prepared(four), torch.randn(3, K, requires_grad=True)
    g = make_grad(torch.randn(1, N).repeat(1, 1))
    if g.shape[0] == 1:
        g = torch._neg_view(torch.randn(3, N))
    (grad,) = torch.autograd.grad(layer(x), x, g)
    (expected,) = torch.autograd.grad(layer(x), x, g.resolve_neg().contiguous())
    torch.testing.assert_close(grad, expected)
