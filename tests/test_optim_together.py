"""Many tensors in one step are many tensors alone; subclasses and processes that step some of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fewbits.optim
from arrays import assert_same_bits
from optimizers import NAMES, give_gradients, make, normal, parameters
from strategies import dtypes, seeds

pytestmark = pytest.mark.filterwarnings("ignore:.*nothing is paged")
SHAPES = [(64, 80), (33,), (5000,)]


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


def test_distributed_parameters(tmp_path: Path) -> None:
    """Each process steps its own part; whether states have 8 bits is decided by the whole."""
    tensor = pytest.importorskip("torch.distributed.tensor")
    if not hasattr(tensor, "distribute_tensor"):
        pytest.skip("no distributed tensors yet")
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
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.cuda
@pytest.mark.parametrize("where", ["two GPUs", "GPU and CPU"])
def test_several_devices(where: str) -> None:
    """The norm is over all of them."""
    if where == "two GPUs" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    first, second = ("cuda:0", "cuda:1") if where == "two GPUs" else ("cuda:0", "cpu")
    shapes = [(64, 80), (33,), (5000,), (4096,)]
    params, others = parameters(shapes, first), parameters(shapes, first)
    for p in params[1::2]:
        p.data = p.data.to(second)
    ours = fewbits.optim.AdamW8bit(params, max_grad_norm=1.0, skip_nonfinite=True)
    reference = [p.detach().cpu().double().requires_grad_() for p in others]
    plain = torch.optim.AdamW(reference)
    for t in range(3):
        give_gradients(params, t)
        for p, q in zip(params, reference, strict=True):
            q.grad = p.grad.cpu().double()
        torch.nn.utils.clip_grad_norm_(reference, 1.0)
        ours.step()
        plain.step()
    for p, q in zip(params, reference, strict=True):
        torch.testing.assert_close(p.detach().cpu().double(), q.detach(), rtol=0, atol=3e-3)
    params[1].grad[3] = torch.nan
    before = [p.detach().clone() for p in params]
    ours.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


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
