"""Constructors, parameter groups, overrides, schedulers, scalers, closures, and what is refused."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fewbits.optim
from arrays import DTYPES, assert_same_bits, dtype_name
from fewbits.optim import GlobalOptimManager
from optimizers import ALL, FAMILIES, NAMES, PAGED_NAMES, family_of, give_gradients, make, normal, parameters
from strategies import dtypes, seeds

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


def test_examples() -> None:
    for found in pkgutil.iter_modules(fewbits.optim.__path__):
        module = importlib.import_module(f"fewbits.optim.{found.name}")
        result = doctest.testmod(module, extraglobs={"torch": torch})
        assert not result.failed, found.name


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
        if name.endswith("8bit") and bits == 32 and family_of(name) != "Adagrad":
            continue  # the default, which is there for compatibility
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
    ("LAMB8bit", {"max_unorm": 0.0}, "max_unorm: expected a positive"),
    ("LARS", {"max_unorm": 0.0}, "max_unorm: expected a positive"),
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


# ---- groups, schedulers, closures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_groups_have_their_own_hyperparameters(name: str, device: torch.device) -> None:
    """As if each group had an optimizer of its own."""
    params, others = parameters(SHAPES, device), parameters(SHAPES, device)
    together = make(name, [{"params": params[:1], "lr": 0.05}, {"params": params[1:], "weight_decay": 0.2}])
    apart = [make(name, others[:1], lr=0.05), make(name, others[1:], weight_decay=0.2)]
    for t in range(3):
        give_gradients(params, t)
        give_gradients(others, t)
        together.step()
        for optimizer in apart:
            optimizer.step()
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p, q, name)


def test_more_groups_than_a_launch_takes(device: torch.device) -> None:
    shapes = [(17,), (300,)] * 20
    params, others = parameters(shapes, device), parameters(shapes, device)
    together = fewbits.optim.AdamW([{"params": [p], "lr": 0.001 * (i + 1)} for i, p in enumerate(params)])
    apart = [fewbits.optim.AdamW([p], lr=0.001 * (i + 1)) for i, p in enumerate(others)]
    for t in range(3):
        give_gradients(params, t)
        give_gradients(others, t)
        together.step()
        for optimizer in apart:
            optimizer.step()
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert_same_bits(p, q, f"parameter {i}")


def test_group_added_later_and_parameters_exchanged(device: torch.device) -> None:
    params, late = parameters(SHAPES, device), parameters([(12, 500)], device)
    optimizer = fewbits.optim.AdamW8bit(params)
    give_gradients(params, 0)
    optimizer.step()
    optimizer.add_param_group({"params": late, "lr": 0.1})
    give_gradients([*params, *late], 1)
    before = late[0].detach().clone()
    optimizer.step()
    assert not torch.equal(late[0], before)
    assert [int(optimizer.state[p]["step"]) for p in [*params, *late]] == [2, 2, 2, 1]
    new = parameters([(40, 200)], device)[0]
    optimizer.param_groups[1]["params"][0] = new  # as accelerate does for FSDP
    give_gradients([*params, new], 2)
    optimizer.step()
    assert int(optimizer.state[new]["step"]) == 1
    with pytest.raises(ValueError, match="betas"):
        optimizer.add_param_group({"params": parameters([(3,)], device), "betas": (0.9, 2.0)})


@pytest.mark.parametrize("lr_kind", ["float", "float32", "float64"])
@pytest.mark.parametrize("name", ["AdamW8bit", "SGD", "LAMB8bit"])
def test_schedulers(name: str, lr_kind: str, device: torch.device) -> None:
    params, others = parameters(SHAPES, device), parameters(SHAPES, device)
    tensor = None if lr_kind == "float" else torch.tensor(0.25, dtype=getattr(torch, lr_kind), device=device)
    ours = make(name, params, lr=0.25 if tensor is None else tensor)
    twin = make(name, others, lr=0.25)
    scheduler = torch.optim.lr_scheduler.StepLR(ours, 1, gamma=0.5)  # exact in float32
    for t in range(4):
        give_gradients(params, t)
        give_gradients(others, t)
        twin.param_groups[0]["lr"] = 0.25 * 0.5**t
        ours.step()
        twin.step()
        scheduler.step()
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p, q, name)
    if tensor is not None:
        assert ours.param_groups[0]["lr"] is tensor


def test_one_cycle_moves_betas(device: torch.device) -> None:
    params = parameters(SHAPES, device)
    optimizer = fewbits.optim.SGD8bit(params, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    for t in range(5):
        give_gradients(params, t)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["betas"][0] != 0.9


def test_momentum_switched_on_later(device: torch.device) -> None:
    params = parameters(SHAPES, device)
    optimizer = fewbits.optim.SGD(params, lr=0.1)
    give_gradients(params, 0)
    optimizer.step()
    assert "state1" not in optimizer.state[params[0]]
    optimizer.param_groups[0]["betas"] = (0.9, 0.0)
    for t in range(1, 3):
        give_gradients(params, t)
        optimizer.step()
    assert optimizer.state[params[0]]["state1"].abs().sum() > 0


def test_closure_and_zero_grad(device: torch.device) -> None:
    (p,) = parameters([(64, 80)], device)
    optimizer = fewbits.optim.AdamW8bit([p])

    def closure() -> float:
        optimizer.zero_grad(set_to_none=False)
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure)
    address = p.grad.data_ptr()
    optimizer.step(closure)
    assert p.grad.data_ptr() == address
    optimizer.zero_grad()
    assert p.grad is None
    before = p.detach().clone()
    optimizer.step()  # nothing to do
    assert torch.equal(p, before)


def test_missing_gradients_are_skipped(device: torch.device) -> None:
    params = parameters(SHAPES, device)
    optimizer = fewbits.optim.AdamW8bit(params)
    expected = [0, 0, 0]
    for t in range(6):
        give_gradients(params, t)
        for i, p in enumerate(params):
            if (t >> i) & 1:
                p.grad = None
            else:
                expected[i] += 1
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for p, old in zip(params, before, strict=True):
            assert torch.equal(p, old) == (p.grad is None)
    assert [int(optimizer.state[p]["step"]) for p in params] == expected


def test_autograd_sees_the_change(device: torch.device) -> None:
    (p,) = parameters([(64, 80)], device)
    optimizer = fewbits.optim.AdamW8bit([p])
    loss = (p**2).sum()
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- overrides -----------------------------------------------------------------------------------------------------


@pytest.fixture
def manager() -> Any:
    manager = GlobalOptimManager.get_instance()
    manager.initialize()
    yield manager
    manager.initialize()


@pytest.mark.parametrize("when", ["before", "after"])
def test_override_of_a_parameter(manager: GlobalOptimManager, when: str, device: torch.device) -> None:
    params = parameters([(64, 80), (80, 64)], device)
    if when == "before":
        manager.register_parameters(params)
        manager.override_config(params[0], "optim_bits", 32)
        manager.override_config(params[1], key_value_dict={"lr": 0.5, "betas": (0.5, 0.5)})
    optimizer = fewbits.optim.AdamW8bit(params)
    if when == "after":
        manager.override_config(params[0], "optim_bits", 32)
        manager.override_config([params[1]], key_value_dict={"lr": 0.5, "betas": (0.5, 0.5)})
    give_gradients(params, 0)
    twins = parameters([(64, 80), (80, 64)], device)
    others = [fewbits.optim.AdamW(twins[:1]), fewbits.optim.AdamW8bit(twins[1:], lr=0.5, betas=(0.5, 0.5))]
    give_gradients(twins, 0)
    for one in (optimizer, *others):
        one.step()
    assert [optimizer.state[p]["state1"].dtype for p in params] == [torch.float32, torch.uint8]
    for p, q in zip(params, twins, strict=True):
        assert_same_bits(p, q, "parameter")
    assert optimizer.get_config(0, 1, optimizer.param_groups[0])["lr"] == 0.5


def test_override_of_a_module(manager: GlobalOptimManager, device: torch.device) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 100)).to(device)
    optimizer = fewbits.optim.AdamW8bit(model.parameters())
    manager.register_module_override(model[0], "weight", {"optim_bits": 32})
    assert optimizer.mng.module_weight_config_triple == [(model[0], "weight", {"optim_bits": 32})]
    assert manager.index2config == {}
    give_gradients(list(model.parameters()), 0)
    optimizer.step()
    assert optimizer.state[model[0].weight]["state1"].dtype == torch.float32
    assert optimizer.state[model[1].weight]["state1"].dtype == torch.uint8
    assert manager.index2config == {(0, 0): {"optim_bits": 32}}
    assert manager.pid2config == {id(model[0].weight): {"optim_bits": 32}}


def test_overrides_go_with_their_parameters(manager: GlobalOptimManager) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    manager.override_config(p, "lr", 0.5)
    assert len(manager.pid2config) == 1
    del p
    assert not manager.pid2config
    with pytest.raises(RuntimeError, match="get_instance"):
        GlobalOptimManager()
    with pytest.raises(ValueError, match="key: expected either"):
        manager.override_config([], "lr", 1.0, {"lr": 2.0})


# ---- scalers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW8bit", "SGD", "LAMB"])
def test_gradient_scaler(name: str, device: torch.device) -> None:
    params, others = parameters(SHAPES, device), parameters(SHAPES, device)
    ours, plain = make(name, params), make(name, others)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=1000)
    for t in range(4):
        ours.zero_grad()
        weights = [normal(tuple(p.shape), t).to(device) for p in params]
        loss = sum((p * w).sum() for p, w in zip(params, weights, strict=True))
        scaler.scale(loss).backward()
        if t == 2:
            params[1].grad[3] = float("inf")
        if t == 1:
            scaler.unscale_(ours)
            torch.nn.utils.clip_grad_norm_(params, 1e9)
        before = [p.detach().clone() for p in params]
        scaler.step(ours)
        scaler.update()
        if t == 2:
            assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
            assert scaler.get_scale() == 512.0
            continue
        for q, w in zip(others, weights, strict=True):
            q.grad = w.clone()
        plain.step()
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p, q, name)
    assert ours.state_dict()["state"][0]["step"] == 3


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW", "LAMB8bit"])
def test_parameters_with_gaps_are_updated_where_they_lie(name: str, dtype: torch.dtype, device: torch.device) -> None:
    base = normal((80, 300), 0, dtype).to(device)
    whole = base.clone()
    views = [whole[:, ::3].t(), whole[:, 1]]
    params = [torch.nn.Parameter(view) for view in views]
    others = [torch.nn.Parameter(view.detach().clone(memory_format=torch.contiguous_format)) for view in views]
    ours, plain = make(name, params), make(name, others)
    for t in range(3):
        give_gradients(params, t)
        for p, q in zip(params, others, strict=True):
            q.grad = p.grad.clone()
            p.grad = p.grad.t().contiguous().t() if p.dim() == 2 else p.grad
        addresses = [p.data_ptr() for p in params]
        ours.step()
        plain.step()
        assert [p.data_ptr() for p in params] == addresses
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p.contiguous(), q, name)
    assert torch.equal(whole[:, ::3].t(), params[0])
    assert torch.equal(whole[:, 2::3], base[:, 2::3])  # what nobody optimizes


def test_channels_last(device: torch.device) -> None:
    convolution = torch.nn.Conv2d(8, 16, 3).to(device).to(memory_format=torch.channels_last)
    twin = torch.nn.Conv2d(8, 16, 3).to(device)
    twin.load_state_dict(convolution.state_dict())
    ours, plain = (fewbits.optim.AdamW8bit(m.parameters(), min_8bit_size=1) for m in (convolution, twin))
    x = normal((2, 8, 9, 9), 0).to(device)
    for model, optimizer in ((convolution, ours), (twin, plain)):
        for _ in range(2):
            optimizer.zero_grad()
            for p in model.parameters():
                p.grad = normal(tuple(p.shape), 5).to(device).to(memory_format=torch.preserve_format)
            optimizer.step()
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(convolution.weight.contiguous(), twin.weight, "weight")
    convolution(x)


def test_data_exchanged_between_steps(device: torch.device) -> None:
    (p,), (q,) = parameters([(64, 80)], device), parameters([(64, 80)], device)
    ours, plain = fewbits.optim.AdamW8bit([p]), fewbits.optim.AdamW8bit([q])
    for t in range(4):
        give_gradients([p], t)
        give_gradients([q], t)
        ours.step()
        plain.step()
        p.data = p.data.clone()
        for key in ("state1", "absmax2"):
            ours.state[p][key] = ours.state[p][key].clone()
        ours.state[p]["state2"].data = ours.state[p]["state2"].clone()
        ours.state[p]["state1"].data = ours.state[p]["state1"].clone()
    assert_same_bits(p, q, "parameter")
    assert_same_bits(ours.state[p]["state1"], plain.state[q]["state1"], "state")


def test_states_taken_away_and_brought_back(device: torch.device) -> None:
    """As trainers do that offload states between steps; what they leave elsewhere is fetched."""
    (p,), (q,) = parameters([(64, 80)], device), parameters([(64, 80)], device)
    ours, plain = fewbits.optim.AdamW8bit([p]), fewbits.optim.AdamW8bit([q])
    for t in range(3):
        give_gradients([p], t)
        give_gradients([q], t)
        ours.step()
        plain.step()
        for key, value in ours.state[p].items():
            ours.state[p][key] = value.cpu() if t == 0 else value.cpu().to(device)
    assert_same_bits(p, q, "parameter")
    ours.state.clear()
    give_gradients([p], 3)
    ours.step()
    assert int(ours.state[p]["step"]) == 1


def test_odd_sizes(device: torch.device) -> None:
    params = [torch.nn.Parameter(t.to(device)) for t in (torch.ones(0), torch.tensor(1.0), torch.ones(3, 0, 2))]
    optimizer = fewbits.optim.AdamW8bit(params, max_grad_norm=1.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert params[1] < 1
    empty = fewbits.optim.LAMB(params[:1])
    empty.step()


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


# ---- subclasses ----------------------------------------------------------------------------------------------------


class OneByOne(fewbits.optim.Optimizer2State):
    """As GaLore: a step of its own that exchanges data and gradients around each update."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__("adam", params, lr, (0.9, 0.999), 1e-8, 0.01, 8, None, 4096)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for gindex, group in enumerate(self.param_groups):
            for pindex, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                state = self.state[p]
                if "step" not in state:
                    state["step"] = 0
                kept, p.data = p.data, p.data[:64].clone()
                p.grad = p.grad[:64].clone()
                if "state1" not in state:
                    self.init_state(group, p, gindex, pindex)
                self.prefetch_state(p)
                self.update_step(group, p, gindex, pindex)
                kept[:64] = p.data
                p.data = kept


def test_subclass_with_its_own_step(device: torch.device) -> None:
    (p,) = parameters([(100, 80)], device)
    q = torch.nn.Parameter(p.detach()[:64].clone())
    ours, plain = OneByOne([p]), fewbits.optim.AdamW8bit([q])
    for t in range(3):
        give_gradients([p], t)
        q.grad = p.grad[:64].clone()
        ours.step()
        plain.step()
    assert_same_bits(p.detach()[:64].contiguous(), q, "rows")
    assert ours.state[p]["state1"].shape == (64, 80)
    saved = ours.state_dict()
    assert saved["state"][0]["step"] == 3
    again = OneByOne([p])
    again.load_state_dict(saved)
    give_gradients([p], 4)
    again.step()


def test_subclass_with_its_own_update(device: torch.device) -> None:
    class Halved(fewbits.optim.AdamW8bit):
        def update_step(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
            p.grad.mul_(0.5)
            super().update_step(group, p, gindex, pindex)

    params, others = parameters(SHAPES, device), parameters(SHAPES, device)
    ours, plain = Halved(params), fewbits.optim.AdamW8bit(others)
    for t in range(3):
        give_gradients(params, t)
        give_gradients(others, t, scale=0.5)
        ours.step()
        plain.step()
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p, q, "parameter")


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


def test_distributed_parameters(tmp_path: Path) -> None:
    """Each process steps its own part; whether states have 8 bits is decided by the whole."""
    tensor = pytest.importorskip("torch.distributed.tensor")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        others = parameters(SHAPES, "cpu")
        params = [torch.nn.Parameter(tensor.distribute_tensor(p.detach().clone(), mesh)) for p in others]
        ours, plain = fewbits.optim.AdamW8bit(params), fewbits.optim.AdamW8bit(others)
        for t in range(3):
            give_gradients(others, t)
            for p, q in zip(params, others, strict=True):
                p.grad = tensor.distribute_tensor(q.grad.clone(), mesh)
            ours.step()
            plain.step()
        for p, q in zip(params, others, strict=True):
            assert_same_bits(p.to_local(), q, "parameter")
        for refused in (
            fewbits.optim.AdamW8bit(params, max_grad_norm=1.0),
            fewbits.optim.AdamW8bit(params, skip_nonfinite=True),
            fewbits.optim.LAMB8bit(params),
        ):
            with pytest.raises(ValueError, match="distributed"):
                refused.step()
    finally:
        torch.distributed.destroy_process_group()


# ---- anything at all -----------------------------------------------------------------------------------------------

_shapes = st.lists(st.lists(st.integers(0, 70), max_size=3).map(tuple), min_size=1, max_size=6)


@settings(max_examples=60)
@given(
    name=st.sampled_from(NAMES),
    shapes=_shapes,
    kinds=st.lists(dtypes, min_size=6, max_size=6),
    rates=st.lists(st.sampled_from([0.0, 1e-3, 0.1]), min_size=3, max_size=3),
    steps=st.integers(1, 4),
    missing=seeds,
    small=st.sampled_from([1, 4096]),
)
def test_together_as_alone(
    device: torch.device, name: str, shapes: Any, kinds: Any, rates: Any, steps: int, missing: int, small: int
) -> None:
    """Any mix of shapes, dtypes, groups and missing gradients gives what each tensor would get alone."""

    def new() -> list[torch.nn.Parameter]:
        return [
            torch.nn.Parameter(normal(shape, i, dtype).to(device))
            for i, (shape, dtype) in enumerate(zip(shapes, kinds, strict=False))
        ]

    params, others = new(), new()
    groups = [{"params": params[i::3], "lr": rates[i]} for i in range(3) if params[i::3]]
    together = make(name, groups, min_8bit_size=small)
    alone = [make(name, [p], lr=rates[i % 3], min_8bit_size=small) for i, p in enumerate(others)]
    for t in range(steps):
        give_gradients(params, t)
        give_gradients(others, t)
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            if (missing >> (6 * t + i)) & 3 == 3:
                p.grad = q.grad = None
        together.step()
        for optimizer in alone:
            optimizer.step()
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert_same_bits(p, q, f"{name}, parameter {i}")
