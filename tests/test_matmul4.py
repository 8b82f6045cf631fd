"""Products with a 4-bit weight, held against float64, and against what torch makes of the dequantized weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
import fewbits.functional as F
from arrays import DTYPES, assert_same_bits
from fewbits import _checks, _matmul, _native
from fewbits._launch import target_queue
from products import assert_rounded_once, distance, truth_of
from strategies import blocksizes, dtypes, quant_types, seeds
from tolerances import MATMUL_RATIO
from weights4 import REAL_SHAPES, STORAGES, Weight, batches, laid_out, panels_of, randn

# ---- against float64 ------------------------------------------------------------------------------------------------


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
    with panels_of(panel):
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
@pytest.mark.parametrize(("n", "k"), [*REAL_SHAPES, (4096, 11008)])  # nested scales that no copy engine reads
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
    kept = _native.Weight4bit(*weight.bound().native)
    scratch = _matmul.workspace(x, x.shape[0], ordinal, kept.workspace_size)
    where = (0 if scratch is None else scratch.data_ptr(), ordinal, queue)
    arguments = (x.data_ptr(), x.shape[0], _checks.DTYPES[x.dtype], *weight.bound().native, 0, out.data_ptr())
    if not _native.matmul_4bit(*arguments, *where):  # type: ignore[arg-type]
        return None
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
    with panels_of(panel):
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
