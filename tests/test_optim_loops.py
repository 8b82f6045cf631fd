"""Optimizers in the loops that programs write around them: compiled, or guarded by what a framework looks at."""

from __future__ import annotations

from typing import Any

import torch

from optimizers import make


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
