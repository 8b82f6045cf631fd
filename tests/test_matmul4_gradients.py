"""Products with a 4-bit weight: their gradients, and the memory that both take."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
import fewbits.functional as F
from arrays import DTYPES
from fewbits import _panel
from products import assert_rounded_once, distance
from strategies import blocksizes, dtypes, seeds
from tolerances import MATMUL_RATIO
from weights4 import REAL_SHAPES, Weight, batches, laid_out, panels_of, randn

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
    with panels_of(panel):
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
