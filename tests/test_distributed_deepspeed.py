"""DeepSpeed's ZeRO on quantized models, where it is installed: the losses of one process, before and after a resume.

Not part of CI: DeepSpeed compiles its communication on the first use. ``pip install deepspeed ninja``, a C++ compiler.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fewbits.optim
from ranks import Ranks

if os.environ.get("RANK") is None:  # ranks import it when they know their device
    pytest.importorskip("deepspeed")

try:
    from distributed_model import build, inputs
except ImportError:
    pytest.skip("this torch has no fully_shard", allow_module_level=True)

LAYERS: list[Any] = [
    ("4", {"quant_type": "nf4"}, 128, 64),
    ("4", {"quant_type": "nf4", "quant_storage": torch.float32, "compress_statistics": False}, 64, 50),
    ("8", {"threshold": 2.0}, 50, 33),
]


def zero(device: torch.device, stage: int, folder: str) -> None:
    os.environ["DS_ACCELERATOR"] = device.type
    import deepspeed

    rank, world = dist.get_rank(), dist.get_world_size()
    model = build(device, layers=LAYERS)
    whole = copy.deepcopy(model)
    ours, plain = (
        fewbits.optim.AdamW8bit([p for p in m.parameters() if p.requires_grad], lr=1e-3, min_8bit_size=64)
        for m in (model, whole)
    )
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}}
    config["zero_allow_untested_optimizer"] = True
    engine, *_ = deepspeed.initialize(model=model, optimizer=ours, config=config)

    def losses(t: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = inputs(device, t, rows=8).detach()
        loss = (engine(batch.chunk(world)[rank]) - 0.5).square().mean()
        expected = (whole(batch) - 0.5).square().mean()
        total = loss.detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total / world, expected.detach(), rtol=1e-3, atol=0)
        return loss, expected

    for t in range(4):
        loss, expected = losses(t)
        engine.backward(loss)
        engine.step()
        expected.backward()
        plain.step()
        plain.zero_grad()
    engine.save_checkpoint(folder)
    engine.load_checkpoint(folder)
    losses(9)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero(ranks: Ranks, stage: int, tmp_path: Path) -> None:
    ranks.stop()  # DeepSpeed keeps process groups of its own: fresh processes
    ranks(2, zero, stage, str(tmp_path), timeout=300.0)
    ranks.stop()
