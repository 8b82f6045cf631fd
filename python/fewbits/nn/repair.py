"""Helpers of bitsandbytes for state dicts and for weights that lost their class."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch

from fewbits.nn.module8bit import check_format
from fewbits.nn.params import Params4bit

__all__ = ["fix_4bit_weight_quant_state_from_module", "maybe_rearrange_weight"]


def fix_4bit_weight_quant_state_from_module(module: Any) -> None:
    """Give the weight of a 4-bit module its state back, which sharding took from it.

    Forwards do not need this: the modules look their state up themselves.

    Parameters
    ----------
    module : Linear4bit or Embedding4bit
        Whose ``quant_state`` is that of its ``weight``.

    Raises
    ------
    ValueError
        If the module has no state, or the weight is not packed.
    """
    weight = module.weight
    if getattr(weight, "quant_state", None) is not None:
        return
    state = getattr(module, "quant_state", None)
    if state is None:
        raise ValueError("module.quant_state: expected the state of its weight, got None; move the module to a device")
    if weight.dim() != 2 or weight.shape[1] != 1:
        raise ValueError(f"module.weight: expected packed codes of shape (k, 1), got {tuple(weight.shape)}")
    if isinstance(weight, Params4bit):
        weight.quant_state, weight.bnb_quantized = state, True
    else:
        module.weight = Params4bit(
            weight.data, requires_grad=False, quant_state=state, quant_storage=weight.dtype, module=module
        )


def maybe_rearrange_weight(
    state_dict: MutableMapping[str, torch.Tensor],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Take ``weight_format`` out of a state dict, as a hook before a load; the layout must be row by row.

    Raises
    ------
    ValueError
        If it is one of the layouts of older GPUs.
    """
    if f"{prefix}weight" in state_dict:
        check_format(state_dict.pop(f"{prefix}weight_format", "row"))
