"""Products with a 4-bit weight, held against float64, and against what torch makes of the dequantized weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
import fewbits.functional as F
from arrays import DTYPES, assert_same_bits
from fewbits import _checks, _matmul, _native, _panel
from fewbits._launch import target_queue
from fewbits._states import dequantize_as
from products import assert_rounded_once, distance, truth_of
from strategies import blocksizes, dtypes, quant_types, seeds
from tolerances import MATMUL_RATIO

STORAGES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]
REAL_SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (28672, 8192), (8192, 28672), (4097, 4104)]


def randn(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


class Weight:
    """A quantized weight of N × K, with what it stands for in float64."""

    def __init__(
        self,
        n: int,
        k: int,
        device: torch.device,
        *,
        blocksize: int = 64,
        quant_type: str = "nf4",
        nested: bool = False,
        storage: torch.dtype = torch.uint8,
        seed: int = 0,
    ) -> None:
        values = randn(n, k, seed=seed, device=device) / k**0.5
        self.codes, self.state = F.quantize_4bit(
            values, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested, quant_storage=storage
        )

    @property
    def exact(self) -> torch.Tensor:
        return self.dense(torch.float32).double()

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_as(self.codes, self.state, dtype)

    def times(self, x: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        return fewbits.matmul_4bit(x, self.codes, self.state, out, bias)

    def bound(self) -> _panel.Bound:
        state, state2 = self.state, self.state.state2
        nested: tuple[Any, ...] = (None, None, 0, None)
        if state2 is not None:
            nested = (state2.code, state2.absmax, state2.blocksize, state.offset)
        assert state.shape is not None
        assert state.blocksize is not None
        assert state.quant_type is not None
        return _panel.bind(self.codes, state.absmax, *nested, state.blocksize, state.quant_type, state.shape)


# ---- against float64 ------------------------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, ...]:
    """Leading sizes of the activations: none, one of up to 70, or several, some of them 0."""
    return draw(
        st.one_of(
            st.just(()),
            st.tuples(st.integers(0, 70)),
            st.lists(st.integers(0, 5), min_size=2, max_size=3).map(tuple),
        )
    )


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another place: off by an element, with gaps, or with another order of dimensions."""
    if layout == "offset":
        memory = x.new_zeros(x.numel() + 1)
        return memory[1:].copy_(x.reshape(-1)).view(x.shape)
    if layout == "stepped":
        memory = x.new_zeros(*x.shape[:-1], x.shape[-1], 3)
        memory[..., 1] = x
        return memory[..., 1]
    if layout == "transposed":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    return x


@given(
    n=st.integers(1, 300),
    k=st.integers(1, 300),
    batch=batches(),
    dtype=dtypes,
    blocksize=blocksizes,
    quant_type=quant_types,
    nested=st.booleans(),
    bias=st.booleans(),
    storage=st.sampled_from(STORAGES),
    layout=st.sampled_from(["plain", "offset", "stepped", "transposed"]),
    panel=st.sampled_from([None, None, 1, 4096]),
    seed=seeds,
)
def test_any_problem(
    n: int,
    k: int,
    batch: tuple[int, ...],
    dtype: torch.dtype,
    blocksize: int,
    quant_type: str,
    nested: bool,
    bias: bool,
    storage: torch.dtype,
    layout: str,
    panel: int | None,
    seed: int,
    device: torch.device,
) -> None:
    weight = Weight(n, k, device, blocksize=blocksize, quant_type=quant_type, nested=nested, storage=storage, seed=seed)
    x = laid_out(randn(*batch, k, seed=seed, device=device).to(dtype), layout)
    added = randn(n, seed=seed + 1, device=device).to(dtype) if bias else None
    memory = torch.full((x[..., 0].numel() * n + 16,), torch.nan, dtype=dtype, device=device)
    out = memory[8:-8].view(*batch, n)
    with pytest.MonkeyPatch.context() as patch:
        if panel is not None:
            patch.setattr(_panel, "PANEL_BYTES", {"cpu": panel, "cuda": panel})
        y = weight.times(x, added)
        assert weight.times(x, added, out) is out
    assert (y.shape, y.dtype, y.is_contiguous()) == ((*batch, n), dtype, True)
    assert_rounded_once(y, x, weight.exact, added)
    assert_same_bits(out, y, "out")
    assert bool(memory[:8].isnan().all() and memory[-8:].isnan().all()), "written outside of out"


def assert_as_exact_as_torch(weight: Weight, m: int, dtype: torch.dtype, bias: bool, device: torch.device) -> None:
    __tracebackhide__ = True
    n, k = weight.state.shape  # type: ignore[misc]
    x = randn(m, k, seed=m, device=device).to(dtype)
    added = randn(n, seed=1, device=device).to(dtype) if bias else None
    truth = truth_of(x, weight.exact, added)
    out = torch.full((m, n), torch.nan, dtype=dtype, device=device)
    weight.times(x, added, out)
    theirs = nn.functional.linear(x, weight.dense(dtype), added)
    assert distance(out, truth) <= MATMUL_RATIO * distance(theirs, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 9, 16, 17, 32, 48, 64, 65, 100, 128, 200, 256, 300])
@pytest.mark.parametrize(("n", "k"), [(512, 512), (257, 300), (640, 1000)])
def test_as_exact_as_torch(n: int, k: int, m: int, dtype: torch.dtype, device: torch.device) -> None:
    """At every number of tokens at which another kernel may take over."""
    assert_as_exact_as_torch(Weight(n, k, device), m, dtype, m % 2 == 0, device)
    assert_as_exact_as_torch(
        Weight(n, k, device, blocksize=128, quant_type="fp4", nested=True), m, dtype, False, device
    )


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("n", "k"), REAL_SHAPES)
def test_real_shapes(n: int, k: int, nested: bool, dtype: torch.dtype, cuda: torch.device) -> None:
    weight = Weight(n, k, cuda, nested=nested)
    for m in (1, 4, 8, 12, 16, 32, 64, 128, 256, 512, 1024, 4096):
        if m * n < 2**25:
            assert_as_exact_as_torch(weight, m, dtype, m == 4, cuda)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("size", [1, 31, 64, 200])
def test_identity(dtype: torch.dtype, quant_type: str, blocksize: int, size: int, device: torch.device) -> None:
    """Both tables hold 0 and 1: an identity matrix is exact, and returns what it is given, bit for bit."""
    codes, state = F.quantize_4bit(torch.eye(size, device=device), blocksize=blocksize, quant_type=quant_type)
    for m in (1, 7, 40, 150):
        x = randn(m, size, device=device).to(dtype)
        assert torch.equal(fewbits.matmul_4bit(x, codes, state), x)
        leaf = torch.zeros_like(x).requires_grad_()
        (grad,) = torch.autograd.grad(fewbits.matmul_4bit(leaf, codes, state), leaf, x)
        assert torch.equal(grad, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 5, 40, 150])
def test_storage_does_not_matter(dtype: torch.dtype, m: int, device: torch.device) -> None:
    x = randn(m, 100, device=device).to(dtype)
    first, *others = (Weight(33, 100, device, nested=True, storage=storage).times(x) for storage in STORAGES)
    for other in others:
        assert_same_bits(other, first, "another storage")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 5, 16, 40, 64, 150])
def test_every_run_is_the_same(dtype: torch.dtype, m: int, device: torch.device) -> None:
    weight = Weight(384, 1024, device, nested=True)
    x = randn(m, 1024, device=device).to(dtype)
    first = weight.times(x)
    for _ in range(20):
        out = torch.full_like(first, torch.nan)
        assert_same_bits(weight.times(x, out=out), first, "another run")


def fused(weight: Weight, x: torch.Tensor) -> torch.Tensor | None:
    """The product by whatever fused kernel takes it, or None."""
    n, _ = weight.state.shape  # type: ignore[misc]
    out = torch.full((x.shape[0], n), torch.nan, dtype=x.dtype, device=x.device)
    ordinal, queue = target_queue(x.device)
    scratch = _matmul.workspace(x, x.shape[0], n, x.shape[1], ordinal)
    where = (0 if scratch is None else scratch.data_ptr(), ordinal, queue)
    arguments = (x.data_ptr(), x.shape[0], _checks.DTYPES[x.dtype], *weight.bound().native, 0, out.data_ptr())
    if not _native.matmul_4bit(*arguments, *where):  # type: ignore[arg-type]
        return None
    kept = _native.Weight4bit(*weight.bound().native)
    for version in (0, 0, 1, -1):  # the second call need not wait for the weight
        again = torch.full_like(out, torch.nan)
        rest = (0, again.data_ptr(), *where, version)
        assert kept.matmul(*arguments[:3], *rest)  # type: ignore[arg-type]
        assert_same_bits(again, out, f"by Weight4bit, version {version}")
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("least", "most"), [(6, 8), (9, 13), (41, 48)])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, least: int, most: int, device: torch.device) -> None:
    """Within one path: batches of these sizes are of one kernel on every device that has one."""
    weight = Weight(192, 640, device)
    x = randn(most, 640, device=device).to(dtype)
    whole = fused(weight, x)
    if whole is None:
        pytest.skip("no fused kernel takes this here")
    for m in range(least, most):
        part = fused(weight, x[:m].contiguous())
        assert part is not None
        assert_same_bits(part, whole[:m], f"{m} of {most} rows")


def test_special_values_stay_in_their_rows(device: torch.device) -> None:
    weight = Weight(70, 200, device)
    for m in (4, 40):
        x = randn(m, 200, device=device)
        x[1, 7], x[3, 0] = torch.nan, torch.inf
        y = weight.times(x)
        assert bool(y[1].isnan().all())
        assert not bool(y[3].isfinite().any())
        assert bool(y[[0, 2]].isfinite().all())


# ---- gradients ------------------------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 300),
    k=st.integers(1, 300),
    batch=batches(),
    dtype=dtypes,
    blocksize=blocksizes,
    nested=st.booleans(),
    bias=st.booleans(),
    transposed_grad=st.booleans(),
    panel=st.sampled_from([None, None, 1, 4096]),
    seed=seeds,
)
def test_gradients(
    n: int,
    k: int,
    batch: tuple[int, ...],
    dtype: torch.dtype,
    blocksize: int,
    nested: bool,
    bias: bool,
    transposed_grad: bool,
    panel: int | None,
    seed: int,
    device: torch.device,
) -> None:
    weight = Weight(n, k, device, blocksize=blocksize, nested=nested, seed=seed)
    x = randn(*batch, k, seed=seed, device=device).to(dtype).requires_grad_()
    added = randn(n, seed=seed, device=device).to(dtype).requires_grad_() if bias else None
    grad = laid_out(
        randn(*batch, n, seed=seed + 1, device=device).to(dtype), "transposed" if transposed_grad else "plain"
    )
    with pytest.MonkeyPatch.context() as patch:
        if panel is not None:
            patch.setattr(_panel, "PANEL_BYTES", {"cpu": panel, "cuda": panel})
        weight.times(x, added).backward(grad)
    assert x.grad is not None
    assert (x.grad.shape, x.grad.dtype) == (x.shape, dtype)
    assert_rounded_once(x.grad, grad, weight.exact.t())
    if added is not None:
        again = added.detach().clone().requires_grad_()
        nn.functional.linear(x.detach(), weight.dense(dtype), again).backward(grad)
        assert added.grad is not None
        torch.testing.assert_close(added.grad, again.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 8, 64, 200])
def test_gradients_as_exact_as_torchs(dtype: torch.dtype, m: int, device: torch.device) -> None:
    weight = Weight(500, 384, device, nested=True)
    x = randn(m, 384, device=device).to(dtype).requires_grad_()
    grad = randn(m, 500, seed=1, device=device).to(dtype)
    (mine,) = torch.autograd.grad(weight.times(x), x, grad)
    (theirs,) = torch.autograd.grad(nn.functional.linear(x, weight.dense(dtype)), x, grad)
    truth = grad.double() @ weight.exact
    assert distance(mine, truth) <= MATMUL_RATIO * distance(theirs, truth)


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*REAL_SHAPES, (128256, 8192), (1, 2**31), (2**31, 1), (3, 5)])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_panels_are_bounded(shape: tuple[int, int], dim: int, dtype: torch.dtype, kind: str) -> None:
    count = _panel.panel_size(shape, dim, dtype, torch.device(kind))
    size, other = shape[dim], shape[1 - dim]
    itemsize = dtype.itemsize if dtype in DTYPES else dtype.itemsize + 4
    assert 1 <= count <= size
    assert count == 1 or count * other * itemsize <= _panel.PANEL_BYTES[kind]
    assert count == size or count < 64 or count % 64 == 0
    assert _panel.PANEL_BYTES["cuda"] <= 64 << 20


@pytest.mark.parametrize("backward", [False, True])
def test_memory_on_the_cpu(backward: bool) -> None:
    """Beside the result, one panel: nowhere near the 32 MB that the weight has in float32."""
    n, k, m = 2048, 4096, 2
    weight = Weight(n, k, torch.device("cpu"))
    x = randn(m, k).requires_grad_(backward)
    grad = randn(m, n)
    y = weight.times(x)  # torch's own product allocates at its first call
    if backward:
        y.backward(grad)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        y = weight.times(x)
        if backward:
            y.backward(grad)
    held = peak = 0
    for event in sorted(profile.events(), key=lambda event: event.time_range.start):
        held += event.self_cpu_memory_usage
        peak = max(peak, held)
    results = 4 * m * (n + 2 * k)
    assert 0 < peak <= _panel.PANEL_BYTES["cpu"] + results + (64 << 10)


@pytest.mark.cuda
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("m", [1, 16, 512])
def test_memory_of_a_large_head(backward: bool, m: int, cuda: torch.device) -> None:
    n, k = 128256, 8192
    codes = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8, device=cuda)
    state = F.QuantState(torch.rand(n * k // 64, device=cuda), torch.Size((n, k)), None, 64, "nf4", torch.bfloat16)
    x = randn(m, k, device=cuda).bfloat16().requires_grad_(backward)
    y = fewbits.matmul_4bit(x, codes, state)
    grad = torch.randn_like(y) if backward else None
    if grad is not None:
        torch.autograd.grad(y, x, grad)  # torch's own product takes its workspace at its first call
        y = fewbits.matmul_4bit(x, codes, state)
    else:
        del y
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(cuda)
    torch.cuda.reset_peak_memory_stats(cuda)
    if grad is not None:
        (result,) = torch.autograd.grad(y, x, grad)
    else:
        result = fewbits.matmul_4bit(x, codes, state)
    extra = torch.cuda.max_memory_allocated(cuda) - before - result.nbytes
    assert extra <= 64 << 20, f"{extra / 2**20:.1f} MB beside the result"


# ---- the native functions -------------------------------------------------------------------------------------------

# Places in (x, m, dtype, weight of ten numbers, bias, out, device, queue), and what is wrong there.
NATIVE_ERRORS = [
    ({0: 0}, "A: got a null address"),
    ({1: 2**63}, "A: got 9223372036854775808 rows"),
    ({2: 3}, "dtype: got 3"),
    ({3: 0}, "B: got a null address"),
    ({4: 2**40, 5: 2**40}, r"quant_state.shape: got \(1099511627776, 1099511627776\)"),
    ({6: 48}, "blocksize: got 48"),
    ({7: 2}, "quant_type: got 2"),
    ({8: 0}, "absmax: got a null address"),
    ({11: 48}, "nested_absmax: got a null address"),
    ({14: 0}, "out: got a null address"),
    ({16: -2}, "device: got -2"),
]


@pytest.mark.parametrize(("changes", "match"), NATIVE_ERRORS)
def test_native_arguments(changes: dict[int, int], match: str) -> None:
    """Both native ways refuse the same, before anything is written."""
    weight = Weight(24, 96, torch.device("cpu"))
    x, out = randn(2, 96), torch.full((2, 24), -7.0)
    numbers = [x.data_ptr(), 2, 0, *weight.bound().native, 0, out.data_ptr(), 0, -1, 1]
    for place, value in changes.items():
        numbers[place] = value
    with pytest.raises(ValueError, match=f"^{match}"):
        _native.matmul_4bit(*numbers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^{match}"):
        _native.Weight4bit(*numbers[3:13]).matmul(*numbers[:3], *numbers[13:], 0)  # type: ignore[arg-type]
    assert bool((out == -7).all())


# ---- callers of every kind ------------------------------------------------------------------------------------------


def test_gemv(device: torch.device) -> None:
    weight = Weight(24, 96, device)
    x = randn(1, 1, 96, device=device)
    out = torch.full((1, 1, 24), torch.nan, device=device)
    expected = weight.times(x)
    assert_same_bits(F.gemv_4bit(x, weight.codes.t(), state=weight.state), expected, "gemv")
    assert F.gemv_4bit(x, weight.codes, out, state=weight.state) is out
    assert_same_bits(out, expected, "gemv, out")
    with pytest.raises(ValueError, match=r"state.*None"):
        F.gemv_4bit(x, weight.codes)


def test_under_default_device_and_inference_mode(device: torch.device) -> None:
    weight = Weight(24, 96, device)
    x = randn(3, 96, device=device)
    expected = weight.times(x)
    with torch.device("meta"):
        assert_same_bits(weight.times(x), expected, "default device")
    with torch.inference_mode():
        y = weight.times(x)
    assert y.is_inference()
    assert_same_bits(y, expected, "inference mode")


def test_out_counts_as_written(device: torch.device) -> None:
    """Autograd notices that a tensor it has kept is overwritten."""
    weight = Weight(96, 96, device)
    kept = torch.ones(3, 96, device=device, requires_grad=True) * 2
    loss = kept.square().sum()
    with torch.no_grad():
        weight.times(randn(3, 96, device=device), out=kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("panel", [None, 4096])
def test_out_may_be_the_input(panel: int | None, device: torch.device) -> None:
    weight = Weight(96, 96, device)
    x = randn(5, 96, device=device)
    with pytest.MonkeyPatch.context() as patch:
        if panel is not None:
            patch.setattr(_panel, "PANEL_BYTES", {"cpu": panel, "cuda": panel})
        expected = weight.times(x)
        assert weight.times(x, out=x) is x
        assert_same_bits(x, expected, "in place")
        memory = randn(5 * 96 + 96, device=device)
        expected = weight.times(memory[96:].view(5, 96))
        weight.times(memory[96:].view(5, 96), out=memory[:-96].view(5, 96))
        assert_same_bits(memory[:-96], expected, "shifted by a row")


@pytest.mark.cuda
@pytest.mark.parametrize("m", [1, 16, 128, 600])
@pytest.mark.parametrize("nested", [False, True])
def test_capture_in_a_graph(m: int, nested: bool, cuda: torch.device) -> None:
    layer = nn.Sequential(*(fewbits.nn.LinearNF4(512, 512, compress_statistics=nested) for _ in range(3)))
    layer = layer.to(cuda, torch.bfloat16)
    x = randn(m, 512, device=cuda).bfloat16().requires_grad_()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            plain = layer(x)
        y = layer(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        return plain, grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(randn(m, 512, seed=7, device=cuda))
    for tensor in captured:
        tensor.fill_(torch.nan)
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert_same_bits(got, expected, "replayed")


@pytest.mark.cuda
@pytest.mark.parametrize("m", [1, 16, 64, 600])
def test_runs_on_the_current_stream(m: int, cuda: torch.device) -> None:
    """The input is written late on a side stream; a product on any other stream would read what was there before."""
    weight = Weight(512, 512, cuda)
    late = randn(m, 512, device=cuda).bfloat16()
    expected = weight.times(late)
    stream = torch.cuda.Stream()
    for _ in range(5):
        x = torch.zeros_like(late)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            x.copy_(late)
            y = weight.times(x)
        stream.synchronize()
        assert_same_bits(y, expected, "side stream")
