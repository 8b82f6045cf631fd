"""`Linear4bit` and `matmul_4bit`: values, gradients and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
import fewbits.functional as F
from arrays import DTYPES
from linear4bit_layers import STORAGES, K, N, dense, make, randn
from products import assert_rounded_once


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("compute", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_forward_is_a_dense_linear(
    nested: bool, compute: torch.dtype | None, dtype: torch.dtype, storage: torch.dtype, device: torch.device
) -> None:
    layer = make(device, compute_dtype=compute, compress_statistics=nested, quant_storage=storage)
    used = dtype if compute is None else compute
    for shape in ((K,), (1, K), (5, K), (2, 3, K), (0, K), (2, 0, K)):
        x = randn(*shape).to(device, dtype)
        y = layer(x)
        assert (y.dtype, y.shape) == (dtype, (*shape[:-1], N))
        product = fewbits.matmul_4bit(x.to(used), layer.weight.data, layer.quant_state, bias=layer.bias)
        assert_rounded_once(product, x.to(used), dense(layer, torch.float32).double(), layer.bias.to(used))
        assert torch.equal(y, product.to(dtype))
        with torch.no_grad():
            assert torch.equal(layer(x), y)
    assert layer.bias.dtype == torch.float32, "the bias was cast for good"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compute", [None, torch.float32])
@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, 4, K), (0, K)])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_a_dense_linears(
    dtype: torch.dtype, compute: torch.dtype | None, shape: tuple[int, ...], bias: bool, device: torch.device
) -> None:
    layer = make(device, bias=bias, compute_dtype=compute)
    if bias:
        layer.bias.data = layer.bias.data.to(dtype)
    x = randn(*shape).to(device, dtype).requires_grad_()
    grad = randn(*shape[:-1], N).to(device, dtype)
    layer(x).backward(grad)
    used = dtype if compute is None else compute
    weight = dense(layer, used)
    again = x.detach().clone().requires_grad_()
    plain = layer.bias.detach().clone().requires_grad_() if bias else None
    y = nn.functional.linear(again.to(used), weight, None if plain is None else plain.to(used)).to(dtype)
    y.backward(grad)
    assert x.grad is not None
    assert again.grad is not None
    assert x.grad.dtype == dtype
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype != torch.float32 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(x.grad, again.grad, **tolerance)
    assert layer.weight.grad is None
    if plain is not None:
        assert layer.bias.grad is not None
        assert layer.bias.grad.dtype == dtype
        torch.testing.assert_close(layer.bias.grad, plain.grad, **tolerance)


def test_gradcheck() -> None:
    layer = make(n=4, k=8)
    assert layer.quant_state is not None
    x = randn(2, 3, 8).double().requires_grad_()
    bias = randn(4).double().requires_grad_()

    def function(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return fewbits.matmul_4bit(x, layer.weight.data, layer.quant_state, bias=bias)

    assert torch.autograd.gradcheck(function, (x, bias))
    assert torch.autograd.gradgradcheck(function, (x, bias))


def test_only_the_packed_weight_is_kept_for_backward() -> None:
    layer = make(n=256, k=256, compress_statistics=True)
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(randn(4, 256).requires_grad_())
    bytes_kept = sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in kept}.values())
    assert bytes_kept < 256 * 256, "a full-size weight waits for backward"
    y.sum().backward()


def test_checkpointing() -> None:
    layers = nn.Sequential(make(n=K), make(n=K))
    x = randn(3, K)
    results = []
    for use_reentrant in (None, False, True):
        leaf = x.clone().requires_grad_()
        if use_reentrant is None:
            y = layers(leaf)
        else:
            y = torch.utils.checkpoint.checkpoint(layers, leaf, use_reentrant=use_reentrant)
        y.square().sum().backward()
        results.append(leaf.grad)
    assert results[0] is not None
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype, device: torch.device) -> None:
    layer = make(device)
    x = randn(3, K).to(device, dtype).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x)
        z = fewbits.matmul_4bit(x, layer.weight.data, layer.quant_state, bias=layer.bias)
    assert y.dtype == dtype
    assert z.dtype == torch.bfloat16
    assert_rounded_once(z, x.bfloat16(), dense(layer, torch.float32).double(), layer.bias.bfloat16())
    assert torch.equal(y, z.to(dtype))
    (y.sum() + z.sum()).backward()
    assert x.grad is not None
    assert layer.bias.grad is not None
    assert (x.grad.dtype, layer.bias.grad.dtype) == (dtype, torch.float32)


def test_autocast_leaves_float64_alone() -> None:
    layer = make()
    x = randn(3, K).double()
    with torch.autocast("cpu", torch.bfloat16):
        y = fewbits.matmul_4bit(x, layer.weight.data, layer.quant_state)
    assert torch.equal(y, x @ dense(layer, torch.float32).double().t())


def test_vmap() -> None:
    layer = make()
    x = randn(4, 3, K)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    torch.testing.assert_close(torch.func.vmap(layer, in_dims=1, out_dims=1)(x), layer(x))
    state = layer.quant_state

    def loss(x: torch.Tensor) -> torch.Tensor:
        return fewbits.matmul_4bit(x, layer.weight.data, state, bias=layer.bias).square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(x), torch.func.vmap(torch.func.grad(loss))(x))
    weights = torch.stack([layer.weight.data, layer.weight.data.flip(0)])
    biases = torch.stack([layer.bias.detach(), torch.zeros(N)])
    x.requires_grad_()
    products = torch.func.vmap(lambda b, bias: fewbits.matmul_4bit(x, b, state, bias=bias))(weights, biases)
    expected = [fewbits.matmul_4bit(x, b, state, bias=bias) for b, bias in zip(weights, biases, strict=True)]
    assert torch.equal(products, torch.stack(expected))
    (mine,) = torch.autograd.grad(products.square().sum(), x)
    (theirs,) = torch.autograd.grad(torch.stack(expected).square().sum(), x)
    torch.testing.assert_close(mine, theirs)


def test_forward_mode() -> None:
    layer = make(bias=False)
    x, tangent = randn(3, K), randn(3, K, seed=5)
    assert torch.equal(torch.func.jvp(layer, (x,), (tangent,))[1], layer(tangent))
    with torch.autograd.forward_ad.dual_level():
        y = layer(torch.autograd.forward_ad.make_dual(x, tangent))
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(y).tangent, layer(tangent))
    state, weight, bias = layer.quant_state, layer.weight.data, torch.ones(N)

    def of_bias(bias: torch.Tensor) -> torch.Tensor:
        return fewbits.matmul_4bit(x, weight, state, bias=bias)

    assert torch.equal(torch.func.jvp(of_bias, (bias,), (bias,))[1], torch.ones(3, N))
    hessian = torch.func.hessian(lambda x: fewbits.matmul_4bit(x, weight, state).square().sum() / 2)(x[0])
    torch.testing.assert_close(hessian, dense(layer, torch.float32).t() @ dense(layer, torch.float32))


@given(
    n=st.integers(1, 40),
    k=st.integers(1, 70),
    rows=st.integers(0, 5),
    storage=st.sampled_from(STORAGES),
    nested=st.booleans(),
    pad=st.integers(0, 7),
    transposed=st.booleans(),
)
def test_matmul_takes_slices(
    n: int, k: int, rows: int, storage: torch.dtype, nested: bool, pad: int, transposed: bool
) -> None:
    """Codes at any place of a larger buffer, as a column or a row."""
    codes, state = F.quantize_4bit(randn(n, k), quant_type="nf4", compress_statistics=nested, quant_storage=storage)
    buffer = torch.zeros(codes.shape[0] + pad + 3, 1, dtype=storage)
    buffer[pad : pad + codes.shape[0]] = codes
    B = buffer[pad : pad + codes.shape[0]]
    x = randn(rows, k)
    expected = x @ F.dequantize_4bit(codes, state).t()
    torch.testing.assert_close(fewbits.matmul_4bit(x, B.t() if transposed else B, state), expected)


def test_matmul_out(device: torch.device) -> None:
    layer = make(device)
    x, state = randn(3, K).to(device), layer.quant_state
    for out in (torch.zeros(3, N, device=device), torch.zeros(N, 3, device=device).t()):
        with torch.no_grad():
            assert fewbits.matmul_4bit(x, layer.weight.data, state, out=out, bias=layer.bias) is out
            assert torch.equal(out, layer(x))
    with pytest.raises(ValueError, match=r"out.*gradient"):
        fewbits.matmul_4bit(x, layer.weight.data, state, out=out, bias=layer.bias)


def test_weight_in_the_other_orientation() -> None:
    codes, state = F.quantize_4bit(randn(K, N))
    x = randn(3, K).requires_grad_()
    with pytest.warns(DeprecationWarning, match="K, N"):
        y = fewbits.matmul_4bit(x, codes, state)
    weight = F.dequantize_4bit(codes, state)
    torch.testing.assert_close(y, x @ weight)
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(1).expand(3, K))


MATMUL_ERRORS: list[tuple[str, type[Exception], Callable[[torch.Tensor, torch.Tensor, Any], object]]] = [
    ("quant_state", ValueError, lambda x, b, s: fewbits.matmul_4bit(x, b, None)),  # type: ignore[arg-type]
    ("quant_state", TypeError, lambda x, b, s: fewbits.matmul_4bit(x, b, {})),  # type: ignore[arg-type]
    ("A.*95", ValueError, lambda x, b, s: fewbits.matmul_4bit(x[:, 1:], b, s)),
    ("A", ValueError, lambda x, b, s: fewbits.matmul_4bit(x.int(), b, s)),
    ("A", ValueError, lambda x, b, s: fewbits.matmul_4bit(torch.tensor(1.0), b, s)),
    ("A", TypeError, lambda x, b, s: fewbits.matmul_4bit([1.0], b, s)),  # type: ignore[arg-type]
    ("B.*1152.*1151", ValueError, lambda x, b, s: fewbits.matmul_4bit(x, b[1:], s)),
    ("A and B.*cpu.*meta", ValueError, lambda x, b, s: fewbits.matmul_4bit(x, b.to("meta"), s)),
    ("bias.*24", ValueError, lambda x, b, s: fewbits.matmul_4bit(x, b, s, bias=torch.ones(N + 1))),
    ("bias.*24", ValueError, lambda x, b, s: fewbits.matmul_4bit(x, b, s, bias=torch.ones(N, 1))),
    ("bias", TypeError, lambda x, b, s: fewbits.matmul_4bit(x, b, s, bias=1.0)),  # type: ignore[arg-type]
    ("out.*float32.*float16", ValueError, lambda x, b, s: fewbits.matmul_4bit(x, b, s, torch.ones(3, N).half())),
    ("out.*shape", ValueError, lambda x, b, s: fewbits.matmul_4bit(x, b, s, torch.ones(3, N + 1))),
]


@pytest.mark.parametrize(("match", "error", "call"), MATMUL_ERRORS)
def test_matmul_names_wrong_arguments(match: str, error: type[Exception], call: Callable[..., object]) -> None:
    codes, state = F.quantize_4bit(randn(N, K))
    with pytest.raises(error, match=f"^{match}"):
        call(randn(3, K), codes, state)


def test_matmul_needs_a_matrix() -> None:
    codes, state = F.quantize_4bit(randn(2, N, K))
    with pytest.raises(ValueError, match=r"quant_state.shape.*\(2, 24, 96\)"):
        fewbits.matmul_4bit(randn(3, K), codes, state)
