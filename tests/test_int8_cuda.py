"""LLM.int8() where only a GPU goes: every kernel forced, graphs, streams, sizes, repeats.

``test_int8_native.py`` compares every device with the definition; here are larger layers, against float64.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arrays import DTYPES
from fewbits import _native
from fewbits._checks import DTYPES as NUMBERS
from fewbits._launch import target_queue

pytestmark = pytest.mark.cuda

PRODUCTS = [
    "plain",
    "mma_16",
    "mma_128",
    "skinny_own",
    "skinny_kept_8",
    "skinny_kept_16",
    "skinny_8",
    "skinny_16",
    "skinny_32",
    "wide_64",
    "wide_128",
    "wide_256",
]
# Rows, out features, columns: tiles and stages that are not whole, more tiles than a GPU takes at once, k that the
# copy engine cannot read.
SHAPES = [
    (1, 300, 4096),
    (3, 4100, 272),
    (8, 136, 8192),
    (13, 1030, 4080),
    (16, 514, 4112),
    (31, 200, 2064),
    (40, 260, 1040),
    (129, 4097, 528),
    (300, 1000, 16),
    (700, 9000, 384),
    (5, 64, 77),
    (20, 30, 1000),
]
FEW = 1e-2  # of the result's norm: far below what a wrong column or scale makes, far above rounding to bfloat16


class Layer:
    """An int8 layer, activations with planted outlier columns, and their product in float64."""

    def __init__(self, m: int, n: int, k: int, dtype: torch.dtype, outliers: int, device: torch.device) -> None:
        generator = torch.Generator(device=device).manual_seed(m + n + k)
        self.m, self.n, self.k, self.dtype = m, n, k, dtype
        self.x = torch.randn(m, k, generator=generator, device=device).to(dtype)
        columns = torch.randperm(k, generator=generator, device=device)[:outliers]
        rows = torch.randint(m, (columns.numel(),), generator=generator, device=device)
        self.x[rows, columns] = 25.0
        self.weight = torch.randint(-127, 128, (n, k), generator=generator, device=device, dtype=torch.int8)
        self.scale = torch.rand(n, generator=generator, device=device) + 0.5
        self.bias = torch.randn(n, generator=generator, device=device).to(dtype)

    def linear(self, threshold: float) -> torch.Tensor:
        """The whole operation, on the current stream."""
        return self.prepared(threshold)()

    def prepared(self, threshold: float) -> Callable[[], torch.Tensor]:
        """The same later, without a launch of its own."""
        device, queue = target_queue(self.x.device)
        out = torch.full((self.m, self.n), float("nan"), dtype=self.dtype, device=self.x.device)
        size = _native.int8_linear_workspace_size(self.m, self.n, self.k, device)
        # Whatever the memory holds.
        workspace = torch.randint(0, 256, (size,), dtype=torch.uint8, device=self.x.device)
        arguments = (self.weight.data_ptr(), self.n, self.scale.data_ptr(), self.bias.data_ptr(), out.data_ptr())
        number = NUMBERS[self.dtype]

        def run() -> torch.Tensor:
            _native.int8_linear(
                self.x.data_ptr(), self.m, self.k, number, threshold, *arguments, workspace.data_ptr(), device, queue
            )
            return out

        return run

    def expected(self, threshold: float) -> torch.Tensor:
        """By the definition, in float64."""
        x = self.x.double()
        outlier = (x.abs() >= threshold) if threshold else torch.zeros_like(x, dtype=torch.bool)
        kept = x.masked_fill(outlier, 0)
        scale = kept.abs().amax(1, keepdim=True).float()
        codes = (kept.float() * (127 / scale)).round().double()
        approximate = codes * scale.double() / 127
        columns = outlier.any(0)
        approximate[:, columns] = x[:, columns]
        weight = self.weight.double() * self.scale.double()[:, None] / 127
        return approximate @ weight.T + self.bias.double()

    def check(self, out: torch.Tensor, threshold: float) -> None:
        expected = self.expected(threshold)
        assert not out.isnan().any()
        assert float((out.double() - expected).norm() / expected.norm()) < FEW


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("outliers", [0, 5, 100, "half", "all"])
def test_layers(shape: tuple[int, int, int], dtype: torch.dtype, outliers: int | str, cuda: torch.device) -> None:
    k = shape[2]
    layer = Layer(*shape, dtype, min({"half": k // 2, "all": k}.get(outliers, outliers), k), cuda)
    for threshold in (0.0, 6.0):
        layer.check(layer.linear(threshold), threshold)


@pytest.mark.parametrize("outliers", [0, 5, 33, 2000])
def test_a_long_product(outliers: int, cuda: torch.device) -> None:
    """There few and many outlier columns have launches of their own. A graph takes the one or the other."""
    layer = Layer(2048, 14336, 4096, torch.bfloat16, outliers, cuda)
    for threshold in (0.0, 6.0):
        layer.check(layer.linear(threshold), threshold)
    again = replayed(lambda: layer.linear(6.0))
    for count in (0, 2000, 5):
        layer.x.copy_(Layer(2048, 14336, 4096, torch.bfloat16, count, cuda).x)
        assert torch.equal(again(), layer.linear(6.0))


FORCED = """
import sys
sys.path.insert(0, {tests!r})
import torch
from arrays import DTYPES
from test_int8_cuda import Layer, SHAPES
for shape in SHAPES:
    for dtype in DTYPES:
        for outliers in (0, 3, 70, shape[2] // 2, shape[2]):
            layer = Layer(*shape, dtype, min(outliers, shape[2]), torch.device("cuda"))
            for threshold in (0.0, 6.0):
                first = layer.linear(threshold)
                layer.check(first, threshold)
                for _ in range(3):
                    assert torch.equal(layer.linear(threshold), first), (shape, dtype, outliers)
print("all right")
"""


@pytest.mark.parametrize("name", [*PRODUCTS, "nonsense"])
def test_every_kernel_forced(name: str) -> None:
    """In a process of its own, because the variable is read once. Repeats give the same bits."""
    code = FORCED.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "FEWBITS_INT8": name}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if name == "nonsense":
        assert "FEWBITS_INT8: got nonsense, expected one of plain, mma_16" in ran.stderr
    else:
        assert ran.stdout.strip() == "all right", ran.stderr[-2000:]


def replayed(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The call as a graph, after a warm-up on a side stream."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def again() -> torch.Tensor:
        graph.replay()
        return out

    return again


@pytest.mark.parametrize("m", [1, 7, 16, 64, 300, 1000])
def test_a_graph_follows_its_inputs(m: int, cuda: torch.device) -> None:
    """Outlier columns of one replay must not stay for the next."""
    layer = Layer(m, 1000, 2048, torch.bfloat16, 9, cuda)
    again = replayed(lambda: layer.linear(6.0))
    for seed in range(3):
        other = Layer(m, 1000, 2048, torch.bfloat16, [9, 0, 40][seed], cuda)
        layer.x.copy_(other.x.roll(seed, 1))
        eager = layer.linear(6.0)
        assert torch.equal(again(), eager)
        layer.check(eager, 6.0)


@pytest.mark.parametrize("m", [1, 8, 100, 600])
def test_a_side_stream(m: int, cuda: torch.device) -> None:
    layer = Layer(m, 3000, 4096, torch.float16, 4, cuda)
    expected = layer.linear(6.0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(1_000_000)
        layer.x.mul_(0.5)
        layer.x.mul_(2.0)
        out = layer.linear(6.0)
    side.synchronize()
    assert torch.equal(out, expected)


def test_layers_one_after_another(cuda: torch.device) -> None:
    """Launches that overlap: each reads what the one before wrote."""
    layers = [Layer(33, 2048, 2048, torch.bfloat16, 6, cuda) for _ in range(6)]

    def chain(wait: bool) -> torch.Tensor:
        x = layers[0].x.clone()
        for layer in layers:
            layer.x.copy_(x)
            if wait:
                torch.cuda.synchronize()
            x = layer.linear(6.0) / 600
        return x

    assert torch.equal(chain(False), chain(True))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("m", [1, 4, 8, 16, 32, 100])
def test_operands_written_just_before(m: int, threshold: float, cuda: torch.device) -> None:
    """What the launch before writes, weight included, is what is read: the product starts while rows are quantized."""
    layer = Layer(m, 8192, 4096, torch.bfloat16, 5, cuda)
    weights = [layer.weight.clone(), layer.weight.roll(1, 0)]
    scales = [layer.scale.clone(), layer.scale.roll(1, 0)]
    run = layer.prepared(threshold)
    expected = []
    for i in range(2):
        layer.weight.copy_(weights[i])
        layer.scale.copy_(scales[i])
        torch.cuda.synchronize()
        expected.append(run().clone())
    assert not torch.equal(*expected)
    for i in [0, 1] * 5:
        torch.cuda._sleep(500_000)  # so that all of these launches queue up
        layer.scale.copy_(scales[i])
        layer.weight.copy_(weights[i])
        assert torch.equal(run(), expected[i])


def test_two_streams_at_once(cuda: torch.device) -> None:
    layers = [Layer(m, 4096, 4096, torch.bfloat16, 7, cuda) for m in (2, 8, 16, 16)]
    expected = [layer.linear(6.0) for layer in layers]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in layers]
    runs = []
    for layer, stream in zip(layers, streams, strict=True):
        with torch.cuda.stream(stream):
            runs.append(layer.prepared(6.0))
    torch.cuda.synchronize()
    outs = [runs[i % 4]() for i in range(400)][-4:]
    torch.cuda.synchronize()
    for out, right in zip(outs, expected, strict=True):
        assert torch.equal(out, right)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_past_two_to_the_31_elements(dtype: torch.dtype, cuda: torch.device) -> None:
    """Rows, a weight, a result and a rectangle whose last elements lie past 2^31."""
    device, queue = target_queue(cuda)
    m, k = 2**31 // 8192 + 5, 8192
    x = torch.zeros(m, k, dtype=dtype, device=cuda)
    x[-1] = torch.arange(k, device=cuda).to(dtype) / k
    codes = torch.full((m, k), 7, dtype=torch.int8, device=cuda)
    scale = torch.zeros(m, device=cuda)
    _native.int8_quantize_rows(
        x.data_ptr(), m, k, NUMBERS[dtype], 0.0, codes.data_ptr(), scale.data_ptr(), 0, device, queue
    )
    assert not codes[:-1].any()
    assert torch.equal(codes[-1].float(), (x[-1].float() * (127 / x[-1].float().max())).round())
    # The same codes as a weight: its last row against itself.
    ones = torch.ones(m, device=cuda)
    out = torch.empty(1, m, dtype=torch.float32, device=cuda)
    _native.int8_matmul(
        0, 0, codes[-1:].data_ptr(), 1, k, ones[-1:].data_ptr(), codes.data_ptr(), m, ones.data_ptr(), 0, 0,
        out.data_ptr(), device, queue,
    )  # fmt: skip
    assert not out[0, :-1].any()
    torch.testing.assert_close(out[0, -1].double(), codes[-1].double().square().sum() / 16129)
    part = torch.empty(2, k, dtype=dtype, device=cuda)
    _native.int8_dequantize_panel(
        codes.data_ptr(), m, k, ones.data_ptr(), m - 2, 2, 0, k, part.data_ptr(), NUMBERS[dtype], device, queue
    )
    assert torch.equal(part[1], (codes[-1].float() * (ones[0] / 127)).to(dtype))
    del x, codes
    rows = 70_000
    a, b = (torch.ones(rows, 32, dtype=torch.int8, device=cuda) for _ in range(2))
    sums = torch.zeros(rows, rows, dtype=torch.int32, device=cuda)
    _native.int8_matmul_int32(a.data_ptr(), rows, 32, b.data_ptr(), rows, sums.data_ptr(), device, queue)
    assert bool((sums == 32).all())
