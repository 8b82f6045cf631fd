"""The short way from ``Linear4bit.forward`` to native code: taken where nothing is unusual."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fewbits
from prepared import TYPES, K, Kernel, N, expected, make, randn, stand_in, warm


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    yield from stand_in(monkeypatch)


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
    with pytest.raises(ValueError, match=r"x.*last size of 96.*\(3, 95\)"):
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
