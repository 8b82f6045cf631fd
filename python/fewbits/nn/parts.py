"""What tensor parallelism asks of modules with a quantized weight: to keep a part of it, to save and load the whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fewbits.nn.shard import distribute_alike, gathered
from fewbits.nn.split import SIZES, Split, check_split, joined, part_of_bias


def _mark_alike(part: Any, whole: Any) -> None:
    """Leave marks on a part that others have left on the whole, such as that it need not be initialized."""
    for key, value in whole.__dict__.items():
        if key != "prepared":
            part.__dict__.setdefault(key, value)


class PartedModule(nn.Module):
    """A module that may have a part of its weight, or wait for a weight to take a part of."""

    _split: Split | None = None  # which part of the weight this has, under tensor parallelism
    _awaited: Split | None = None  # which part it will take of a weight that is not here yet
    _bias_awaited = False  # as well; it may come before the weight or after it
    _whole_bias: torch.Tensor | None = None  # where ranks add up their outputs, and the first one adds a frozen bias
    _outside: torch.Tensor | None = None  # which indices an embedding leaves to other ranks

    def _weight_shape(self) -> torch.Size:
        """Return the shape of the weight, (N, K)."""
        raise NotImplementedError

    def _sizes(self) -> tuple[str, str]:
        """Return the names of the attributes that are the shape of the weight."""
        return SIZES

    def _keep_part(self, split: Split) -> None:
        """Put this rank's part of the weight in its place; raise with nothing changed if there is none."""
        raise NotImplementedError

    def _take_part(self, split: Split) -> None:
        """Keep this rank's part of the weight, which is quantized, and of the bias."""
        whole = self._parameters["weight"]
        self._keep_part(split)
        _mark_alike(self._parameters["weight"], whole)
        self._split, self._awaited = split, None
        size = self._sizes()[split.dim]
        setattr(self, size, getattr(self, size) // split.world)
        bias = self._parameters.get("bias")
        if bias is not None and not bias.is_meta:
            self._take_bias(bias, split)

    def _take_bias(self, bias: torch.Tensor, split: Split) -> None:
        self._bias_awaited = False
        if split.dim == 1 and bias.requires_grad:
            return  # whole on every rank
        self._whole_bias = bias.detach() if split.dim == 1 else None
        part = nn.Parameter(part_of_bias(bias.detach(), split), requires_grad=bias.requires_grad)
        self._parameters["bias"] = part
        _mark_alike(part, bias)

    def _await(self, split: Split) -> None:
        """Take a part of the weight when it comes, as a checkpoint is loaded."""
        check_split(split.shape, split.dim, split.world, self._blocksize(), self._sizes())
        self._awaited, self._bias_awaited = split, True

    def _blocksize(self) -> int | None:
        """Return how many elements of the flattened weight have a scale in common; None: one a row."""
        return None

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register as ``nn.Module.register_parameter``; of what is awaited, this rank's part is kept."""
        super().register_parameter(name, param)
        if param is None or param.is_meta:
            return
        if name == "weight" and self._awaited is not None and getattr(param, "_is_quantized", bool)():
            self._take_part(self._awaited)
        elif name == "bias" and self._bias_awaited and self._split is not None:
            self._take_bias(param, self._split)

    def _cut_entries(self, state_dict: dict[str, Any], prefix: str, split: Split) -> dict[str, Any]:
        """Return a state dict of a whole module with this rank's part in its place."""
        bias = state_dict.get(f"{prefix}bias")
        if isinstance(bias, torch.Tensor) and bias.shape[0] == split.shape[0]:
            whole = gathered(bias.detach())
            own = self._parameters.get("bias")
            late = split.dim == 1 and own is not None and own.requires_grad
            part = whole if late else part_of_bias(whole, split)
            # Where FSDP2 has cut it again, over another dimension of the mesh.
            state_dict[f"{prefix}bias"] = distribute_alike(part, own)
            self._whole_bias = whole.clone() if split.dim == 1 and not late else None
        return state_dict

    def _join_bias(self, destination: dict[str, Any], prefix: str, split: Split) -> None:
        """Put the bias of the whole module into a state dict."""
        name = f"{prefix}bias"
        if name in destination:
            if split.dim == 0:
                destination[name] = joined(split, gathered(destination[name]), 0)
            elif self._whole_bias is not None:
                destination[name] = self._whole_bias
