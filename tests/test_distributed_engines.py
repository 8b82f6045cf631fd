"""DDP and FSDP1 on quantized models: the losses of one process, and optimizer states that are saved and resumed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.nn.parallel import DistributedDataParallel

import fewbits.optim
from ranks import Ranks

try:
    from distributed_model import backward_of_both, build, inputs
except ImportError:
    pytest.skip("this torch has no fully_shard", allow_module_level=True)

MIXED: list[Any] = [
    ("4", {"quant_type": "nf4"}, 128, 64),
    ("4", {"quant_type": "nf4", "quant_storage": torch.bfloat16, "compress_statistics": False}, 64, 50),
    ("8", {"threshold": 2.0}, 50, 33),
]
FLOAT: list[Any] = [
    ("4", {"quant_type": "nf4", "quant_storage": torch.float32}, 128, 64),
    ("4", {"quant_type": "fp4", "quant_storage": torch.float32, "compress_statistics": False}, 64, 33),
    ("4", {"quant_type": "nf4", "quant_storage": torch.float32, "bias": False}, 33, 50),
]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def compare(engine: nn.Module, whole: nn.Module, device: torch.device, make: Any, steps: int = 6) -> Any:
    """Train both, one on this rank's part of the batch; return the optimizer of the engine."""
    ours, plain = make(trainable(engine)), make(trainable(whole))
    for t in range(steps):
        backward_of_both(engine, whole, inputs(device, t, rows=8).detach())
        for optimizer in (ours, plain):
            optimizer.step()
            optimizer.zero_grad()
    return ours


def adam(params: list[nn.Parameter]) -> Any:
    return fewbits.optim.AdamW32bit(params, lr=1e-2)


def adam8(params: list[nn.Parameter]) -> Any:
    return fewbits.optim.AdamW8bit(params, lr=1e-3, min_8bit_size=64)


def lion(params: list[nn.Parameter]) -> Any:
    return fewbits.optim.Lion32bit(params, lr=1e-3)


def lion8(params: list[nn.Parameter]) -> Any:
    return fewbits.optim.Lion8bit(params, lr=1e-4, min_8bit_size=64)


# ---- DDP -----------------------------------------------------------------------------------------------------------


def replicas(device: torch.device, recompute: bool) -> None:
    model = build(device, layers=MIXED)
    whole = copy.deepcopy(model)
    for layer in model:
        layer.recompute = recompute
    if dist.get_rank():  # what the first rank has is broadcast, codes and scales of others are not looked at
        nn.init.zeros_(model[0].up.weight)
    engine = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    ours = compare(engine, whole, device, adam8)
    engine.load_state_dict({f"module.{key}": value for key, value in whole.state_dict().items()})
    again = adam8(trainable(engine))
    again.load_state_dict(ours.state_dict())
    for p in trainable(engine):
        for key, value in ours.state[p].items():
            assert torch.equal(value, again.state[p][key]), key


@pytest.mark.parametrize("recompute", [False, True])
def test_ddp(ranks: Ranks, recompute: bool) -> None:
    ranks(2, replicas, recompute)


# ---- FSDP1 ---------------------------------------------------------------------------------------------------------


def wrapped(model: nn.Sequential, use_orig_params: bool) -> FullyShardedDataParallel:
    """Wrap as peft's policy does: what is trained by itself, and each layer."""
    options: dict[str, Any] = {"use_orig_params": use_orig_params, "sharding_strategy": ShardingStrategy.FULL_SHARD}
    p = next(model.parameters())
    options["device_id"] = p.device if p.is_cuda else torch.device("cpu")
    for i, layer in enumerate(model):
        if not use_orig_params:
            layer.down = FullyShardedDataParallel(layer.down, **options)
            layer.up = FullyShardedDataParallel(layer.up, **options)
        model[i] = FullyShardedDataParallel(layer, **options)
    return FullyShardedDataParallel(model, **options)


def flat(device: torch.device, use_orig_params: bool, eight: bool) -> None:
    model = build(device, layers=FLOAT)
    whole = copy.deepcopy(model)
    engine = wrapped(model, use_orig_params)
    make = adam8 if eight else adam
    if use_orig_params:
        # One state: with gloo, torch 2.15 gives the second state of any optimizer in the place of the first.
        make = lion8 if eight else lion
    ours = compare(engine, whole, device, make)
    if eight and not use_orig_params:  # the size of the whole decides, not that of the shard
        for p, state in ours.state.items():
            numel = p._unpadded_unsharded_size.numel()
            assert (state["state1"].dtype == torch.uint8) == (numel >= 64), numel
    # Saved and resumed: the same steps again.
    saved = FullyShardedDataParallel.optim_state_dict(engine, ours)
    again = make(trainable(engine))
    again.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(engine, again, saved))
    for p in trainable(engine):
        assert set(ours.state[p]) == set(again.state[p]), (set(ours.state[p]), set(again.state[p]))
        for key, value in ours.state[p].items():
            assert torch.equal(value, again.state[p][key]), key


@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1(ranks: Ranks, use_orig_params: bool, eight: bool) -> None:
    ranks(2, flat, use_orig_params, eight)


def full(device: torch.device, use_orig_params: bool) -> None:
    """A full state dict has the packed codes as one process has them, for adapters and for export."""
    from torch.distributed.fsdp import FullStateDictConfig, StateDictType

    model = build(device, layers=FLOAT)
    expected = copy.deepcopy(model).state_dict()
    engine = wrapped(model, use_orig_params)
    with FullyShardedDataParallel.state_dict_type(engine, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
        given = engine.state_dict()
    for name, value in expected.items():
        if name in given:
            a, b = given[name].cpu(), value.cpu()
            assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), name
    missing = sorted(set(expected) - set(given))
    assert not missing, missing


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_full_state_dict(ranks: Ranks, use_orig_params: bool) -> None:
    ranks(2, full, use_orig_params)
