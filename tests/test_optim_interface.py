"""Constructors, attributes, and what is refused."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

import fewbits.optim
from fewbits.optim import GlobalOptimManager
from optimizers import ALL, FAMILIES, NAMES, PAGED_NAMES, family_of, give_gradients, make, parameters

pytestmark = pytest.mark.filterwarnings("ignore:.*nothing is paged")
SHAPES = [(64, 80), (33,), (5000,)]

_LR3, _ADAM = {"lr": 1e-3}, {"betas": (0.9, 0.999), "eps": 1e-8}
_TAIL = {"args": None, "min_8bit_size": 4096}
_SGD: dict[str, Any] = {"lr": ..., "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False}
# Positional arguments after `params`, with their defaults, of each family's plain class; `...` is none. `optim_bits` is
# left out: see below.
SIGNATURES: dict[str, dict[str, Any]] = {
    "Adam": {**_LR3, **_ADAM, "weight_decay": 0, "amsgrad": False, **_TAIL, "is_paged": False},
    "AdamW": {**_LR3, **_ADAM, "weight_decay": 0.01, "amsgrad": False, **_TAIL, "is_paged": False},
    "AdEMAMix": {
        **{**_LR3, "betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "t_alpha": None, "t_beta3": None},
        **{"eps": 1e-8, "weight_decay": 0.01, "min_8bit_size": 4096, "is_paged": False},
    },
    "Lion": {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0, **_TAIL, "is_paged": False},
    "SGD": {**_SGD, **_TAIL},
    "RMSprop": {
        **{"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0, "momentum": 0, "centered": False, **_TAIL},
    },
    "Adagrad": {
        **{"lr": 1e-2, "lr_decay": 0, "weight_decay": 0, "initial_accumulator_value": 0, "eps": 1e-10, **_TAIL},
    },
    "LAMB": {
        **{**_LR3, "bias_correction": True, **_ADAM, "weight_decay": 0, "amsgrad": False, "adam_w_mode": True},
        **{**_TAIL, "max_unorm": 1.0},
    },
    "LARS": {**_SGD, **_TAIL, "max_unorm": 0.02},
}
WITH_BITS = ("Adam", "AdamW", "Adagrad")  # every class of these takes optim_bits


@pytest.mark.parametrize("name", ALL)
def test_signatures(name: str) -> None:
    expected = dict(SIGNATURES[family_of(name)])
    if (name.startswith("Paged") and not name.startswith("PagedAdam")) or name.startswith("PagedAdamW"):
        expected.pop("is_paged", None)
    if family_of(name) in WITH_BITS or not name.endswith("bit"):
        before = "args" if "args" in expected else "min_8bit_size"
        items = list(expected.items())
        items.insert(list(expected).index(before), ("optim_bits", 8 if name == "Adagrad8bit" else 32))
        expected = dict(items)
    found = inspect.signature(getattr(fewbits.optim, name)).parameters
    positional = {
        key: ... if p.default is p.empty else p.default
        for key, p in found.items()
        if p.kind is p.POSITIONAL_OR_KEYWORD and key != "params"
    }
    assert list(positional.items()) == list(expected.items())
    assert next(iter(found)) == "params"
    for option in ("stochastic_rounding", "seed", "max_grad_norm", "skip_nonfinite"):
        make(name, [torch.nn.Parameter(torch.ones(1))], **{option: None if option == "max_grad_norm" else 1})


def test_all_names() -> None:
    assert len(ALL) == 39
    extra = {"PytorchLARS", "GlobalOptimManager", "Optimizer8bit", "Optimizer1State", "Optimizer2State"}
    assert set(fewbits.optim.__all__) == {*ALL, *extra}
    code = "import fewbits; fewbits.optim.AdamW8bit; from fewbits.optim.optimizer import MockArgs, Optimizer2State"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ALL)
def test_attributes(name: str) -> None:
    optimizer = make(name, [torch.nn.Parameter(torch.ones(1))])
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer, fewbits.optim.Optimizer8bit)
    assert optimizer.args.optim_bits == (8 if name.endswith("8bit") else 32)
    assert optimizer.args.min_8bit_size == 4096
    assert optimizer.mng is GlobalOptimManager.get_instance()
    assert optimizer.is_paged is name.startswith("Paged")


@pytest.mark.parametrize("name", [name for name in ALL if not name.endswith("bit") or family_of(name) in WITH_BITS])
def test_optim_bits_is_obeyed(name: str, device: torch.device) -> None:
    for bits in (8, 32):
        if name.endswith("8bit") and bits == 32:
            continue  # the default, which is there for compatibility; `Adagrad8bit` refuses it
        params = parameters([(64, 80)], device)
        optimizer = make(name, params, optim_bits=bits)
        give_gradients(params, 0)
        optimizer.step()
        assert optimizer.state[params[0]]["state1"].dtype == (torch.uint8 if bits == 8 else torch.float32)
    with pytest.raises(ValueError, match="optim_bits: expected 8"):
        make(name, parameters([(64, 80)], device), optim_bits=4)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *((name, {"lr": -1.0}, "lr: expected") for name in FAMILIES),
    *((name, {"lr": float("nan")}, "lr: expected") for name in FAMILIES),
    *((name, {"weight_decay": -0.1}, "weight_decay: expected") for name in FAMILIES),
    ("Adam", {"eps": -1e-8}, "eps: expected"),
    ("Adam", {"betas": (0.9, 1.0)}, "betas: expected"),
    ("Adam", {"betas": "(0.9, x)"}, "betas: expected"),
    ("Adam", {"betas": (0.9,)}, "betas: expected 2"),
    ("AdEMAMix", {"betas": (0.9, 0.999)}, "betas: expected 3"),
    ("Adam8bit", {"amsgrad": True}, "amsgrad: expected False"),
    ("PagedAdamW8bit", {"amsgrad": True}, "amsgrad: expected False"),
    ("AdamW", {"amsgrad": True, "optim_bits": 8}, "amsgrad: expected False"),
    ("LAMB", {"amsgrad": True}, "amsgrad: expected False"),
    ("Adagrad8bit", {"optim_bits": 32}, "optim_bits: expected 8"),
    ("LAMB8bit", {"max_unorm": -1.0}, "max_unorm: expected a finite number of at least 0"),
    ("LARS", {"max_unorm": float("nan")}, "max_unorm: expected a finite number of at least 0"),
    ("SGD", {"nesterov": True, "momentum": 0.0}, "nesterov: expected"),
    ("LARS8bit", {"nesterov": True, "dampening": 0.1}, "nesterov: expected"),
    ("RMSprop8bit", {"centered": True}, "centered: expected False"),
    ("RMSprop8bit", {"momentum": 0.9}, "momentum: expected 0"),
    ("Adagrad", {"lr_decay": -1.0}, "lr_decay: expected"),
    ("Adagrad", {"initial_accumulator_value": -1.0}, "initial_accumulator_value: expected"),
    ("AdamW", {"max_grad_norm": 0.0}, "max_grad_norm: expected"),
    ("AdamW", {"page_budget": 10}, "page_budget: expected None"),
    ("PagedAdamW", {"page_budget": -1}, "page_budget: expected"),
    ("PagedAdamW", {"page_budget": 1.5}, "page_budget: expected"),
]


@pytest.mark.parametrize(("name", "kwargs", "message"), REFUSED)
def test_what_cannot_be_obeyed_is_refused(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, [torch.nn.Parameter(torch.ones(2))], **kwargs)


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="block_wise"):
        make("AdamW8bit", [torch.nn.Parameter(torch.ones(2))], block_wise=True)
    with pytest.raises(TypeError, match="seed"):
        make("AdamW8bit", [torch.nn.Parameter(torch.ones(2))], seed=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_changes_the_result(name: str) -> None:
    """Or is refused, which `test_what_cannot_be_obeyed_is_refused` shows."""
    changed: dict[str, Any] = {
        **{"lr": 0.5, "weight_decay": 0.7, "eps": 0.5, "alpha": 0.5, "momentum": 0.5, "dampening": 0.5},
        **{"nesterov": True, "centered": True, "amsgrad": True, "lr_decay": 0.5, "initial_accumulator_value": 0.5},
        **{"bias_correction": False, "adam_w_mode": False, "max_unorm": 0.5, "t_alpha": 9, "t_beta3": 9},
        **{"betas": (0.3, 0.4, 0.5), "min_8bit_size": 1 << 20},
    }
    base: dict[str, Any] = {"weight_decay": 0.1}

    def result(**kwargs: Any) -> torch.Tensor:
        params = parameters([(64, 80)], "cpu")
        optimizer = make(name, params, **{**base, **kwargs})
        for t in range(4):
            give_gradients(params, t, scale=0.2 if t % 2 else 3.0)
            optimizer.step()
        return params[0].detach()

    plain = result()
    for key in SIGNATURES[family_of(name)]:
        if key not in changed or (key == "min_8bit_size" and not name.endswith("8bit")):
            continue
        value = changed[key]
        if key == "betas" and family_of(name) != "AdEMAMix":
            value = value[:2]
        try:
            other = result(**{key: value})
        except ValueError as error:
            assert key in str(error)  # noqa: PT017
            continue
        assert not torch.equal(plain, other), key


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_bad_tensors_are_refused_before_anything_moves(device: torch.device) -> None:
    def check(bad: torch.nn.Parameter, message: str, error: type[Exception] = ValueError) -> None:
        good = parameters([(64, 80)], device)[0]
        optimizer = fewbits.optim.AdamW8bit([good])
        give_gradients([good], 0)
        optimizer.step()
        before = good.detach().clone()
        optimizer.param_groups[0]["params"].append(bad)
        give_gradients([good], 1)
        with pytest.raises(error, match=message):
            optimizer.step()
        assert torch.equal(good, before)
        assert int(optimizer.state[good]["step"]) == 1
        optimizer.param_groups[0]["params"].pop()
        optimizer.step()

    sparse = torch.nn.Embedding(10, 4, sparse=True).to(device)
    sparse(torch.tensor([1], device=device)).sum().backward()
    check(sparse.weight, "sparse")
    for dtype in (torch.float64, torch.complex64):
        p = torch.nn.Parameter(torch.ones(4, dtype=dtype, device=device))
        p.grad = torch.ones_like(p)
        check(p, "expected float32, float16 or bfloat16")
    p = torch.nn.Parameter(torch.ones(1, device=device).expand(4))
    p.grad = torch.ones(4, device=device)
    check(p, "distinct elements")


def test_a_gradient_that_becomes_sparse(device: torch.device) -> None:
    layer = torch.nn.Embedding(100, 64).to(device)
    optimizer = fewbits.optim.AdamW8bit(layer.parameters())
    x = torch.tensor([1, 5], device=device)
    layer(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    layer.sparse = True
    layer(x).sum().backward()
    with pytest.raises(ValueError, match="sparse is not supported"):
        optimizer.step()


def test_frozen_integers_are_nobodys_business(device: torch.device) -> None:
    codes = torch.nn.Parameter(torch.ones(4, dtype=torch.uint8, device=device), requires_grad=False)
    params = parameters([(4,)], device)
    optimizer = fewbits.optim.AdamW8bit([codes, *params])
    give_gradients(params, 0)
    optimizer.step()
    with pytest.raises(ValueError, match="complex parameters are not supported"):
        fewbits.optim.AdamW8bit([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))])


@pytest.mark.parametrize("name", PAGED_NAMES)
def test_paging_on_the_cpu_says_so_once(name: str) -> None:
    params = parameters([(64, 80)], "cpu")
    optimizer = make(name, params)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(3):
            give_gradients(params, t)
            optimizer.step()
        optimizer.add_param_group({"params": parameters([(3,)], "cpu")})
        give_gradients(optimizer.param_groups[1]["params"], 0)
        optimizer.step()
    (warning,) = caught
    assert "nothing is paged" in str(warning.message)
    assert warning.filename == __file__
