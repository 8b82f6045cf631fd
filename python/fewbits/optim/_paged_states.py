"""Which states of an optimizer live in host memory, and when that changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fewbits.optim import _paging, _states

if TYPE_CHECKING:
    from fewbits.optim._prepare import Member

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
            if self.page_budget is not None or room.bytes() < room.resident:
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

    def _settle_pages(self, owners: list[tuple[Member, torch.Tensor]]) -> None:
        """Decide which paged states stay on the GPU, and bring each where it belongs."""
        if not self.is_paged:
            return
        if any(p.device.type == "cpu" for _, p in owners):
            if not self.__dict__.get("_said_unpaged"):
                self._said_unpaged = True
                warnings.warn(
                    f"{type(self).__name__}: parameters on the CPU keep their states there: nothing is paged",
                    stacklevel=9,  # the caller of step
                )
            return
        if is_capturing():
            return
        for device in {p.device for _, p in owners}:
            mine = [(self.state[m.p], p) for m, p in owners if p.device == device and self._is_paged_state(p)]
            sizes = [sum(t.nbytes for t in _paging.tensors_of(state).values()) for state, _ in mine]
            resident = sum(size for size, (state, _) in zip(sizes, mine, strict=True) if not _paging.is_evicted(state))
            room = self._room(device)
            room.changed(resident)
            chosen = _paging.choose(sizes, lambda total, device=device: self._budget(device, total))  # type: ignore[misc]
            if not all(chosen) or resident < sum(sizes):
                self._synchronize_pages()
            for keep in (False, True):  # those that leave make room
                for (state, p), stays in zip(mine, chosen, strict=True):
                    if stays is keep:
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
            states = [
                self.state[p]
                for group in self.param_groups
                for p in group["params"]
                if p.device == device and p in self.state and self._is_paged_state(local(p))
            ]
            if not states:
                continue
            sizes = [sum(t.nbytes for t in _paging.tensors_of(state).values()) for state in states]
            away = [size for size, state in zip(sizes, states, strict=True) if _paging.is_evicted(state)]
            resident = sum(sizes) - sum(away)
            allowed = room.bytes()
            answer |= resident > allowed or bool(away and resident + min(away) + _paging.MIN_MARGIN < allowed)
        return answer

    def _synchronize_pages(self) -> None:
        """Wait until states in host memory are what the last step made of them."""
        for device in self._rooms:
            torch.cuda.synchronize(device)
