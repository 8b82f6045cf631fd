"""What the benches of matrix products share: what the machine can do, and weights that are in no cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

import torch

from common import Row, cell, copy_rate, cuda_us, medians, wall_us

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Work(Protocol):
    """A product of m tokens."""

    @property
    def label(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def m(self) -> int: ...


class Rates(NamedTuple):
    """What this machine does in a microsecond."""

    bytes: float
    flops: float


def measure_rates(device: torch.device, rounds: int) -> Rates:
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device).bfloat16()
    calls = [partial(torch.mm, a, a)]
    (us,) = medians([lambda: cuda_us(calls, 5) if device.type == "cuda" else wall_us(calls, 3)], rounds)
    assert us is not None
    return Rates(copy_rate(device), 2 * size**3 / us)


def copies(device: torch.device, first: object, nbytes: int, duplicate: Callable[..., object]) -> list[object]:
    """As many copies of a weight as are three times the L2."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return [first, *(duplicate(first) for _ in range(min(63, 3 * l2 // nbytes)))]


def conclude(work: Work, floor: float, us: float | None, dense_us: float | None, peer_us: float | None) -> Row:
    assert us is not None
    assert dense_us is not None
    row: Row = {"work": work.label, "dtype": NAMES[work.dtype], "m": work.m, "floor_us": floor, "us": us}
    row |= {"x_floor": us / floor, "dense_us": dense_us, "x_dense": us / dense_us, "bitsandbytes_us": peer_us}
    row["times_faster"] = peer_us / us if peer_us else None
    return row


def shown(rows: Iterable[Row], start: float) -> Iterator[Row]:
    """Pass rows on, each printed as it is there."""
    for row in rows:
        verdict = {True: "met", False: "MISSED", None: ""}[row.get("met")]
        facts = [
            f"{key} {cell(value)}" for key, value in row.items() if value is not None and key not in ("work", "met")
        ]
        print(f"[{time.monotonic() - start:4.0f} s] {row['work']}:", ", ".join(facts), verdict, flush=True)
        yield row
