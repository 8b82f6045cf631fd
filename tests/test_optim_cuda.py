"""Optimizer steps where only a GPU goes: whole blocks at aligned addresses against the CPU, streams, graphs, sizes.

``test_optim_native.py`` compares every device with the oracle; here the GPU is compared with the CPU on more elements.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import oracle_optim as oracle
from arrays import as_numpy, dtype_name
from fewbits import _native
from optim_cases import CASES, PAIRS, VARIANTS
from optim_launch import Launch, Piece, make_piece
from oracle_optim import BIAS_CORRECTION, DECOUPLED, FAMILIES, Group
from strategies import ORDINARY

pytestmark = pytest.mark.cuda

CPU = torch.device("cpu")
# Whole tiles, a part of one, a tail; the recipes make blocks of zeros, of zeros among numbers, and of numbers only.
SIZES = [4096 * 5, 256 * 37, 160 * 160, 8192 + 8, 256]
RECIPES = ["normal", "normal", "zeros", "wide", "few units", "normal", "subnormal", "huge", "normal"]
Pair = tuple[torch.dtype, torch.dtype]


def pieces_of(family: str, groups: list[Group], bits: int, pair: Pair, seed: int, *, zero: bool) -> list[Piece]:
    pieces = []
    for i, n in enumerate(SIZES):
        group = i % len(groups)
        recipes = RECIPES if i % 2 else ["normal"]
        pieces.append(make_piece(family, groups[group], group, n, bits, pair, recipes, seed + i, 0, i, 0, i, zero))
        pieces[-1].ratio = np.float32(1.25 - i / 8)
    return pieces


def twins(family: str, bits: int, groups: list[Group], pieces: list[Piece], pair: Pair, device: torch.device,
          *, stochastic: bool = False) -> tuple[Launch, Launch]:  # fmt: skip
    """The same launch on the CPU and on the GPU."""
    ours = Launch(family, bits, groups, copy.deepcopy(pieces), pair, device, 77, stochastic)
    return Launch(family, bits, groups, copy.deepcopy(pieces), pair, CPU, 77, stochastic), ours


def assert_same(cpu: Launch, ours: Launch) -> None:
    __tracebackhide__ = True
    for i, (expected, piece) in enumerate(zip(cpu.pieces, ours.pieces, strict=True)):
        for name, memory in expected.memory.items():
            piece.memory[name].check(as_numpy(memory.view), f"{ours.family} entry {i}: {name}")
    assert ours.counters.tolist() == cpu.counters.tolist()
    assert not bool(ours.workspace.any())


@pytest.mark.parametrize(("family", "variant", "bits"), CASES)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: "-".join(map(dtype_name, p)))
@pytest.mark.parametrize("zero", [True, False], ids=["fresh", "any"])
def test_bytes_are_the_cpus(family: str, variant: int, bits: int, pair: Pair, zero: bool, cuda: torch.device) -> None:
    group = VARIANTS[family][variant]
    groups = [group, Group(**{**vars(group), "lr": group.lr * 0.37, "weight_decay": group.weight_decay * 2})]
    cpu, ours = twins(family, bits, groups, pieces_of(family, groups, bits, pair, variant, zero=zero), pair, cuda)
    for _ in range(3):
        cpu.step()
        ours.step()
        assert_same(cpu, ours)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("family", ["adam", "lion", "ademamix"])
def test_stochastic_bytes_are_the_cpus(family: str, bits: int, cuda: torch.device) -> None:
    for pair in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)):
        groups = [VARIANTS[family][0]]
        pieces = pieces_of(family, groups, bits, pair, 3, zero=True)
        cpu, ours = twins(family, bits, groups, pieces, pair, cuda, stochastic=True)
        for _ in range(2):
            cpu.step()
            ours.step()
            assert_same(cpu, ours)


@pytest.mark.parametrize("control", [(0.125, 0), (3.0, 1)], ids=["scaled", "skipped"])
@pytest.mark.parametrize("bits", [8, 32])
def test_control_bytes_are_the_cpus(control: tuple[float, int], bits: int, cuda: torch.device) -> None:
    pair, groups = (torch.bfloat16, torch.bfloat16), [VARIANTS["adam"][0]]
    cpu, ours = twins("adam", bits, groups, pieces_of("adam", groups, bits, pair, 3, zero=True), pair, cuda)
    words = torch.tensor([control[0], 0.0])
    words.view(torch.int32)[1] = control[1]
    cpu.step(words)
    ours.step(words.to(cuda))
    assert_same(cpu, ours)


@pytest.mark.parametrize("family", ["lamb", "lars"])
@pytest.mark.parametrize("bits", [8, 32])
def test_trust_ratios_are_the_cpus(family: str, bits: int, cuda: torch.device) -> None:
    pair, groups = (torch.bfloat16, torch.float32), [Group(weight_decay=0.01, flags=DECOUPLED | BIAS_CORRECTION)]
    pieces = [
        make_piece(family, groups[0], 0, n, bits, pair, [*ORDINARY], n, 0, 3, 0, 0, False) for n in (300_000, 4096, 9)
    ]
    cpu, ours = twins(family, bits, groups, pieces, pair, cuda)
    np.testing.assert_array_equal(ours.norms(1), cpu.norms(1))
    np.testing.assert_array_equal(ours.trust(), cpu.trust())
    np.testing.assert_array_equal(ours.norms(0), cpu.norms(0))


def call(launch: Launch) -> None:
    """The native step alone, on the current stream."""
    stream = torch.cuda.current_stream(launch.device).cuda_stream
    _native.optim_step(
        *launch._head(), *launch._table(), launch.workspace.data_ptr(), 0, 0, launch.seed, launch.stochastic,
        torch.cuda.current_device(), stream,
    )  # fmt: skip


@pytest.mark.parametrize("bits", [8, 32])
def test_a_captured_step_follows_the_learning_rate(bits: int, cuda: torch.device) -> None:
    """A graph is recorded once; the learning rate and the counters change in device memory between replays."""
    pair, group = (torch.bfloat16, torch.bfloat16), Group(weight_decay=0.01, flags=DECOUPLED)
    pieces = pieces_of("adam", [group], bits, pair, 1, zero=True)
    cpu = Launch("adam", bits, [group], copy.deepcopy(pieces), pair, CPU, lr_on_device=True)
    ours = Launch("adam", bits, [group], copy.deepcopy(pieces), pair, cuda, lr_on_device=True)
    cpu.step()
    call(ours)  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(ours)
        call(ours)
    for lr in (1e-3, 1e-2, 3e-4):
        cpu.lrs.fill_(lr)
        ours.lrs.fill_(lr)
        cpu.step()
        cpu.step()
        graph.replay()
    torch.cuda.synchronize()
    assert_same(cpu, ours)


def test_a_whole_clipped_step_is_captured(cuda: torch.device) -> None:
    pair, group = (torch.float32, torch.float32), Group()
    pieces = pieces_of("adam", [group], 8, pair, 1, zero=True)
    cpu, ours = twins("adam", 8, [group], pieces, pair, cuda)
    partials = torch.zeros(ours.tile_count, dtype=torch.float64, device=cuda)
    control = torch.zeros(2, device=cuda)

    def whole() -> None:
        target = (torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream)
        _native.optim_norms(0, *ours._head(), *ours._table(), 0, partials.data_ptr(), *target)
        _native.optim_control(partials.data_ptr(), ours.tile_count, 0.5, 0, 0, True, control.data_ptr(), *target)
        _native.optim_step(
            *ours._head(), *ours._table(), ours.workspace.data_ptr(), control.data_ptr(), 0, 0, False, *target
        )

    whole()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        whole()
    graph.replay()
    torch.cuda.synchronize()
    for _ in range(2):
        sums = torch.from_numpy(cpu.norms(0)[:, 0].copy())
        words = torch.zeros(2)
        _native.optim_control(sums.data_ptr(), sums.numel(), 0.5, 0, 0, True, words.data_ptr(), -1, 1)
        cpu.step(words)
    assert_same(cpu, ours)


def test_runs_on_the_current_stream(cuda: torch.device) -> None:
    """On a side stream the gradients are written late; a step on any other stream would read what was there before."""
    pair, group = (torch.bfloat16, torch.bfloat16), Group(weight_decay=0.01, flags=DECOUPLED)
    cpu, ours = twins("adam", 8, [group], pieces_of("adam", [group], 8, pair, 1, zero=True), pair, cuda)
    late = [piece.memory["g"].view.clone() for piece in ours.pieces]
    for piece in ours.pieces:
        piece.memory["g"].view.fill_(float("nan"))
    call(twins("adam", 8, [group], pieces_of("adam", [group], 8, pair, 2, zero=True), pair, cuda)[1])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for piece, gradient in zip(ours.pieces, late, strict=True):
            piece.memory["g"].view.copy_(gradient)
        call(ours)
    stream.synchronize()
    cpu.step()
    assert_same(cpu, ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_in_a_row_do_not_overtake(family: str, cuda: torch.device) -> None:
    """Launches may start before the previous one has ended, but not read what it has yet to write."""
    pair, group = (torch.float32, torch.float32), VARIANTS[family][0]
    pieces = [make_piece(family, group, 0, 4096 * 300 + 17, 8, pair, ["normal"], 1)]
    cpu, ours = twins(family, 8, [group], pieces, pair, cuda)
    if family in ("lamb", "lars"):
        for launch in (cpu, ours):
            launch.step()
    else:
        for _ in range(10):
            cpu.step()
        for _ in range(10):
            call(ours)
        torch.cuda.synchronize()
    assert_same(cpu, ours)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 32])
def test_more_than_two_to_the_31_elements(bits: int, cuda: torch.device) -> None:
    """The last elements of a huge tensor are those of a small one."""
    n, tail = 2**31 + 4096 + 300, 4096 + 300
    if torch.cuda.mem_get_info(cuda)[0] < (2 + 2 + bits // 4) * n + 2**31:
        pytest.skip("needs more GPU memory")
    group, pair = Group(weight_decay=0.01, flags=DECOUPLED), (torch.bfloat16, torch.bfloat16)
    small = make_piece("adam", group, 0, tail, bits, pair, ["normal"], 5)
    p, g = (torch.zeros(n, dtype=torch.bfloat16, device=cuda) for _ in range(2))
    width = torch.uint8 if bits == 8 else torch.float32
    states = [torch.zeros(n, dtype=width, device=cuda) for _ in range(2)]
    absmax = [torch.zeros(-(-n // oracle.BLOCK), device=cuda) for _ in range(2)]
    launch = Launch("adam", bits, [group], [small], pair, cuda)
    p[-tail:] = launch.pieces[0].memory["p"].view
    g[-tail:] = launch.pieces[0].memory["g"].view
    tile_count = -(-n // oracle.TILE)
    tiles = torch.zeros(tile_count, dtype=torch.int32, device=cuda)
    counter = torch.zeros(1, dtype=torch.int64, device=cuda)
    scales = [x.data_ptr() if bits == 8 else 0 for x in absmax]
    row = [p.data_ptr(), states[0].data_ptr(), states[1].data_ptr(), 0, *scales, n, counter.data_ptr(), 0, 0, 0, 0, 1]
    tensors = torch.tensor([[*row, 0, 0, 0]], dtype=torch.int64, device=cuda)
    gradients = torch.tensor([g.data_ptr()], dtype=torch.int64, device=cuda)
    target = (torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream)
    table = (tensors.data_ptr(), 1, gradients.data_ptr(), tiles.data_ptr(), tile_count, launch.packed)
    _native.optim_step(*launch._head(), *table, launch.workspace.data_ptr(), 0, 0, 0, False, *target)
    launch.step()
    memory = launch.pieces[0].memory
    assert torch.equal(p[-tail:].view(torch.int16), memory["p"].view.view(torch.int16))
    for i, state in enumerate(states):
        assert torch.equal(state[-tail:], memory[f"state{i + 1}"].view)
    assert counter.item() == 1
    assert not bool(p[:-tail].any())
