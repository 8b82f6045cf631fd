"""States that live in host memory: chunks of them visit the GPU, while the chunks before and after are on their way."""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch

from fewbits._backend import is_portable

CHUNK = 32 << 20  # bytes of states that are on their way at a time
SLOTS = 3  # one arrives, one is worked on, one leaves
MIN_NUMEL = 100_000  # smaller states are not worth a journey
MARGIN = 0.03  # of the GPU's memory stays free
MIN_MARGIN = 256 << 20


class Copy(NamedTuple):
    """A piece of a state at home and on the GPU."""

    host: torch.Tensor
    device: torch.Tensor


def pinned_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return page-locked memory of this size, which goes back to the system with the tensor.

    torch's own allocator of pinned memory rounds up to powers of two and keeps what was freed.
    """
    size = prod(shape) * dtype.itemsize
    memory = np.frombuffer(mmap.mmap(-1, max(1, size)), dtype=np.uint8)  # whole pages, shared with nobody
    address = memory.ctypes.data
    with torch.cuda.device(device):
        failed = int(torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, 0))
    if failed:  # some virtual machines cannot
        with contextlib.suppress(RuntimeError):  # the next launch would report what has been dealt with here
            torch.zeros(1, device=device)
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
    weakref.finalize(memory, _unpin, address, device, os.getpid()).atexit = False
    return torch.from_numpy(memory)[:size].view(dtype).view(shape)


def _unpin(address: int, device: torch.device, process: int) -> None:
    if os.getpid() != process:  # a child that was forked has the object, but not the GPU
        return
    torch.cuda.synchronize(device)  # a copy may be under way
    torch.cuda.cudart().cudaHostUnregister(address)


class Pager:
    """The streams, buffers and events of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.arriving, self.leaving = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.buffers = [torch.empty(CHUNK, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        for buffer in self.buffers:  # freed only when the side streams are done with it
            buffer.record_stream(self.arriving)
            buffer.record_stream(self.leaving)
        self.empty: list[torch.cuda.Event | None] = [None] * SLOTS
        self.captured = False

    def begin(self, capturing: bool) -> None:
        """Order this step behind the last one, whose chunks may still be on their way home."""
        if capturing:
            self.captured = True
            self.empty = [None] * SLOTS  # a graph cannot wait for what it did not capture
        else:
            self.arriving.wait_stream(self.leaving)
        self.arriving.wait_stream(torch.cuda.current_stream(self.device))

    def fetch(self, slot: int, copies: list[Copy]) -> None:
        """Bring a chunk to its buffer; what the current stream does next finds it there."""
        free = self.empty[slot]
        if free is not None:
            self.arriving.wait_event(free)
        with torch.cuda.stream(self.arriving):
            for copy in copies:
                copy.device.copy_(copy.host, non_blocking=True)
        torch.cuda.current_stream(self.device).wait_stream(self.arriving)

    def send_home(self, slot: int, copies: list[Copy]) -> None:
        """Take a chunk home when the current stream is done with it."""
        self.leaving.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.leaving):
            for copy in copies:
                copy.host.copy_(copy.device, non_blocking=True)
            free = torch.cuda.Event()
            free.record(self.leaving)
        self.empty[slot] = free

    def end(self, capturing: bool) -> None:
        """Join the side streams where there are graphs: theirs end in one, and know nothing of what came before."""
        if self.captured:
            torch.cuda.current_stream(self.device).wait_stream(self.leaving)
        if capturing:
            self.empty = [None] * SLOTS


class Chunk:
    """Pieces that share a buffer and a launch."""

    def __init__(self, pager: Pager, slot: int) -> None:
        self.pager, self.slot, self.used = pager, slot, 0
        self.copies: list[Copy] = []

    def room(self, tile_bytes: int) -> int:
        """Return how many tiles more fit, if each has so many bytes of states."""
        # What lies before each part of a piece is rounded up to 256 bytes.
        return max(0, (CHUNK - self.used - 8 * 256) // tile_bytes)

    def place(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return where the parts of a piece (contiguous pieces of host memory, one behind another) will be."""
        size = sum(part.nbytes for part in parts)
        start = -(-self.used // 256) * 256
        target = self.pager.buffers[self.slot][start : start + size].view(parts[0].dtype)
        self.used = start + size
        places, offset = [], 0
        for part in parts:
            place = target[offset : offset + part.numel()]
            places.append(place)
            self.copies.append(Copy(part, place))
            offset += part.numel()
        return places


# ---- what stays on the GPU -----------------------------------------------------------------------------------------


class Room:
    """How many bytes of states a GPU has room for, judged by the peak of the last step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak = self.peak_resident = self.retries = -1
        self.squeezes = self.resident = 0

    def changed(self, resident: int) -> bool:
        """Return whether the peak or the allocator's troubles are others than at the last call."""
        stats = torch._C._cuda_memoryStats(self.device.index)
        peak, retries = int(stats["allocated_bytes"]["all"]["peak"]), int(stats["num_alloc_retries"])
        if (peak, retries) == (self.peak, self.retries):
            return False
        if 0 <= self.retries < retries:
            self.squeezes += 1
        if peak != self.peak:
            self.peak_resident = resident
        self.peak, self.retries = peak, retries
        return True

    def bytes(self) -> int:
        """Return the room, without a wait for the device."""
        free, total = torch.cuda.mem_get_info(self.device)
        margin = max(MIN_MARGIN, int(total * MARGIN)) << self.squeezes
        others = self.peak - self.peak_resident  # at the peak, beside the states
        return max(0, free + torch.cuda.memory_reserved(self.device) - others - margin)


def is_paged_state(optimizer: Any, p: torch.Tensor) -> bool:
    return bool(optimizer.is_paged and p.is_cuda and p.numel() >= MIN_NUMEL and not is_portable(p.device))


def tensors_of(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the states that may be in host memory."""
    return {key: state[key] for key in ("state1", "state2", "absmax1", "absmax2", "state3") if key in state}


def is_evicted(state: dict[str, Any], p: torch.Tensor) -> bool:
    return p.is_cuda and any(tensor.device.type == "cpu" for tensor in tensors_of(state).values())


def is_settled(state: dict[str, Any], p: torch.Tensor, resident: bool) -> bool:
    """Return whether the states of a parameter are where they belong, in page-locked memory if that is it."""
    tensors = tensors_of(state).values()
    return all(tensor.device == p.device if resident else tensor.is_pinned() for tensor in tensors)


def size_of(state: dict[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(state).values())


def move(state: dict[str, Any], p: torch.Tensor, resident: bool) -> None:
    """Bring the states of a parameter to the GPU, or to page-locked memory."""
    for key, tensor in tensors_of(state).items():
        shape = tuple(tensor.shape)
        if resident:
            target = torch.empty(shape, dtype=tensor.dtype, device=p.device)
        else:
            target = pinned_empty(shape, tensor.dtype, p.device)
        state[key] = target.copy_(tensor, non_blocking=True)


def choose(sizes: list[int], budget: int) -> list[bool]:
    """Return which states stay on the GPU: the first ones that fit into so many bytes."""
    chosen = []
    for size in sizes:
        chosen.append(size <= budget)
        budget -= size if chosen[-1] else 0
    return chosen
