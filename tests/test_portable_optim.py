"""Optimizer steps of the portable backend: native code's bytes, in parameters and states."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewbits.optim
import oracle_optim as oracle
from arrays import DTYPES, as_numpy, assert_same_bits, dtype_name
from fewbits import _backend
from fewbits.portable import numbers, optim_norms
from fewbits.portable.optim_coefficients import Moment
from fewbits.portable.optim_random import halves
from optimizers import ALL, NAMES, PAGED_NAMES, give_gradients, make, normal, parameters
from portable_mode import SMALL_PIECE, portable
from strategies import fill, flat_tensors, seeds

pytestmark = pytest.mark.skipif(_backend.FORCED != "", reason="compares with native code")
# Under min_8bit_size, over a small piece and a tile, with and without tails.
SHAPES = [(3,), (64, 80), (5001,), (2, SMALL_PIECE), (0,)]


def run(
    name: str, dtype: torch.dtype = torch.float32, steps: int = 3, grads: torch.dtype | None = None, **kwargs: Any
) -> list[torch.Tensor]:
    """Return parameters and states after some steps."""
    params = parameters(SHAPES, "cpu", dtype)
    optimizer = make(name, params, **kwargs)
    for t in range(steps):
        give_gradients(params, t, grads, scale=10.0 ** (t - 2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing is paged on the CPU
            optimizer.step()
    return tensors_of(params, optimizer)


def tensors_of(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    keys = ("step", "state1", "state2", "state3", "absmax1", "absmax2")
    found = []
    for p in params:
        state = optimizer.state[p]
        found += [p.detach(), *(state[key] for key in keys if key in state)]
    return found


def assert_same(name: str, *args: Any, **kwargs: Any) -> None:
    __tracebackhide__ = True
    native = run(name, *args, **kwargs)
    with portable(SMALL_PIECE):
        mine = run(name, *args, **kwargs)
    for i, (expected, got) in enumerate(zip(native, mine, strict=True)):
        if expected.dtype == torch.int64:
            assert expected.item() == got.item()
        else:
            assert_same_bits(got, expected, f"{name}: tensor {i}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_name(name: str, dtype: torch.dtype) -> None:
    assert_same(name, dtype, weight_decay=0.1)


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("Adam8bit", {"betas": (0.0, 0.9), "eps": 0.0}),
    ("AdEMAMix8bit", {"t_alpha": 4, "t_beta3": 4, "betas": (0.0, 0.999, 0.9999)}),
    ("AdEMAMix", {"t_alpha": 2, "t_beta3": 5, "alpha": 3.0}),
    ("SGD8bit", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.0}),
    ("RMSprop", {"momentum": 0.5, "centered": True}),
    ("RMSprop", {"momentum": 0.0, "centered": True, "eps": 1e-3}),
    ("Adagrad8bit", {"lr_decay": 0.1, "initial_accumulator_value": 0.25}),
    ("LAMB", {"bias_correction": False, "adam_w_mode": False, "weight_decay": 0.1}),
    ("LARS8bit", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("LARS", {"lr": 0.1, "momentum": 0.0}),
]


@pytest.mark.parametrize(("name", "kwargs"), VARIANTS, ids=[name for name, _ in VARIANTS])
def test_every_choice(name: str, kwargs: dict[str, Any]) -> None:
    assert_same(name, **kwargs)


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion", "LAMB8bit"])
def test_common_arguments(name: str) -> None:
    """Clipping, leaving steps out, stochastic rounding, gradients of another dtype."""
    common = {"max_grad_norm": 0.5, "skip_nonfinite": True, "stochastic_rounding": True, "seed": 2**63 + 11}
    assert_same(name, torch.bfloat16, 4, **common)
    assert_same(name, torch.bfloat16, 2, torch.float32, **common)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_left_out(value: float) -> None:
    p = torch.nn.Parameter(torch.ones(5000))
    with portable():
        optimizer = fewbits.optim.AdamW8bit([p], skip_nonfinite=True)
        for bad in (False, True):
            p.grad = torch.ones(5000)
            if bad:
                p.grad[4321] = value
            optimizer.step()
        assert optimizer.state[p]["step"].item() == 1
        assert bool((p == p[0]).all())


def test_gradient_scaler() -> None:
    """A scale is taken out, and a step that it found infinite is left out."""

    def scaled() -> list[torch.Tensor]:
        params = parameters([(5000,)], "cpu")
        optimizer: Any = fewbits.optim.Adam8bit(params)
        for t, (scale, found) in enumerate([(1024.0, 0.0), (512.0, 1.0), (3.0, 0.0)]):
            give_gradients(params, t)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(found)
            optimizer.step()
        return [params[0].detach(), optimizer.state[params[0]]["state1"], optimizer.state[params[0]]["absmax2"]]

    native = scaled()
    with portable():
        mine = scaled()
    for expected, got in zip(native, mine, strict=True):
        assert_same_bits(got, expected, "scaled")


def test_parameters_with_gaps_and_learning_rates_that_are_tensors() -> None:
    def train() -> list[torch.Tensor]:
        p = torch.nn.Parameter(normal((80, 64), 1).t())
        lr = torch.tensor(0.01)
        optimizer = fewbits.optim.AdamW([p], lr=lr)
        for t in range(3):
            p.grad = normal((80, 64), t + 2).t()
            optimizer.step()
            lr.mul_(0.5)
        return [p.detach(), optimizer.state[p]["state1"]]

    native = train()
    with portable():
        mine = train()
    for expected, got in zip(native, mine, strict=True):
        assert_same_bits(got, expected, "with gaps")


@pytest.mark.parametrize("name", PAGED_NAMES)
def test_nothing_is_paged(name: str) -> None:
    p = torch.nn.Parameter(torch.ones(200_000))
    with portable():
        optimizer: Any = make(name, [p])
        p.grad = torch.ones(200_000)
        with pytest.warns(UserWarning, match="the CPU keep their states there: nothing is paged"):
            optimizer.step()
    assert optimizer.memory_report()["in_host_memory"] == 0


def test_a_checkpoint_goes_on_over_there() -> None:
    """Saved by one backend, resumed by the other, as if nothing had happened."""
    params = parameters(SHAPES, "cpu")
    optimizer = make("AdamW8bit", params)
    for t in range(4):
        give_gradients(params, t, scale=10.0 ** (t - 2))
        if t < 2:
            optimizer.step()
            continue
        with portable():
            saved = optimizer.state_dict()
            optimizer = make("AdamW8bit", params)
            optimizer.load_state_dict(saved)
            optimizer.step()
    for i, (got, expected) in enumerate(zip(tensors_of(params, optimizer), run("AdamW8bit", steps=4), strict=True)):
        assert torch.equal(got, expected), i


# ---- parts that have a definition of their own ---------------------------------------------------------------------


@given(x=flat_tensors(256))
@pytest.mark.parametrize("has_float64", [True, False])
def test_tile_sums(x: torch.Tensor, has_float64: bool) -> None:
    """A device without float64 has its sums on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(numbers._has_float64, torch.device("cpu"), has_float64)
        got = optim_norms.tile_sums(x.float())
    expected = oracle.tile_sums(as_numpy(x.float()))
    np.testing.assert_array_equal(got.numpy(), expected)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(optim_norms.total(got), oracle.total(expected))


@pytest.mark.parametrize("recipe", ["normal", "subnormal", "huge", "infinite", "wide", "few units"])
def test_square_roots(recipe: str) -> None:
    x = fill([recipe], 20_000, 4096, torch.float32, 3).abs()
    assert_same_bits(numbers.square_root(x), np.sqrt(as_numpy(x)), recipe)


@given(
    first=st.sampled_from([0, 8, 4096, 2**35 - 4096, 2**35, 2**40 + 64]),
    count=st.integers(0, 100),
    t=st.sampled_from([1, 2**31, 2**32 - 1, 2**32 + 5]),
    ordinal=st.integers(0, 2**32 - 1),
    seed=st.integers(0, 2**64 - 1),
)
def test_random_numbers(first: int, count: int, t: int, ordinal: int, seed: int) -> None:
    got = halves(first, count, t, ordinal, seed, torch.device("cpu"))
    expected = oracle.Random(seed, ordinal, first).halves(count, t)
    assert got.tolist() == expected.tolist()


@given(seed=seeds)
def test_coefficients_of_ademamix(seed: int) -> None:
    rng = np.random.default_rng(seed)
    beta1, beta3 = sorted(rng.uniform(0.001, 0.99999, 2))
    group = oracle.Group(beta1=beta1, beta3=beta3, t_alpha=rng.integers(1, 50), t_beta3=rng.integers(1, 50))
    moment = Moment(vars(group), int(rng.integers(1, 100)))
    assert moment.slow_decay() == pytest.approx(oracle.slow_decay(group, moment.t), rel=1e-14)
    assert moment.slow_weight() == oracle.f32(oracle.slow_weight(group, moment.t))


@pytest.mark.parametrize("name", ALL)
def test_wrong_calls_are_the_same(name: str) -> None:
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4).to_sparse()
    with portable():
        optimizer = make(name, [p])
        with pytest.raises(ValueError, match="sparse is not supported"):
            optimizer.step()
