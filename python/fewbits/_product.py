"""The product with a 4-bit weight for every kind of caller, and its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fewbits import _launch, _matmul, _weight_ops
from fewbits._ops import library
from fewbits._states import WeightParts, weight_tensors


def product(A: torch.Tensor, bias: torch.Tensor | None, transposed: bool, weight: WeightParts) -> torch.Tensor:
    """Return ``A @ W.T + bias``, or ``A @ W + bias`` of a transposed weight, by whatever serves this caller.

    The compiler and dispatch modes get one op. Transforms and forward-mode derivatives get an autograd.Function that
    knows their rules; ordinary calls go straight to native code, by way of a quicker one if a gradient is asked for.
    """
    if not torch.compiler.is_compiling():
        result: torch.Tensor
        if _launch.is_transformed():
            result = _Transformed.apply(A, *weight, bias, transposed)
            return result
        wants_grad = torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad))
        if wants_grad and _launch.is_direct(A, bias, *weight_tensors(weight)):
            result = _Eager.apply(A, bias, transposed, weight)
            return result
    return _run(A, bias, transposed, weight)


def _run(A: torch.Tensor, bias: torch.Tensor | None, transposed: bool, weight: WeightParts) -> torch.Tensor:
    run: Any = _matmul if _launch.is_direct(A, bias, *weight_tensors(weight)) else _weight_ops
    if not transposed:
        result: torch.Tensor = run.matmul_4bit(A, *weight, bias)
        return result
    result = run.matmul_4bit_grad(A, *weight)
    return result if bias is None else result + bias


def _save(ctx: Any, A: torch.Tensor, weight: WeightParts, transposed: bool) -> None:
    B, absmax, nested_code, nested_absmax, nested_blocksize, offset, *rest = weight
    ctx.save_for_backward(B, absmax, nested_code, nested_absmax, offset)
    ctx.plain, ctx.transposed, ctx.dtype = (nested_blocksize, *rest), transposed, A.dtype


def _saved(ctx: Any) -> WeightParts:
    B, absmax, nested_code, nested_absmax, offset = ctx.saved_tensors
    nested_blocksize, *rest = ctx.plain
    return (B, absmax, nested_code, nested_absmax, nested_blocksize, offset, *rest)


def _gradients(
    ctx: Any, grad_output: torch.Tensor, wants_A: bool, wants_bias: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of `A` and of the bias. They are products with the same weight: those have gradients too."""
    grad_A = grad_bias = None
    if wants_A:
        grad_A = product(grad_output.to(ctx.dtype), None, not ctx.transposed, _saved(ctx))
    if wants_bias:
        grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
    return grad_A, grad_bias


class _Eager(torch.autograd.Function):
    """The product for plain autograd. Arguments: A, bias, transposed, a weight's parts."""

    @staticmethod
    def forward(
        ctx: Any, A: torch.Tensor, bias: torch.Tensor | None, transposed: bool, weight: WeightParts
    ) -> torch.Tensor:
        _save(ctx, A, weight, transposed)
        return _run(A, bias, transposed, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_gradients(ctx, grad_output, *ctx.needs_input_grad[:2]), None, None


class _Transformed(torch.autograd.Function):
    """The product for functorch and forward-mode derivatives. Arguments: A, a weight's parts, bias, transposed.

    Apart from `_Eager`, because functorch needs `setup_context`, with which every call takes a good deal longer.
    """

    @staticmethod
    def forward(A: torch.Tensor, *rest: Any) -> torch.Tensor:
        *weight, bias, transposed = rest
        return _run(A, bias, transposed, tuple(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        A, *weight, _bias, transposed = inputs
        _save(ctx, A, tuple(weight), transposed)
        ctx.save_for_forward(*weight_tensors(tuple(weight)))
        ctx.product_shape = output.shape

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_A, grad_bias = _gradients(ctx, grad_output, ctx.needs_input_grad[0], ctx.needs_input_grad[-2])
        return grad_A, *[None] * 9, grad_bias, None

    @staticmethod
    def jvp(ctx: Any, A: torch.Tensor | None, *rest: Any) -> torch.Tensor:
        bias: torch.Tensor | None = rest[-2]
        if A is not None:
            return product(A, bias, ctx.transposed, _saved(ctx))
        assert bias is not None
        return bias.expand(ctx.product_shape)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], A: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, int]:
        if all(dim is None for dim in tree_leaves(in_dims[1:])):  # a shape has a dim for each of its sizes
            return _Transformed.apply(A.movedim(in_dims[0], 0), *rest), 0
        products = [
            _Transformed.apply(
                *(arg.select(dim, i) if type(dim) is int else arg for arg, dim in zip((A, *rest), in_dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        return torch.stack(products), 0


# ---- gradients of the ops, for whoever traces them ------------------------------------------------------------------


def _op_backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_A, grad_bias = _gradients(ctx, grad_output, ctx.needs_input_grad[0], ctx.needs_input_grad[-1])
    return grad_A, *[None] * 9, grad_bias


def _op_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    A, *weight, _bias = inputs
    _save(ctx, A, tuple(weight), transposed=False)


def _grad_op_backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _gradients(ctx, grad_output, True, False)[0], *[None] * 9


def _grad_op_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    grad_output, *weight = inputs
    _save(ctx, grad_output, tuple(weight), transposed=True)


torch.library.register_autograd("fewbits::matmul_4bit", _op_backward, setup_context=_op_setup, lib=library)
torch.library.register_autograd(
    "fewbits::matmul_4bit_grad", _grad_op_backward, setup_context=_grad_op_setup, lib=library
)
