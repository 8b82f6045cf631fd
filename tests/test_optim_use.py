"""Optimizers in use: groups, schedulers, closures, overrides, scalers, and parameters that move."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import fewbits.optim
from arrays import DTYPES, assert_same_bits, dtype_name
from fewbits.optim import GlobalOptimManager
from optimizers import NAMES, give_gradients, make, normal, parameters

pytestmark = pytest.mark.filterwarnings("ignore:.*nothing is paged")
SHAPES = [(64, 80), (33,), (5000,)]


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
    table = torch.nn.Embedding(4, 4)
    manager.register_module_override(table, "weight", {"lr": 0.5})
    weight, gone = table.weight, weakref.ref(table)
    del table
    gc.collect()
    assert gone() is None, "the manager keeps a model alive"
    assert manager.module_weight_config_triple == []
    assert manager.pid2config == {id(weight): {"lr": 0.5}}
    del weight
    assert not manager.pid2config
    with pytest.raises(RuntimeError, match="get_instance"):
        GlobalOptimManager()
    with pytest.raises(ValueError, match="key: expected either"):
        manager.override_config([], "lr", 1.0, {"lr": 2.0})


def test_overrides_of_registered_tensors_survive_a_move(manager: GlobalOptimManager, device: torch.device) -> None:
    params = [torch.nn.Parameter(torch.ones(n, 64)) for n in (80, 80, 96)]
    manager.override_config(params[1:], "optim_bits", 8)
    manager.register_parameters(params)
    params = [p.detach().to(device, copy=True).requires_grad_() for p in params]
    assert not manager.pid2config
    others = [torch.nn.Parameter(torch.ones(n, 64, device=device)) for n in (80, 80, 64)]  # the last has no predecessor
    first, second = fewbits.optim.AdamW(params[:2]), fewbits.optim.AdamW(others)
    for optimizer in (first, second):
        give_gradients(optimizer.param_groups[0]["params"], 0)
        optimizer.step()
    assert [first.state[p]["state1"].dtype for p in params[:2]] == [torch.float32, torch.uint8]
    assert [second.state[p]["state1"].dtype for p in others] == [torch.float32] * 3, "passed on twice, or to a stranger"


def test_overrides_of_registered_tensors_that_live_stay_theirs(manager: GlobalOptimManager) -> None:
    params = [torch.nn.Parameter(torch.ones(80, 64)) for _ in range(2)]
    manager.override_config(params[:1], "optim_bits", 8)
    manager.register_parameters(params[:1])
    optimizer = fewbits.optim.AdamW(params[1:])
    give_gradients(params[1:], 0)
    optimizer.step()
    assert optimizer.state[params[1]]["state1"].dtype == torch.float32


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
