"""Native optimizer steps: the same bytes as the oracle, for every family, state width, dtype and device."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle_optim as oracle
from arrays import DTYPES, dtype_name
from fewbits import _native
from optim_launch import Launch, make_piece, pack
from oracle_optim import AMSGRAD, BIAS_CORRECTION, CENTERED, DECOUPLED, FAMILIES, NESTEROV, Group
from strategies import ORDINARY, RECIPES, dtypes, seeds

# Every choice of each family; those marked 32 have no 8-bit form.
VARIANTS: dict[str, list[Group]] = {
    "adam": [
        Group(weight_decay=0.01, flags=DECOUPLED),
        Group(weight_decay=0.01),
        Group(flags=DECOUPLED, eps=0.0, beta1=0.0),
        Group(weight_decay=0.1, flags=DECOUPLED | AMSGRAD),
    ],
    "ademamix": [
        Group(weight_decay=0.01),
        Group(t_alpha=50.0, t_beta3=80.0, beta3=0.999),
        Group(t_alpha=2.0, t_beta3=2.0, alpha=3.0),
    ],
    "lion": [Group(lr=1e-4, beta2=0.99, weight_decay=0.1), Group(lr=1e-4, beta1=0.0)],
    "sgd": [
        Group(weight_decay=1e-4),
        Group(beta1=0.0, weight_decay=1e-4),
        Group(flags=NESTEROV, lr=0.1),
        Group(dampening=0.3),
    ],
    "rmsprop": [
        Group(beta1=0.99, beta2=0.0, weight_decay=0.01),
        Group(beta1=0.99, beta2=0.9),
        Group(beta1=0.9, beta2=0.0, flags=CENTERED, eps=1e-3),
        Group(beta1=0.9, beta2=0.5, flags=CENTERED),
    ],
    "adagrad": [Group(lr=0.01, lr_decay=0.1, weight_decay=0.01, eps=1e-10), Group(lr=0.01)],
    "lamb": [
        Group(weight_decay=0.01, flags=DECOUPLED | BIAS_CORRECTION),
        Group(weight_decay=0.01, flags=BIAS_CORRECTION),
        Group(flags=DECOUPLED, weight_decay=0.01, eps=1e-6),
    ],
    "lars": [
        Group(weight_decay=1e-3, trust=0.02, lr=0.1),
        Group(beta1=0.0, trust=0.02, lr=0.1),
        Group(flags=NESTEROV, lr=0.1, dampening=0.1),
    ],
}


def has_8bit(family: str, group: Group) -> bool:
    return not (group.has(AMSGRAD | CENTERED) or (family == "rmsprop" and group.beta2 != 0))


CASES = [
    pytest.param(family, i, bits, id=f"{family}-{i}-{bits}")
    for family in FAMILIES
    for i, group in enumerate(VARIANTS[family])
    for bits in (8, 32)
    if bits == 32 or has_8bit(family, group)
]
PAIRS = list(itertools.product(DTYPES, DTYPES))
LENGTHS = [0, 1, 255, 256, 257, 4095, 4096, 4097, 9001]


def launch_of(
    family: str, group: Group, bits: int, pair: tuple[torch.dtype, torch.dtype], recipes: list[str], seed: int,
    device: torch.device, *, zero: bool = True, t: int = 0, stochastic: bool = False, lr_on_device: bool = False,
) -> Launch:  # fmt: skip
    """Tensors of awkward lengths and addresses, in two groups."""
    groups = [group, Group(**{**vars(group), "lr": group.lr * 0.37, "weight_decay": group.weight_decay * 2})]
    pieces = [
        make_piece(family, groups[i % 2], i % 2, n, bits, pair, recipes, seed + 10 * i, i % 4, t + i, 256 * i, 1000 + i,
                   zero)
        for i, n in enumerate(LENGTHS)
    ]  # fmt: skip
    for piece in pieces:
        piece.ratio = np.float32(1 + piece.p.size % 7 / 8)
    return Launch(family, bits, groups, pieces, pair, device, seed * 12345, stochastic, lr_on_device)


def run(launch: Launch, steps: int, **arguments: torch.Tensor) -> None:
    __tracebackhide__ = True
    for _ in range(steps):
        launch.expect()
        launch.step(**arguments)
        launch.check()


# ---- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "variant", "bits"), CASES)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: "-".join(map(dtype_name, p)))
def test_step_is_the_oracle(
    family: str, variant: int, bits: int, pair: tuple[torch.dtype, torch.dtype], device: torch.device
) -> None:
    """Three steps from nothing, every tail, odd addresses, two groups."""
    group = VARIANTS[family][variant]
    run(launch_of(family, group, bits, pair, ["normal", "zeros", "wide"], variant, device), 3)


@pytest.mark.parametrize(("family", "variant", "bits"), CASES)
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


@pytest.mark.parametrize("threads", [1, 3])
def test_thread_count_does_not_matter(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        test_many_tensors(torch.device("cpu"))
    finally:
        torch.set_num_threads(before)


# ---- control -------------------------------------------------------------------------------------------------------


def control_of(
    launch: Launch, partials: torch.Tensor, max_norm: float, grad_scale: float | None, found_inf: float | None,
    skip_nonfinite: bool,
) -> torch.Tensor:  # fmt: skip
    """The native {scale, skip}, checked against the oracle's."""
    __tracebackhide__ = True
    device = launch.device
    scales = torch.tensor([grad_scale or 0.0, found_inf or 0.0], dtype=torch.float32, device=device)
    control = torch.full((3,), 77.0, dtype=torch.float32, device=device)
    addresses = [scales.data_ptr() if grad_scale is not None else 0]
    addresses += [scales.data_ptr() + 4 if found_inf is not None else 0]
    target = (-1, 1) if device.type == "cpu" else (control.device.index, torch.cuda.current_stream().cuda_stream)
    _native.optim_control(
        partials.data_ptr(), partials.numel(), max_norm, *addresses, skip_nonfinite, control.data_ptr(), *target
    )
    scale, skip = oracle.control(
        partials.cpu().numpy(),
        max_norm,
        None if grad_scale is None else np.float32(grad_scale),
        None if found_inf is None else np.float32(found_inf),
        skip_nonfinite,
    )
    bits = control.view(torch.int32).tolist()
    got = np.array(bits[:1], dtype=np.int32).view(np.float32)[0]
    assert got == scale or (np.isnan(got) and np.isnan(scale))
    assert bits[1] == skip
    assert control[2].item() == 77
    return control


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("recipes", [["normal", "wide"], ["huge"], ["subnormal"], ["nan"], ["infinite"]], ids=str)
@pytest.mark.parametrize("arguments", [(0.0, None, None, False), (0.5, None, None, True), (1e30, 1024.0, 0.0, True),
                                       (2.0, 65536.0, 1.0, False)], ids=str)  # fmt: skip
def test_control_and_clipping(
    dtype: torch.dtype, recipes: list[str], arguments: tuple[float, float | None, float | None, bool],
    device: torch.device,
) -> None:  # fmt: skip
    launch = launch_of("adam", Group(), 8, (torch.float32, dtype), recipes, 3, device)
    partials = launch.norms(0)
    expected = np.concatenate([oracle.tile_sums(oracle.widen(piece.g)) for piece in launch.pieces])
    np.testing.assert_array_equal(partials[:, 0], expected)
    control = control_of(launch, launch.partials[:-1], *arguments)
    bits = control[:2].view(torch.int32).tolist()
    if not bits[1]:
        launch.expect(np.float32(control[0].item()))
    launch.step(control)
    launch.check()


@pytest.mark.parametrize("count", [0, 1, 1023, 1025, 5000])
def test_control_sums_in_one_order(count: int, device: torch.device) -> None:
    partials = torch.from_numpy(10.0 ** np.random.default_rng(count).uniform(-9, 9, count)).to(device)
    launch = launch_of("sgd", Group(beta1=0.0), 32, (torch.float32, torch.float32), ["zeros"], 0, device)
    control_of(launch, partials, 1.0, 3.0, None, True)


# ---- trust ratios --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: "-".join(map(dtype_name, p)))
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(("family", "variant"), [("lamb", 0), ("lamb", 1), ("lamb", 2), ("lars", 0), ("lars", 1)])
def test_trust_ratio(
    family: str, variant: int, bits: int, pair: tuple[torch.dtype, torch.dtype], device: torch.device
) -> None:
    group = VARIANTS[family][variant]
    launch = launch_of(family, group, bits, pair, ["normal", "wide"], variant, device, zero=False, t=2)
    launch.pieces[3].memory["p"].view.zero_()
    launch.pieces[3].p[:] = 0
    control = torch.tensor([0.25, 0.0], device=device)
    for _ in range(2):
        partials, tile = launch.norms(1, control), 0
        for piece in launch.pieces:
            expected = oracle.trust_sums(
                family, launch.groups[piece.group], piece.t + 1, piece.p, piece.g, piece.states, np.float32(0.25)
            )
            got = partials[tile : tile + expected[0].size]
            np.testing.assert_array_equal(got, np.stack(expected, axis=1))
            piece.ratio = oracle.trust_ratio(family, launch.groups[piece.group], *expected)
            tile += expected[0].size
        np.testing.assert_array_equal(launch.trust(), [piece.ratio for piece in launch.pieces])
        launch.expect(np.float32(0.25))
        launch.step(control)
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
