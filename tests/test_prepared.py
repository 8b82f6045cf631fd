"""The short way from ``Linear4bit.forward`` to native code: taken where nothing is unusual, never on stale addresses.

A kernel that takes every product stands in for the fused ones on the short way, and none takes any on the long way, so
that both ways are the same on every machine.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fewbits
import fewbits.functional as F
from fewbits import _native
from fewbits.nn import Linear4bit, Params4bit

N, K = 24, 96
TYPES = (torch.float32, torch.float16, torch.bfloat16)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    count = torch.Size(shape).numel()
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class Kernel:
    """How often a product was asked for."""

    calls = 0

    def __init__(self) -> None:
        self.versions: list[int] = []


class Weight:
    """What stands for `_native.Weight4bit`: it multiplies by the addresses that it is given."""

    kernel: Kernel

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def matmul(
        self, x: int, m: int, number: int, bias: int, out: int, workspace: int, device: int, queue: int, version: int
    ) -> bool:
        self.kernel.calls += 1
        self.kernel.versions.append(version)
        _, n, k, *_ = self.numbers
        dtype = TYPES[number]
        panel = torch.empty(n, k, dtype=dtype)
        _native.dequantize_4bit_panel(*self.numbers, 0, n, 0, k, panel.data_ptr(), number, device, queue)  # type: ignore[call-arg]
        added = at(bias, (n,), dtype) if bias else None
        at(out, (m, n), dtype).copy_(nn.functional.linear(at(x, (m, k), dtype), panel, added))
        return True


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    Weight.kernel = Kernel()
    monkeypatch.setattr(_native, "Weight4bit", Weight)
    monkeypatch.setattr(_native, "matmul_4bit", lambda *_: False)
    with torch.no_grad():
        yield Weight.kernel


def make(seed: int = 0, n: int = N, k: int = K, bias: bool = True, **kwargs: Any) -> Linear4bit:
    layer = Linear4bit(k, n, bias=bias, **{"quant_type": "nf4", "compute_dtype": torch.float32, **kwargs})
    layer.weight.data = randn(n, k, seed=seed)
    if bias:
        layer.bias.data = randn(n, seed=seed + 1)
    return layer.to("cpu")


def expected(layer: Linear4bit, x: torch.Tensor) -> torch.Tensor:
    weight = layer.weight
    state = weight.quant_state if isinstance(weight, Params4bit) else layer.quant_state
    assert state is not None
    state = copy.copy(state)
    state.dtype = x.dtype
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return nn.functional.linear(x, F.dequantize_4bit(weight.data, state), bias)


def warm(layer: Linear4bit, x: torch.Tensor, kernel: Kernel) -> None:
    layer(x)
    before = kernel.calls
    layer(x)
    assert kernel.calls == before + 1, "the short way is not taken"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, K), (5, K), (1, 1, K), (2, 3, K), (K,), (2, 1, 2, K)])
def test_ordinary_calls(nested: bool, bias: bool, dtype: torch.dtype, shape: tuple[int, ...], kernel: Kernel) -> None:
    layer = make(bias=bias, compress_statistics=nested, compute_dtype=dtype)
    if bias:
        layer.bias.data = layer.bias.data.to(dtype)
    x = randn(*shape).to(dtype)
    slow = layer(x)
    kernel.calls = 0
    y = layer(x)
    assert kernel.calls == 1
    assert (y.shape, y.dtype, y.stride()) == (slow.shape, slow.dtype, slow.stride())
    torch.testing.assert_close(y, slow)
    torch.testing.assert_close(fewbits.matmul_4bit(x, layer.weight.data, layer.quant_state, bias=layer.bias), slow)
    assert kernel.calls == 2


def test_a_kernel_that_declines_is_not_missed(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    layer, x = make(), randn(2, K)
    warm(layer, x, kernel)
    monkeypatch.setattr(layer.weight.prepared, "matmul", lambda *_: False)
    torch.testing.assert_close(layer(x), expected(layer, x))


# ---- what changes under a prepared weight ---------------------------------------------------------------------------


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


# ---- callers that are not ordinary ----------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    """Counts what is done with it."""

    seen = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def strided(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def negated(x: torch.Tensor) -> torch.Tensor:
    return torch._neg_view(-x)


INPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "strided": strided,
    "negated": negated,
    "other dtype": lambda x: x.bfloat16(),
    "float64": lambda x: x.double(),
    "no rows": lambda x: x[:0],
    "subclass": lambda x: x.as_subclass(Subclass),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", INPUTS)
def test_unusual_inputs(name: str, bias: bool, kernel: Kernel) -> None:
    layer, x = make(bias=bias), randn(3, K)
    warm(layer, x, kernel)
    calls = kernel.calls
    given = INPUTS[name](x)
    y = layer(given)
    assert kernel.calls == calls
    assert y.dtype == given.dtype
    plain = given.detach().as_subclass(torch.Tensor)
    torch.testing.assert_close(
        y.detach().as_subclass(torch.Tensor), expected(layer, plain.float()).to(given.dtype), check_device=False
    )


def test_wrong_inputs_raise_as_ever(kernel: Kernel) -> None:
    layer, x = make(), randn(3, K)
    warm(layer, x, kernel)
    with pytest.raises(ValueError, match=r"A.*last size of 96.*\(3, 95\)"):
        layer(x[:, 1:].contiguous())
    with pytest.raises(ValueError, match=r"A and B.*meta.*cpu"):
        layer(x.to("meta"))
    with pytest.raises(ValueError, match=r"A.*layout"):
        layer(x.to_sparse())
    layer.bias = nn.Parameter(torch.ones(N + 1))
    with pytest.raises(ValueError, match=r"bias.*24.*25"):
        layer(x)


def test_observers_see_the_op(kernel: Kernel) -> None:
    layer, x = make(), randn(3, K)
    warm(layer, x, kernel)
    calls = kernel.calls
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        watched = layer(x)
    assert "fewbits.matmul_4bit.default" in seen
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.float32
    with torch.device("meta"):
        default_device = layer(x)
    mapped = torch.func.vmap(layer)(x)
    tangent = torch.func.jvp(lambda x: layer(x) - layer.bias, (x,), (x,))[1]
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(x, x))
        assert torch.autograd.forward_ad.unpack_dual(dual).tangent is not None
    assert kernel.calls == calls, "the short way was taken past an observer"
    for y in (watched, default_device, mapped, tangent + layer.bias):
        torch.testing.assert_close(y, expected(layer, x))


def test_hooks_run(kernel: Kernel) -> None:
    layer, x = make(), randn(3, K)
    warm(layer, x, kernel)
    layer.register_forward_pre_hook(lambda module, given: (given[0] * 2,))
    layer.register_forward_hook(lambda module, given, result: result + 1)
    torch.testing.assert_close(layer(x), expected(layer, x * 2) + 1)


def test_compute_dtype_may_change(kernel: Kernel) -> None:
    layer, x = make(bias=False), randn(3, K)
    warm(layer, x, kernel)
    layer.compute_dtype = torch.bfloat16
    torch.testing.assert_close(layer(x), expected(layer, x.bfloat16()).float())
    warm(layer, x.bfloat16(), kernel)
    layer.compute_dtype, layer.compute_type_is_set = None, False
    layer(x)
    assert layer.compute_dtype is torch.float32


def test_inference_mode(kernel: Kernel) -> None:
    layer, x = make(), randn(3, K)
    warm(layer, x, kernel)
    calls = kernel.calls
    with torch.inference_mode():
        y = layer(x)
    assert kernel.calls == calls + 1
    assert y.is_inference()
    torch.testing.assert_close(y.clone(), expected(layer, x))


def test_compiled_after_warm_up(kernel: Kernel) -> None:
    layer, x = make(), randn(3, K)
    warm(layer, x, kernel)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    calls = kernel.calls
    torch.testing.assert_close(compiled(x), expected(layer, x))
    assert kernel.calls == calls
    torch._dynamo.reset()
