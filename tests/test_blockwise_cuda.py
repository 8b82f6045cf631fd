"""What only a GPU has: streams, graphs, failed launches, several devices. Bytes are tested in ``test_blockwise.py``."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fewbits.functional as F
from arrays import assert_same_bits
from fewbits import _native
from strategies import fill

pytestmark = pytest.mark.cuda

Op = Callable[[torch.Tensor], list[torch.Tensor]]


def _quantize_8bit(x: torch.Tensor) -> list[torch.Tensor]:
    codes, state = F.quantize_blockwise(x, blocksize=256)
    return [codes, state.absmax]


def _quantize_4bit(x: torch.Tensor) -> list[torch.Tensor]:
    packed, state = F.quantize_4bit(x, quant_type="nf4")
    return [packed, state.absmax]


def _quantize_nested(x: torch.Tensor) -> list[torch.Tensor]:
    packed, state = F.quantize_4bit(x, quant_type="fp4", compress_statistics=True)
    return [packed, state.absmax, state.offset, state.state2.absmax]


def _round_trip_8bit(x: torch.Tensor) -> list[torch.Tensor]:
    return [F.dequantize_blockwise(*F.quantize_blockwise(x, blocksize=256))]


def _round_trip_4bit(x: torch.Tensor) -> list[torch.Tensor]:
    return [F.dequantize_4bit(*F.quantize_4bit(x, quant_type="nf4"))]


def _round_trip_nested(x: torch.Tensor) -> list[torch.Tensor]:
    return [F.dequantize_4bit(*F.quantize_4bit(x, quant_type="fp4", compress_statistics=True))]


OPS = [_quantize_8bit, _quantize_4bit, _quantize_nested, _round_trip_8bit, _round_trip_4bit, _round_trip_nested]
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__.strip("_"))
N = 64 * 1000 + 33


def _expect(op: Op, x: torch.Tensor, got: list[torch.Tensor]) -> None:
    __tracebackhide__ = True
    for ours, cpu in zip(got, op(x.cpu()), strict=True):
        assert_same_bits(ours, cpu, op.__name__)


def _run(program: str) -> None:
    """Run a program in a process of its own, beside the tests' modules."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@every_op
def test_runs_on_the_current_stream(op: Op, cuda: torch.device) -> None:
    """On a side stream the input is written late; an operation on any other stream would read what was there before."""
    late = fill(["normal", "wide"], N, 64, torch.bfloat16, 1).to(cuda)
    op(late)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    for _ in range(10):
        x = torch.zeros_like(late)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            x.copy_(late)
            got = op(x)
        stream.synchronize()
        _expect(op, late, got)


@every_op
def test_graph_capture(op: Op, cuda: torch.device) -> None:
    x = fill(["normal"], N, 64, torch.bfloat16, 2).to(cuda)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = op(x)
    for seed in (3, 4):
        x.copy_(fill(["normal", "wide"], N, 64, torch.bfloat16, seed))
        for tensor in got:
            tensor.reshape(-1).view(torch.uint8).fill_(0xFF)
        graph.replay()
        torch.cuda.synchronize()
        _expect(op, x, got)


# Past what one round of warps takes at once on the largest GPU, with a short end.
LARGE = 3 * 2**22 + 4095


def _large(dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(LARGE // 32 + 1, generator=generator).exp().repeat_interleave(32)[:LARGE]
    return torch.randn(LARGE, generator=generator).mul_(scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 512, 1024, 2048, 4096])
def test_warps_that_take_many_tiles(dtype: torch.dtype, blocksize: int, cuda: torch.device) -> None:
    """Every tile is taken once, whichever warp is free, and counted once in the mean of the maxima."""
    x = _large(dtype, blocksize)

    def op(x: torch.Tensor) -> list[torch.Tensor]:
        packed, state = F.quantize_4bit(x, blocksize=blocksize, quant_type="nf4", compress_statistics=True)
        plain, plain_state = F.quantize_4bit(x, blocksize=blocksize, quant_type="nf4")
        codes, state8 = F.quantize_blockwise(x, blocksize=blocksize)
        nested = [packed, state.absmax, state.offset, state.state2.absmax]
        return [*nested, plain, plain_state.absmax, codes, state8.absmax]

    _expect(op, x, op(x.to(cuda)))


@pytest.mark.parametrize("n", [64, N, LARGE])
def test_double_quantization_on_many_streams_and_in_replays(n: int, cuda: torch.device) -> None:
    """The second launch waits for its own first launch, not for another's nor for that of the replay before."""
    inputs = [_large(torch.bfloat16, seed)[:n] for seed in range(3)]
    expected = [_quantize_nested(x) for x in inputs]
    inputs = [x.to(cuda) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results: list[list[list[torch.Tensor]]] = [[] for _ in inputs]
    for _ in range(20):
        for x, stream, got in zip(inputs, streams, results, strict=True):
            with torch.cuda.stream(stream):
                got.append(_quantize_nested(x))
    torch.cuda.synchronize()
    for want, runs in zip(expected, results, strict=True):
        for got in runs:
            for ours, cpu in zip(got, want, strict=True):
                assert_same_bits(ours, cpu, "on its stream")

    x = inputs[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _quantize_nested(x)
    runs = []
    for turn in range(12):  # nobody waits in between
        x.copy_(inputs[turn % 3])
        graph.replay()
        runs.append([tensor.clone() for tensor in captured])
    torch.cuda.synchronize()
    for turn, got in enumerate(runs):
        for ours, cpu in zip(got, expected[turn % 3], strict=True):
            assert_same_bits(ours, cpu, f"replay {turn}")


@every_op
def test_first_use_inside_a_capture(op: Op) -> None:
    """Kernels are loaded lazily; the load itself must be legal while a graph is captured."""
    _run(
        f"""
        import torch, test_blockwise_cuda as t
        x = torch.randn({N}, device="cuda", dtype=torch.bfloat16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = t.{op.__name__}(x)
        graph.replay()
        torch.cuda.synchronize()
        t._expect(t.{op.__name__}, x, got)
        """
    )


def test_failed_launch_raises_and_the_process_works_on() -> None:
    """A forbidden call inside a capture makes the driver refuse every later launch on that stream."""
    _run(
        """
        import torch
        from fewbits import _native
        import fewbits.functional as F
        x = torch.randn(4096, device="cuda")
        codes = torch.zeros(2048, dtype=torch.uint8, device="cuda")
        absmax = torch.zeros(64, device="cuda")
        expected = F.quantize_4bit(x.cpu(), quant_type="nf4")[0]
        assert torch.equal(F.quantize_4bit(x, quant_type="nf4")[0].cpu(), expected)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                torch.cuda.synchronize()
                raise SystemExit("the capture was not invalidated")
            except RuntimeError:
                pass
            try:
                _native.quantize_4bit(x.data_ptr(), 4096, 0, 64, 0, codes.data_ptr(), absmax.data_ptr(),
                                      x.device.index, stream.cuda_stream)
                raise SystemExit("the refused launch did not raise")
            except _native.Error as error:
                words = str(error)
                assert isinstance(error, RuntimeError)
                assert "quantize" in words and "capture" in words.lower(), words
            try:
                graph.capture_end()
            except RuntimeError:
                pass
        assert torch.equal(F.quantize_4bit(x, quant_type="nf4")[0].cpu(), expected)
        assert torch.cuda.current_device() == 0
        """
    )


def test_wrong_device_index_leaves_the_process_working(cuda: torch.device) -> None:
    x = torch.randn(64, device=cuda)
    with pytest.raises((RuntimeError, ValueError), match="99"):
        _native.quantize_4bit(x.data_ptr(), 64, 0, 64, 0, x.data_ptr(), x.data_ptr(), 99, 0)
    _expect(_quantize_4bit, x, _quantize_4bit(x))


def test_second_device() -> None:
    """Tensors on a device that is not torch's current one; torch's current device stays."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    x = fill(["normal"], N, 64, torch.float16, 6).to("cuda:1")
    assert torch.cuda.current_device() == 0
    for op in OPS:
        got = op(x)
        assert {t.device for t in got} == {x.device}
        _expect(op, x, got)
    assert torch.cuda.current_device() == 0


def test_import_and_cpu_use_initialize_no_cuda() -> None:
    _run(
        """
        import torch, fewbits, fewbits.functional as F
        F.quantize_4bit(torch.randn(64), quant_type="nf4")
        assert not torch.cuda.is_initialized()
        """
    )
