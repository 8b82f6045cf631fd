"""Tensors, states and tables for ``_native.optim_step``, with the oracle's copy of each beside them."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np
import torch

import oracle_optim as oracle
from arrays import as_numpy, as_tensor, assert_same_bits
from fewbits import _native
from fewbits._checks import DTYPES as NUMBERS
from fewbits._launch import target_queue
from oracle_optim import Group, State, State8
from strategies import fill

GUARD = 16
_WORDS = ("lr", "lr_address", "beta1", "beta2", "beta3", "alpha", "t_alpha", "t_beta3", "eps", "weight_decay")
_MORE = ("dampening", "lr_decay", "trust", "flags")


def pack(groups: list[Group], lr_addresses: list[int]) -> bytes:
    out = b""
    for group, address in zip(groups, lr_addresses, strict=True):
        words = [address if name == "lr_address" else getattr(group, name) for name in (*_WORDS, *_MORE)]
        out += struct.pack("=dQ11dQ2Q", *words, 0, 0)
    return out


class Guarded:
    """A tensor at an odd element offset, with elements around it that nobody may write."""

    def __init__(self, values: torch.Tensor, shift: int, device: torch.device) -> None:
        self.start, self.n = GUARD + shift, values.numel()
        self.memory = torch.full((self.n + 2 * GUARD + shift,), 77, dtype=values.dtype, device=device)
        self.view = self.memory[self.start : self.start + self.n]
        self.view.copy_(values)

    def address(self) -> int:
        return self.memory.data_ptr() + self.start * self.memory.element_size()

    def check(self, expected: np.ndarray, what: str) -> None:
        __tracebackhide__ = True
        assert_same_bits(self.view, expected, what)
        assert bool((self.memory[: self.start] == 77).all()), f"{what}: written before the start"
        assert bool((self.memory[self.start + self.n :] == 77).all()), f"{what}: written past the end"


@dataclass
class Piece:
    """One entry of the table."""

    p: np.ndarray
    g: np.ndarray
    group: int
    ordinal: int
    first: int
    t: int  # steps done
    states: list[State]
    shift: int
    advance: bool = True
    ratio: np.float32 = oracle.ONE
    memory: dict[str, Guarded] = field(default_factory=dict)


def fresh_states(family: str, group: Group, n: int, bits: int, rng: np.random.Generator, zero: bool) -> list[State]:
    """States of nothing, or of anything."""
    maps = oracle.state_maps(family, group)
    blocks = -(-n // oracle.BLOCK)
    states: list[State] = []
    for table in maps:
        if bits == 8:
            codes = np.zeros(n, np.uint8) if zero else rng.integers(0, 256, n).astype(np.uint8)
            absmax = np.zeros(blocks) if zero else 10.0 ** rng.uniform(-9, 1, blocks)
            states.append(State8(codes, absmax.astype(np.float32), table))
        else:
            values = rng.standard_normal(n) * 10.0 ** rng.uniform(-6, 0, n)
            values = np.zeros(n) if zero else values if table is oracle.SIGNED and family != "adagrad" else abs(values)
            states.append(values.astype(np.float32))
    return states


class Launch:
    """All entries of one call, on a device."""

    def __init__(
        self, family: str, bits: int, groups: list[Group], pieces: list[Piece], dtypes: tuple[torch.dtype, torch.dtype],
        device: torch.device, seed: int = 0, stochastic: bool = False, lr_on_device: bool = False,
    ) -> None:  # fmt: skip
        self.family, self.bits, self.groups, self.pieces = family, bits, groups, pieces
        self.dtypes, self.device, self.seed, self.stochastic = dtypes, device, seed, stochastic
        self.workspace = torch.zeros(_native.OPTIM_WORKSPACE, dtype=torch.uint8, device=device)
        self.counters = torch.tensor([piece.t for piece in pieces], dtype=torch.int64, device=device)
        self.lrs = torch.tensor([group.lr for group in groups], dtype=torch.float32, device=device)
        if lr_on_device:
            self.groups = [Group(**{**vars(group), "lr": float(np.float32(group.lr))}) for group in groups]
        sent = [Group(**{**vars(group), "lr": 1e9}) for group in groups] if lr_on_device else groups
        self.packed = pack(sent, [self.lrs.data_ptr() + 4 * i if lr_on_device else 0 for i in range(len(groups))])
        for piece in pieces:
            self._place(piece)
        self._tables()

    def _place(self, piece: Piece) -> None:
        def put(name: str, array: np.ndarray, dtype: torch.dtype) -> None:
            piece.memory[name] = Guarded(as_tensor(np.ascontiguousarray(array), dtype), piece.shift, self.device)

        put("p", piece.p, self.dtypes[0])
        put("g", piece.g, self.dtypes[1])
        for name, states in self._slots(piece).items():
            if not states:
                continue
            if self.bits == 8:
                put(name, np.concatenate([state.codes for state in states]), torch.uint8)
                put(f"absmax{name[-1]}", np.concatenate([state.absmax for state in states]), torch.float32)
            else:
                put(name, np.concatenate(states), torch.float32)

    def _slots(self, piece: Piece) -> dict[str, list[State]]:
        """Which of a rule's states lie in state1, state2, state3."""
        states = piece.states
        if self.family == "ademamix":
            return {"state1": states[:2], "state2": states[2:]}
        slots = {f"state{i + 1}": [state] for i, state in enumerate(states)}
        group = self.groups[piece.group]
        if self.family == "rmsprop" and group.has(oracle.CENTERED) and group.beta2 == 0:
            return {"state1": states[:1], "state3": states[1:]}
        return slots

    def _tables(self) -> None:
        rows, tiles = [], []
        for index, piece in enumerate(self.pieces):
            names = ("p", "state1", "state2", "state3", "absmax1", "absmax2")
            addresses = [piece.memory[name].address() if name in piece.memory else 0 for name in names]
            counter = self.counters.data_ptr() + 8 * index
            rest = [piece.p.size, counter, len(tiles), piece.group, piece.ordinal, piece.first, piece.advance]
            rows.append([*addresses, *rest, 0, 0, 0])
            tiles += [index] * -(-piece.p.size // oracle.TILE)
        gradients = [piece.memory["g"].address() for piece in self.pieces]
        self.tile_count = len(tiles)
        self.tensors = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self.tiles = torch.tensor(tiles, dtype=torch.int32, device=self.device)
        self.gradients = torch.tensor(gradients, dtype=torch.int64, device=self.device)

    def _head(self) -> tuple[int, ...]:
        family = oracle.FAMILIES.index(self.family)
        return (family, self.bits, NUMBERS[self.dtypes[0]], NUMBERS[self.dtypes[1]])

    def _table(self) -> tuple[int | bytes, ...]:
        count = len(self.pieces)
        addresses = (self.tensors.data_ptr(), count, self.gradients.data_ptr(), self.tiles.data_ptr())
        return (*addresses, self.tile_count, self.packed)

    def step(self, control: torch.Tensor | None = None) -> None:
        """One native step."""
        ratios = torch.tensor([piece.ratio for piece in self.pieces], dtype=torch.float32, device=self.device)
        has_ratio = self.family in ("lamb", "lars")
        _native.optim_step(
            *self._head(),
            *self._table(),
            self.workspace.data_ptr(),
            0 if control is None else control.data_ptr(),
            ratios.data_ptr() if has_ratio else 0,
            self.seed,
            self.stochastic,
            *target_queue(self.tensors.device),
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def norms(self, kind: int, control: torch.Tensor | None = None) -> np.ndarray:
        """One or two sums a tile."""
        partials = torch.full((self.tile_count * (1 + kind) + 1,), 77, dtype=torch.float64, device=self.device)
        _native.optim_norms(
            kind,
            *self._head(),
            *self._table(),
            0 if control is None else control.data_ptr(),
            partials.data_ptr(),
            *target_queue(self.tensors.device),
        )
        self.partials = partials
        assert partials[-1].item() == 77
        return partials[:-1].cpu().numpy().reshape(self.tile_count, 1 + kind)

    def trust(self) -> np.ndarray:
        """The trust ratios, from the last sums of kind 1."""
        ratios = torch.full((len(self.pieces),), 77, dtype=torch.float32, device=self.device)
        _native.optim_trust(
            self.partials.data_ptr(),
            self.tensors.data_ptr(),
            len(self.pieces),
            self.tile_count,
            oracle.FAMILIES.index(self.family),
            self.packed,
            ratios.data_ptr(),
            *target_queue(self.tensors.device),
        )
        return ratios.cpu().numpy()

    def expect(self, scale: np.float32 | None = None) -> None:
        """Take the oracle's step."""
        for piece in self.pieces:
            random = oracle.Random(self.seed, piece.ordinal, piece.first) if self.stochastic else None
            group = self.groups[piece.group]
            piece.p, piece.states = oracle.step(
                self.family, group, piece.t + 1, piece.p, piece.g, piece.states, scale, piece.ratio, random
            )
            piece.t += piece.advance

    def check(self) -> None:
        """Everything in memory is the oracle's, to the bit."""
        __tracebackhide__ = True
        for index, piece in enumerate(self.pieces):
            what = f"{self.family} entry {index} step {piece.t}"
            piece.memory["p"].check(piece.p, f"{what}: p")
            piece.memory["g"].check(piece.g, f"{what}: g")
            for name, states in self._slots(piece).items():
                if states and self.bits == 8:
                    absmax = f"absmax{name[-1]}"
                    piece.memory[absmax].check(np.concatenate([s.absmax for s in states]), f"{what}: {absmax}")
                    piece.memory[name].check(np.concatenate([s.codes for s in states]), f"{what}: {name}")
                elif states:
                    piece.memory[name].check(np.concatenate(states), f"{what}: {name}")
        assert self.counters.tolist() == [piece.t for piece in self.pieces]
        assert not bool(self.workspace.any())


def make_piece(
    family: str, group: Group, index: int, n: int, bits: int, dtypes: tuple[torch.dtype, torch.dtype],
    recipes: list[str], seed: int, shift: int = 0, t: int = 0, first: int = 0, ordinal: int = 0, zero: bool = True,
) -> Piece:  # fmt: skip
    """An entry with values of `recipes`, block by block."""
    p = as_numpy(fill(recipes, n, oracle.BLOCK, dtypes[0], seed)).copy()
    g = as_numpy(fill(recipes[::-1], n, oracle.BLOCK, dtypes[1], seed + 1)).copy()
    states = fresh_states(family, group, n, bits, np.random.default_rng(seed), zero)
    return Piece(p, g, index, ordinal, first, t, states, shift)
