"""The LLM.int8() product for every kind of caller, and its gradients.

    int8_linear(A, W)          rows of A quantized; to the gradients it counts as A @ W.T (a straight-through estimate)
    int8_dense_matmul(A, W)    A @ W.T
    int8_dense_matmul_grad(G, W)    G @ W

`W` is the int8 weight ``CB`` with its row scales ``SCB``. Where it was made of a floating-point weight `B` that is
trained, ``G.T @ A`` is the gradient of `B`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from fewbits import _int8, _int8_ops, _launch
from fewbits._ops import library


class Weight(NamedTuple):
    """An int8 weight of N rows, shape (N, K), and the largest magnitude of each."""

    CB: torch.Tensor
    SCB: torch.Tensor


def linear(
    A: torch.Tensor, bias: torch.Tensor | None, B: torch.Tensor | None, weight: Weight, threshold: float
) -> torch.Tensor:
    """Return ``A @ W.T + bias`` by whatever serves this caller; see `_product.product`."""
    if not torch.compiler.is_compiling():
        result: torch.Tensor
        if _launch.is_transformed():
            result = _Transformed.apply(A, bias, B, *weight, threshold)
            return result
        wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (A, bias, B))
        if wants_grad and _launch.is_direct(A, bias, B, *weight):
            result = _Eager.apply(A, bias, B, weight, threshold)
            return result
    return _run(A, bias, B, weight, threshold)


def _run(
    A: torch.Tensor, bias: torch.Tensor | None, B: torch.Tensor | None, weight: Weight, threshold: float
) -> torch.Tensor:
    run: Any = _int8 if _launch.is_direct(A, bias, B, *weight) else _int8_ops
    result: torch.Tensor = run.int8_linear(A, *weight, threshold, bias, B)
    return result


def dense(A: torch.Tensor, weight: Weight, transposed: bool) -> torch.Tensor:
    """Return ``A @ W.T``, or ``A @ W`` if transposed, with gradients, nothing of `A` quantized."""
    if not torch.compiler.is_compiling():
        result: torch.Tensor
        if _launch.is_transformed():
            result = _Dense.apply(A, *weight, transposed)
            return result
        if _launch.is_direct(A, *weight):
            if torch.is_grad_enabled() and A.requires_grad:
                result = _Dense.apply(A, *weight, transposed)
                return result
            return _run_dense(A, weight, transposed)
    return _run_dense(A, weight, transposed)


def _run_dense(A: torch.Tensor, weight: Weight, transposed: bool) -> torch.Tensor:
    run: Any = _int8 if _launch.is_direct(A, *weight) else _int8_ops
    product = run.int8_dense_matmul_grad if transposed else run.int8_dense_matmul
    result: torch.Tensor = product(A, *weight)
    return result


_Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _save(ctx: Any, A: torch.Tensor, B: torch.Tensor | None, weight: Weight) -> None:
    # The activations are kept only where the gradient of a weight is asked for.
    keep = B is not None and B.requires_grad
    ctx.save_for_backward(*weight, A if keep else None)
    ctx.dtype, ctx.weight_dtype = A.dtype, None if B is None else B.dtype


def _gradients(ctx: Any, grad_output: torch.Tensor, wants: tuple[bool, bool, bool]) -> _Gradients:
    """Return the gradients of A, bias and B. They are made of differentiable products: they have gradients too."""
    CB, SCB, A = ctx.saved_tensors
    grad_A = grad_bias = grad_B = None
    if wants[0]:
        grad_A = dense(grad_output.to(ctx.dtype), Weight(CB, SCB), transposed=True)
    if wants[1] or wants[2]:
        flat = grad_output.reshape(-1, grad_output.shape[-1])
        if wants[1]:
            grad_bias = flat.sum(0)
        if wants[2]:
            grad_B = (flat.t() @ A.reshape(-1, A.shape[-1])).to(ctx.weight_dtype)
    return grad_A, grad_bias, grad_B


class _Eager(torch.autograd.Function):
    """The product for plain autograd. Arguments: A, bias, B, weight, threshold."""

    @staticmethod
    def forward(
        ctx: Any,
        A: torch.Tensor,
        bias: torch.Tensor | None,
        B: torch.Tensor | None,
        weight: Weight,
        threshold: float,
    ) -> torch.Tensor:
        _save(ctx, A, B, weight)
        return _run(A, bias, B, weight, threshold)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_gradients(ctx, grad_output, ctx.needs_input_grad[:3]), None, None


class _Transformed(torch.autograd.Function):
    """The product for functorch and forward-mode derivatives. Arguments: A, bias, B, CB, SCB, threshold."""

    @staticmethod
    def forward(
        A: torch.Tensor,
        bias: torch.Tensor | None,
        B: torch.Tensor | None,
        CB: torch.Tensor,
        SCB: torch.Tensor,
        threshold: float,
    ) -> torch.Tensor:
        return _run(A, bias, B, Weight(CB, SCB), threshold)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        A, _bias, B, CB, SCB, _threshold = inputs
        ctx.save_for_backward(CB, SCB, None if B is None else A)
        ctx.save_for_forward(CB, SCB, None if B is None else A)
        ctx.dtype, ctx.weight_dtype = A.dtype, None if B is None else B.dtype
        ctx.product_shape, ctx.product_dtype = output.shape, output.dtype

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_gradients(ctx, grad_output, ctx.needs_input_grad[:3]), None, None, None

    @staticmethod
    def jvp(ctx: Any, A: Any, bias: Any, B: Any, *rest: Any) -> torch.Tensor:
        CB, SCB, values = ctx.saved_tensors
        parts = []
        if A is not None:
            parts.append(dense(A, Weight(CB, SCB), transposed=False))
        if bias is not None:
            parts.append(bias.expand(ctx.product_shape))
        if B is not None:
            parts.append(values @ B.to(values.dtype).t())
        return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[torch.Tensor, int]:
        return _mapped(_Transformed, info, in_dims, args)


class _Dense(torch.autograd.Function):
    """``A @ W.T`` or ``A @ W``, linear in A. Arguments: A, CB, SCB, transposed."""

    @staticmethod
    def forward(A: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor, transposed: bool) -> torch.Tensor:
        return _run_dense(A, Weight(CB, SCB), transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        A, CB, SCB, ctx.transposed = inputs
        ctx.save_for_backward(CB, SCB)
        ctx.save_for_forward(CB, SCB)
        ctx.dtype = A.dtype

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_A = dense(grad_output.to(ctx.dtype), Weight(*ctx.saved_tensors), not ctx.transposed)
        return grad_A, None, None, None

    @staticmethod
    def jvp(ctx: Any, A: torch.Tensor, *rest: Any) -> torch.Tensor:
        return dense(A, Weight(*ctx.saved_tensors), ctx.transposed)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[torch.Tensor, int]:
        return _mapped(_Dense, info, in_dims, args)


def _mapped(function: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[torch.Tensor, int]:
    """Return a product over a batch: at once if only `A` has one, else one by one."""
    if all(dim is None for dim in tree_leaves(in_dims[1:])):
        return function.apply(args[0].movedim(in_dims[0], 0), *args[1:]), 0
    products = [
        function.apply(
            *(arg.select(dim, i) if type(dim) is int else arg for arg, dim in zip(args, in_dims, strict=True))
        )
        for i in range(info.batch_size)
    ]
    return torch.stack(products), 0


# ---- gradients of the ops, for whoever traces them ------------------------------------------------------------------


def _op_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    A, CB, SCB, _threshold, _bias, B = inputs
    _save(ctx, A, B, Weight(CB, SCB))


def _op_backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs = ctx.needs_input_grad
    grad_A, grad_bias, grad_B = _gradients(ctx, grad_output, (needs[0], needs[4], needs[5]))
    return grad_A, None, None, None, grad_bias, grad_B


def _dense_setup(transposed: bool) -> Any:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        A, CB, SCB = inputs
        ctx.save_for_backward(CB, SCB)
        ctx.dtype, ctx.transposed = A.dtype, transposed

    return setup


def _dense_backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return dense(grad_output.to(ctx.dtype), Weight(*ctx.saved_tensors), not ctx.transposed), None, None


torch.library.register_autograd("fewbits::int8_linear", _op_backward, setup_context=_op_setup, lib=library)
torch.library.register_autograd(
    "fewbits::int8_dense_matmul", _dense_backward, setup_context=_dense_setup(False), lib=library
)
torch.library.register_autograd(
    "fewbits::int8_dense_matmul_grad", _dense_backward, setup_context=_dense_setup(True), lib=library
)
