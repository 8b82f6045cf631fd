"""8-bit optimizers: the oracle's bytes, the published error of an update, and a language model that learns as well."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

import fewbits.functional as F
import fewbits.optim
import oracle_optim as oracle
from arrays import DTYPES, as_numpy, assert_same_bits, dtype_name
from fewbits._backend import is_portable
from language_model import train
from optimizers import FAMILIES, PAGED_NAMES, family_of, give_gradients, make, parameters
from oracle_optim import BIAS_CORRECTION, DECOUPLED, NESTEROV, Group, State8
from tolerances import LOSS_RATIO, PUBLISHED_UPDATE_ERROR, UPDATE_ERROR_SLACK

# Optimizer -> its arguments, and the same for the oracle.
CASES: dict[str, tuple[dict[str, Any], str, Group]] = {
    "Adam8bit": ({"weight_decay": 0.1}, "adam", Group(weight_decay=0.1)),
    "AdamW8bit": ({}, "adam", Group(weight_decay=0.01, flags=DECOUPLED)),
    "AdEMAMix8bit": (
        {"t_alpha": 4, "t_beta3": 4},
        "ademamix",
        Group(weight_decay=0.01, t_alpha=4, t_beta3=4, flags=DECOUPLED),
    ),
    "Lion8bit": (
        {"weight_decay": 0.1},
        "lion",
        Group(lr=1e-4, beta2=0.99, weight_decay=0.1, eps=0.0, flags=DECOUPLED),
    ),
    "SGD8bit": (
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        "sgd",
        Group(lr=0.1, beta2=0.0, eps=0.0, flags=NESTEROV),
    ),
    "RMSprop8bit": ({"weight_decay": 0.1}, "rmsprop", Group(lr=0.01, beta1=0.99, beta2=0.0, weight_decay=0.1)),
    "Adagrad8bit": (
        {"lr_decay": 0.1, "initial_accumulator_value": 0.25},
        "adagrad",
        Group(lr=0.01, eps=1e-10, lr_decay=0.1),
    ),
    "LAMB8bit": ({"weight_decay": 0.1}, "lamb", Group(weight_decay=0.1, flags=DECOUPLED | BIAS_CORRECTION)),
    "LARS8bit": (
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1},
        "lars",
        Group(lr=0.1, weight_decay=0.1, dampening=0.2, trust=0.02),
    ),
}
SHAPES = [(64, 80), (5001,), (17, 256)]


def fresh_states(family: str, group: Group, n: int, begin: float) -> list[State8]:
    """Zeros, or for Adagrad what its sum begins with."""
    blocks = -(-n // oracle.BLOCK)
    maps = oracle.state_maps(family, group)
    states = [State8(np.zeros(n, np.uint8), np.zeros(blocks, np.float32), table) for table in maps]
    if begin:
        states[0] = State8(np.full(n, 255, np.uint8), np.full(blocks, begin, np.float32), maps[0])
    return states


def ratio_of(family: str, group: Group, t: int, p: np.ndarray, g: np.ndarray, states: list[State8]) -> np.float32:
    if family not in ("lamb", "lars"):
        return oracle.ONE
    sums = oracle.trust_sums(family, group, t, p, g, states, None)
    return oracle.trust_ratio(family, group, *sums)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_bytes_of_the_oracle(name: str, dtype: torch.dtype, device: torch.device) -> None:
    kwargs, family, group = CASES[name]
    params = parameters(SHAPES, device, dtype)
    optimizer = getattr(fewbits.optim, name)(params, **kwargs)
    begin = kwargs.get("initial_accumulator_value", 0.0)
    expected = [(as_numpy(p).copy(), fresh_states(family, group, p.numel(), begin)) for p in params]
    for t in range(1, 6):
        give_gradients(params, t)
        for i, (p, (before, states)) in enumerate(zip(params, expected, strict=True)):
            g = as_numpy(p.grad)
            ratio = ratio_of(family, group, t, before, g, states)
            expected[i] = oracle.step(family, group, t, before, g, states, ratio=ratio)
        optimizer.step()
    for i, (p, (values, states)) in enumerate(zip(params, expected, strict=True)):
        assert_same_bits(p, values, f"parameter {i}")
        mine = optimizer.state[p]
        joined = [states[:2], states[2:]] if family == "ademamix" else [[state] for state in states]
        for number, parts in enumerate(joined, 1):
            codes = np.concatenate([part.codes for part in parts])
            absmax = np.concatenate([part.absmax for part in parts])
            assert_same_bits(mine[f"state{number}"], codes, f"codes {number} of parameter {i}")
            assert_same_bits(mine[f"absmax{number}"], absmax, f"maxima {number} of parameter {i}")


@pytest.mark.parametrize("gradient", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_another_dtype(name: str, gradient: torch.dtype, device: torch.device) -> None:
    kwargs, _, _ = CASES[name]
    (p,), (q,) = parameters([(64, 80)], device, torch.bfloat16), parameters([(64, 80)], device, torch.bfloat16)
    ours, same = (getattr(fewbits.optim, name)([x], **kwargs) for x in (p, q))
    for t in range(3):
        give_gradients([p], t, gradient)
        give_gradients([q], t, torch.float32)
        q.grad = p.grad.float()
        ours.step()
        same.step()
    assert_same_bits(p, q, "parameter")


@functools.cache
def loss_and_optimizer(name: str, device: torch.device) -> tuple[float, torch.optim.Optimizer]:
    return train(lambda params: make(name, params, **LEARNING[family_of(name)]), 100, device)


# Rates at which a hundred steps teach something.
LEARNING: dict[str, dict[str, Any]] = {
    "Adam": {"lr": 2e-3},
    "AdamW": {"lr": 2e-3},
    "AdEMAMix": {"lr": 2e-3, "alpha": 2.0, "t_alpha": 100, "t_beta3": 100, "betas": (0.9, 0.999, 0.99)},
    "Lion": {"lr": 1e-3},
    "SGD": {"lr": 0.1},
    "RMSprop": {"lr": 1e-3},
    "Adagrad": {"lr": 0.02},
    "LAMB": {"lr": 0.01},
    "LARS": {"lr": 0.5},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_learns_as_well(family: str, device: torch.device) -> None:
    narrow, optimizer = loss_and_optimizer(f"{family}8bit", device)
    wide, _ = loss_and_optimizer(f"{family}32bit", device)
    assert optimizer.memory_report()["tensors_8bit"] == 2
    assert wide < 3.5  # it did learn: a uniform guess is 4.6
    assert abs(narrow / wide - 1) < LOSS_RATIO


def test_published_error_of_an_update() -> None:
    _, optimizer = loss_and_optimizer("Adam32bit", torch.device("cpu"))
    errors: dict[str, list[torch.Tensor]] = {"dynamic": [], "linear": []}
    maps = {"dynamic": F.create_dynamic_map, "linear": F.create_linear_map}
    for state in optimizer.state.values():
        m, v = state["state1"], state["state2"]
        if m.numel() < 4096:
            continue
        exact = update(m, v)
        for kind, table in maps.items():
            narrow = update(through_8_bits(m, table(signed=True)), through_8_bits(v, table(signed=False)))
            known = exact.abs() > 1e-12  # characters that never came have no update
            errors[kind].append(((narrow - exact).abs() / exact.abs())[known])
    mean = {kind: torch.cat(parts).mean().item() for kind, parts in errors.items()}
    assert abs(mean["dynamic"] - PUBLISHED_UPDATE_ERROR["dynamic"]) < UPDATE_ERROR_SLACK
    assert mean["linear"] > PUBLISHED_UPDATE_ERROR["linear"]


def update(m: torch.Tensor, v: torch.Tensor, t: int = 100) -> torch.Tensor:
    return m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


def through_8_bits(x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    return F.dequantize_blockwise(*F.quantize_blockwise(x, code=code, blocksize=256))


def test_small_tensors_keep_32_bits(device: torch.device) -> None:
    params = parameters([(4095,), (4096,)], device)
    optimizer = fewbits.optim.AdamW8bit(params)
    give_gradients(params, 0)
    optimizer.step()
    assert [optimizer.state[p]["state1"].dtype for p in params] == [torch.float32, torch.uint8]
    optimizer = fewbits.optim.AdamW8bit(params, min_8bit_size=1)
    optimizer.step()
    assert all(optimizer.state[p]["state1"].dtype == torch.uint8 for p in params)


@pytest.mark.parametrize("name", PAGED_NAMES)
def test_paged_is_the_same(name: str, device: torch.device) -> None:
    """Wherever its states are: chunks are cut at tiles, and nothing else is different."""
    shapes = [(300, 700), (64, 80), (100_000,)]
    results = []
    pages = device.type == "cuda" and not is_portable(device)
    budgets = [None, 1.0, 0.5, 0] if pages else [0]
    for budget in ["unpaged", *budgets]:
        params = parameters(shapes, device, torch.bfloat16)
        if budget == "unpaged":
            optimizer = make(name.removeprefix("Paged"), params, max_grad_norm=1.0)
        else:
            optimizer = make(name, params, max_grad_norm=1.0, page_budget=budget)
        for t in range(3):
            give_gradients(params, t)
            if not pages and budget != "unpaged" and t == 0:
                with pytest.warns(UserWarning, match="paged"):
                    optimizer.step()
            else:
                optimizer.step()
        if pages and budget == 0:
            assert optimizer.memory_report()["in_host_memory"] > 0
        results.append((params, optimizer.state_dict()["state"]))
    for params, states in results[1:]:
        for i, (p, q) in enumerate(zip(results[0][0], params, strict=True)):
            assert_same_bits(p, q, f"parameter {i}")
            for key, tensor in results[0][1][i]["__bnb_optimizer_quant_state__"].items():
                other = states[i]["__bnb_optimizer_quant_state__"][key]
                assert_same_bits(tensor, other, f"{key} of parameter {i}")
