"""What modules with an int8 weight have in common: saving and loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fewbits.nn.base import QuantizedModule
from fewbits.nn.int8_params import Int8Params
from fewbits.nn.shard import Shard, distributed, fill, gathered, shard_of
from fewbits.nn.split import Split, joined, split_8bit

# The only layout there is: codes row by row. Checkpoints name it by this number, or by its name.
_ROW = 0


class Module8bit(QuantizedModule):
    """A module whose parameter ``weight`` is a matrix in int8 with one scale a row.

    The state dict holds the codes as ``weight`` and, beside it, ``SCB`` and ``weight_format``.
    """

    _parameter_class = Int8Params
    _with_state = "torch.int8 codes of that shape with SCB beside them"

    weight: Int8Params

    def _scales(self) -> torch.Tensor | None:
        """Return the scales of a quantized weight."""
        raise NotImplementedError

    def _keep_part(self, split: Split) -> None:
        scales = self._scales()
        if scales is None:
            raise ValueError("module.weight: expected scales beside the codes, got None as weight.SCB and state.SCB")
        CB, SCB = split_8bit(self.weight.data, scales, split.dim, split.rank, split.world, self._sizes())
        self._forget_scales()
        self._parameters["weight"] = Int8Params(CB, requires_grad=False, CB=CB, SCB=SCB)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        codes: Any = self.weight
        if shard_of(codes) is not None:
            codes, SCB = distributed(codes)
            if not keep_vars:
                destination[f"{prefix}weight"] = codes
        else:
            SCB = self._scales()
        if self._split is not None and not keep_vars:
            codes, SCB = gathered(codes), None if SCB is None else gathered(SCB)
            if SCB is not None:
                destination[f"{prefix}weight"] = joined(self._split, codes.data, self._split.dim)
                SCB = joined(self._split, SCB, 0) if self._split.dim == 0 else SCB
                self._join_bias(destination, prefix, self._split)
        if SCB is not None:
            destination[f"{prefix}SCB"] = SCB if keep_vars else SCB.detach()
            destination[f"{prefix}weight_format"] = torch.tensor(_ROW, dtype=torch.uint8)

    # Distributed checkpoints find the entries of a state dict by walking attributes.

    @property
    def SCB(self) -> torch.Tensor:  # noqa: N802  (as the state dict has it)
        """The scales of a quantized weight."""
        SCB = self._scales() if shard_of(self.weight) is None else distributed(self.weight)[1]
        if SCB is None:
            raise AttributeError(f"{type(self).__name__}: no 'SCB' in a module whose weight is not quantized")
        return SCB

    @property
    def weight_format(self) -> torch.Tensor:
        """The number of the layout of the codes, as state dicts have it."""
        return torch.tensor(_ROW, dtype=torch.uint8)

    def _statistics(self, state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        names = (f"{prefix}SCB", f"{prefix}weight_format")
        return {name: state_dict[name] for name in names if name in state_dict}

    def _read_weight(
        self, weight: Int8Params, entry: torch.Tensor, stats: Mapping[str, Any], assign: bool
    ) -> Int8Params:
        shape, device = self._weight_shape(), self._load_device(weight, entry, assign)
        stats = {name.rpartition(".")[2]: value for name, value in stats.items()}
        if weight.has_fp16_weights:
            raise ValueError(
                "weight: expected floating-point values for a module with has_fp16_weights=True, got a quantized weight"
            )
        if entry.shape != shape or entry.dtype != torch.int8:
            raise ValueError(
                f"weight: expected torch.int8 of shape {tuple(shape)} beside SCB, "
                f"got {entry.dtype} of shape {tuple(entry.shape)}"
            )
        SCB = stats.get("SCB")
        if not isinstance(SCB, torch.Tensor) or not SCB.is_floating_point() or SCB.numel() != shape[0]:
            got = f"{SCB.numel()} of {SCB.dtype}" if isinstance(SCB, torch.Tensor) else type(SCB).__name__
            raise ValueError(f"SCB: expected {shape[0]} floating-point values, one a row, got {got}")
        check_format(stats.get("weight_format", _ROW))
        codes, scales = entry.detach(), SCB.detach().view(-1)
        if not assign:
            codes, scales = codes.to(device, copy=True), scales.to(device, torch.float32, copy=True)
        return Int8Params(codes, requires_grad=False, CB=codes, SCB=scales.to(device, torch.float32))

    def _cut_entries(self, state_dict: dict[str, Any], prefix: str, split: Split) -> dict[str, Any]:
        state_dict, name = super()._cut_entries(state_dict, prefix, split), f"{prefix}weight"
        entry, SCB = state_dict.get(name), state_dict.get(f"{prefix}SCB")
        if not isinstance(entry, torch.Tensor) or entry.shape != split.shape:
            return state_dict
        codes = gathered(entry.detach())
        if not isinstance(SCB, torch.Tensor):
            if codes.dtype == torch.int8:
                return state_dict
            quantized = Int8Params(codes, requires_grad=False).to(self.weight.device)
            codes, SCB = quantized.data, quantized.SCB
        assert SCB is not None
        codes, SCB = split_8bit(codes, gathered(SCB.detach()), split.dim, split.rank, split.world)
        return {**state_dict, name: codes, f"{prefix}SCB": SCB}

    def _blank(self, shard: Shard) -> Int8Params:
        return Int8Params(torch.empty(0, dtype=torch.int8, device=shard.device), requires_grad=False)

    def _take_whole(self, weight: Any, loaded: Int8Params) -> None:
        assert loaded.SCB is not None
        fill(weight, loaded.data, loaded.SCB)

    def _read_values(self, weight: Int8Params, entry: torch.Tensor, device: torch.device, assign: bool) -> Int8Params:
        values = entry.detach()
        if not values.is_floating_point():
            raise ValueError(f"SCB: expected it in the state dict beside a weight of {values.dtype}, got none")
        if weight._is_quantized():
            return Int8Params(values, requires_grad=False).to(device)
        if not assign:
            dtype = values.dtype if weight.is_meta else weight.dtype
            values = values.to(device, dtype, copy=True)
        return Int8Params(values, weight.requires_grad, has_fp16_weights=weight.has_fp16_weights)


def check_format(value: Any) -> None:
    """Raise unless a checkpoint's codes are row by row. The layouts of older GPUs are not read."""
    if isinstance(value, torch.Tensor):
        value = value.tolist() if value.numel() <= 1 else f"a tensor of shape {tuple(value.shape)}"
        while isinstance(value, list) and len(value) == 1:
            value = value[0]
    if value not in (_ROW, "row"):
        raise ValueError(f"weight_format: expected {_ROW} (row), got {value!r}")
