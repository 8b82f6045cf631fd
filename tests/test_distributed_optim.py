"""Optimizers on sharded parameters: the steps of one process, norms over the mesh, states that can be cut otherwise."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import fewbits.optim
from optimizers import ALL, family_of, give_gradients, make, normal
from ranks import Ranks

try:
    from torch.distributed.tensor import DTensor

    from distributed_params import ALIGNED, SHAPES, SMALL, mesh_of, part, replicated, sharded, share_gradients, whole
except ImportError:
    pytest.skip("this torch has no distributed tensors", allow_module_level=True)

EXACT = len(ALIGNED) + len(SMALL)  # of SHAPES: states have the same blocks, or 32 bits


def same(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    if not torch.equal(a, b):
        raise AssertionError(f"{what}: {(a.float() - b.float()).abs().max()} at most between {a.shape} and {b.shape}")


def near(a: torch.Tensor, b: torch.Tensor, rtol: float, what: str) -> None:
    """Compare in the norm: single elements of 8-bit states may fall to the other side of a rounding."""
    error, size = (a.float() - b.float()).norm(), b.float().norm()
    if not error <= rtol * size:
        raise AssertionError(f"{what}: {error} beside {size}")


# ---- steps ---------------------------------------------------------------------------------------------------------


def steps_of(device: torch.device, names: list[str]) -> None:
    mesh = mesh_of(device)
    for name in names:
        others = whole(device)
        begin = [q.detach().clone() for q in others]
        params = sharded(mesh, others)
        ours, plain = make(name, params), make(name, others)
        for t in range(3):
            give_gradients(others, t)
            share_gradients(params, others)
            ours.step()
            plain.step()
        counts = [[len(getattr(b, "launches", ())) for b in o._watch.plan.bundles] for o in (ours, plain)]
        assert counts[0] == counts[1], f"{name}: launches {counts}"
        trust = family_of(name) in ("LAMB", "LARS")
        for i, (p, q, b) in enumerate(zip(params, others, begin, strict=True)):
            what = f"{name}, parameter {i} of {SHAPES[i]}"
            moved, expected = p.to_local() - part(b, p), part(q, p) - part(b, p)
            exact = i < EXACT or name.endswith("32bit") or ours.args.optim_bits == 32
            if exact and not trust:
                same(p.to_local(), part(q, p), what)
            elif p.to_local().numel():
                near(moved, expected, 1e-5 if exact else 0.05, what)
            for key in ("state1", "state2") if exact and not trust else ():
                if key in plain.state[q] and plain.state[q][key].shape == q.shape:
                    same(ours.state[p][key], part(plain.state[q][key], p), f"{what}, {key}")
            bits = [str(s[key].dtype) for s in (ours.state[p], plain.state[q]) for key in ("state1",) if key in s]
            assert len(set(bits)) <= 1, f"{what}: {bits}"


@pytest.mark.filterwarnings("ignore:.*nothing is paged")
@pytest.mark.parametrize("world", [2, 4])
def test_every_optimizer_steps_shards(ranks: Ranks, world: int) -> None:
    """Elementwise rules give the same bytes where blocks are the same, trust ratios the same up to rounding."""
    ranks(world, steps_of, ALL)


def rounded(device: torch.device) -> None:
    mesh = mesh_of(device)
    others = whole(device, torch.bfloat16)[:EXACT]
    params = sharded(mesh, others)
    ours = fewbits.optim.AdamW8bit(params, stochastic_rounding=True, seed=3)
    plain = fewbits.optim.AdamW8bit(others, stochastic_rounding=True, seed=3)
    for t in range(2):
        give_gradients(others, t)
        share_gradients(params, others)
        ours.step()
        plain.step()
    for i in range(len(ALIGNED)):
        same(params[i].to_local(), part(others[i], params[i]), f"parameter {i}")


def test_random_numbers_are_those_of_the_whole(ranks: Ranks) -> None:
    ranks(2, rounded)


def held_still(device: torch.device) -> None:
    """Memory of shards is what counts: a plan is found again while it stays, beside parameters that are whole."""
    mesh = mesh_of(device)
    others = whole(device)
    params: list[Any] = [*sharded(mesh, others[:2]), torch.nn.Parameter(others[2].detach().clone())]
    optimizer = fewbits.optim.AdamW8bit(params)

    def stepped(t: int) -> Any:
        give_gradients(others, t)
        share_gradients(params, others[:3])
        optimizer.step()
        return optimizer._watch.plan

    plan = stepped(0)
    assert plan.whereabouts.native is None
    assert stepped(1) is plan
    params[1]._local_tensor.data = params[1]._local_tensor.data.clone()
    assert plan.match(optimizer) is None
    plan = stepped(2)
    params[2].grad = replicated(mesh, params[2].grad).detach()
    assert plan.match(optimizer) is None
    plan = stepped(3)
    params[0]._local_tensor = params[0]._local_tensor.clone()
    assert plan.match(optimizer) is None
    assert stepped(4) is not plan


def test_shards_that_move(ranks: Ranks) -> None:
    ranks(2, held_still)


# ---- norms ---------------------------------------------------------------------------------------------------------


def clipped(device: torch.device, name: str) -> None:
    """The norm is over all shards, whole parameters counted once, as that of torch."""
    mesh = mesh_of(device)
    others = whole(device)
    params = [*sharded(mesh, others[:4]), replicated(mesh, others[4]), *map(torch.nn.Parameter, whole(device)[5:])]
    theirs = sharded(mesh, others[:4])
    ours, plain = make(name, params, max_grad_norm=0.5), make(name, others, max_grad_norm=0.5)
    before = [p.detach().clone() for p in others]
    for t in range(2):
        give_gradients(others, t)
        share_gradients(params, others)
        ours.step()
        plain.step()
    for i, (p, q, b) in enumerate(zip(params, others, before, strict=True)):
        mine = p.to_local() if isinstance(p, DTensor) else p
        moved, expected = mine.detach() - part(b, p), part(q - b, p)  # every rank takes part
        if mine.numel():
            near(moved, expected, 1e-5, f"{name}, parameter {i}")
    share_gradients(theirs, others[:4])
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    expected = torch.nn.utils.clip_grad_norm_(others[:4], 0.5)
    torch.testing.assert_close(norm.full_tensor() if isinstance(norm, DTensor) else norm, expected)


@pytest.mark.parametrize("name", ["AdamW32bit", "LAMB32bit"])
def test_norms_are_over_the_mesh(ranks: Ranks, name: str) -> None:
    ranks(2, clipped, name)


def infinite_somewhere(device: torch.device) -> list[float]:
    mesh = mesh_of(device)
    params = sharded(mesh, whole(device)[:2])
    for p in params:
        p.grad = torch.ones_like(p)
    if dist.get_rank() == 1:
        params[1].grad.to_local()[-1, -1] = float("inf")
    before = params[0].to_local().clone()
    optimizer = fewbits.optim.AdamW8bit(params, skip_nonfinite=True)
    optimizer.step()
    same(params[0].to_local(), before, "left out")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(params[0].to_local(), before)
    return [int(state["step"]) for state in optimizer.state.values()]


def test_no_rank_steps_if_one_gradient_is_infinite(ranks: Ranks) -> None:
    assert ranks(2, infinite_somewhere) == [[1, 1]] * 2


def refusals(device: torch.device) -> None:
    from torch.distributed.tensor import Partial

    mesh = mesh_of(device)
    p = torch.nn.Parameter(DTensor.from_local(torch.ones(4, 4, device=device), mesh, [Partial()]))
    p.grad = DTensor.from_local(torch.ones(4, 4, device=device), mesh, [Partial()])
    with pytest.raises(ValueError, match="in shards or replicated"):
        fewbits.optim.AdamW([p]).step()
    # Gradients of replicated parameters may be sums that nobody has added up yet, as in tensor parallelism.
    p = replicated(mesh, torch.ones(4, 4, device=device))
    p.grad = DTensor.from_local(torch.ones(4, 4, device=device), mesh, [Partial()])
    fewbits.optim.SGD32bit([p], lr=1.0, momentum=0.9).step()
    same(p.to_local().detach(), torch.full((4, 4), 1.0 - dist.get_world_size(), device=device), "summed")


def test_placements(ranks: Ranks) -> None:
    ranks(2, refusals)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


class Weights(torch.nn.Module):
    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(params)


def train(model: Weights, optimizer: torch.optim.Optimizer, others: list[Any], steps: range) -> None:
    for t in steps:
        give_gradients(others, t)
        share_gradients(list(model.weights), others)
        optimizer.step()
    optimizer.zero_grad()


def save(device: torch.device, name: str, folder: str) -> None:
    others = whole(device)
    model = Weights(sharded(mesh_of(device), others))
    optimizer = make(name, model.parameters())
    train(model, optimizer, others, range(3))
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder)


def resume(device: torch.device, name: str, folder: str) -> list[torch.Tensor]:
    others = whole(device)
    model = Weights(sharded(mesh_of(device), [torch.zeros_like(q) for q in others]))
    optimizer = make(name, model.parameters())
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, optimizer, others, range(3, 6))
    return [p.full_tensor().detach().cpu() for p in model.weights]


def uninterrupted(device: torch.device, name: str) -> list[torch.Tensor]:
    others = whole(device)
    optimizer = make(name, others)
    train(Weights([torch.nn.Parameter(q.detach().clone()) for q in others]), optimizer, others, range(0))
    for t in range(6):
        give_gradients(others, t)
        optimizer.step()
    return [q.detach().cpu() for q in others]


@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit", "Lion8bit", "AdamW32bit", "LAMB8bit"])
def test_resharding(ranks: Ranks, name: str, tmp_path: Path) -> None:
    """Training goes on with another number of ranks as if nothing had happened."""
    expected = ranks(1, uninterrupted, name)[0]
    begin = whole(torch.device("cpu"))
    chain = [2, 1, 2, 4] if name == "AdamW8bit" else [2, 4]
    for i, (few, many) in enumerate(pairwise(chain)):
        folder = str(tmp_path / str(i))
        ranks(few, save, name, folder)
        results = ranks(many, resume, name, folder)
        for result in results:
            for j, (p, q, b) in enumerate(zip(result, expected, begin, strict=True)):
                what = f"{name}, {few} to {many}, parameter {j}"
                if (j < EXACT or name.endswith("32bit")) and "LAMB" not in name:
                    same(p, q, what)
                else:
                    near(p - b, q - b, 0.05, what)


def interchanged(device: torch.device) -> None:
    """States of whole parameters go into sharded ones and back, and states come back bit for bit."""
    others = whole(device)
    mesh = mesh_of(device)
    for name in ("AdamW8bit", "AdEMAMix8bit", "AdamW32bit"):
        plain = make(name, others)
        give_gradients(others, 0)
        plain.step()
        params = sharded(mesh, others)
        ours = make(name, params)
        ours.load_state_dict(plain.state_dict())
        share_gradients(params, others)
        again = make(name, params)
        again.load_state_dict(ours.state_dict())
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            for key, value in ours.state[p].items():
                same(again.state[p][key], value, f"{name}, parameter {i}, {key}")
            if i < EXACT and name != "AdEMAMix8bit":
                same(ours.state[p]["state1"], part(plain.state[q]["state1"], p), f"{name}, parameter {i}")
        # And back: gathered, as a full state dict has them.
        full = ours.state_dict()
        for state in full["state"].values():
            for key, value in state.items():
                state[key] = value.full_tensor() if isinstance(value, DTensor) else value
        back = make(name, others)
        back.load_state_dict(full)
        for i, q in enumerate(others):
            for key, value in plain.state[q].items():
                if i < EXACT:
                    same(back.state[q][key], value, f"{name} and back, parameter {i}, {key}")
        give_gradients(others, 1)
        back.step()


def test_whole_and_sharded_states_are_interchangeable(ranks: Ranks) -> None:
    ranks(2, interchanged)


def random_shapes(device: torch.device, seed: int) -> None:
    """Shapes of all kinds: the step of one process to rounding, and states that survive a state dict bit for bit."""
    random = np.random.default_rng(seed)
    mesh = mesh_of(device)
    shapes = []
    for _ in range(16):
        sizes = [int(size) for size in random.integers(1, 40, random.integers(1, 4))]
        shapes.append((*sizes[:-1], sizes[-1] * int(random.choice([1, 16, 256]))))
    for name in ("AdamW8bit", "Lion8bit"):
        others = [torch.nn.Parameter(normal(shape, i).to(device)) for i, shape in enumerate(shapes)]
        before = [q.detach().clone() for q in others]
        params = sharded(mesh, others)
        ours, plain = make(name, params, min_8bit_size=256), make(name, others, min_8bit_size=256)
        for t in range(2):
            give_gradients(others, t)
            share_gradients(params, others)
            ours.step()
            plain.step()
        again = make(name, params, min_8bit_size=256)
        again.load_state_dict(ours.state_dict())
        for p, q, b in zip(params, others, before, strict=True):
            what = f"{name}, {tuple(q.shape)}"
            for key, value in ours.state[p].items():
                same(again.state[p][key], value, f"{what}, {key}")
            assert ours.state[p]["state1"].dtype == plain.state[q]["state1"].dtype, what
            moved, expected = p.to_local() - part(b, p), part(q - b, p)  # every rank takes part
            if moved.numel() and name == "AdamW8bit":  # the signs of Lion flip where an average is about zero
                near(moved, expected, 0.05, what)


@pytest.mark.parametrize("world", [2, 4])
def test_random_shapes(ranks: Ranks, world: int) -> None:
    ranks(world, random_shapes, world)
