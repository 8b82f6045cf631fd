"""Parameters of any module and any shape in 4 bits, dequantized when the module reads them.

For weights that are no linear layer's, such as the stacked experts of a mixture. The module's own code stays as it is:
reading the attribute gives the dequantized tensor, once a forward, and the state dict holds the packed bytes under the
parameter's name with their state beside them, as `Linear4bit` has it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize as _parametrize

from fewbits.functional import dequantize_4bit, quantize_4bit
from fewbits.nn.params import as_packed, to_storage
from fewbits.quant_state import QuantState

__all__ = ["Bnb4bitParametrization", "replace_parameter_4bit", "replace_parameter_4bit_prequantized"]


class Bnb4bitParametrization(nn.Module):
    """Makes a tensor of packed 4-bit codes.

    Parameters
    ----------
    quant_state : QuantState
        What the codes stand for. It moves to where the codes are.

    Examples
    --------
    >>> codes, state = quantize_4bit(torch.ones(2, 2, 32))
    >>> Bnb4bitParametrization(state)(codes).shape
    torch.Size([2, 2, 32])
    """

    def __init__(self, quant_state: QuantState) -> None:
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: torch.Tensor) -> torch.Tensor:
        """Return the dequantized tensor, in the shape and dtype that it was quantized from."""
        state = self.quant_state
        if not torch.compiler.is_compiling() and state.absmax.device != quantized_param.device:
            state = self.quant_state = state.moved(quantized_param.device)
        return dequantize_4bit(quantized_param, state)


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    blocksize: int | None = None,
) -> None:
    """Hold a parameter of a module in 4 bits from now on.

    Parameters
    ----------
    module : torch.nn.Module
        Its owner.
    param_name : str
        The attribute.
    compress_statistics : bool
        Double quantization.
    quant_type : str
        ``"nf4"`` or ``"fp4"``.
    blocksize : int, optional
        A power of two from 32 to 4096; 64 by default.

    Raises
    ------
    AttributeError
        If there is no such attribute.
    TypeError
        If it is no parameter.
    ValueError
        If it cannot be quantized, as one that is in 4 bits already. The module is as it was.

    Examples
    --------
    >>> experts = nn.Module()
    >>> experts.up = nn.Parameter(torch.ones(4, 8, 32))
    >>> replace_parameter_4bit(experts, "up")
    >>> experts.up.shape, sorted(experts.state_dict())
    (torch.Size([4, 8, 32]), ['up', 'up.absmax', 'up.quant_map', 'up.quant_state.bitsandbytes__nf4'])
    """
    original = _own_parameter(module, param_name)
    codes, state = quantize_4bit(
        original.data, blocksize=blocksize, compress_statistics=compress_statistics, quant_type=quant_type
    )
    setattr(module, param_name, nn.Parameter(codes, requires_grad=False))
    _hold(module, param_name, state)


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: Mapping[str, Any], device: torch.device
) -> None:
    """Read a parameter that holds packed codes as what those stand for from now on.

    Parameters
    ----------
    module : torch.nn.Module
        Its owner.
    param_name : str
        The attribute.
    qs_dict : mapping
        The entries of a state dict that describe it; see `QuantState.from_dict`.
    device : torch.device
        Where the state goes.

    Raises
    ------
    AttributeError
        If there is no such attribute.
    TypeError
        If it is no parameter.
    ValueError
        Naming the entry that is missing or corrupt, or if the parameter has another size than the codes. The module is
        as it was.

    Examples
    --------
    >>> codes, state = quantize_4bit(torch.ones(4, 8, 32))
    >>> experts = nn.Module()
    >>> experts.up = nn.Parameter(codes, requires_grad=False)
    >>> replace_parameter_4bit_prequantized(experts, "up", state.as_dict(packed=True), torch.device("cpu"))
    >>> experts.up.shape
    torch.Size([4, 8, 32])
    """
    original = _own_parameter(module, param_name)
    state = QuantState.from_dict(qs_dict, device=device)
    if state.shape is None or state.quant_type is None:
        raise ValueError("qs_dict: expected the state of a 4-bit tensor, got one without quant_type or shape")
    expected, got = -(-state.shape.numel() // 2), original.numel() * original.element_size()
    if not expected <= got < expected + original.element_size():
        raise ValueError(
            f"{param_name}: expected {expected} bytes of packed codes for shape {tuple(state.shape)}, got {got}"
        )
    _hold(module, param_name, state)


def _own_parameter(module: nn.Module, name: str) -> nn.Parameter:
    if not hasattr(module, name):
        raise AttributeError(f"Module does not have parameter {name!r}: expected the name of one as param_name")
    parameter = getattr(module, name)
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"Parameter {name!r} is not an instance of nn.Parameter, got a {type(parameter).__name__}")
    return parameter


def _hold(module: nn.Module, name: str, state: QuantState) -> None:
    # unsafe: the dequantized tensor has another shape and dtype than what is stored.
    _parametrize.register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
    _register_parametrization_hooks(module, name)


def _register_parametrization_hooks(module: nn.Module, param_name: str) -> None:
    """Write the parameter to state dicts and read it from them under its own name, and dequantize it once a forward."""
    save = partial(_parametrized_state_dict_post_hook, param_name=param_name)
    register = getattr(module, "register_state_dict_post_hook", None) or module._register_state_dict_hook
    register(save)  # public since torch 2.5
    # By its private name, which older versions of torch know as well.
    module._register_load_state_dict_pre_hook(partial(_load_parametrized, param_name=param_name), with_module=True)
    module.register_forward_pre_hook(_enable_parametrization_cache)
    # A forward that ends in an exception, as activation checkpointing makes them do, must switch the cache off too.
    module.register_forward_hook(_disable_parametrization_cache, always_call=True)


def _enable_parametrization_cache(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    _parametrize._cache_enabled += 1


def _disable_parametrization_cache(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    # Called even where the other hook was not, if an earlier one raised: below 0, the cache would stay on for good.
    _parametrize._cache_enabled = max(0, _parametrize._cache_enabled - 1)
    if not _parametrize._cache_enabled:
        _parametrize._cache = {}


def _parametrized_state_dict_post_hook(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    *,
    param_name: str = "weight",
    **kwargs: Any,
) -> None:
    stored = f"{prefix}parametrizations.{param_name}.original"
    if stored not in state_dict:
        return
    ours = _ours(module, param_name)
    if ours is None:
        return
    name = f"{prefix}{param_name}"
    state_dict[name] = state_dict.pop(stored)
    for key, value in ours.quant_state.as_dict(packed=True).items():
        state_dict[f"{name}.{key}"] = value


def _load_parametrized(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
    *,
    param_name: str,
) -> None:
    """Put the codes that a state dict holds where torch looks for them, and take over their state."""
    name, ours = f"{prefix}{param_name}", _ours(module, param_name)
    entries = {key: value for key, value in state_dict.items() if key.startswith(f"{name}.")}
    if ours is None or name not in state_dict or not entries:
        return
    codes = state_dict.pop(name)
    for key in entries:
        del state_dict[key]
    original: torch.Tensor = module.parametrizations[param_name].original  # type: ignore[index, union-attr]
    stored = f"{prefix}parametrizations.{param_name}.original"
    assign = bool(local_metadata.get("assign_to_params_buffers", False))
    try:
        state = QuantState.from_dict(entries, codes.device if assign or original.is_meta else original.device)
        if state.shape != ours.quant_state.shape:
            raise ValueError(f"shape: expected {tuple(ours.quant_state.shape or ())}, got {tuple(state.shape or ())}")
        packed = as_packed(param_name, codes, state)
        if packed.dtype != original.dtype:
            packed = to_storage(packed, state, original.dtype)
    except (TypeError, ValueError) as error:
        error_msgs.append(f"While loading {name}: {error}")
        state_dict[stored] = original  # nothing else is wrong
        return
    state_dict[stored] = packed.view(original.shape)
    # A copy: what is loaded must not change when the state dict does.
    ours.quant_state = state if assign else copy.deepcopy(state)


def _ours(module: nn.Module, param_name: str) -> Bnb4bitParametrization | None:
    """Return what dequantizes a parameter of a module, if that is in 4 bits."""
    parametrizations: Any = getattr(module, "parametrizations", ())
    if param_name not in parametrizations:
        return None
    return next((p for p in parametrizations[param_name] if isinstance(p, Bnb4bitParametrization)), None)
