"""The short way from ``Linear4bit.forward`` to native code: never on stale addresses."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fewbits.functional as F
from fewbits.nn import Linear4bit, Params4bit
from prepared import K, Kernel, N, expected, make, randn, stand_in, warm


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    yield from stand_in(monkeypatch)


def other_weight(layer: Linear4bit) -> Params4bit:
    nested = layer.weight.compress_statistics
    return make(seed=9, compress_statistics=nested).weight


def assign_data(layer: Linear4bit) -> None:
    layer.weight.data = other_weight(layer).data.clone()


def assign_parameter_to_data(layer: Linear4bit) -> None:
    layer.weight.data = other_weight(layer)


def assign_data_from_below(layer: Linear4bit) -> None:
    torch.Tensor.data.__set__(layer.weight, other_weight(layer).data.clone())  # type: ignore[attr-defined]


def same_storage_elsewhere(layer: Linear4bit) -> None:
    memory = torch.cat([layer.weight.data, other_weight(layer).data])
    half = layer.weight.numel()
    layer.weight.data = memory[:half]
    layer(randn(2, K))
    layer(randn(2, K))
    torch.Tensor.data.__set__(layer.weight, memory[half:])  # type: ignore[attr-defined]


def set_storage(layer: Linear4bit) -> None:
    layer.weight.set_(other_weight(layer).data.clone())  # type: ignore[call-overload]


def free_and_fill_storage(layer: Linear4bit) -> None:
    """What FSDP does to the memory of a parameter between its uses."""
    other = other_weight(layer).data.clone()
    storage = layer.weight.data.untyped_storage()
    storage.resize_(0)
    held = [torch.empty(N * K // 2, dtype=torch.uint8) for _ in range(4)]  # the old place is taken
    storage.resize_(other.nbytes)
    layer.weight.data.copy_(other)
    del held


def write_in_place(layer: Linear4bit) -> None:
    layer.weight.data.copy_(other_weight(layer).data)


def load(layer: Linear4bit) -> None:
    layer.load_state_dict(make(seed=9, compress_statistics=layer.weight.compress_statistics).state_dict())


def load_and_assign(layer: Linear4bit) -> None:
    layer.load_state_dict(make(seed=9, compress_statistics=layer.weight.compress_statistics).state_dict(), assign=True)


def load_otherwise(layer: Linear4bit) -> None:
    layer.load_state_dict(make(seed=9, compress_statistics=not layer.weight.compress_statistics).state_dict())


def replace_parameter(layer: Linear4bit) -> None:
    layer.weight = other_weight(layer)


def replace_by_plain_parameter(layer: Linear4bit) -> None:
    layer.weight = nn.Parameter(layer.weight.data.flip(0), requires_grad=False)  # type: ignore[assignment]


def replace_by_attribute(layer: Linear4bit) -> None:
    data = layer.weight.data.flip(0)
    del layer._parameters["weight"]
    layer.weight = data  # type: ignore[assignment]


def replace_state(layer: Linear4bit) -> None:
    other = other_weight(layer)
    layer.weight.quant_state = other.quant_state
    layer.weight.data.copy_(other.data)


def replace_absmax(layer: Linear4bit) -> None:
    assert layer.quant_state is not None
    layer.quant_state.absmax = layer.quant_state.absmax.flip(0)


def replace_absmax_data(layer: Linear4bit) -> None:
    assert layer.quant_state is not None
    layer.quant_state.absmax.data = layer.quant_state.absmax.flip(0)


def replace_offset(layer: Linear4bit) -> None:
    assert layer.quant_state is not None
    if layer.quant_state.nested:
        layer.quant_state.offset = layer.quant_state.offset * 2


def replace_offset_data(layer: Linear4bit) -> None:
    assert layer.quant_state is not None
    if layer.quant_state.nested:
        layer.quant_state.offset.data = layer.quant_state.offset * 2


def replace_nested_absmax(layer: Linear4bit) -> None:
    assert layer.quant_state is not None
    if layer.quant_state.state2 is not None:
        layer.quant_state.state2.absmax = layer.quant_state.state2.absmax * 2


def replace_nested_state(layer: Linear4bit) -> None:
    assert layer.quant_state is not None
    if layer.quant_state.state2 is not None:
        layer.quant_state.state2 = copy.deepcopy(layer.quant_state.state2)
        layer.quant_state.state2.absmax *= 2


def own_nested_code(layer: Linear4bit) -> None:
    """A table that the kernels do not know, in memory that changes."""
    assert layer.quant_state is not None
    if layer.quant_state.state2 is not None:
        layer.quant_state.state2.code = F.create_dynamic_map()
        layer(randn(2, K))
        layer(randn(2, K))
        layer.quant_state.state2.code.data = F.create_linear_map()


def replace_nested_code(layer: Linear4bit) -> None:
    assert layer.quant_state is not None
    if layer.quant_state.state2 is not None:
        layer.quant_state.state2.code = F.create_linear_map()


def change_quant_type(layer: Linear4bit) -> None:
    assert layer.quant_state is not None
    layer.quant_state.quant_type = "fp4"


def through_meta(layer: Linear4bit) -> None:
    state_dict = make(seed=9, compress_statistics=layer.weight.compress_statistics).state_dict()
    layer.to("meta").load_state_dict(state_dict, assign=True)


def swap(layer: Linear4bit) -> None:
    torch.utils.swap_tensors(layer.weight, other_weight(layer))


def swap_bias(layer: Linear4bit) -> None:
    layer.bias = nn.Parameter(randn(N, seed=77))


def set_bias_data(layer: Linear4bit) -> None:
    layer.bias.data = randn(N, seed=77)


def cast_bias(layer: Linear4bit) -> None:
    layer.to(torch.bfloat16)


def drop_bias(layer: Linear4bit) -> None:
    layer.bias = None  # type: ignore[assignment]


def nothing(layer: Linear4bit) -> None:
    layer.to("cpu")


CHANGES: list[Callable[[Linear4bit], None]] = [
    assign_data,
    assign_parameter_to_data,
    assign_data_from_below,
    same_storage_elsewhere,
    set_storage,
    free_and_fill_storage,
    write_in_place,
    load,
    load_and_assign,
    load_otherwise,
    replace_parameter,
    replace_by_plain_parameter,
    replace_by_attribute,
    replace_state,
    replace_absmax,
    replace_absmax_data,
    replace_offset,
    replace_offset_data,
    replace_nested_absmax,
    replace_nested_state,
    replace_nested_code,
    own_nested_code,
    change_quant_type,
    through_meta,
    swap,
    swap_bias,
    set_bias_data,
    cast_bias,
    drop_bias,
    nothing,
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_are_noticed(change: Callable[[Linear4bit], None], nested: bool, kernel: Kernel) -> None:
    layer, x = make(compress_statistics=nested), randn(2, K)
    warm(layer, x, kernel)
    before = layer(x)
    change(layer)
    for _ in range(3):  # the first may prepare, the next ones use what was prepared
        torch.testing.assert_close(layer(x), expected(layer, x))
    of_nested = {
        "replace_offset",
        "replace_offset_data",
        "replace_nested_absmax",
        "replace_nested_state",
        "replace_nested_code",
        "own_nested_code",
    }
    unchanged = {"nothing"} | (set() if nested else of_nested)
    assert torch.equal(layer(x), before) is (change.__name__ in unchanged), "the change changes nothing"


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [("shape", torch.Size((N - 1, K)), r"B.*1104.*1152"), ("blocksize", 32, r"absmax.*72.*36")],
)
def test_states_made_wrong_raise(name: str, value: Any, match: str, kernel: Kernel) -> None:
    layer, x = make(bias=False), randn(2, K)
    warm(layer, x, kernel)
    setattr(layer.quant_state, name, value)
    with pytest.raises(ValueError, match=match):
        layer(x)


def test_given_up_weights_are_freed() -> None:
    """What was prepared keeps no weight and no scales alive that nobody else holds."""
    layer, x = make(), randn(2, K)
    layer(x)
    assert layer.weight.prepared is not None
    assert layer.quant_state is not None
    watched = [weakref.ref(layer.weight), weakref.ref(layer.quant_state.absmax)]
    layer.weight = make(seed=9).weight
    layer(x)
    gc.collect()
    assert [ref() for ref in watched] == [None, None]


def test_two_modules_with_one_weight(kernel: Kernel) -> None:
    first, second = make(), make(seed=3)
    second.weight = first.weight
    second.quant_state = first.quant_state
    x = randn(2, K)
    warm(first, x, kernel)
    warm(second, x, kernel)
    torch.testing.assert_close(second(x), expected(second, x))
    torch.testing.assert_close(first(x), expected(first, x))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied: Callable[[Any], Any], kernel: Kernel) -> None:
    layer, x = make(), randn(2, K)
    warm(layer, x, kernel)
    weight = copied(layer.weight)
    assert "prepared" not in weight.__dict__
    other = copied(layer)
    if other.weight is not layer.weight:
        assert "prepared" not in other.weight.__dict__
        layer.weight.data.zero_()
        warm(other, x, kernel)
    torch.testing.assert_close(other(x), expected(other, x))
    torch.testing.assert_close(other(x), expected(other, x))
