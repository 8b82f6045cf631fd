"""The tables of one device in its memory, and the native calls that read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from fewbits import _native
from fewbits._launch import target_queue
from fewbits.optim import _paging
from fewbits.optim._distributed import Reducer, sums_of_rows
from fewbits.optim._families import FAMILIES

if TYPE_CHECKING:
    from fewbits.optim._config import Config
    from fewbits.optim._stepping import Stepping

_N, _FIRST_TILE = 6, 8  # of `Field` in rust/core/src/optim.rs


class Key(NamedTuple):
    """What the tensors of a launch have in common. `batch`: kernels take a limited number of groups."""

    bits: int
    dtype_p: int
    dtype_g: int
    batch: int
    evicted: bool


class Launch:
    """A slice of the tables."""

    def __init__(self, key: Key, configs: list[Config], chunk: _paging.Chunk | None) -> None:
        self.key, self.configs, self.chunk = key, configs, chunk
        self.entry = self.count = self.tile = self.tile_count = 0

    def groups(self) -> bytes:
        return b"".join([config.record for config in self.configs])


class Bundle:
    """All launches of one device."""

    def __init__(self, optimizer: Stepping, device: torch.device) -> None:
        self.device = self.home = device  # home: where the sums of all devices are joined
        self.family = FAMILIES[optimizer.optimizer_name]
        self.seed, self.stochastic = optimizer.seed, optimizer.stochastic_rounding
        self.launches: list[Launch] = []
        self.staged: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.rows: list[Any] = []
        self.sources: list[Any] = []
        self.sent: bytes | None = None
        self.sent_by_graph = False
        self.control: torch.Tensor | None = None
        self.partials: torch.Tensor | None = None
        self.reducer: Reducer | None = None  # of distributed parameters

    def place(self, p: torch.Tensor) -> int:
        """Return where a step updates a parameter: in its memory, or in a copy without gaps."""
        if p.is_contiguous() and not p.is_neg():
            return p.data_ptr()
        copy = torch.empty(p.shape, dtype=p.dtype, device=p.device)
        self.staged.append((p.detach(), copy))
        return copy.data_ptr()

    def add(self, launch: Launch, rows: list[Any], sources: list[Any]) -> None:
        launch.entry, launch.count = len(self.rows), len(rows)
        self.launches.append(launch)
        self.rows += rows
        self.sources += sources

    def finish(self) -> None:
        """Bring the tables to the device."""
        rows = np.array(self.rows, dtype=np.int64)
        counts = -(-rows[:, _N] // _native.OPTIM_TILE)
        tiles: list[np.ndarray[Any, Any]] = []
        for launch in self.launches:
            mine = slice(launch.entry, launch.entry + launch.count)
            rows[mine, _FIRST_TILE] = np.cumsum(counts[mine]) - counts[mine]
            launch.tile, launch.tile_count = sum(part.size for part in tiles), int(counts[mine].sum())
            tiles.append(np.repeat(np.arange(launch.count, dtype=np.int32), counts[mine]))
        self.tile_count = sum(part.size for part in tiles)
        self.tile_counts = counts.tolist()
        sources = np.array(self.sources, dtype=np.int64)
        self.index, self.offsets = sources[:, 0].copy(), sources[:, 1].copy()
        self.is_plain = bool((self.index == np.arange(len(sources))).all() and not self.offsets.any())
        self.rows, self.sources = [], []
        self.uploads: list[torch.Tensor] = []  # what a captured graph copies again in every replay
        self.tensors = self._upload(torch.from_numpy(rows))
        self.tiles = self._upload(torch.from_numpy(np.concatenate(tiles)))
        self.gradients = torch.empty(len(rows), dtype=torch.int64, device=self.device)
        self.workspace = torch.zeros(_native.OPTIM_WORKSPACE, dtype=torch.uint8, device=self.device)
        self.ratios = torch.empty(len(rows), device=self.device) if self.family.trust else None
        self.spare = self._pinned(len(rows))

    def _pinned(self, count: int) -> torch.Tensor | None:
        if self.device.type != "cuda":
            return None
        return torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=True)  # whatever the default device

    def _upload(self, table: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cpu":
            return table
        pinned = table.pin_memory()
        self.uploads.append(pinned)
        return pinned.to(self.device, non_blocking=True)

    def send(self, addresses: bytes, grads: list[torch.Tensor], capturing: bool) -> None:
        """Tell the device where the gradients are, if it does not know.

        Through fresh memory every time: the copy of the step before may not have been made yet, and a captured graph
        copies from the same memory again in every replay.
        """
        if addresses == self.sent and not capturing:
            return
        numbers = np.frombuffer(addresses, dtype=np.int64)
        if not self.is_plain or len(numbers) != len(self.index):
            numbers = numbers[self.index] + self.offsets
        if self.device.type == "cpu":
            self.gradients.numpy()[:] = numbers
        else:
            host = self.spare if capturing else self._pinned(len(numbers))
            if host is None:
                host = self._pinned(len(numbers))
                assert host is not None
            host.numpy()[:] = numbers
            self.gradients.copy_(host, non_blocking=True)
            if capturing:
                self.uploads.append(host)
                self.spare = None
            elif self.spare is None:
                self.spare = self._pinned(len(numbers))
        # A graph leaves its own addresses behind, at times that nobody knows.
        self.sent = None if capturing or self.sent_by_graph else addresses
        self.sent_by_graph = capturing or self.sent_by_graph

    # ---- native calls ----

    def gather(self) -> None:
        """Copy parameters with gaps to where they are updated."""
        if self.staged:
            torch._foreach_copy_([copy for _, copy in self.staged], [p for p, _ in self.staged])

    def scatter(self) -> None:
        if self.staged:
            torch._foreach_copy_([p for p, _ in self.staged], [copy for _, copy in self.staged])

    def norms(self) -> torch.Tensor:
        """Return the sums of the squares of the gradients, one a tile."""
        if self.partials is None:
            self.partials = torch.empty(max(1, self.tile_count), dtype=torch.float64, device=self.device)
        for launch in self.launches:
            if launch.tile_count:
                self._norms(launch, 0, 0, self.partials.data_ptr() + 8 * launch.tile)
        return self.partials[: self.tile_count]

    def row_sums(self, partials: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Return the sums of rows of the tables, and whose they are."""
        return sums_of_rows(partials, self.tile_counts), self.index.tolist()

    def _norms(self, launch: Launch, kind: int, control: int, partials: int) -> None:
        _native.optim_norms(
            kind,
            self.family.number,
            *launch.key[:3],
            *self._tables(launch),
            launch.groups(),
            control,
            partials,
            *target_queue(self.device),
        )

    def decide(
        self, partials: torch.Tensor | None, max_norm: float, scale: Any, inf: Any, skip_nonfinite: bool
    ) -> None:
        """Write the factor of the gradients, and whether to leave the step out, to `control`."""
        scale, inf = _as_float32(scale, self.device), _as_float32(inf, self.device)
        assert self.control is not None
        _native.optim_control(
            partials.data_ptr() if partials is not None and partials.numel() else 0,
            partials.numel() if partials is not None else 0,
            max_norm,
            scale.data_ptr() if scale is not None else 0,
            inf.data_ptr() if inf is not None else 0,
            skip_nonfinite,
            self.control.data_ptr(),
            *target_queue(self.device),
        )

    def _tables(self, launch: Launch) -> tuple[int, int, int, int, int]:
        return (
            self.tensors.data_ptr() + launch.entry * _native.OPTIM_FIELDS * 8,
            launch.count,
            self.gradients.data_ptr() + launch.entry * 8,
            self.tiles.data_ptr() + launch.tile * 4,
            launch.tile_count,
        )

    def step(self, control: int, capturing: bool) -> None:
        """Launch."""
        self.gather()
        ordinal, queue = target_queue(self.device)
        pagers: list[_paging.Pager] = []
        for launch in self.launches:
            chunk = launch.chunk
            if chunk is not None:
                if chunk.pager not in pagers:
                    chunk.pager.begin(capturing)
                    pagers.append(chunk.pager)
                chunk.pager.fetch(chunk.slot, chunk.copies)
            groups, ratios = launch.groups(), 0
            if self.ratios is not None:
                ratios = self.ratios.data_ptr() + 4 * launch.entry
                self._trust(launch, groups, control, ratios)
            _native.optim_step(
                self.family.number,
                *launch.key[:3],
                *self._tables(launch),
                groups,
                self.workspace.data_ptr(),
                control,
                ratios,
                self.seed,
                self.stochastic and launch.key.dtype_p == 2,
                ordinal,
                queue,
            )
            if chunk is not None:
                chunk.pager.send_home(chunk.slot, chunk.copies)
        for pager in pagers:
            pager.end(capturing)
        self.scatter()

    def _trust(self, launch: Launch, groups: bytes, control: int, ratios: int) -> None:
        tiles = max(launch.tile_count for launch in self.launches)
        if self.partials is None or self.partials.numel() < 2 * tiles:
            self.partials = torch.empty(2 * max(1, tiles, self.tile_count), dtype=torch.float64, device=self.device)
        partials = self.partials.data_ptr()
        if launch.tile_count:
            self._norms(launch, 1, control, partials)
        if self.reducer is not None:
            self._reduce(launch, self.reducer)
        tensors, count, *_ = self._tables(launch)
        _native.optim_trust(
            partials, tensors, count, launch.tile_count, self.family.number, groups, ratios, *target_queue(self.device)
        )
        if any(not config.has_ratio for config in launch.configs):
            assert self.ratios is not None
            found = self.ratios[launch.entry : launch.entry + count]
            found.masked_fill_(found == 0, 1.0)

    def _reduce(self, launch: Launch, reducer: Reducer) -> None:
        """Put the sums of whole tensors in the place of those of their shards."""
        assert self.partials is not None
        rows = slice(launch.entry, launch.entry + launch.count)
        counts = self.tile_counts[rows]
        sums = self.partials[: 2 * launch.tile_count].view(-1, 2)
        whole = reducer.reduce_rows(sums_of_rows(sums, counts), self.index[rows].tolist())
        sums.zero_()
        present = [i for i, count in enumerate(counts) if count]
        if present:
            firsts = np.cumsum([0, *counts[:-1]])[present]
            sums[torch.from_numpy(firsts).to(sums.device)] = whole[torch.tensor(present, device=sums.device)]


def _as_float32(value: Any, device: torch.device) -> torch.Tensor | None:
    if value is None or (isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.device == device):
        return value
    return torch.as_tensor(value, dtype=torch.float32, device=device)
