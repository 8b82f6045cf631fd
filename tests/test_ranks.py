"""The harness of the distributed tests reports what goes wrong."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from ranks import RankError, Ranks


def sums(device: torch.device, begin: int) -> list[int]:
    value = torch.tensor([begin + dist.get_rank()], device=device)
    dist.all_reduce(value)
    return value.tolist()


def fails(device: torch.device) -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one is unwell")
    dist.barrier()


def dies(device: torch.device) -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def hangs(device: torch.device) -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def test_ranks(ranks: Ranks) -> None:
    assert ranks(2, sums, 10) == [[21], [21]]
    with pytest.raises(RankError, match=r"rank 1: Traceback[^$]*rank one is unwell"):
        ranks(2, fails)
    with pytest.raises(RankError, match="rank 1: exited with 3"):
        ranks(2, dies)
    with pytest.raises(RankError, match="rank 1: did not come back"):
        ranks(2, hangs, timeout=4.0)
    assert ranks(2, sums, 0) == [[1], [1]]
