"""Quantized models of transformers with adapters of peft, on several ranks: FSDP2, FSDP1, DDP, accelerate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

import fewbits.optim
from fewbits.nn.shard import shard_of
from hf_models import IDS, install, load, make_llama
from ranks import Ranks

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:
    pytest.skip("this torch has no fully_shard", allow_module_level=True)

transformers: Any = install()
peft: Any = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(transformers, tmp_path_factory.mktemp("base"))


def with_adapters(path: str, name: str, device: torch.device) -> Any:
    torch.manual_seed(1)
    model = load(transformers, Path(path), name, device_map={"": str(device)})
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    return model.to(torch.float32) if name != "nf4-bfloat16-storage" else model.to(torch.bfloat16)


def compare(model: Any, whole: Any, device: torch.device, rtol: float) -> None:
    """Train both: one on this rank's sequences, one on all of them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ours, plain = (
        fewbits.optim.AdamW32bit([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in (model, whole)
    )
    ids = IDS.to(device)
    for _ in range(4):
        mine = ids.chunk(world)[rank]
        loss, expected = model(input_ids=mine, labels=mine).loss, whole(input_ids=ids, labels=ids).loss
        loss.backward()
        expected.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total / world, expected.detach(), rtol=rtol, atol=0)
        for optimizer in (ours, plain):
            optimizer.step()
            optimizer.zero_grad()


def qlora(device: torch.device, path: str, name: str, engine: str) -> None:
    model = with_adapters(path, name, device)
    whole = copy.deepcopy(model)
    rtol = 2e-2 if name == "nf4-bfloat16-storage" else 1e-3
    if engine == "DDP":
        compare(DistributedDataParallel(model), whole, device, rtol)
        return
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    sharded = [name for name, p in model.named_parameters() if shard_of(p) is not None]
    assert len(sharded) == 14, sharded
    compare(model, whole, device, rtol)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    expected = whole.state_dict()
    assert set(full) == set(expected)
    for key, value in expected.items():
        if "lora_" not in key:
            a, b = (t.cpu().contiguous().reshape(-1) for t in (full[key], value))
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), key


@pytest.mark.parametrize("engine", ["FSDP2", "DDP"])
@pytest.mark.parametrize("name", ["nf4-double", "nf4-bfloat16-storage", "int8"])
def test_qlora(ranks: Ranks, base: Path, name: str, engine: str) -> None:
    ranks(2, qlora, str(base), name, engine)
