"""32-bit optimizers against torch.optim, and against the papers where torch has none, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fewbits.optim
from optimizers import give_gradients, normal, parameters

STEPS = 100
TOLERANCE = 1e-5  # of each tensor's largest magnitude
SHAPES = [(64, 80), (33,), (7, 5, 3), ()]

CASES: dict[str, tuple[str, dict[str, Any], type[torch.optim.Optimizer], dict[str, Any]]] = {
    "Adam": ("Adam", {}, torch.optim.Adam, {}),
    "Adam decay": ("Adam", {"weight_decay": 0.1, "lr": 0.01}, torch.optim.Adam, {"weight_decay": 0.1, "lr": 0.01}),
    "Adam amsgrad": ("Adam32bit", {"amsgrad": True}, torch.optim.Adam, {"amsgrad": True}),
    "AdamW": ("AdamW", {}, torch.optim.AdamW, {}),
    "AdamW betas": (
        "AdamW",
        {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3, "amsgrad": True},
        torch.optim.AdamW,
        {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3, "amsgrad": True},
    ),
    "SGD": ("SGD", {"lr": 0.01}, torch.optim.SGD, {"lr": 0.01}),
    "SGD momentum": (
        "SGD",
        {"lr": 0.01, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    ),
    "SGD nesterov": (
        "SGD32bit",
        {"lr": 0.01, "momentum": 0.9, "nesterov": True},
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9, "nesterov": True},
    ),
    "RMSprop": ("RMSprop", {"weight_decay": 0.1}, torch.optim.RMSprop, {"weight_decay": 0.1}),
    "RMSprop momentum": ("RMSprop", {"momentum": 0.9}, torch.optim.RMSprop, {"momentum": 0.9}),
    "RMSprop centered": (
        "RMSprop",
        {"centered": True, "momentum": 0.5, "alpha": 0.9},
        torch.optim.RMSprop,
        {"centered": True, "momentum": 0.5, "alpha": 0.9},
    ),
    "Adagrad": ("Adagrad", {}, torch.optim.Adagrad, {}),
    "Adagrad all": (
        "Adagrad",
        {"lr": 0.1, "lr_decay": 0.05, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-6},
        torch.optim.Adagrad,
        {"lr": 0.1, "lr_decay": 0.05, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-6},
    ),
}


def assert_close(params: list[torch.nn.Parameter], expected: list[torch.Tensor]) -> None:
    __tracebackhide__ = True
    for p, reference in zip(params, expected, strict=True):
        error = (p.detach().cpu().double() - reference.detach()).abs().max()
        assert error <= TOLERANCE * reference.detach().abs().max(), f"{error:.3g} in shape {tuple(p.shape)}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_against_torch(case: str, gradient: torch.dtype, device: torch.device) -> None:
    name, kwargs, reference_type, reference_kwargs = CASES[case]
    params = parameters(SHAPES, device)
    reference = [p.detach().cpu().double().requires_grad_() for p in params]
    ours = getattr(fewbits.optim, name)(params, **kwargs)
    theirs = reference_type(reference, **reference_kwargs)
    for t in range(STEPS):
        give_gradients(params, t, gradient)
        for p, other in zip(params, reference, strict=True):
            other.grad = p.grad.cpu().double()
        ours.step()
        theirs.step()
    assert_close(params, reference)


# ---- rules that torch does not have, as published ------------------------------------------------------------------

Rule = Callable[[torch.Tensor, torch.Tensor, dict[str, Any], int], torch.Tensor]


def lion(p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], t: int) -> torch.Tensor:
    m = state.setdefault("m", torch.zeros_like(p))
    p = p * (1 - 1e-3 * 0.1)
    p = p - 1e-3 * torch.sign(0.9 * m + 0.1 * g)
    state["m"] = 0.99 * m + 0.01 * g
    return p


def ademamix(p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], t: int) -> torch.Tensor:
    beta1, beta2, beta3, alpha, horizon = 0.9, 0.999, 0.9999, 5.0, 80
    low, high = math.log(beta1), math.log(beta3)
    share = min(1.0, t / horizon)
    slow = math.exp(low * high / ((1 - share) * high + share * low))
    m1, m2, v = (state.setdefault(key, torch.zeros_like(p)) for key in ("m1", "m2", "v"))
    state["m1"] = m1 = beta1 * m1 + (1 - beta1) * g
    state["m2"] = m2 = slow * m2 + (1 - slow) * g
    state["v"] = v = beta2 * v + (1 - beta2) * g**2
    update = (m1 / (1 - beta1**t) + alpha * share * m2) / (torch.sqrt(v / (1 - beta2**t)) + 1e-8)
    return p - 1e-3 * (update + 0.01 * p)


def lamb(p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], t: int) -> torch.Tensor:
    m, v = (state.setdefault(key, torch.zeros_like(p)) for key in ("m", "v"))
    state["m"] = m = 0.9 * m + 0.1 * g
    state["v"] = v = 0.999 * v + 0.001 * g**2
    r = (m / (1 - 0.9**t)) / (torch.sqrt(v / (1 - 0.999**t)) + 1e-8) + 0.1 * p
    ratio = p.norm() / r.norm() if p.norm() and r.norm() else 1.0
    return p - 1e-2 * ratio * r


def lars(p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], t: int) -> torch.Tensor:
    norms = p.norm(), g.norm()
    ratio = 0.02 * norms[0] / (norms[1] + 0.1 * norms[0]) if all(norms) else 1.0
    b = state["b"] = 0.9 * state.get("b", torch.zeros_like(p)) + ratio * (g + 0.1 * p)
    return p - 0.1 * b


PUBLISHED: dict[str, tuple[dict[str, Any], Rule]] = {
    "Lion": ({"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.99)}, lion),
    "AdEMAMix": ({"t_alpha": 80, "t_beta3": 80}, ademamix),
    "LAMB": ({"lr": 1e-2, "weight_decay": 0.1}, lamb),
    "LARS": ({"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, lars),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_against_papers(name: str, device: torch.device) -> None:
    kwargs, rule = PUBLISHED[name]
    params = parameters(SHAPES, device)
    with torch.no_grad():
        params[1].zero_()  # a norm of 0 at first
    reference = [p.detach().cpu().double() for p in params]
    states: list[dict[str, Any]] = [{} for _ in params]
    ours = getattr(fewbits.optim, name)(params, **kwargs)
    for t in range(1, STEPS + 1):
        give_gradients(params, t)
        reference = [rule(p, q.grad.cpu().double(), s, t) for p, q, s in zip(reference, params, states, strict=True)]
        ours.step()
    assert_close(params, reference)


def test_lamb_without_correction_and_with_l2(device: torch.device) -> None:
    (p,) = parameters([(64, 80)], device)
    q = p.detach().cpu().double()
    ours = fewbits.optim.LAMB([p], lr=0.01, weight_decay=0.1, bias_correction=False, adam_w_mode=False, max_unorm=2.0)
    m, v = torch.zeros_like(q), torch.zeros_like(q)
    for t in range(5):
        give_gradients([p], t)
        g = p.grad.cpu().double() + 0.1 * q
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        r = m / (v.sqrt() + 1e-8)
        q = q - 0.01 * 2.0 * q.norm() / r.norm() * r
        ours.step()
    assert_close([p], [q])


# ---- clipping, skipping, rounding ----------------------------------------------------------------------------------


def test_max_grad_norm_is_that_of_torch(device: torch.device) -> None:
    ours, theirs = parameters(SHAPES, device), parameters(SHAPES, "cpu")
    theirs = [p.detach().double().requires_grad_() for p in theirs]
    clipped = fewbits.optim.AdamW(ours, max_grad_norm=1.0, lr=0.01)
    plain = torch.optim.AdamW(theirs, lr=0.01)
    for t in range(20):
        give_gradients(ours, t, scale=0.001 if t % 3 == 0 else 10.0)
        before = [p.grad.clone() for p in ours]
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.cpu().double()
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        clipped.step()
        plain.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, before, strict=True))
    assert_close(ours, theirs)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("bits", [8, 32])
def test_nonfinite_gradients_skip_the_step(bad: float, bits: int, device: torch.device) -> None:
    params = parameters([(64, 80), (5000,)], device)
    optimizer = fewbits.optim.AdamW(params, optim_bits=bits, skip_nonfinite=True)
    give_gradients(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    state = optimizer.state_dict()["state"]
    states = {i: {k: v.clone() for k, v in s["__bnb_optimizer_quant_state__"].items()} for i, s in state.items()}
    give_gradients(params, 1)
    params[1].grad[17] = bad
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    for i, after in optimizer.state_dict()["state"].items():
        assert after["step"] == 1
        for key, tensor in after["__bnb_optimizer_quant_state__"].items():
            assert torch.equal(tensor, states[i][key])
    give_gradients(params, 2)
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 2
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_stochastic_rounding_is_right_on_average(device: torch.device) -> None:
    # One step of 2**-12 of the spacing of bfloat16 at 1: to the nearest, nothing would ever move.
    n = 1 << 18
    step = 2.0**-8 / 16
    moved = []
    for seed in (0, 1):
        p = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device=device))
        optimizer = fewbits.optim.SGD([p], lr=1.0, stochastic_rounding=True, seed=seed)
        p.grad = torch.full_like(p, step)
        optimizer.step()
        moved.append(p.detach().clone())
        share = (p.double() < 1).double().mean().item()  # below 1 the spacing is 2**-8
        assert abs(share - 1 / 16) < 4 * math.sqrt(1 / 16 * 15 / 16 / n)
    assert not torch.equal(*moved)
    p = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device=device))
    p.grad = torch.full_like(p, step)
    fewbits.optim.SGD([p], lr=1.0).step()
    assert (p == 1).all()


def test_stochastic_rounding_follows_float32(device: torch.device) -> None:
    """Updates of 1e-4 of the weights: lost to the nearest, followed at random."""
    start = normal((20_000,), 1).abs().add(0.5).to(device)
    exact = torch.nn.Parameter(start.clone())
    random = torch.nn.Parameter(start.bfloat16())
    nearest = torch.nn.Parameter(start.bfloat16())
    optimizers = [
        fewbits.optim.SGD([exact], lr=1.0),
        fewbits.optim.SGD([random], lr=1.0, stochastic_rounding=True),
        fewbits.optim.SGD([nearest], lr=1.0),
    ]
    for _ in range(200):
        for p in (exact, random, nearest):
            p.grad = (start * 1e-4).to(p.dtype)
        for optimizer in optimizers:
            optimizer.step()
    change = (exact - start).mean()
    assert abs((random.float() - exact).mean() / change) < 0.02
    assert abs((nearest.float() - exact).mean() / change) > 0.5
