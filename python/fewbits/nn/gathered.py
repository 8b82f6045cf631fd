"""Quantized parameters in memory that FSDP2 gathers, frees and gathers again."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch

from fewbits import _int8_prepared, _launch, _prepared
from fewbits.nn.int8_params import Int8Params, Scales
from fewbits.nn.params import Params4bit, keywords
from fewbits.nn.shard import Recipe
from fewbits.quant_state import QuantState

# FSDP2 makes a parameter of what it is given: with the sizes that it has, and detached.
_IDENTITIES = {torch.as_strided, torch.Tensor.as_strided, torch.Tensor.detach}


class _Gathered:
    """What parameters in gathered memory have in common; comes before the quantized parameter among the bases."""

    gathered = True

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _IDENTITIES and isinstance(args[0], cls):
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[misc]


class Gathered4bit(_Gathered, Params4bit):
    """All codes of a sharded `Params4bit`, with all of their scales, while a layer works."""


class Gathered8bit(_Gathered, Int8Params):
    """All codes of a sharded `Int8Params`, with all of their scales, while a layer works."""


class Recipe4bit(Recipe):
    """What it takes to make a `Gathered4bit`: a state without its block maxima."""

    def __init__(self, parameter: Params4bit, state: QuantState) -> None:
        super().__init__(parameter, state.absmax)
        self.keywords = {**keywords(state, parameter.quant_storage), "quant_state": None}
        self.take(state)
        if parameter.module is not None:
            self.modules.append(weakref.ref(parameter.module))

    def take(self, state: QuantState) -> None:
        """Take over all of a state but its block maxima, which are dealt out."""
        self.state = copy.copy(state)
        self.state.absmax = state.absmax.new_empty(0)

    def with_maxima(self, absmax: Any, device: torch.device) -> QuantState:
        """Return the state with these block maxima, distributed ones perhaps, on a device."""
        state = copy.copy(self.state.moved(device))
        state.absmax = absmax
        return state

    def whole(self, codes: torch.Tensor, scales: torch.Tensor) -> Gathered4bit:
        """Return the parameter that lies in gathered memory."""
        state = self.with_maxima(scales, codes.device)
        return Gathered4bit(codes, False, **{**self.keywords, "quant_state": state}, bnb_quantized=True)

    def scales_of(self, parameter: Any) -> torch.Tensor:
        """Return the scales of a gathered parameter."""
        absmax: torch.Tensor = parameter.quant_state.absmax
        return absmax

    def refresh(self, parameter: Any) -> None:
        """Prepare a parameter whose memory has been gathered again."""
        state: QuantState = parameter.quant_state
        if state.offset is not self.state.offset or state.state2 is not self.state.state2:  # loaded, or on a device
            here = self.state.moved(parameter.device)
            state.offset, state.state2, state.code = here.offset, here.state2, here.code
            self.state = here
        super().refresh(parameter)

    def prepare(self, parameter: Any) -> Any:
        """Return what products need of a gathered parameter."""
        return _prepared.prepare(parameter, parameter.quant_state)

    def elsewhere(self, parameter: Any) -> Any:
        """Return what was prepared before for where the parameter is now, or None if that will not do."""
        return self.prepared.elsewhere(parameter, parameter.quant_state)


class Recipe8bit(Recipe):
    """What it takes to make a `Gathered8bit`."""

    def whole(self, codes: torch.Tensor, scales: torch.Tensor) -> Gathered8bit:
        """Return the parameter that lies in gathered memory."""
        return Gathered8bit(codes, False, SCB=scales)

    def scales_of(self, parameter: Any) -> torch.Tensor:
        """Return the scales of a gathered parameter."""
        SCB: torch.Tensor = parameter.SCB
        return SCB

    def prepare(self, parameter: Any) -> Any:
        """Return what products need of a gathered parameter."""
        return _int8_prepared.prepare(parameter, parameter.SCB) or Scales(parameter.SCB)

    def elsewhere(self, parameter: Any) -> Any:
        """Return what was prepared before for where the parameter is now, or None if that will not do."""
        return None if type(self.prepared) is Scales else self.prepared.elsewhere(parameter, parameter.SCB)


def recipe_of(parameter: Any) -> Recipe | None:
    """Return what shards of a parameter need, or None if it is not quantized, or its scales are elsewhere."""
    if not parameter._is_quantized() or parameter.is_meta:
        return None
    if isinstance(parameter, Params4bit):
        state = parameter.quant_state
        return None if state is None or state.shape is None else Recipe4bit(parameter, state)
    if isinstance(parameter, Int8Params):
        scales = parameter.SCB
        if scales is None and parameter.prepared is not None:
            scales = parameter.prepared.scales  # a module took them over
        return None if scales is None else Recipe8bit(parameter, scales)
    return None


_launch.PLAIN_TYPES.update((Gathered4bit, Gathered8bit))
