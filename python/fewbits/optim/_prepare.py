"""Before a launch: tensors that a step can update, each with the states that it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from fewbits._checks import DTYPES
from fewbits.optim import _paging, _states
from fewbits.optim._families import check_8bit
from fewbits.optim._paged_states import is_capturing

if TYPE_CHECKING:
    from fewbits.optim._config import Config
    from fewbits.optim._stepping import Stepping


class Member(NamedTuple):
    """A parameter that takes part, and where it stands."""

    group_index: int
    position: int  # in its group
    ordinal: int  # among all of the optimizer's
    p: torch.Tensor


def check_tensors(members: list[Member], params: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
    """Raise unless a step can update these parameters by these gradients."""
    for m, p, g in zip(members, params, grads, strict=True):
        where = f"parameter {m.position} of group {m.group_index}"
        for what, tensor in ((where, p), (f"gradient of {where}", g)):
            if tensor.layout is not torch.strided:
                raise ValueError(
                    f"{what}: expected a dense tensor, got layout {tensor.layout}; sparse is not supported"
                )
            if tensor.dtype not in DTYPES:
                raise ValueError(f"{what}: expected float32, float16 or bfloat16, got {tensor.dtype}")
            if tensor.is_meta:
                raise ValueError(f"{what}: expected a tensor with values, got one on {tensor.device}")
        if g.shape != p.shape or g.device != p.device:
            raise ValueError(
                f"gradient of {where}: expected shape {tuple(p.shape)} on {p.device}, "
                f"got {tuple(g.shape)} on {g.device}"
            )
        if torch._debug_has_internal_overlap(p) == 1 and p.numel() > 1:
            raise ValueError(f"{where}: expected a tensor of distinct elements, got strides {tuple(p.stride())}")
        if not isinstance(p, torch.nn.Parameter) and type(p) is not torch.Tensor:
            raise TypeError(f"{where}: expected a plain tensor, got {type(p).__name__}")


def prepare_states(
    optimizer: Stepping, members: list[Member], params: list[torch.Tensor], configs: list[Config]
) -> None:
    """Create states that are missing, bring all to their devices, and check them."""
    _adopt(optimizer)
    capturing = is_capturing()
    family = optimizer.optimizer_name
    for m, p, config in zip(members, params, configs, strict=True):
        state = optimizer.state[m.p]
        if "step" not in state or any(name not in state for name in config.names):
            if capturing and p.is_cuda:
                raise RuntimeError(
                    f"step: expected parameter {m.position} of group {m.group_index} to have a state before a CUDA "
                    "graph is captured, got none; run a step before the capture"
                )
            optimizer.init_state(optimizer.param_groups[m.group_index], m.p, m.group_index, m.position)
        step = state["step"]
        if not isinstance(step, torch.Tensor) or step.dtype != torch.int64 or step.device != p.device or step.dim():
            state["step"] = torch.full((), int(step), dtype=torch.int64, device=p.device)
        _states.check(f"state of parameter {m.position} of group {m.group_index}", state, family, p, config.names)
        paged = _paging.is_paged_state(optimizer, p)
        for key in (*_paging.tensors_of(state), *(key for key in _states.MAPS if key in state)):
            tensor = state[key]
            if tensor.device != p.device and not (paged and key not in _states.MAPS):
                state[key] = tensor.to(p.device)
            if not tensor.is_contiguous():
                state[key] = state[key].contiguous()
        if _states.bits_of(state) == 8 and config.names:
            _check_8bit(optimizer, config)
    optimizer._settle_pages(params)


def _check_8bit(optimizer: Stepping, config: Config) -> None:
    check_8bit(optimizer.optimizer_name, config.values)


def _adopt(optimizer: Stepping) -> None:
    """Make the optimizer's states ones whose changes are noticed, whoever put them there."""
    state = optimizer.state
    if type(state) is not _states.States or state.watch is not optimizer._watch:
        optimizer.state = _states.States(optimizer._watch, state)
