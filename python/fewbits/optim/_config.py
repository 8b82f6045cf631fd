"""Hyperparameters that parameters share, packed for the native step when they change."""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch

from fewbits._backend import is_portable
from fewbits.optim._families import FAMILIES, check_values, pack, parse_betas

if TYPE_CHECKING:
    from fewbits.optim._stepping import Stepping


class Config:
    """The hyperparameters of a parameter group on one device, or of one parameter with overrides."""

    def __init__(
        self, optimizer: Stepping, group: dict[str, Any], override: dict[str, Any] | None, device: torch.device
    ) -> None:
        self.group, self.override, self.device = group, override, device
        self.name = optimizer.optimizer_name
        self.defaults, self.args, self.decoupled = optimizer.defaults, optimizer.args, optimizer._decoupled
        self.keys = FAMILIES[self.name].keys
        self.read = itemgetter(*self.keys)
        self.seen: Any = None
        self.record = b""
        self.names: tuple[str, ...] = ()  # of the states that the rule needs
        self.values: dict[str, Any] = {}
        self.has_ratio = True  # of rules that have one
        self.buffer: torch.Tensor | None = None

    def refresh(self) -> bool:
        """Take over what changed in the group. Return whether other states are needed now.

        Raises
        ------
        ValueError
            Naming the hyperparameter that the rule cannot use.
        """
        group = self.group
        source = group if self.override is None else {**group, **self.override}
        try:
            found = self.read(source)
        except KeyError:  # a group from elsewhere that lacks some
            found = self.read({**self.defaults, **source})
        lr, address = found[0], 0
        if isinstance(lr, torch.Tensor):
            lr, address = self._from_tensor(lr)
        trust = source.get("max_unorm", self.args.max_unorm)
        seen = (lr, address, found[1:], trust)
        if seen == self.seen:
            return False
        values = {**dict(zip(self.keys, found, strict=True)), "max_unorm": trust, "decoupled": self.decoupled}
        values.setdefault("betas", ())
        if isinstance(values["betas"], str):
            values["betas"] = parse_betas(values["betas"])
        check_values(self.name, {**values, "lr": lr}, 32)
        if "weight_decay" not in values:
            values["weight_decay"] = 0.0
        family = FAMILIES[self.name]
        self.record = pack(family, values, float(lr), address)
        names, before = family.states(values), self.names
        self.seen, self.values, self.names = seen, values, names
        self.has_ratio = bool(trust)
        return names != before

    def _from_tensor(self, lr: torch.Tensor) -> tuple[float, int]:
        """Return (number, 0), or (0, the address of the float32 that a kernel reads when it runs)."""
        if lr.device.type == "cpu" or self.device.type == "cpu" or is_portable(self.device):
            return float(lr), 0
        if lr.dtype == torch.float32 and lr.device == self.device:
            return 0.0, lr.data_ptr()
        if self.buffer is None:
            self.buffer = torch.empty((), dtype=torch.float32, device=self.device)
        self.buffer.copy_(lr.detach().reshape(()), non_blocking=True)
        return 0.0, self.buffer.data_ptr()
