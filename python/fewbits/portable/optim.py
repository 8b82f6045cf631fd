"""All steps of one device in plain torch operations: what `optim._launches.Bundle` is for native code."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fewbits._checks import block_count
from fewbits._launch import dense
from fewbits.optim import _states
from fewbits.optim._distributed import Reducer, sums_of_rows
from fewbits.optim._families import FAMILIES, unpack
from fewbits.portable import optim_norms as norms
from fewbits.portable.blockwise import PIECE, decode, encode, normalize
from fewbits.portable.optim_coefficients import Moment
from fewbits.portable.optim_random import halves, round_stochastically
from fewbits.portable.optim_rules import RULES, lamb_direction
from fewbits.portable.tables import Code, named

if TYPE_CHECKING:
    from fewbits.optim._config import Config
    from fewbits.optim._stepping import Stepping

_BLOCK = _states.BLOCKSIZE


class Plane(NamedTuple):
    """A flat state, with the maxima of its blocks and its code where it has 8 bits."""

    values: torch.Tensor
    absmax: torch.Tensor | None
    code: Code | None

    def read(self, first: int, last: int) -> torch.Tensor:
        """Return elements in float32."""
        part = self.values[first:last]
        if self.absmax is None or self.code is None:
            return part
        maxima = self.absmax[first // _BLOCK : block_count(last, _BLOCK)]
        return decode(part, maxima, self.code.values, _BLOCK)

    def write(self, first: int, last: int, values: torch.Tensor) -> None:
        """Take over elements in float32."""
        if self.absmax is None or self.code is None:
            self.values[first:last] = values
            return
        t, maxima = normalize(values, _BLOCK)
        self.values[first:last] = encode(t[: last - first], self.code)
        self.absmax[first // _BLOCK : block_count(last, _BLOCK)] = maxima


class Entry(NamedTuple):
    """A parameter and what its step reads. Not its dict of states, which knows the plan: that would be a cycle."""

    gradient: int  # its place among those of the optimizer
    ordinal: int  # its place among the optimizer's parameters
    p: torch.Tensor
    step: torch.Tensor
    planes: list[Plane]
    config: Config
    first: int  # where a shard begins in the parameter


class PortableBundle:
    """All parameters of one device. A step waits for the device once: the counters are read."""

    def __init__(self, optimizer: Stepping, device: torch.device) -> None:
        self.device, self.name = device, optimizer.optimizer_name
        self.family = FAMILIES[self.name]
        self.seed, self.stochastic = optimizer.seed, optimizer.stochastic_rounding
        self.home = torch.device("cpu")  # where sums are joined: float64 is there
        self.entries: list[Entry] = []
        self.grads: list[torch.Tensor] = []
        self.control: torch.Tensor | None = None
        self.reducer: Reducer | None = None  # of distributed parameters

    def send(self, addresses: bytes, grads: list[torch.Tensor], capturing: bool) -> None:
        """Take the gradients of all parameters of the optimizer."""
        if capturing and self.device.type == "cuda":
            raise RuntimeError(f"step: expected no graph to be captured on {self.device}, whose steps wait for it")
        self.grads = grads

    def _gradient(self, entry: Entry) -> torch.Tensor:
        return dense(self.grads[entry.gradient].detach()).view(-1)

    def norms(self) -> torch.Tensor:
        """Return the sums of the squares of the gradients, one a tile, in float64."""
        found = []
        for entry in self.entries:
            g = self._gradient(entry)
            found += [norms.tile_sums(g[first:last].to(torch.float32)) for first, last in _pieces(g.numel())]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.float64, device="cpu")

    def row_sums(self, partials: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Return the sums of entries, and whose they are."""
        tiles = [-(-entry.p.numel() // norms.TILE) for entry in self.entries]
        return sums_of_rows(partials, tiles), [entry.gradient for entry in self.entries]

    def decide(
        self, partials: torch.Tensor | None, max_norm: float, scale: Any, inf: Any, skip_nonfinite: bool
    ) -> None:
        """Write the factor of the gradients, and whether to leave the step out, to `control`."""
        grad_scale, found_inf = (None if value is None else float(value) for value in (scale, inf))
        factor, leave_out = norms.decide(partials, max_norm, grad_scale, found_inf, skip_nonfinite)
        words = struct.unpack("=i", struct.pack("=f", factor))[0], int(leave_out)
        assert self.control is not None
        self.control.copy_(torch.tensor(words, dtype=torch.int32, device="cpu"))

    def step(self, control: int, capturing: bool) -> None:
        """Update parameters and states."""
        scale, leave_out = None, False
        if control and self.control is not None:
            bits, flag = self.control.cpu().tolist()
            scale, leave_out = struct.unpack("=f", struct.pack("=i", bits))[0], flag != 0
        if not leave_out and self.entries:
            counters = torch.stack([entry.step for entry in self.entries]).cpu().tolist()
            for entry, count in zip(self.entries, counters, strict=True):
                self._update(entry, Moment(unpack(entry.config.record), count + 1), scale)
                entry.step.add_(1)
        self.grads = []

    def _update(self, entry: Entry, c: Moment, scale: float | None) -> None:
        p, g, planes = dense(entry.p.detach()), self._gradient(entry), entry.planes
        ratio = self._ratio(entry, c, p.view(-1), g, scale) if self.family.trust and c.group["trust"] else 1.0
        flat, stochastic = p.view(-1), self.stochastic and p.dtype == torch.bfloat16
        for first, last in _pieces(flat.numel()):
            wide, states = RULES[self.name](c, *_read(flat, g, planes, scale, first, last), ratio)
            if stochastic:
                random = halves(entry.first + first, last - first, c.t, entry.ordinal, self.seed, self.device)
                wide = round_stochastically(wide, random)
            flat[first:last] = wide
            for plane, values in zip(planes, states, strict=True):
                plane.write(first, last, values)
        if p.data_ptr() != entry.p.data_ptr() or not entry.p.is_contiguous() or entry.p.is_neg():
            entry.p.detach().copy_(p)

    def _ratio(self, entry: Entry, c: Moment, p: torch.Tensor, g: torch.Tensor, scale: float | None) -> float:
        planes = entry.planes
        sums: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for first, last in _pieces(p.numel()):
            wide, u, states = _read(p, g, planes, scale, first, last)
            if self.name == "lamb":
                u, _ = lamb_direction(c, wide, u, states)
            sums[0].append(norms.tile_sums(wide))
            sums[1].append(norms.tile_sums(u))
        decay = None if self.name == "lamb" else c.group["weight_decay"]
        if self.reducer is not None:
            mine = torch.tensor([[norms.total(torch.cat(part)) if part else 0.0 for part in sums]], dtype=torch.float64)
            whole = self.reducer.reduce_rows(mine, [entry.gradient])[0]
            sums = [whole[:1]], [whole[1:]]
        if not sums[0]:
            return 1.0
        return norms.trust_ratio(torch.cat(sums[0]), torch.cat(sums[1]), c.group["trust"], decay)


def entry_of(
    family: str,
    gradient: int,
    ordinal: int,
    p: torch.Tensor,
    state: dict[str, Any],
    config: Config,
    first: int = 0,
) -> Entry:
    """Return a parameter with its states, in the order of its rule."""
    return Entry(gradient, ordinal, p, state["step"], _planes(family, state, config.names), config, first)


def _pieces(n: int) -> Iterator[tuple[int, int]]:
    for first in range(0, n, PIECE):
        yield first, min(n, first + PIECE)


def _read(
    p: torch.Tensor, g: torch.Tensor, planes: list[Plane], scale: float | None, first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return parameter, gradient and states of a piece in float32."""
    gradient = g[first:last].to(torch.float32)
    if scale is not None:
        gradient = gradient * scale
    return p[first:last].to(torch.float32), gradient, [plane.read(first, last) for plane in planes]


def _planes(family: str, state: dict[str, Any], names: tuple[str, ...]) -> list[Plane]:
    """Return flat states. AdEMAMix has two averages in its first."""
    found = []
    for name in names:
        values = state[name]
        halved = 2 if family == "ademamix" and name == "state1" else 1
        flat = values.view(halved, -1)
        if values.dtype != torch.uint8:
            found += [Plane(part, None, None) for part in flat]
            continue
        code = named(_states.MAPS[_states.map_name(name)], values.device)
        maxima = state[_states.maxima_name(name)].view(halved, -1)
        found += [Plane(part, absmax, code) for part, absmax in zip(flat, maxima, strict=True)]
    return found
