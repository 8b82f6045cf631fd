"""`Linear4bit` and `matmul_4bit`: values, gradients, dtypes, moves, and state dicts that load back."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
import fewbits.functional as F
from arrays import DTYPES, assert_same_bits
from fewbits.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit
from fewbits.nn import linear as linear_module
from products import assert_rounded_once

N, K = 24, 96
STORAGES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(device: torch.device | str | None = "cpu", n: int = N, k: int = K, **kwargs: Any) -> Linear4bit:
    """A layer with known values; no device: not quantized."""
    layer = Linear4bit(k, n, **{"quant_type": "nf4", **kwargs})
    layer.weight.data = randn(n, k)
    if layer.bias is not None:
        layer.bias.data = randn(n, seed=1)
    return layer if device is None else layer.to(device)


def dense(layer: Linear4bit, dtype: torch.dtype) -> torch.Tensor:
    assert layer.quant_state is not None
    state = copy.copy(layer.quant_state)
    state.dtype = dtype
    return F.dequantize_4bit(layer.weight.data, state)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def assert_same_layer(got: Linear4bit, expected: Linear4bit) -> None:
    assert type(got.weight) is Params4bit
    assert got.quant_state is got.weight.quant_state
    left, right = got.state_dict(), expected.state_dict()
    assert list(left) == list(right)
    for key in left:
        assert torch.equal(raw(left[key]), raw(right[key])), key
    x = randn(2, expected.in_features).to(got.weight.device)
    assert torch.equal(got(x), expected.to(got.weight.device)(x))


# ---- values and gradients -------------------------------------------------------------------------------------------


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


# ---- the module -----------------------------------------------------------------------------------------------------


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
    linear_module._warned.clear()
    yield
    linear_module._warned.clear()


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


# ---- copies ---------------------------------------------------------------------------------------------------------


def through_torch_save(layer: Linear4bit) -> Linear4bit:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded: Linear4bit = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_copies(copied: Callable[[Linear4bit], Linear4bit], storage: torch.dtype) -> None:
    layer = make(quant_storage=storage)
    other = copied(layer)
    assert_same_layer(other, layer)
    assert other.weight.module is other
    assert other.weight.data_ptr() != layer.weight.data_ptr()
    unquantized = copied(make(None, quant_storage=storage))
    assert unquantized.weight.module is unquantized
    assert_same_layer(unquantized.to("cpu"), layer)


# ---- state dicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
def test_layout(nested: bool, storage: torch.dtype) -> None:
    state_dict = nn.ModuleDict({"a": make(compress_statistics=nested, quant_storage=storage)}).state_dict()
    assert {
        key: (value.dtype, tuple(value.shape)) for key, value in state_dict.items() if "bitsandbytes" not in key
    } == {
        "a.weight": (storage, (N * K // 2 // storage.itemsize, 1)),
        "a.bias": (torch.float32, (N,)),
        "a.weight.absmax": (torch.uint8 if nested else torch.float32, (N * K // 64,)),
        "a.weight.quant_map": (torch.float32, (16,)),
        **({"a.weight.nested_absmax": (torch.float32, (1,))} if nested else {}),
        **({"a.weight.nested_quant_map": (torch.float32, (256,))} if nested else {}),
    }
    blob = state_dict["a.weight.quant_state.bitsandbytes__nf4"]
    assert (blob.dtype, blob.dim(), blob.device.type) == (torch.uint8, 1, "cpu")
    assert all(type(value) is torch.Tensor and not value.requires_grad for value in state_dict.values())
    kept = make(compress_statistics=nested).state_dict(keep_vars=True)
    assert isinstance(kept["weight"], Params4bit)


def test_layers_share_no_memory(tmp_path: Any) -> None:
    model = nn.Sequential(make(), make(), make(compress_statistics=False))
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    pointers = [value.untyped_storage().data_ptr() for value in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers)


TARGETS: dict[str, Callable[[], Linear4bit]] = {
    "unquantized": lambda: Linear4bit(K, N),
    "quantized": lambda: make(),
    "quantized otherwise": lambda: make(quant_type="fp4", compress_statistics=False),
    "meta": lambda: Linear4bit(K, N, device="meta"),
    "moved to meta": lambda: make().to("meta"),
}


def through_memory(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return state_dict


def through_safetensors(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(safetensors.torch.save(state_dict))


def through_pickle(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("through", [through_memory, through_safetensors, through_pickle])
@pytest.mark.parametrize("inside", [False, True])
def test_load_strictly(
    target: str, assign: bool, nested: bool, through: Callable[..., Any], inside: bool, device: torch.device
) -> None:
    source = make(device, compress_statistics=nested)
    layer = TARGETS[target]()
    was_meta, was = layer.weight.is_meta, layer.weight
    if inside:
        state_dict = through(nn.ModuleDict({"a": source}).state_dict())
        keys = list(state_dict)
        result = nn.ModuleDict({"a": layer}).load_state_dict(state_dict, strict=True, assign=assign)
    else:
        state_dict = through(source.state_dict())
        keys = list(state_dict)
        result = layer.load_state_dict(state_dict, strict=True, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert list(state_dict) == keys, "load_state_dict consumed the caller's dictionary"
    given_on = next(iter(state_dict.values())).device.type  # a file read by safetensors lies on the CPU
    assert layer.weight.device.type == (given_on if assign or was_meta else "cpu")
    assert layer.weight.module is layer
    assert (layer.weight is was) is not (assign or was_meta)
    if not assign:
        loaded = {v.data_ptr() for v in layer.state_dict().values()}
        assert not loaded & {v.data_ptr() for v in state_dict.values()}, "the module shares memory with the file"
    assert_same_layer(layer, source)
    assert_same_layer(layer.to("cpu"), source.to("cpu"))


@given(
    n=st.integers(1, 30),
    k=st.integers(1, 80),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    nested=st.booleans(),
    written=st.sampled_from(STORAGES),
    read=st.sampled_from(STORAGES),
    dtype=st.sampled_from(DTYPES),
)
def test_load_any_size_and_storage(
    n: int, k: int, quant_type: str, nested: bool, written: torch.dtype, read: torch.dtype, dtype: torch.dtype
) -> None:
    source = make(None, n, k, quant_type=quant_type, compress_statistics=nested, quant_storage=written)
    source.to("cpu", dtype)
    layer = Linear4bit(k, n, quant_storage=read)
    layer.load_state_dict(source.state_dict())
    assert layer.weight.dtype == layer.weight.quant_storage == layer.quant_storage == read
    assert torch.equal(dense(layer, dtype), dense(source, dtype))
    state_dict = layer.state_dict()
    again = Linear4bit(k, n, device="meta", quant_storage=written)
    again.load_state_dict(state_dict, assign=True)
    assert again.weight.dtype == again.quant_storage == read
    assert torch.equal(dense(again, dtype), dense(source, dtype))
    assert {key: raw(value).tolist() for key, value in again.state_dict().items()} == {
        key: raw(value).tolist() for key, value in state_dict.items()
    }


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_load_floating_point_weights(assign: bool, target: str) -> None:
    source = nn.Linear(K, N)
    source.weight.data = randn(N, K)
    layer = TARGETS[target]()
    quantized = layer.weight.bnb_quantized
    result = layer.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert type(layer.weight) is Params4bit
    assert layer.weight.bnb_quantized is quantized
    if not quantized:
        assert torch.equal(layer.weight.data, randn(N, K))
        assert layer.weight.data_ptr() != source.weight.data_ptr() or assign
    layer.to("cpu")
    expected = TARGETS[target]()
    kwargs = {key: getattr(expected.weight, key) for key in ("quant_type", "compress_statistics")}
    codes, state = F.quantize_4bit(
        randn(N, K), quant_type=kwargs["quant_type"], compress_statistics=kwargs["compress_statistics"]
    )
    assert_same_bits(layer.weight.data, codes, "codes")
    assert layer.quant_state == state
    assert torch.equal(layer.bias, source.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_load_maxima_of_other_dtypes_and_shapes(dtype: torch.dtype) -> None:
    source = make(compress_statistics=False)
    state_dict = source.state_dict()
    state_dict["weight.absmax"] = state_dict["weight.absmax"].to(dtype).view(1, -1)
    layer = Linear4bit(K, N)
    layer.load_state_dict(state_dict)
    assert layer.quant_state is not None
    assert torch.equal(layer.quant_state.absmax, state_dict["weight.absmax"].view(-1).float())


def drop(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda d: {k: v for k, v in d.items() if k != key}


def change(key: str, function: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda d: {**d, key: function(d[key])}


BLOB = "weight.quant_state.bitsandbytes__nf4"
BROKEN: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = [
    ("absmax", drop("weight.absmax")),
    ("quant_map", drop("weight.quant_map")),
    ("quant_state", drop(BLOB)),
    ("nested_absmax", drop("weight.nested_absmax")),
    ("weight: expected a tensor", drop("weight")),
    ("absmax", change("weight.absmax", lambda v: v[1:])),
    ("nested_absmax", change("weight.nested_absmax", lambda v: v.repeat(2))),
    ("quant_map", change("weight.quant_map", lambda v: v.flip(0))),
    ("bitsandbytes__nf4", change(BLOB, lambda v: v[:-1])),
    ("weight.*1152.*1151", change("weight", lambda v: v[1:])),
    ("weight.*1152", change("weight", lambda v: v.float().view(torch.uint8))),
    ("more", lambda d: {**d, "weight.more": torch.ones(1)}),
    (r"shape.*\(24, 96\).*\(12, 192\)", lambda d: make(n=12, k=192, bias=False).state_dict() | {"bias": d["bias"]}),
    ("weight.*absmax", lambda d: {"weight": d["weight"], "bias": d["bias"]}),
    (r"weight.*\(24, 96\)", lambda d: {"weight": randn(N, K + 1), "bias": d["bias"]}),
    (r"weight.*\(24, 96\)", lambda d: {"weight": randn(N * K), "bias": d["bias"]}),
]


@pytest.mark.parametrize(("match", "corrupt"), BROKEN)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("strict", [False, True])
def test_corrupt_state_dicts_change_nothing(
    match: str, corrupt: Callable[[dict[str, Any]], dict[str, Any]], target: str, strict: bool
) -> None:
    layer = TARGETS[target]()
    weight, state, bias = layer.weight, layer.quant_state, layer.bias
    before = weight.data.clone(), bias.detach().clone(), dict(weight.__dict__)
    broken = corrupt(dict(make(device="cpu").state_dict()))
    with pytest.raises(RuntimeError, match=rf"(?s)While loading weight: .*{match}"):
        layer.load_state_dict(broken, strict=strict)
    assert layer.weight is weight
    assert layer.quant_state is state
    assert weight.__dict__ == before[2]
    if not weight.is_meta:
        assert torch.equal(weight.data, before[0])
        assert torch.equal(layer.bias, before[1])


@pytest.mark.filterwarnings("ignore:for bias. copying from a non-meta")  # torch's own, about a layer left on meta
@pytest.mark.parametrize("target", ["unquantized", "quantized", "meta"])
def test_missing_and_unexpected_keys(target: str) -> None:
    source = make().state_dict()
    layer = TARGETS[target]()
    with pytest.raises(RuntimeError, match=r"Missing.*bias"):
        layer.load_state_dict(drop("bias")(source))
    result = TARGETS[target]().load_state_dict({"bias": source["bias"]}, strict=False)
    assert result.missing_keys == ["weight"]
    result = TARGETS[target]().load_state_dict({**source, "extra": torch.ones(1)}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], ["extra"])
    with pytest.raises(RuntimeError, match="size mismatch for bias"):
        TARGETS[target]().load_state_dict({**source, "bias": torch.ones(N + 1)})


def test_bitsandbytes_files(device: torch.device) -> None:
    peer = pytest.importorskip("bitsandbytes")
    k = 128  # its CPU kernels are wrong where rows are no multiple of the block size
    theirs = peer.nn.Linear4bit(k, N, quant_type="nf4", compress_statistics=True)
    theirs.weight.data.copy_(randn(N, k))
    theirs.to("cpu")
    state_dict = theirs.state_dict()
    assert list(make().state_dict()) == list(state_dict)
    layer = Linear4bit(k, N).to(device)
    layer.load_state_dict(state_dict)
    for key in ("weight", "bias", "weight.absmax", "weight.quant_map", "weight.nested_quant_map", BLOB):
        assert torch.equal(layer.state_dict()[key].cpu(), state_dict[key]), key
    torch.testing.assert_close(layer(randn(3, k).to(device)).cpu(), theirs(randn(3, k)))
