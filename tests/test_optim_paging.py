"""Paging: chunks give the bytes of whole tensors, the budget is kept, and memory comes back."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import pytest
import torch

import fewbits.optim
from arrays import assert_same_bits
from fewbits.optim import _paging
from optimizers import PAGED, give_gradients, make, parameters

SHAPES = [(300, 70), (64, 80), (37_001,), (4096,), (7,)]
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing is paged")


class HostPager(_paging.Pager):
    """Chunks without streams, so that they can be tried where there is no GPU."""

    def __init__(self, device: torch.device) -> None:
        self.buffers = [torch.full((_paging.CHUNK,), 7, dtype=torch.uint8) for _ in range(_paging.SLOTS)]
        self.fetched = 0

    def begin(self, capturing: bool) -> None:
        pass

    def fetch(self, slot: int, copies: list[_paging.Copy]) -> None:
        self.fetched += 1
        self.buffers[slot].fill_(7)
        for copy in copies:
            copy.device.copy_(copy.host)

    def send_home(self, slot: int, copies: list[_paging.Copy]) -> None:
        for copy in copies:
            copy.host.copy_(copy.device)

    def end(self, capturing: bool) -> None:
        pass


@pytest.mark.parametrize("chunk", [40_000, 100_000, 1 << 20])
@pytest.mark.parametrize("bits", ["8bit", "32bit"])
@pytest.mark.parametrize("family", PAGED)
def test_chunks_are_the_same(family: str, bits: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"max_grad_norm": 1.0, "stochastic_rounding": True, "weight_decay": 0.1}
    if family in ("Adam", "AdamW"):
        options["amsgrad"] = bits == "32bit"
    params, others = parameters(SHAPES, "cpu", torch.bfloat16), parameters(SHAPES, "cpu", torch.bfloat16)
    whole = make(f"{family}{bits}", others, **options)
    monkeypatch.setattr(_paging, "CHUNK", chunk * (4 if bits == "32bit" else 1))
    monkeypatch.setattr(_paging, "Pager", HostPager)
    monkeypatch.setattr(_paging, "is_evicted", lambda state, p: p.numel() > 5000)
    paged = make(f"Paged{family}{bits}", params, **options)
    for t in range(3):
        give_gradients(params, t)
        give_gradients(others, t)
        paged.step()
        whole.step()
    (pager,) = paged._pagers.values()
    assert pager.fetched >= 3 * (2 if chunk == 40_000 else 1)
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert_same_bits(p, q, f"parameter {i}")
        assert int(paged.state[p]["step"]) == 3
        for key in ("state1", "state2", "state3", "absmax1", "absmax2"):
            if key in whole.state[q]:
                assert_same_bits(paged.state[p][key], whole.state[q][key], f"{key} of parameter {i}")


def test_page_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is registered while somebody holds it, and no longer."""
    registered: dict[int, int] = {}

    class Runtime:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
            registered[address] = size
            return 0

        def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
            del registered[address]
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    tensors = [_paging.pinned_empty((3, 5), dtype, torch.device("cpu")) for dtype in (torch.float32, torch.uint8)]
    assert [t.data_ptr() % 4096 for t in tensors] == [0, 0]
    assert {t.data_ptr() for t in tensors} == set(registered)
    view = tensors[0].fill_(1.0)[1:]
    tensors.clear()
    gc.collect()
    assert len(registered) == 1
    assert view.sum() == 10
    del view
    gc.collect()
    assert not registered


def test_choice() -> None:
    assert _paging.choose([4, 5, 3], 12) == [True, True, True]
    assert _paging.choose([4, 5, 3], 8) == [True, False, True]
    assert _paging.choose([4, 5, 3], 0) == [False] * 3


# ---- on a GPU ------------------------------------------------------------------------------------------------------

LARGE = [(1024, 1024), (3000, 700), (100_000,), (64, 80)]


def train(optimizer: torch.optim.Optimizer, params: list[Any], steps: range) -> None:
    for t in steps:
        give_gradients(params, t)
        optimizer.step()


@pytest.mark.cuda
@pytest.mark.parametrize("budget", [0, 3_000_000, 0.5, 1.0, None])
@pytest.mark.parametrize("name", ["PagedAdamW8bit", "PagedAdEMAMix32bit"])
def test_budget(name: str, budget: int | float | None, cuda: torch.device) -> None:
    params, others = parameters(LARGE, cuda), parameters(LARGE, cuda)
    paged = make(name, params, page_budget=budget)
    whole = make(name.removeprefix("Paged"), others)
    train(paged, params, range(4))
    train(whole, others, range(4))
    report = paged.memory_report()
    large = sum(_paging.size_of(paged.state[p]) for p in params[:3])
    small = _paging.size_of(paged.state[params[3]])
    allowed = {0: 0, 3_000_000: 3_000_000, 0.5: large // 2, 1.0: large, None: large}[budget]
    assert report["on_parameter_devices"] - small <= allowed
    if budget in (1.0, None):
        assert report["in_host_memory"] == 0
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert_same_bits(p, q, f"parameter {i}")
    # The next steps see what the last ones sent home, and so does a checkpoint.
    saved = paged.state_dict()["state"]
    for i, state in whole.state_dict()["state"].items():
        for key, tensor in state["__bnb_optimizer_quant_state__"].items():
            assert_same_bits(saved[i]["__bnb_optimizer_quant_state__"][key], tensor, f"{key} of {i}")


@pytest.mark.cuda
def test_still_paged_after_loading(cuda: torch.device) -> None:
    params, others = parameters(LARGE, cuda), parameters(LARGE, cuda)
    first = fewbits.optim.PagedAdamW8bit(params, page_budget=0)
    train(first, params, range(2))
    second = fewbits.optim.PagedAdamW8bit(others, page_budget=0)
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    second.load_state_dict(first.state_dict())
    train(first, params, range(2, 4))
    train(second, others, range(2, 4))
    assert second.memory_report() == first.memory_report()
    assert second.state[others[0]]["state1"].is_pinned()
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert_same_bits(q, p, f"parameter {i}")


@pytest.mark.cuda
def test_memory_comes_back(cuda: torch.device) -> None:
    params = parameters([(4096, 4096)], cuda, torch.bfloat16)
    give_gradients(params, 0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    optimizer = fewbits.optim.PagedAdamW8bit(params, page_budget=0)
    optimizer.step()
    host = optimizer.state[params[0]]["state1"]
    assert host.is_pinned()
    assert torch.cuda.memory_allocated() - before < 2 * _paging.SLOTS * _paging.CHUNK
    del optimizer, host
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 4096


@pytest.mark.cuda
@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("name", ["AdamW8bit", "Lion32bit", "LAMB8bit", "PagedAdamW8bit"])
def test_captured_step_follows_the_schedule(name: str, budget: int | None, cuda: torch.device) -> None:
    if not name.startswith("Paged") and budget is not None:
        pytest.skip("not paged")
    options: dict[str, Any] = {"max_grad_norm": 1.0}
    if name.startswith("Paged"):
        options["page_budget"] = budget
    params, others = parameters(LARGE, cuda), parameters(LARGE, cuda)
    lr = torch.tensor(0.25, device=cuda)
    captured, eager = (
        make(name, params, lr=lr, **options),
        make(name.removeprefix("Paged"), others, lr=0.25, max_grad_norm=1.0),
    )
    train(captured, params, range(2))
    train(eager, others, range(2))
    scheduler = torch.optim.lr_scheduler.StepLR(captured, 1, gamma=0.5)
    give_gradients(params, 2)
    static = [p.grad for p in params]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured.step()
    for t in range(2, 6):
        give_gradients(others, t)
        for g, q in zip(static, others, strict=True):
            g.copy_(q.grad)
        eager.param_groups[0]["lr"] = 0.25 * 0.5 ** (t - 2)
        graph.replay()
        eager.step()
        scheduler.step()
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert_same_bits(p, q, f"parameter {i}")
    assert captured.state_dict()["state"][0]["step"] == 6
    # And an ordinary step afterwards, with gradients elsewhere.
    train(captured, params, range(6, 7))
    eager.param_groups[0]["lr"] = 0.25 * 0.5**4
    train(eager, others, range(6, 7))
    graph.replay()
    for q, g in zip(others, static, strict=True):
        q.grad = g
    eager.step()
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert_same_bits(p, q, f"parameter {i} after the graph")


@pytest.mark.cuda
def test_first_step_cannot_be_captured(cuda: torch.device) -> None:
    params = parameters([(64, 80)], cuda)
    optimizer = fewbits.optim.AdamW8bit(params)
    give_gradients(params, 0)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="before a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["AdamW8bit", "LAMB8bit", "SGD32bit"])
def test_a_step_waits_for_nothing(name: str, cuda: torch.device) -> None:
    params = parameters([(64, 80), (33,), (5000,)], cuda)
    optimizer = make(name, params, max_grad_norm=1.0, skip_nonfinite=True)
    train(optimizer, params, range(2))
    give_gradients(params, 3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
