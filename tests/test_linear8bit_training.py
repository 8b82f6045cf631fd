"""Gradients through `Linear8bitLt`: of the input, the bias and a weight in floating point."""

from __future__ import annotations

import pytest
import torch

import fewbits
import fewbits.functional as F
from arrays import DTYPES
from fewbits.nn import Int8Params
from linear8bit_layers import K, N, activations, dense, make, randn
from products import distance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_gradients_of_a_frozen_weight(dtype: torch.dtype, threshold: float, device: torch.device) -> None:
    layer = make(device, threshold=threshold).to(dtype)
    x = activations(2, 3, K).to(device, dtype).requires_grad_()
    y = layer(x)
    g = randn(2, 3, N, seed=8).to(device, dtype)
    y.backward(g)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    truth = g.double() @ dense(layer).double()
    assert distance(x.grad, truth) < {torch.float32: 1e-6}.get(dtype, 6e-3)
    assert layer.bias.grad is not None
    torch.testing.assert_close(layer.bias.grad, g.sum((0, 1)))
    assert layer.weight.grad is None
    with torch.no_grad():
        assert torch.equal(layer(x.detach()), y)


@pytest.mark.parametrize("compiled", [False, True])
def test_without_integer_products(compiled: bool, device: torch.device) -> None:
    """``state.force_no_igemmlt``: nothing of the activations is rounded, before and after a first product."""
    layer = make(device)
    x = activations(2, 3, K).to(device).requires_grad_()
    quantized = layer(x).detach()
    layer.state.force_no_igemmlt = True
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    y = run(x)
    truth = x.detach().double() @ dense(layer).double().t() + layer.bias.detach().double()
    assert distance(y, truth) < 1e-6 < distance(quantized, truth)
    g = randn(2, 3, N, seed=8).to(device)
    (grad,) = torch.autograd.grad(y, x, g)
    assert distance(grad, g.double() @ dense(layer).double()) < 1e-6
    out = torch.empty_like(quantized)
    with torch.no_grad():
        got = fewbits.matmul(x, layer.weight.data, out=out, state=layer.state, bias=layer.bias)
    assert got is out
    assert torch.equal(out, y)
    layer.state.force_no_igemmlt = False
    assert torch.equal(layer(x), quantized)


def test_grad_by_panels(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr("fewbits._panel.PANEL_BYTES", {"cuda": 1 << 13, "cpu": 1 << 13})
    layer = make(device, n=150, k=200)
    x = activations(4, 200).to(device).requires_grad_()
    g = randn(4, 150).to(device)
    (grad,) = torch.autograd.grad(layer(x), x, g)
    torch.testing.assert_close(grad, g @ dense(layer))


def test_double_backward(device: torch.device) -> None:
    layer, x = make(device), activations(3, K).to(device).requires_grad_()
    g = randn(3, N).to(device).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x), x, g, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), g)
    torch.testing.assert_close(second, 2 * (g @ dense(layer)) @ dense(layer).t())


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_a_floating_point_weight(set_to_none: bool, dtype: torch.dtype, device: torch.device) -> None:
    layer = make(None, has_fp16_weights=True).to(device, dtype)
    assert layer.weight.dtype == dtype
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, g = activations(5, K).to(device, dtype), randn(5, N, seed=2).to(device, dtype)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        codes, stats, _ = F.int8_vectorwise_quant(layer.weight.detach())
        y = layer(x)
        state = fewbits.MatmulLtState(CB=codes, SCB=stats)
        expected = fewbits.matmul(x, codes, state=state, threshold=6.0, bias=layer.bias.detach())
        assert torch.equal(y.detach(), expected), "the weight was not quantized anew"
        y.backward(g)
        torch.testing.assert_close(layer.weight.grad, g.t() @ x)
        torch.testing.assert_close(layer.bias.grad, g.sum(0))
        optimizer.step()
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert type(layer.weight) is Int8Params


@torch.no_grad()
def test_evaluation_of_a_floating_point_weight(device: torch.device) -> None:
    layer, x = make(None, has_fp16_weights=True).to(device).eval(), activations(2, K).to(device)
    first, codes = layer(x), layer.state.CB
    assert torch.equal(layer(x), first)
    assert layer.state.CB is codes, "quantized again without need"
    layer.weight.mul_(2)
    torch.testing.assert_close(layer(x) - layer.bias, 2 * (first - layer.bias))


def test_mixed_dtypes_of_weight_and_input(device: torch.device) -> None:
    layer = make(None, has_fp16_weights=True).to(device)
    x = activations(2, K).to(device, torch.bfloat16).requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert (layer.weight.grad.dtype, x.grad.dtype) == (torch.float32, torch.bfloat16)  # type: ignore[union-attr]


def test_functorch_and_forward_mode(device: torch.device) -> None:
    layer, x = make(device), activations(3, K).to(device)
    gradient = torch.func.grad(lambda t: layer(t).square().sum())(x)
    y = layer(x).detach()
    torch.testing.assert_close(gradient, 2 * y @ dense(layer))
    torch.testing.assert_close(torch.vmap(layer)(x.unsqueeze(1)).squeeze(1), y)
    _, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.ones_like(x) @ dense(layer).t())


def test_checkpointed(device: torch.device) -> None:
    layer, x = make(device), activations(3, K).to(device).requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, expected)
