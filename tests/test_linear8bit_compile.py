"""torch.compile, torch.export and fake tensors see one op a layer, with or without a threshold."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import fewbits
import fewbits.functional as F
from fewbits.nn import Embedding8bit, Linear8bitLt
from linear8bit_layers import OPS, K, N, activations, make, randn

ops = torch.ops.fewbits


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model(device: torch.device, threshold: float, trained: bool) -> nn.Sequential:
    layers = make(None, threshold=threshold, has_fp16_weights=trained), make(None, n=K, k=N, threshold=threshold)
    return nn.Sequential(layers[0], nn.SiLU(), layers[1]).to(device)


def gradients(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]  # type: ignore[list-item]


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_fullgraph(threshold: float, trained: bool, warm: bool, device: torch.device) -> None:
    module, twin = model(device, threshold, trained), model(device, threshold, trained)
    if warm:
        module(activations(1, K).to(device))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        x = activations(rows, K).to(device)
        got, expected = gradients(compiled, x), gradients(twin, x)
        assert len(got) == len(expected) == (5 if trained else 4)
        for left, right in zip(got, expected, strict=True):
            torch.testing.assert_close(left, right)
    with torch.no_grad():
        assert torch.equal(compiled(x), twin(x))


def test_export() -> None:
    module, x = model(torch.device("cpu"), 6.0, False), activations(3, K)
    exported = torch.export.export(module, (x,))
    names = [str(node.target) for node in exported.graph.nodes if "fewbits" in str(node.target)]
    assert names == ["fewbits.int8_linear.default"] * 2
    with torch.no_grad():
        assert torch.equal(exported.module()(x), module(x))


def test_functions_compile(device: torch.device) -> None:
    def run(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, row, _ = F.int8_vectorwise_quant(x, 6.0, return_outliers=False)
        b, col, _ = F.int8_vectorwise_quant(w)
        product = F.int8_linear_matmul(a, b)
        return (
            F.int8_mm_dequant(product, row, col),
            F.int8_scaled_mm(a, b, row, col),
            F.int8_vectorwise_dequant(b, col),
            fewbits.matmul(x, w, threshold=6.0),
        )

    x, w = activations(3, K).to(device), randn(N, K).to(device)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x, w), run(x, w), strict=True):
        assert torch.equal(got, expected)


def test_embedding_compiles(device: torch.device) -> None:
    table, indices = Embedding8bit(10, 32).to(device), torch.tensor([3, 1], device=device)
    compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(indices), table(indices))


def test_fake_tensors_and_meta() -> None:
    layer = Linear8bitLt(K, N, has_fp16_weights=False, device="meta")
    codes, scales = torch.empty(N, K, dtype=torch.int8, device="meta"), torch.empty(N, device="meta")
    x = torch.empty(2, 3, K, dtype=torch.bfloat16, device="meta")
    layer.weight.data, layer.weight.SCB = codes, scales
    y = layer(x.float())
    assert (y.shape, y.device.type) == ((2, 3, N), "meta")
    y = ops.int8_linear(x, codes, scales, 6.0, None, None)
    assert (y.shape, y.dtype) == ((2, 3, N), torch.bfloat16)


def arguments(name: str, device: torch.device, dtype: torch.dtype) -> tuple[object, ...]:
    x = activations(2, 3, K).to(device, dtype)
    cb, scb, _ = F.int8_vectorwise_quant(randn(N, K).to(device))
    ca, sca, mask = ops.int8_quantize_rows(x, 6.0)
    bias, master = randn(N).to(device, dtype), randn(N, K).to(device).requires_grad_()
    return {
        "int8_quantize_rows": (x.detach(), 6.0),
        "int8_linear": (x.requires_grad_(), cb, scb, 6.0, bias.requires_grad_(), master),
        "int8_linear_matmul": (ca, cb),
        "int8_scaled_mm": (ca, cb, sca, scb, bias.detach(), dtype),
        "int8_mixed_scaled_mm": (x.detach(), ca, cb, sca, scb, mask, bias.detach()),
        "int8_vectorwise_dequant": (cb, scb, dtype),
        "int8_dense_matmul": (x, cb, scb),
        "int8_dense_matmul_grad": (randn(2, N).to(device, dtype).requires_grad_(), cb, scb),
    }[name]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name: str, dtype: torch.dtype, device: torch.device) -> None:
    torch.library.opcheck(getattr(ops, name).default, arguments(name, device, dtype))


@pytest.mark.cuda
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_cuda_graph(threshold: float, cuda: torch.device) -> None:
    module, x = model(cuda, threshold, False), activations(3, K).to(cuda)
    with torch.no_grad():
        module(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        x.copy_(activations(3, K, seed=9))
        graph.replay()
        assert torch.equal(y, module(x))


@pytest.mark.cuda
def test_nothing_waits_for_the_device(cuda: torch.device) -> None:
    module, x = model(cuda, 6.0, True), activations(3, K).to(cuda).requires_grad_()
    module(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(x).sum().backward()
        with torch.no_grad():
            module(x)
        F.int8_vectorwise_quant(x, 6.0, return_outliers=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
