"""Optimizers as programs for other optimizers use them: compiled steps, groups, what a framework looks at."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fewbits.optim
from optimizers import give_gradients, make, parameters

SHAPES = [(64, 80), (33,), (5000,)]


def trained(compiled: bool, device: torch.device) -> tuple[list[float], torch.Tensor]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 96).to(device)
    x = torch.randn(4, 64, device=device)
    optimizer = make("AdamW8bit", list(layer.parameters()))

    def backward() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = layer(x).square().mean()
        loss.backward()
        return loss

    def train() -> torch.Tensor:
        loss = backward()
        optimizer.step()
        return loss

    step: Any = optimizer.step
    if compiled:
        train, step = torch.compile(train, backend="eager"), torch.compile(step, backend="eager")
    losses = [train().item() for _ in range(3)] + [step(backward).item() for _ in range(2)]
    return losses, layer.weight.detach()


def test_compiled_training_step(device: torch.device) -> None:
    """A step inside a compiled function is what it is outside, closures included."""
    (losses, weight), (expected, plain) = trained(True, device), trained(False, device)
    assert losses == expected
    assert losses[-1] < losses[0]
    assert torch.equal(weight, plain)


@pytest.mark.parametrize(("name", "said"), [("SGD", {"momentum": 0.5}), ("RMSprop", {"alpha": 0.6, "momentum": 0.3})])
def test_groups_may_use_the_names_of_arguments(name: str, said: dict[str, float], device: torch.device) -> None:
    given = {"lr": 1e-2, "momentum": 0.9}
    pairs = [
        (getattr(fewbits.optim, name), parameters(SHAPES, device)),
        (getattr(torch.optim, name), parameters(SHAPES, device)),
    ]
    for make_one, params in pairs:
        optimizer = make_one([{"params": params[:1]}, {"params": params[1:2], **said}], **given)
        optimizer.add_param_group({"params": params[2:], **said})
        for t in range(3):
            give_gradients(params, t)
            optimizer.step()
    for ours, torchs in zip(pairs[0][1], pairs[1][1], strict=True):
        assert torch.allclose(ours, torchs, rtol=1e-5, atol=1e-6)


def test_groups_that_contradict_themselves_or_cannot_be_obeyed() -> None:
    params = parameters(SHAPES, "cpu")
    with pytest.raises(ValueError, match="momentum: expected what betas"):
        fewbits.optim.SGD([{"params": params, "betas": (0.9, 0.0), "momentum": 0.5}], lr=0.1, momentum=0.9)
    fewbits.optim.SGD([{"params": params, "betas": (0.5, 0.0), "momentum": 0.5}], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="maximize: expected False"):
        fewbits.optim.AdamW([{"params": params, "maximize": True}])
    fewbits.optim.AdamW([{"params": params, "maximize": False}])


@pytest.mark.parametrize("name", ["AdamW8bit", "SGD"])
def test_states_are_those_that_a_wrapper_has_seen(name: str, device: torch.device) -> None:
    """Optimizers around others take `state` and `param_groups` over when they are made, as Lightning's."""
    params = parameters(SHAPES, device)
    optimizer = make(name, params)
    state, groups = optimizer.state, optimizer.param_groups
    for t in range(2):
        give_gradients(params, t)
        optimizer.step()
    assert optimizer.state is state
    assert optimizer.param_groups is groups
    assert set(state) == set(params)
