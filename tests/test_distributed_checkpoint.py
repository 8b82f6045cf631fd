"""Distributed checkpoints of quantized models and their optimizers, loaded by other numbers of ranks."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import fewbits.optim
from fewbits.nn.shard import plain, shard_of
from ranks import Ranks

try:
    from distributed_model import build, inputs, same, shard
except ImportError:
    pytest.skip("this torch has no fully_shard", allow_module_level=True)

LAYERS = [
    ("4", {"quant_type": "nf4"}, 128, 1024),
    ("4", {"quant_type": "nf4", "compress_statistics": False, "quant_storage": torch.bfloat16}, 1024, 50),
    ("8", {}, 50, 33),
]


def make(device: torch.device) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = shard(build(device, layers=LAYERS))
    params = [p for p in model.parameters() if p.requires_grad]
    return model, fewbits.optim.AdamW8bit(params, lr=1e-2, min_8bit_size=500)


def train(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    losses = []
    for t in steps:
        batch = inputs(next(model.parameters()).device, t, rows=8).detach()
        loss = (model(batch.chunk(world)[rank]) - 0.5).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / world)
    return losses


def store(model: nn.Sequential, optimizer: torch.optim.Optimizer, folder: str, **options: Any) -> None:
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder, **options)


def restore(model: nn.Sequential, optimizer: torch.optim.Optimizer, folder: str) -> None:
    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": states}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def begin(device: torch.device, folder: str) -> list[float]:
    model, optimizer = make(device)
    losses = train(model, optimizer, range(4))
    store(model, optimizer, folder)
    return losses


def go_on(device: torch.device, folder: str) -> list[float]:
    model, optimizer = make(device)
    for layer in model:
        piece = shard_of(layer.base.weight)
        assert piece is not None
        plain(piece).zero_()
        piece.recipe.cut(dist.get_rank(), dist.get_world_size())
        piece.recipe.scales.zero_()
        nn.init.zeros_(layer.up.weight)
    restore(model, optimizer, folder)
    return train(model, optimizer, range(4, 8))


def uninterrupted(device: torch.device) -> list[float]:
    model, optimizer = make(device)
    return train(model, optimizer, range(8))


@pytest.mark.parametrize("chain", [(2, 1, 2, 4), (2, 2)])
def test_resharding(ranks: Ranks, chain: tuple[int, ...], tmp_path: Path) -> None:
    """Weights and states saved by some ranks go on elsewhere: the losses are those of one process throughout."""
    expected = ranks(1, uninterrupted)[0]
    for i, (few, many) in enumerate(pairwise(chain)):
        folder = str(tmp_path / str(i))
        for losses in ranks(few, begin, folder):
            torch.testing.assert_close(losses, expected[:4], rtol=1e-4, atol=0)
        for losses in ranks(many, go_on, folder):
            torch.testing.assert_close(losses, expected[4:], rtol=1e-3, atol=0)


# ---- a rank dies ---------------------------------------------------------------------------------------------------


class Dying(dcp.FileSystemWriter):
    """Ends its process when some of its data are written."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        super().write_data(plan, planner)
        if dist.get_rank() == 1:
            os._exit(9)
        return super().write_data(plan, planner)


def dies(device: torch.device, good: str, bad: str) -> None:
    model, optimizer = make(device)
    train(model, optimizer, range(4))
    store(model, optimizer, good)
    train(model, optimizer, range(4, 5))
    store(model, optimizer, bad, storage_writer=Dying(bad))


def loads_nothing(device: torch.device, folder: str) -> None:
    model, optimizer = make(device)
    before = {name: value.full_tensor() for name, value in model.state_dict().items() if hasattr(value, "full_tensor")}
    with pytest.raises(CheckpointException, match="metadata"):
        restore(model, optimizer, folder)
    for name, value in before.items():
        same(model.state_dict()[name].full_tensor(), value, name)


def test_a_rank_that_dies_while_it_saves(ranks: Ranks, tmp_path: Path) -> None:
    """The checkpoint before is whole; the one that was begun says that it is none, and changes nothing."""
    good, bad = str(tmp_path / "good"), str(tmp_path / "bad")
    outcomes = ranks.outcomes(2, dies, good, bad)
    assert "exited with 9" in outcomes[1][1]
    assert any(Path(bad).iterdir())
    expected = ranks(1, uninterrupted)[0]
    for losses in ranks(2, go_on, good):
        torch.testing.assert_close(losses, expected[4:], rtol=1e-3, atol=0)
    ranks(2, loads_nothing, bad)
