"""Which states of an optimizer live in host memory, and when that changes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from fewbits._backend import is_portable
from fewbits.optim import _paging, _states

_BYTES_EACH = 12  # of a paged state at most, an element


def local(tensor: Any) -> Any:
    """Return this process's part of a distributed tensor, and any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class PagedStates(torch.optim.Optimizer):
    """An optimizer that decides where its states live: ``state[p]["state1"]`` is a tensor there."""

    is_paged: bool
    page_budget: int | float | None
    _watch: _states.Watch
    _pagers: dict[torch.device, _paging.Pager]
    _rooms: dict[torch.device, _paging.Room]

    def _is_paged_state(self, p: torch.Tensor) -> bool:
        return _paging.is_paged_state(self, p)

    def _allocator(self, p: torch.Tensor) -> Callable[[tuple[int, ...], torch.dtype], torch.Tensor]:
        if self._is_paged_state(p):
            room = self._room(p.device)
            room.changed(room.resident)
            room.resident += _BYTES_EACH * p.numel()
            allowed = room.bytes() if self.page_budget is None else self.page_budget
            if allowed != 1.0 and allowed < room.resident:
                return lambda shape, dtype: _paging.pinned_empty(shape, dtype, p.device)
        return lambda shape, dtype: torch.empty(shape, dtype=dtype, device=p.device)

    def _pager(self, device: torch.device) -> _paging.Pager:
        if device not in self._pagers:
            self._pagers[device] = _paging.Pager(device)
        return self._pagers[device]

    def _room(self, device: torch.device) -> _paging.Room:
        if device not in self._rooms:
            self._rooms[device] = _paging.Room(device)
        return self._rooms[device]

    def _budget(self, device: torch.device, total: int) -> int:
        if self.page_budget is None:
            return self._room(device).bytes()
        return int(self.page_budget * total) if isinstance(self.page_budget, float) else self.page_budget

    def _paged_states(self, device: torch.device) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """Return the states on a device, or away from it, that can be paged, in the order of their parameters."""
        params = (p for group in self.param_groups for p in group["params"])
        owners = ((self.state[p], local(p)) for p in params if p.device == device and p in self.state)
        return [(state, p) for state, p in owners if self._is_paged_state(p) and _paging.tensors_of(state)]

    def _settle_pages(self, params: list[torch.Tensor]) -> None:
        """Decide which paged states stay on the GPU, and bring each where it belongs."""
        if not self.is_paged:
            return
        unpaged = sorted({p.device.type for p in params if p.device.type == "cpu" or is_portable(p.device)})
        if unpaged and not self.__dict__.get("_said_unpaged"):
            self._said_unpaged = True
            where = ["the CPU" if kind == "cpu" else kind for kind in unpaged]
            warnings.warn(
                f"{type(self).__name__}: parameters on {' and '.join(where)} keep their states there: nothing is paged",
                stacklevel=_level_of_caller(),
            )
        if is_capturing():
            return
        for device in {p.device for p in params if p.is_cuda and not is_portable(p.device)}:
            states = self._paged_states(device)
            sizes = [_paging.size_of(state) for state, _ in states]
            resident = sum(_paging.size_of(state) for state, p in states if not _paging.is_evicted(state, p))
            room = self._room(device)
            room.changed(resident)
            chosen = _paging.choose(sizes, self._budget(device, sum(sizes)))
            moves = [
                (state, p, stays)
                for (state, p), stays in zip(states, chosen, strict=True)
                if not _paging.is_settled(state, p, stays)
            ]
            if moves:
                self._synchronize_pages()
            for state, p, stays in sorted(moves, key=lambda move: move[2]):  # those that leave make room
                _paging.move(state, p, resident=stays)
            room.resident = sum(size for size, stays in zip(sizes, chosen, strict=True) if stays)

    def _pages_want_to_move(self) -> bool:
        """Return whether the peak of the last step says that fewer, or more, states should be on a GPU."""
        if self.page_budget is not None or self._watch.plan is None or is_capturing():
            return False
        answer = False
        for device, room in self._rooms.items():
            if not room.changed(room.resident):
                continue
            states = self._paged_states(device)
            away = [_paging.size_of(state) for state, p in states if _paging.is_evicted(state, p)]
            resident = sum(_paging.size_of(state) for state, _ in states) - sum(away)
            allowed = room.bytes()
            answer |= resident > allowed or bool(away and resident + min(away) + _paging.MIN_MARGIN < allowed)
        return answer

    def _synchronize_pages(self) -> None:
        """Wait until states in host memory are what the last step made of them."""
        for device in self._rooms:
            torch.cuda.synchronize(device)


def _level_of_caller() -> int:
    """Return the `stacklevel`, for a function that warns, of whoever called a step: past this package and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fewbits", "torch"):
        level, frame = level + 1, frame.f_back
    return level
