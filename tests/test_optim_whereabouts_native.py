"""The native object that finds tensors where they were: what it looks at, what it refuses, whom it asks."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from fewbits import _native
from fewbits.optim._whereabouts import HAS_READER, addresses_of
from optimizers import give_gradients, parameters

pytestmark = pytest.mark.skipif(not HAS_READER, reason="this torch cannot be asked from C")
API = "__dlpack_c_exchange_api__"


def of(params: Any, **kwargs: Any) -> Any:
    given = {
        **{"tensor": torch.Tensor, "parameter": torch.nn.Parameter, "params": params},
        **{"takes_part": [True] * len(params), "places": [p.data_ptr() for p in params]},
        **{"sentinels": [], "sentinel_places": []},
    }
    return _native.Whereabouts.of(**{**given, **kwargs})


def test_what_the_native_object_looks_at() -> None:
    params = parameters([(4, 4), (3,)], "cpu")
    give_gradients(params, 0)
    grads: list[Any] = [p.grad for p in params]
    sentinels = [torch.zeros(2), torch.zeros(3)]
    places = [s.data_ptr() for s in sentinels]
    found = of(params, sentinels=sentinels, sentinel_places=places)
    groups = [{"params": [params[0]]}, {"params": [params[1]]}]
    assert found.find(groups, sentinels) == (addresses_of(grads), grads)
    for other in (
        *([], groups[:1], groups[::-1], [*groups, {"params": [params[0]]}], tuple(groups), None),
        *([{"params": tuple(params)}], [{}], [[params]], [{"params": [params[0], None]}]),
    ):
        assert found.find(other, sentinels) is None, f"{other}"
    for others in ([], sentinels[:1], sentinels[::-1], [*sentinels, sentinels[0]], [sentinels[0], None]):
        assert found.find(groups, others) is None, f"{others}"
    assert of(params, places=[p.data_ptr() + 4 for p in params]) is None
    assert of(params, takes_part=[True, False], places=[params[0].data_ptr()]) is None, "it has a gradient"
    assert of(params, sentinels=sentinels, sentinel_places=places[::-1]) is None
    assert of(params, tensor=int, parameter=bool) is None
    params[1].grad = None
    assert of(params) is None
    assert of(params, takes_part=[True, False], places=[params[0].data_ptr()]) is not None


STRIDES = [
    *(((2, 3, 4), (12, 4, 1)), ((2, 3, 4), (1, 2, 6)), ((1, 3, 1), (7, 1, 9)), ((1, 3, 1), (7, 2, 9))),
    *(((2, 3), (4, 1)), ((2,), (0,)), ((0, 3), (5, 7)), ((1,), (2,)), ((), ())),
]


@pytest.mark.parametrize(("shape", "strides"), STRIDES)
def test_gaps_are_what_torch_calls_so(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    p = torch.nn.Parameter(torch.ones(shape))
    p.grad = torch.ones(shape)
    found = of([p])
    p.grad = torch.ones(100).as_strided(shape, strides)
    assert (found.find([{"params": [p]}], []) is not None) == p.grad.is_contiguous()


def test_wrong_arguments() -> None:
    params = parameters([(4, 4), (3,)], "cpu")
    give_gradients(params, 0)
    with pytest.raises(ValueError, match="takes_part: expected 2 elements, got 1"):
        of(params, takes_part=[True])
    with pytest.raises(ValueError, match="places: expected 2 elements, got 1"):
        of(params, places=[1])
    with pytest.raises(ValueError, match="sentinel_places: expected 0 elements, got 1"):
        of(params, sentinel_places=[1])
    with pytest.raises(ValueError, match="parameter: expected a subclass of"):
        of(params, parameter=int)
    with pytest.raises(AttributeError, match="grad"):
        _native.Whereabouts.of(torch.Tensor, torch.nn.Parameter, [1], [True], [1], [], [])
    with pytest.raises(TypeError):
        of(params).find([], None)


def test_versions_of_the_interface() -> None:
    """A copy of torch's table with another version is not called; nor is a function that is not there."""
    new, pointer = ctypes.pythonapi.PyCapsule_New, ctypes.pythonapi.PyCapsule_GetPointer
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    name = b"dlpack_exchange_api"
    # Two numbers of a version, an older table, five functions; the fourth is what is called.
    table = (ctypes.c_uint64 * 7).from_buffer_copy(ctypes.string_at(pointer(getattr(torch.Tensor, API), name), 56))
    theirs, read = table[0], table[5]
    members = {
        API: new(ctypes.addressof(table), name, None),
        "__torch_function__": torch._C._disabled_torch_function_impl,
    }
    kind = type("Kind", (torch.Tensor,), members)
    part = type("Part", (kind,), {})
    p = torch.ones(3).as_subclass(part)
    p.grad = torch.ones(3).as_subclass(kind)
    for version, function, usable in ((theirs, read, True), (theirs + 1, read, False), (theirs, 0, False)):
        table[0], table[5] = version, function
        assert (of([p], tensor=kind, parameter=part) is not None) == usable
    for other in (new(ctypes.addressof(table), b"of_another_name", None), 3):
        setattr(kind, API, other)
        assert of([p], tensor=kind, parameter=part) is None
