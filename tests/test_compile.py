"""torch.compile, torch.export and friends see through quantized layers without a graph break."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fewbits
import fewbits.functional as F
from arrays import assert_same_bits
from fewbits.nn import Linear4bit, LinearNF4

K = 64


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class Block(nn.Module):
    """Two quantized layers and a LoRA pair, as QLoRA trains them."""

    def __init__(self, device: torch.device, **kwargs: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = Linear4bit(K, 2 * K, quant_type="nf4", **kwargs)
        self.down = Linear4bit(2 * K, K, bias=False, quant_type="fp4", **kwargs)
        self.lora_a, self.lora_b = nn.Linear(K, 4, bias=False), nn.Linear(4, 2 * K, bias=False)
        self.to(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(nn.functional.silu(self.up(x) + self.lora_b(self.lora_a(x))))
        return y


def train(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]  # type: ignore[list-item]


def assert_close(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(got) == len(expected)
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [False, True])
def test_training(
    nested: bool, storage: torch.dtype, compute: torch.dtype | None, dynamic: bool, device: torch.device
) -> None:
    model = Block(device, compress_statistics=nested, quant_storage=storage, compute_dtype=compute)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        x = randn(rows, K).to(device)
        assert_close(train(compiled, x), train(model, x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_inductor(device: torch.device) -> None:
    model = Block(device)
    compiled = torch.compile(model, fullgraph=True)
    x = randn(3, K).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert_close(train(compiled, x), train(model, x))


def test_no_recompilation() -> None:
    """Dynamic shapes compile once, and running a module does not change what was compiled for it."""
    model = Block(torch.device("cpu"))
    count = 0

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for rows in (2, 3, 7, 9):
            compiled(randn(rows, K))
    assert count == 1


def test_the_graph_holds_the_ops() -> None:
    seen: set[str] = set()

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    with torch.no_grad():
        torch.compile(Block(torch.device("cpu")), fullgraph=True, backend=backend)(randn(2, K))
    assert {name for name in seen if name.startswith("fewbits.")} == {"fewbits.matmul_4bit.default"}


def test_autocast_and_checkpointing() -> None:
    model = Block(torch.device("cpu"))

    def step(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: torch.Tensor = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
            return y

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = randn(3, K).requires_grad_()
        y = function(x)
        y.sum().backward()
        results.append([y.detach(), x.grad])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("nested", [False, True])
def test_functions(nested: bool, device: torch.device) -> None:
    def function(x: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        codes, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=nested)
        codes8, state8 = F.quantize_blockwise(x, blocksize=64)
        F.dequantize_4bit(codes, state, out=out)
        product = fewbits.matmul_4bit(x, codes.t(), state)
        return codes, state.absmax, F.dequantize_4bit(codes, state), F.dequantize_blockwise(codes8, state8), product

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = randn(6, K).to(device)
    out, expected_out = torch.zeros_like(x), torch.zeros_like(x)
    got, expected = compiled(x, out), function(x, expected_out)
    for left, right in zip((*got, out), (*expected, expected_out), strict=True):
        assert_same_bits(left, right, "compiled")


def test_export() -> None:
    model = Block(torch.device("cpu"))
    x = randn(3, K)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2)}})
    x = randn(5, K)
    torch.testing.assert_close(program.module()(x), model(x))


def test_fake_tensors() -> None:
    model = Block(torch.device("cpu"))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        y = model(torch.empty(3, K))
    assert y.shape == (3, K)
    assert isinstance(y, torch._subclasses.FakeTensor)


def test_compiling_leaves_the_module_as_it_was() -> None:
    model = Block(torch.device("cpu"))
    before = copy.deepcopy(model.state_dict())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    train(compiled, randn(2, K))
    assert model.up.compute_dtype is None
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.cuda
def test_reduce_overhead(cuda: torch.device) -> None:
    """CUDA graphs replay the layer on torch's own stream."""
    model = Block(cuda, compute_dtype=torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(4, K, device=cuda)
            torch.testing.assert_close(compiled(x).clone(), model(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16])
def test_jit_trace_of_a_layer_that_has_not_been_called(
    compute_dtype: torch.dtype | None, device: torch.device, tmp_path: Path
) -> None:
    """The tracer runs a module twice and compares: what a first call prepares for the next must not be in the graph."""
    layer = LinearNF4(64, 32, compute_dtype=compute_dtype).to(device).eval()
    x = torch.randn(3, 64, device=device)
    traced = torch.jit.trace(layer, x)
    expected = layer(x)
    torch.jit.save(traced, tmp_path / "layer.pt")
    for graph in (traced, torch.jit.load(tmp_path / "layer.pt")):
        assert torch.allclose(graph(x), expected, rtol=1e-3, atol=1e-4)
