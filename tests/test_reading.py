"""What is kept of a state between calls that dequantize: noticed when the state changes, and never copied."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch

import fewbits.functional as F
from arrays import assert_same_bits
from fewbits.quant_state import QuantState

# Each changes a state.
Change = Callable[[QuantState], None]


def _replace(state: QuantState) -> None:
    state.absmax = state.absmax * 2


def _replace_memory(state: QuantState) -> None:
    state.absmax.data = state.absmax.data * 2


def _write(state: QuantState) -> None:
    state.absmax.mul_(3)


def _reshape(state: QuantState) -> None:
    state.shape = torch.Size((2, 3, 64))


def _retype(state: QuantState) -> None:
    state.quant_type, state.dtype = "fp4", torch.float16


def _merge_blocks(state: QuantState) -> None:
    state.blocksize, state.absmax = 128, state.absmax[::2].clone()


def _nest(state: QuantState) -> None:
    _, nested = F.quantize_4bit(torch.ones(6, 64), quant_type="nf4", compress_statistics=True)
    nested.to(state.absmax.device)
    state.absmax, state.offset, state.state2, state.nested = nested.absmax, nested.offset, nested.state2, True


CHANGES = [_replace, _replace_memory, _write, _reshape, _retype, _merge_blocks, _nest]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_are_noticed(change: Change, device: torch.device) -> None:
    packed, state = F.quantize_4bit(torch.randn(6, 64, device=device), quant_type="nf4")
    before = F.dequantize_4bit(packed, state)
    change(state)
    actual = F.dequantize_4bit(packed, state)
    fresh = copy.deepcopy(state)  # has never been read
    assert (actual.shape, actual.dtype) == (state.shape, state.dtype)
    assert_same_bits(actual, F.dequantize_4bit(packed, fresh), "after the change")
    assert actual.shape != before.shape or not torch.equal(actual.float(), before.float())


def test_wrong_states_are_still_refused() -> None:
    packed, state = F.quantize_4bit(torch.randn(6, 64), quant_type="nf4")
    F.dequantize_4bit(packed, state)
    for name, value in (("absmax", state.absmax[:-1]), ("blocksize", 48), ("quant_type", "int4")):
        broken = copy.copy(state)
        F.dequantize_4bit(packed, state)
        setattr(broken, name, value)
        with pytest.raises(ValueError, match=name):
            F.dequantize_4bit(packed, broken)
    with pytest.raises(ValueError, match="A"):
        F.dequantize_4bit(packed[:-1], state)


def test_replaced_maxima_are_given_back(device: torch.device) -> None:
    packed, state = F.quantize_4bit(torch.randn(6, 64, device=device), quant_type="nf4")
    F.dequantize_4bit(packed, state)
    old = weakref.ref(state.absmax)
    state.absmax = state.absmax.clone()
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_copies_read_for_themselves(duplicate: Callable[[QuantState], QuantState]) -> None:
    packed, state = F.quantize_4bit(torch.randn(6, 64), quant_type="nf4")
    expected = F.dequantize_4bit(packed, state)
    twin = duplicate(state)
    assert vars(twin).keys() == vars(state).keys()
    assert not [name for name in vars(state) if name.startswith("_")]
    assert_same_bits(F.dequantize_4bit(packed, twin), expected, "of a copy")
