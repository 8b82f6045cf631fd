"""Optimizer steps as functions: what an optimizer of the same rule does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewbits import functional as F
from fewbits import optim

STEPS = 4
LR, EPS, DECAY = 0.05, 1e-8, 0.1

# Name, the class with the same rule, and what both are told.
RULES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "adam": (optim.AdamW, {"betas": (0.9, 0.99), "eps": EPS}, {"beta1": 0.9, "beta2": 0.99, "eps": EPS}),
    "momentum": (optim.SGD, {"momentum": 0.9}, {"beta1": 0.9, "eps": 0.0}),
    "rmsprop": (optim.RMSprop, {"alpha": 0.95, "eps": EPS}, {"beta1": 0.95, "eps": EPS}),
    "lion": (optim.Lion, {"betas": (0.9, 0.99)}, {"beta1": 0.9, "beta2": 0.99, "eps": 0.0}),
    "adagrad": (optim.Adagrad, {"eps": 1e-10}, {"beta1": 0.0, "eps": 1e-10}),
    "ademamix": (
        optim.AdEMAMix,
        {"betas": (0.9, 0.99, 0.999), "alpha": 3.0, "eps": EPS},
        {"beta1": 0.9, "beta2": 0.99, "beta3": 0.999, "alpha": 3.0, "eps": EPS},
    ),
    "lamb": (
        optim.LAMB,
        {"betas": (0.9, 0.99), "eps": EPS, "max_unorm": 0.5},
        {"beta1": 0.9, "beta2": 0.99, "eps": EPS, "max_unorm": 0.5},
    ),
    "lars": (optim.LARS, {"momentum": 0.9, "max_unorm": 0.02}, {"beta1": 0.9, "eps": 0.0, "max_unorm": 0.02}),
}
TWO_STATES = ("adam", "ademamix", "lamb")


def states_of(name: str, p: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    shape = (2, *p.shape) if name == "ademamix" else p.shape
    first = torch.zeros(shape, dtype=dtype, device=p.device)
    return first, torch.zeros(p.shape, dtype=dtype, device=p.device) if name in TWO_STATES else None


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_32bit_equals_the_optimizer(name: str, dtype: torch.dtype, device: torch.device) -> None:
    cls, given, told = RULES[name]
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(37, 11, generator=generator).to(device, dtype)
    p, q = start.clone(), torch.nn.Parameter(start.clone())
    optimizer = cls([q], lr=LR, weight_decay=DECAY, **given)
    state1, state2 = states_of(name, p, torch.float32)
    for step in range(1, STEPS + 1):
        g = torch.randn(37, 11, generator=generator).to(device, dtype)
        q.grad = g.clone()
        optimizer.step()
        kept = g.clone()
        F.optimizer_update_32bit(name, g, p, state1, step=step, lr=LR, state2=state2, weight_decay=DECAY, **told)
        assert torch.equal(g, kept)
        assert torch.equal(p, q.detach())
    assert torch.equal(state1.flatten(), optimizer.state[q]["state1"].flatten())


@pytest.mark.parametrize("name", ["adam", "momentum", "rmsprop", "lion", "adagrad", "ademamix"])
def test_8bit_equals_the_optimizer(name: str, device: torch.device) -> None:
    cls, given, told = RULES[name]
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(4099, generator=generator).to(device)
    p, q = start.clone(), torch.nn.Parameter(start.clone())
    optimizer = cls([q], lr=LR, weight_decay=DECAY, optim_bits=8, **given)
    state1, state2 = states_of(name, p, torch.uint8)
    maxima = [torch.zeros(2, 17) if name == "ademamix" else torch.zeros(17), torch.zeros(17)]
    maxima = [m.to(device) for m in maxima]
    maps = [F.create_dynamic_map(signed).to(device) for signed in (True, False)]
    told = {"beta2": 0.0, "beta3": 0.0, "alpha": 0.0, **told}
    for step in range(1, STEPS + 1):
        g = torch.randn(4099, generator=generator).to(device)
        q.grad = g.clone()
        optimizer.step()
        F.optimizer_update_8bit_blockwise(
            name,
            g,
            p,
            state1,
            state2,
            step=step,
            lr=LR,
            qmap1=maps[0],
            qmap2=maps[1],
            absmax1=maxima[0],
            absmax2=maxima[1],
            weight_decay=DECAY,
            **told,
        )
    assert torch.equal(p, q.detach())
    assert torch.equal(state1.flatten(), optimizer.state[q]["state1"].flatten())
    assert torch.equal(maxima[0], optimizer.state[q]["absmax1"].view(maxima[0].shape))


def test_gradient_scale_and_layouts(device: torch.device) -> None:
    start, g = torch.randn(8, 6, device=device), torch.randn(8, 6, device=device)
    plain, scaled, strided = start.clone(), start.clone(), start.t().contiguous().t()
    for p, gradient, scale in ((plain, g, 1.0), (scaled, 4 * g, 0.25), (strided, g.t().contiguous().t(), 1.0)):
        m = torch.zeros(8, 6, device=device)
        F.optimizer_update_32bit("momentum", gradient, p, m, 0.9, 0.0, 1, 0.5, gnorm_scale=scale)
        assert torch.equal(p, plain)
    assert not torch.equal(plain, start)


def test_without_a_trust_coefficient(device: torch.device) -> None:
    for name, other in (("lamb", "adam"), ("lars", "momentum")):
        results = []
        for rule in (name, other):
            p, g = torch.ones(5, device=device), torch.ones(5, device=device)
            state1, state2 = torch.zeros(5, device=device), torch.zeros(5, device=device)
            F.optimizer_update_32bit(rule, g, p, state1, 0.9, 1e-8, 1, 0.1, state2=state2, beta2=0.9)
            results.append(p)
        assert torch.equal(*results)


BAD = {
    "optimizer_name": {"optimizer_name": "adamw"},
    "step": {"step": 0},
    "lr": {"lr": -1.0},
    "eps": {"eps": float("nan")},
    "betas": {"beta1": 1.0},
    "skip_zeros": {"skip_zeros": True},
    "gnorm_scale": {"gnorm_scale": float("inf")},
    "max_unorm": {"max_unorm": 0.1},
    "states\\['state2'\\]": {"state2": None},
    "states\\['state1'\\]": {"state1": torch.zeros(4)},
    "state1: expected 32-bit": {
        "state1": torch.zeros(5, dtype=torch.uint8),
        "state2": torch.zeros(5, dtype=torch.uint8),
    },
    "gradient": {"g": torch.ones(4)},
    "float64": {"p": torch.ones(5, dtype=torch.float64)},
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_changes_nothing(what: str) -> None:
    arguments: dict[str, Any] = {
        **{"optimizer_name": "adam", "g": torch.ones(5), "p": torch.ones(5), "state1": torch.zeros(5), "beta1": 0.9},
        **{"eps": 1e-8, "step": 1, "lr": 0.1, "state2": torch.zeros(5), "beta2": 0.9, **BAD[what]},
    }
    with pytest.raises((TypeError, ValueError), match="absmax" if "32-bit" in what else what):
        F.optimizer_update_32bit(**arguments)
    assert bool((arguments["p"] == 1).all())
    assert not arguments["state1"].any()


def test_another_map_is_refused() -> None:
    p, g, codes, absmax = torch.ones(256), torch.ones(256), torch.zeros(256, dtype=torch.uint8), torch.zeros(1)
    rest = (codes, None, 0.9, 0.0, 0.0, 0.0, 0.0, 1, 0.5)
    for _ in range(2):
        with pytest.raises(ValueError, match="qmap1"):
            F.optimizer_update_8bit_blockwise("momentum", g, p, *rest, F.create_linear_map(), None, absmax, None)
    with pytest.raises(ValueError, match="optimizer_name"):
        F.optimizer_update_8bit_blockwise("lamb", g, p, *rest, F.create_dynamic_map(), None, absmax, None)
    assert bool((p == 1).all())
    F.optimizer_update_8bit_blockwise("momentum", g, p, *rest, F.create_dynamic_map(), None, absmax, None)
    assert bool((p == 0.5).all())


def test_an_empty_tensor() -> None:
    p = torch.empty(0)
    F.optimizer_update_32bit("momentum", torch.empty(0), p, torch.empty(0), 0.9, 0.0, 1, 0.1)


@pytest.mark.parametrize("schedule", [None, 6])
def test_the_reference_in_plain_torch(schedule: int | None) -> None:
    from fewbits.optim._reference import _ReferenceAdEMAMix

    torch.manual_seed(0)
    p, q = (torch.nn.Parameter(torch.ones(300) * 0.1) for _ in range(2))
    ours = optim.AdEMAMix([p], t_alpha=schedule, t_beta3=schedule)
    reference = _ReferenceAdEMAMix([q], t_alpha=schedule, t_beta3=schedule)
    for _ in range(8):
        p.grad = torch.randn(300)
        q.grad = p.grad.clone()
        ours.step()
        assert reference.step(lambda: 2.0) == 2.0
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.state[p]["state1"], reference.state[q]["m1_m2"], rtol=1e-5, atol=1e-6)
