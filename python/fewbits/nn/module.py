"""What modules with a 4-bit weight have in common: moving, saving, loading, and finding the state of the weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fewbits.nn.params import Params4bit, as_packed, keywords, to_storage
from fewbits.quant_state import QuantState

if TYPE_CHECKING:
    from typing_extensions import Self


class Module4bit(nn.Module):
    """A module whose parameter ``weight`` is a matrix held in 4 bits. Comes before torch's class among the bases.

    The state dict holds the packed bytes and, beside them, all that it takes to read them back, under bitsandbytes'
    names; ``load_state_dict`` takes those, and takes floating-point weights too.
    """

    weight: Params4bit
    quant_state: QuantState | None
    quant_storage: torch.dtype

    def _weight_shape(self) -> torch.Size:
        """Return the shape of the weight, (N, K)."""
        raise NotImplementedError

    def _hold(self, compress_statistics: bool, quant_type: str, quant_storage: torch.dtype) -> None:
        """Put the weight that torch's class made into a `Params4bit`, to be quantized on its first move."""
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.quant_state = None
        self.quant_storage = quant_storage

    def _find_state(self, tracing: bool) -> QuantState:
        weight = self.weight
        state: QuantState | None = getattr(weight, "quant_state", None)
        if state is None:
            # FSDP and others put plain tensors in the place of parameters; the module remembers what they are.
            state = self.quant_state
            if state is None:
                raise RuntimeError(
                    f"{type(self).__name__}: expected a quantized weight, got a floating-point one; "
                    "move the module to a device first, as by .to('cuda') or .to('cpu')"
                )
            if not tracing and state.absmax.device != weight.device:
                state = self.quant_state = state.moved(weight.device)
        elif not tracing and self.quant_state is not state:
            self.quant_state = state
        return state

    # ---- moving ----------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Apply `fn` to weight and bias. nn.Module's own way would lose the class of the weight on a move to meta."""
        weight = self._parameters["weight"]
        if not isinstance(weight, Params4bit):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            if self.quant_state is not None and weight is not None and not self.weight.is_meta:
                self.quant_state = self.quant_state.moved(self.weight.device)
            return self
        with torch.no_grad():
            applied = fn(weight)
            if not isinstance(applied, Params4bit):
                applied = Params4bit(applied, weight.requires_grad and applied.is_floating_point(), **weight.__dict__)
            grad = None if weight.grad is None or applied.bnb_quantized else fn(weight.grad)
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters["weight"] = weight
        if applied is not weight:
            weight.grad = None
            self._replace_weight(applied, keep_identity=applied.is_meta == weight.is_meta)
            self.weight.grad = grad
        if applied.bnb_quantized:
            self.quant_state = applied.quant_state
        return self

    def _replace_weight(self, weight: Params4bit, keep_identity: bool) -> None:
        if keep_identity:
            self.weight.data = weight
        else:
            self._parameters["weight"] = weight

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if isinstance(self.weight, Params4bit):
            self.weight.module = self  # a pickled parameter leaves its module behind

    # ---- state dicts -----------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state: QuantState | None = getattr(self.weight, "quant_state", None)
        if state is not None:
            for key, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight, name = self._parameters["weight"], f"{prefix}weight"
        load = super()._load_from_state_dict
        if not isinstance(weight, Params4bit) or not any(key.startswith(name) for key in state_dict):
            load(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            return
        stats = {key: value for key, value in state_dict.items() if key.startswith(f"{name}.")}
        rest = {key: value for key, value in state_dict.items() if key not in stats}
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        try:
            loaded = self._read_weight(weight, rest.pop(name, None), stats, assign)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"While loading {name}: {error}")
            return
        own_bias, bias = self._parameters.get("bias"), rest.get(f"{prefix}bias")
        if own_bias is not None and own_bias.is_meta and isinstance(bias, torch.Tensor) and not assign:
            # There is nothing to copy into: a copy takes its place.
            rest[f"{prefix}bias"] = bias.detach().clone()
            local_metadata = {**local_metadata, "assign_to_params_buffers": True}
        self._parameters["weight"] = None
        try:
            load(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        finally:
            self._parameters["weight"] = weight
        self._replace_weight(loaded, keep_identity=not assign and not weight.is_meta)
        self.quant_storage = loaded.quant_storage
        self.quant_state = loaded.quant_state

    def _read_weight(
        self, weight: Params4bit, entry: torch.Tensor | None, stats: Mapping[str, Any], assign: bool
    ) -> Params4bit:
        """Return the weight that a state dict holds, for the device of the present one, without touching anything."""
        if not isinstance(entry, torch.Tensor):
            raise ValueError(f"weight: expected a tensor, got {type(entry).__name__}")
        shape = self._weight_shape()
        device = entry.device if assign or weight.is_meta else weight.device
        if not stats:
            if entry.shape != shape:
                raise ValueError(
                    f"weight: expected shape {tuple(shape)}, or packed codes with weight.absmax and the rest of their "
                    f"state beside them, got shape {tuple(entry.shape)} alone"
                )
            return self._read_values(weight, entry, device, assign)
        state = QuantState.from_dict(stats, device)
        if state.shape != shape:
            raise ValueError(f"shape: expected {tuple(shape)}, got {tuple(state.shape or ())}")
        packed = as_packed("weight", entry, state).to(device)
        if not assign:
            packed, state = to_storage(packed.clone(), state, self.quant_storage), copy.deepcopy(state)
        requires_grad = weight.requires_grad and packed.is_floating_point()
        kwargs = keywords(state, packed.dtype)
        return Params4bit(packed, requires_grad, **kwargs, module=self, bnb_quantized=True)

    def _read_values(self, weight: Params4bit, entry: torch.Tensor, device: torch.device, assign: bool) -> Params4bit:
        attributes = {**weight.__dict__, "quant_state": None, "bnb_quantized": False, "module": None}
        values = entry.detach()
        if not weight.bnb_quantized:
            if not assign:
                dtype = values.dtype if weight.is_meta else weight.dtype
                values = values.to(device, dtype, copy=True)
            loaded = Params4bit(values, weight.requires_grad, **attributes)
        else:
            loaded = Params4bit(values, **attributes).to(device)
        loaded.module = self
        return loaded
