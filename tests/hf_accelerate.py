"""accelerate's FSDP2 on gloo and the CPU: it offers that for accelerators alone."""

from __future__ import annotations

import os
from typing import Any

import torch

WRAPPED = "LlamaDecoderLayer"


def plugin(accelerate: Any, **options: Any) -> Any:
    """Return accelerate's plugin for FSDP2, as a config file would make it."""
    return accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        **{
            "auto_wrap_policy": "transformer_based_wrap",
            "transformer_cls_names_to_wrap": [WRAPPED],
            "cpu_ram_efficient_loading": False,
            **options,
        },
    )


def forget(accelerate: Any) -> None:
    """Let the next accelerator begin anew, on the processes that there are."""
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        del os.environ[name]
    if "WORLD_SIZE" in os.environ:
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"]}
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def pretend(accelerate: Any, device: torch.device) -> None:
    """Let accelerate take processes on the CPU for those of several GPUs; from there on everything is its own."""
    accelerate.PartialState(cpu=device.type == "cpu")
    if device.type == "cpu":
        accelerate.PartialState._shared_state["distributed_type"] = accelerate.DistributedType.MULTI_GPU


def accelerator_of(accelerate: Any, device: torch.device, make_plugin: Any) -> Any:
    """Return an accelerator that runs FSDP2 on a device, the CPU included."""
    forget(accelerate)
    pretend(accelerate, device)
    return accelerate.Accelerator(cpu=device.type == "cpu", fsdp_plugin=make_plugin())
