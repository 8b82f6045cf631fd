"""Native optimizer steps: the same bytes as the oracle, for every family, state width, dtype and device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optim_cases
from arrays import assert_same_bits, dtype_name
from fewbits import _native
from optim_cases import CASES, PAIRS, VARIANTS, launch_of, run
from optim_launch import Launch, make_piece, pack
from oracle_optim import AMSGRAD, CENTERED, DECOUPLED, FAMILIES, Group, State8
from strategies import ORDINARY, RECIPES, dtypes, seeds

cases = pytest.mark.parametrize(("family", "variant", "bits"), CASES, ids=lambda part: str(part))

# ---- bytes ---------------------------------------------------------------------------------------------------------


@cases
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: "-".join(map(dtype_name, p)))
def test_step_is_the_oracle(
    family: str, variant: int, bits: int, pair: tuple[torch.dtype, torch.dtype], device: torch.device
) -> None:
    """Three steps from nothing, every tail, odd addresses, two groups."""
    group = VARIANTS[family][variant]
    run(launch_of(family, group, bits, pair, ["normal", "zeros", "wide"], variant, device), 3)


@cases
@settings(max_examples=8)
@given(pair=st.tuples(dtypes, dtypes), recipes=st.lists(st.sampled_from([*RECIPES]), min_size=1, max_size=4),
       seed=seeds, t=st.integers(0, 300))  # fmt: skip
def test_anything_is_the_oracle(
    family: str, variant: int, bits: int, pair: tuple[torch.dtype, torch.dtype], recipes: list[str], seed: int, t: int,
    device: torch.device,
) -> None:  # fmt: skip
    """Any values (subnormal, huge, infinite, NaN) on any states, late in training."""
    group = VARIANTS[family][variant]
    run(launch_of(family, group, bits, pair, recipes, seed % 10**6, device, zero=False, t=t), 1)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_stochastic_rounding_is_the_oracle(family: str, bits: int, device: torch.device) -> None:
    pair = (torch.bfloat16, torch.float32)
    recipes = ["normal", "wide", "huge", "infinite", "nan"]
    run(launch_of(family, VARIANTS[family][0], bits, pair, recipes, 5, device, t=7, stochastic=True), 2)


def test_stochastic_rounding_leaves_other_dtypes(device: torch.device) -> None:
    run(launch_of("adam", Group(), 8, (torch.float16, torch.float32), ["normal"], 5, device, stochastic=True), 2)


def test_stochastic_rounding_has_no_bias(device: torch.device) -> None:
    """A hundred steps of a hundredth of a spacing move a bfloat16 by the spacing, on average; to nearest by nothing."""
    n, spacing = 1 << 14, 2.0**-7
    group = Group(lr=spacing / 100, beta1=0.0)
    piece = make_piece("sgd", group, 0, n, 32, (torch.bfloat16, torch.float32), ["zeros"], 0)
    piece.p[:] = 0x3F80
    piece.g[:] = -1.0
    moved = {}
    for stochastic in (False, True):
        launch = Launch("sgd", 32, [group], [piece], (torch.bfloat16, torch.float32), device, 99, stochastic)
        for _ in range(100):
            launch.step()
        moved[stochastic] = (piece.memory["p"].view.double() - 1).mean().item() / spacing
    assert moved[False] == 0
    assert moved[True] == pytest.approx(1, abs=5 / n**0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_lr_on_device(family: str, device: torch.device) -> None:
    pair = (torch.float32, torch.float32)
    run(launch_of(family, VARIANTS[family][0], 32, pair, [*ORDINARY], 3, device, lr_on_device=True), 2)


def test_pieces_of_a_tensor_give_the_tensor(device: torch.device) -> None:
    """A tensor cut into pieces of whole blocks: the same bytes, one count of steps."""
    group, pair, n, cut = Group(weight_decay=0.01, flags=DECOUPLED), (torch.bfloat16, torch.bfloat16), 9001, 4352
    whole = make_piece("adam", group, 0, n, 8, pair, [*ORDINARY], 1, ordinal=4)
    pieces = []
    for first, last in ((0, cut), (cut, n)):
        piece = make_piece("adam", group, 0, last - first, 8, pair, [*ORDINARY], 1, first=first, ordinal=4)
        piece.p, piece.g, piece.advance = whole.p[first:last].copy(), whole.g[first:last].copy(), first == 0
        pieces.append(piece)
    one = Launch("adam", 8, [group], [whole], pair, device, 8, stochastic=True)
    two = Launch("adam", 8, [group], pieces, pair, device, 8, stochastic=True)
    one.step()
    two.step()
    joined = torch.cat([piece.memory["p"].view for piece in pieces])
    assert torch.equal(joined.view(torch.int16), whole.memory["p"].view.view(torch.int16))
    assert two.counters.tolist() == [1, 0]


def test_many_tensors(device: torch.device) -> None:
    """Hundreds of small tensors and a large one: many tiles, many threads."""
    group, pair = Group(weight_decay=0.01, flags=DECOUPLED), (torch.float32, torch.float32)
    lengths = [*range(1, 400, 3), 300_007]
    pieces = [make_piece("adam", group, 0, n, 8, pair, [*ORDINARY], n, n % 3, ordinal=n) for n in lengths]
    run(Launch("adam", 8, [group], pieces, pair, device), 2)


@pytest.mark.slow
def test_past_two_to_the_31(device: torch.device) -> None:
    """Index arithmetic: the last blocks of a tensor of more than 2**31 elements are right."""
    group, pair, start = Group(lr=1e-3), (torch.bfloat16, torch.bfloat16), 2**31
    piece = make_piece("lion", group, 0, 10 * 4096 + 17, 8, pair, [*ORDINARY], 1)
    n = start + piece.p.size
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 7 * n:
        pytest.skip("too little memory on the GPU")
    launch = Launch("lion", 8, [group], [piece], pair, device)
    kinds = {"p": torch.bfloat16, "g": torch.bfloat16, "state1": torch.uint8, "absmax1": torch.float32}
    whole = {name: torch.zeros(n if name != "absmax1" else -(-n // 256), dtype=kinds[name], device=device)
             for name in kinds}  # fmt: skip
    for name, tensor in whole.items():
        tensor[-piece.memory[name].n :] = piece.memory[name].view
    for column, name in ((0, "p"), (1, "state1"), (4, "absmax1")):
        launch.tensors[0, column] = whole[name].data_ptr()
    launch.tensors[0, 6], launch.gradients[0] = n, whole["g"].data_ptr()
    launch.tile_count = -(-n // _native.OPTIM_TILE)
    launch.tiles = torch.zeros(launch.tile_count, dtype=torch.int32, device=device)
    launch.expect()
    launch.step()
    state = piece.states[0]
    assert isinstance(state, State8)
    for name, expected in (("p", piece.p), ("state1", state.codes), ("absmax1", state.absmax)):
        assert_same_bits(whole[name][-piece.memory[name].n :], expected, name)
    assert not bool(whole["p"][:start].any())
    assert bool((whole["state1"][:start] == 127).all())


@pytest.mark.parametrize("threads", [1, 3])
def test_thread_count_does_not_matter(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        test_many_tensors(torch.device("cpu"))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", ["portable", "avx2", "avx512", "avx512bf16"])
def test_every_simd_path_is_the_oracle(path: str) -> None:
    needs = {"avx2": "avx2", "avx512": "avx512bw", "avx512bf16": "avx512bf16"}
    if path in needs and needs[path] not in _native.cpu_info()["features"]:
        pytest.skip(f"this CPU has no {needs[path]}")
    program = [sys.executable, str(Path(optim_cases.__file__))]
    environment = {**os.environ, "FEWBITS_SIMD": path}
    result = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [path]


@pytest.mark.parametrize("bits", [8, 32])
def test_subnormals_count_whatever_torch_is_told(bits: int) -> None:
    """A program that flushes subnormals to zero gets the same bytes."""
    pair = (torch.float32, torch.float32)
    launch = launch_of("adam", VARIANTS["adam"][0], bits, pair, ["subnormal", "few units"], 3, torch.device("cpu"))
    launch.expect()
    torch.set_flush_denormal(True)
    try:
        launch.step()
    finally:
        torch.set_flush_denormal(False)
    launch.check()


# ---- refusals ------------------------------------------------------------------------------------------------------


def step_with(**changes: object) -> None:
    """A native call on nothing, with some arguments changed."""
    arguments: dict[str, object] = {
        "family": 0, "bits": 8, "dtype_p": 0, "dtype_g": 0, "tensors": 0, "count": 0, "gradients": 0, "tiles": 0,
        "tile_count": 0, "groups": pack([Group()], [0]), "workspace": 0, "control": 0, "ratios": 0, "seed": 0,
        "stochastic": False, "device": -1, "queue": 1,
    }  # fmt: skip
    _native.optim_step(**{**arguments, **changes})


@pytest.mark.parametrize(("changes", "name"), [
    ({"family": 8}, "family"),
    ({"bits": 4}, "bits"),
    ({"dtype_p": 3}, "dtype"),
    ({"groups": b""}, "groups"),
    ({"groups": b"0" * 127}, "groups"),
    ({"groups": b"0" * 128 * 17}, "groups"),
    ({"count": 1}, "tensors"),
    ({"tile_count": 1}, "tile_count"),
    ({"device": -2}, "device"),
    ({"groups": pack([Group(flags=AMSGRAD)], [0])}, "amsgrad"),
    ({"family": 4, "groups": pack([Group(flags=CENTERED, beta2=0.0)], [0])}, "centered"),
    ({"family": 4}, "momentum"),
])  # fmt: skip
def test_wrong_arguments(changes: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        step_with(**changes)


@pytest.mark.parametrize(("field", "value", "name"), [
    (0, 0, "entry 1"), (1, 0, "state"), (5, 0, "absmax"), (6, -1, "n of"), (7, 0, "step"), (8, 3, "tiles"),
    (9, 2, "group"), (9, -1, "group"),
])  # fmt: skip
def test_wrong_tables(field: int, value: int, name: str) -> None:
    """On the CPU a table is checked before anything is written."""
    group, pair = Group(), (torch.float32, torch.float32)
    pieces = [make_piece("adam", group, 0, n, 8, pair, ["normal"], n) for n in (300, 500)]
    launch = Launch("adam", 8, [group, group], pieces, pair, torch.device("cpu"))
    launch.tensors[1, field] = value
    with pytest.raises(ValueError, match=name):
        launch.step()
    launch.check()
