"""Kernels that start with a weight before the kernel ahead of them ends: only with one that nobody still writes."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fewbits
import fewbits.functional as F
from arrays import assert_same_bits
from fewbits import _native, _prepared
from fewbits.nn import Linear4bit

NATIVE = _native.Weight4bit


class Recorded:
    """`_native.Weight4bit`, and the versions that its products are told."""

    versions: list[int]

    def __init__(self, *numbers: int) -> None:
        self.native = NATIVE(*numbers)
        self.workspace_size = self.native.workspace_size

    def matmul(self, *arguments: int) -> bool:
        self.versions.append(arguments[-1])
        return self.native.matmul(*arguments)


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    Recorded.versions = []
    monkeypatch.setattr(_native, "Weight4bit", Recorded)
    with torch.no_grad():
        yield Recorded.versions


def make(n: int = 32, k: int = 64, device: str | torch.device = "cpu", seed: int = 0, **kwargs: Any) -> Linear4bit:
    layer = Linear4bit(k, n, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16, **kwargs)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) / k**0.5
    layer.weight.data = weight
    return layer.to(device)


def test_writing_changes_the_version(versions: list[int]) -> None:
    layer, x = make(), torch.randn(2, 64).bfloat16()
    for _ in range(3):
        layer(x)
    assert len(versions) == 2
    assert versions[0] == versions[1] >= 0
    layer.weight.copy_(make(seed=1).weight.data)
    layer(x)
    assert versions[-1] > versions[0]
    layer.weight.quant_state.absmax.mul_(2)  # type: ignore[union-attr]
    layer(x)
    assert versions[-1] > versions[-2] > versions[0]
    layer.weight.data.zero_()  # nobody counts this
    torch.autograd.graph.increment_version(layer.weight)
    layer(x)
    assert versions[-1] > versions[-2]


def test_untracked_tensors_have_no_version(versions: list[int]) -> None:
    with torch.inference_mode():
        layer, x = make(), torch.randn(2, 64).bfloat16()
        layer(x)
        layer(x)
        codes, state = F.quantize_4bit(torch.randn(32, 64), quant_type="nf4")
        fewbits.matmul_4bit(x, codes.t(), state)
    assert versions == [-1, -1]


def test_functions_keep_what_a_state_needs(versions: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(_prepared, "prepare", lambda *args, of=_prepared.prepare: made.append(args) or of(*args))
    codes, state = F.quantize_4bit(torch.randn(32, 64), quant_type="nf4")
    x = torch.randn(2, 64).bfloat16()
    want = fewbits.matmul_4bit(x, codes.t(), state)
    for B in (codes, codes.t(), codes.view(1, -1)):
        assert_same_bits(fewbits.matmul_4bit(x, B, state), want, "again")
    assert len(made) == 1, "prepared once"
    assert set(versions) == {codes._version + state.absmax._version}
    other, _ = F.quantize_4bit(torch.randn(32, 64), quant_type="nf4")
    fewbits.matmul_4bit(x, other, state)
    assert len(made) == 2, "codes that are others"
    assert not torch.equal(fewbits.matmul_4bit(x, other, state), want)
    # The same memory in another order, and a part of it.
    turned = fewbits.matmul_4bit(x, codes.view(32, 32).t(), state)
    assert_same_bits(turned, fewbits.matmul_4bit(x, codes.view(32, 32).t().contiguous().view(-1, 1), state), "turned")
    both = torch.stack([codes, other])
    for B, expected in zip(both, (want, fewbits.matmul_4bit(x, other, state)), strict=True):
        assert_same_bits(fewbits.matmul_4bit(x, B, state), expected, "parts of one tensor")
    with pytest.raises(ValueError, match=r"^B: "):
        fewbits.matmul_4bit(x, codes[:512], state)
    assert_same_bits(fewbits.matmul_4bit(x, codes, copy.copy(state)), want, "a copied state")


def test_states_that_are_gone_keep_nothing() -> None:
    before = len(_prepared._kept)
    states = [F.quantize_4bit(torch.randn(32, 64), quant_type="nf4") for _ in range(3)]
    for codes, state in states:
        fewbits.matmul_4bit(torch.randn(2, 64).bfloat16(), codes, state)
    assert len(_prepared._kept) == before + 3
    del states, codes, state
    gc.collect()
    assert len(_prepared._kept) == before


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def tensors(layer: Linear4bit) -> list[torch.Tensor]:
    state: Any = layer.weight.quant_state
    return [layer.weight, state.absmax, *([state.offset, state.state2.absmax] if state.nested else [])]


def rewrite(layer: Linear4bit, other: Linear4bit) -> None:
    for to, of in zip(tensors(layer), tensors(other), strict=True):
        to.copy_(of)


@pytest.mark.cuda
@pytest.mark.parametrize("m", [1, 8, 16, 64, 300])
@pytest.mark.parametrize("nested", [False, True])
@torch.no_grad()
def test_a_weight_written_before_each_product(m: int, nested: bool, cuda: torch.device) -> None:
    layers = [make(4096, 4096, cuda, seed=i, compress_statistics=nested) for i in range(2)]
    x = torch.randn(m, 4096, device=cuda).bfloat16()
    want = [layer(x).clone() for layer in layers]
    held = make(4096, 4096, cuda, seed=2, compress_statistics=nested)
    for i in range(20):
        held(x)
        rewrite(held, layers[i % 2])
        got = [held(x) for _ in range(3)]
        for y in got:
            assert_same_bits(y, want[i % 2], f"after write {i}")


@pytest.mark.cuda
@pytest.mark.parametrize("m", [1, 16, 300])
@torch.no_grad()
def test_written_between_and_within_replays(m: int, cuda: torch.device) -> None:
    layers = [make(4096, 4096, cuda, seed=i, compress_statistics=False) for i in range(2)]
    x = torch.randn(m, 4096, device=cuda).bfloat16()
    want = [layer(x).clone() for layer in layers]
    held, swapped = (make(4096, 4096, cuda, seed=2, compress_statistics=False) for _ in range(2))
    for layer in (held, swapped):
        for _ in range(2):
            layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = [held(x), held(x)]
        rewrite(swapped, held)
        second = [swapped(x), swapped(x)]
    for i in range(10):
        rewrite(held, layers[i % 2])
        graph.replay()
        for y in (*first, *second):
            assert_same_bits(y, want[i % 2], f"replay {i}")


@pytest.mark.cuda
@torch.no_grad()
def test_streams_that_take_turns(cuda: torch.device) -> None:
    layers = [make(4096, 4096, cuda, seed=i, compress_statistics=False) for i in range(2)]
    x = torch.randn(1, 4096, device=cuda).bfloat16()
    want = [layer(x).clone() for layer in layers]
    held, streams = make(4096, 4096, cuda, seed=2, compress_statistics=False), [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for i in range(20):
        writer, reader = streams[i % 2], streams[1 - i % 2]
        with torch.cuda.stream(writer):
            rewrite(held, layers[i % 2])
        reader.wait_stream(writer)
        with torch.cuda.stream(reader):
            elsewhere = [held(x) for _ in range(2)]
        with torch.cuda.stream(writer):
            here = [held(x) for _ in range(2)]
        torch.cuda.synchronize()
        for y in (*elsewhere, *here):
            assert_same_bits(y, want[i % 2], f"turn {i}")
