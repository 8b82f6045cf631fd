"""accelerate's FSDP2, alone and under transformers' Trainer: QLoRA by its own plugin, with nothing of ours to set."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import fewbits.optim
from fewbits.nn.shard import shard_of
from hf_accelerate import WRAPPED, accelerator_of, forget, plugin, pretend
from hf_models import DATA, IDS, install, losses, make_llama
from ranks import Ranks

try:
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
except ImportError:
    pytest.skip("this torch has no fully_shard", allow_module_level=True)

from test_hf_distributed import with_adapters

transformers: Any = install()
accelerate: Any = pytest.importorskip("accelerate")
STEPS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(transformers, tmp_path_factory.mktemp("base"))


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "offloaded": {"cpu_offload": CPUOffloadPolicy(pin_memory=False)},
    "from the first": {"cpu_ram_efficient_loading": True},
    "recomputed": {"reshard_after_forward": False, "activation_checkpointing": True},
    "sharded before": {"state_dict_type": "FULL_STATE_DICT", "auto_wrap_policy": "no_wrap"},
}


def one_process(whole: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    optimizer = fewbits.optim.AdamW8bit([p for p in whole.parameters() if p.requires_grad], lr=1e-2)
    expected = []
    for _ in range(STEPS):
        loss = whole(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.detach())
    return expected


def prepared(model: Any, way: str, device: torch.device) -> tuple[Any, Any, Any]:
    if way == "sharded before":
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    accelerator = accelerator_of(accelerate, device, lambda: plugin(accelerate, **WAYS[way]))
    optimizer = fewbits.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return accelerator, *accelerator.prepare(model, optimizer)


def trains(device: torch.device, path: str, name: str, way: str, folder: str) -> int:
    """Losses are one process's, and those of a run that is saved and resumed too; return how many weights are cut."""
    model = with_adapters(path, name, device)
    whole, fresh = copy.deepcopy(model), copy.deepcopy(model)
    ids = IDS.repeat(2, 1).to(device)
    mine, expected = ids.chunk(dist.get_world_size())[dist.get_rank()], one_process(whole, ids)
    rtol = 2e-2 if name == "nf4-bfloat16-storage" else 1e-3

    def run(accelerator: Any, model: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            loss = model(input_ids=mine, labels=mine, use_cache=False).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            torch.testing.assert_close(accelerator.reduce(loss.detach(), "mean"), expected[step], rtol=rtol, atol=0)

    first = prepared(model, way, device)
    run(*first, range(STEPS // 2))
    first[0].save_state(folder)
    run(*first, range(STEPS // 2, STEPS))
    again, model, optimizer = prepared(fresh, way, device)
    again.load_state(folder)
    run(again, model, optimizer, range(STEPS // 2, STEPS))
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    for key, value in whole.state_dict().items():
        if "lora_" not in key:
            a, b = (t.cpu().contiguous().reshape(-1) for t in (full[key], value))
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), key
    return sum(shard_of(p) is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("nf4-double", "plain"),
        ("nf4-double", "sharded before"),
        ("nf4-bfloat16-storage", "offloaded"),
        ("nf4-bfloat16-storage", "from the first"),
        ("int8", "recomputed"),
    ],
)
def test_prepare(ranks: Ranks, base: Path, name: str, way: str, tmp_path: Path) -> None:
    recent = tuple(map(int, accelerate.__version__.split(".")[:2])) >= (1, 13)
    if way == "from the first" and not recent:
        pytest.skip("this accelerate loads 4-bit weights from the first rank as if they were values")
    counts = ranks(2, trains, str(base), name, way, str(tmp_path))
    left_whole = name == "nf4-double" and way != "sharded before" and recent  # integers, by accelerate
    assert counts == [0 if left_whole else 14] * 2


# ---- the Trainer ---------------------------------------------------------------------------------------------------


def trainer_of(model: Any, folder: str, device: torch.device, world: int, **options: Any) -> Any:
    forget(accelerate)
    if world > 1:
        os.environ["FSDP_VERSION"] = "2"  # as `accelerate launch` does; older transformers do not say it themselves
    arguments = transformers.TrainingArguments(
        folder,
        use_cpu=device.type == "cpu",
        max_steps=STEPS,
        per_device_train_batch_size=4 // world,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        **{"optim": "adamw_bnb_8bit", **options},
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        save_steps=STEPS // 2,
    )
    if world > 1:
        pretend(accelerate, device)
    return transformers.Trainer(model, arguments, train_dataset=DATA)


def under_the_trainer(device: torch.device, path: str, name: str, kind: str, folder: str) -> list[float]:
    """Train, resume in the middle, and save; return the losses."""
    config = {
        "fsdp_version": 2,
        "transformer_layer_cls_to_wrap": [WRAPPED],
        "state_dict_type": kind,
        "cpu_ram_efficient_loading": False,
    }
    options = {"fsdp": "full_shard auto_wrap", "fsdp_config": config}
    model = with_adapters(path, name, device)
    fresh, world = copy.deepcopy(model), dist.get_world_size()
    first = trainer_of(model, folder, device, world, **options)
    first.train()
    again = trainer_of(fresh, folder, device, world, **options)
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}")
    # transformers 4 leaves the state of the optimizer in the checkpoint, torch's AdamW's too.
    rtol = 1e-6 if int(transformers.__version__.split(".")[0]) >= 5 else 1e-2
    torch.testing.assert_close(losses(again)[-2:], losses(first)[-2:], rtol=rtol, atol=0)
    return losses(first)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("nf4-double", "FULL_STATE_DICT"), ("nf4-bfloat16-storage", "SHARDED_STATE_DICT")],
)
def test_trainer(ranks: Ranks, base: Path, name: str, kind: str, tmp_path: Path) -> None:
    given = ranks(2, under_the_trainer, str(base), name, kind, str(tmp_path / "two"))
    device = torch.device("cpu")
    alone = trainer_of(with_adapters(str(base), name, device), str(tmp_path / "one"), device, 1, save_strategy="no")
    alone.train()
    for values in given:
        torch.testing.assert_close(values, losses(alone), rtol=2e-2 if "bfloat16" in name else 1e-3, atol=0)
