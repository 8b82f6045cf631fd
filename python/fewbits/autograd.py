"""Matrix products with quantized weights, and their gradients."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fewbits import _checks, _launch, _matmul, _prepared, _weight_ops
from fewbits._ops import library
from fewbits._states import WeightParts, check_state, weight_parts, weight_tensors
from fewbits.quant_state import QuantState

__all__ = ["matmul_4bit"]


def matmul_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    quant_state: QuantState,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``A @ W.T + bias`` for a weight `W` held in 4 bits.

    The weight is decoded as it is multiplied, or in panels of bounded size, forward and for the gradient of `A`: a
    full-size copy of it never exists. It has no gradient itself.

    Parameters
    ----------
    A : torch.Tensor
        Floating point, shape ``(..., K)``. Under autocast it is taken in the autocast dtype, as by ``F.linear``.
    B : torch.Tensor
        The codes of `W`, as `quantize_4bit` returns them or transposed.
    quant_state : QuantState
        Their state; its shape is ``(N, K)``. A state of shape ``(K, N)`` that does not fit otherwise is taken as that
        of the transposed weight, with a DeprecationWarning.
    out : torch.Tensor, optional
        Receives the product. It has no gradient then.
    bias : torch.Tensor, optional
        Shape ``(N,)``.

    Returns
    -------
    torch.Tensor
        Shape ``(..., N)``, dtype of `A`, or `out`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that is wrong.

    Examples
    --------
    >>> from fewbits.functional import quantize_4bit
    >>> codes, state = quantize_4bit(torch.ones(2, 32))
    >>> matmul_4bit(torch.ones(1, 32), codes.t(), state).tolist()
    [[32.0, 32.0]]
    """
    if out is None and type(quant_state) is QuantState and not torch.compiler.is_compiling():
        done = _prepared.matmul_4bit(A, B, quant_state, bias)
        if done is not None:
            return done
    if quant_state is None:
        raise ValueError("quant_state: expected the state of B, got None")
    state = check_state(quant_state)
    transposed = _check_product(A, B, state, bias)
    if A.device.type != "meta" and torch.is_autocast_enabled(A.device.type) and A.dtype != torch.float64:
        A = A.to(torch.get_autocast_dtype(A.device.type))
    if bias is not None:
        bias = bias.to(A.dtype)
    weight = weight_parts(B, state)
    if out is None:
        return _product(A, bias, transposed, weight)
    differentiable = torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad))
    _check_out(out, A, weight[-1][1 if transposed else 0], differentiable)
    if not transposed and _launch.is_direct(A, bias, out, *weight_tensors(weight)):
        return _matmul.matmul_4bit(A, *weight, bias, out)
    return out.copy_(_product(A, bias, transposed, weight))


def _check_product(A: torch.Tensor, B: torch.Tensor, state: QuantState, bias: torch.Tensor | None) -> bool:
    """Raise unless the product exists; return whether the state is that of the transposed weight."""
    _checks.check_tensor("A", A)
    _checks.check_tensor("B", B)
    if not A.is_floating_point():
        raise ValueError(f"A: expected a floating-point dtype, got {A.dtype}")
    _checks.check_same_device("A", A, "B", B)
    shape = state.shape
    assert shape is not None
    if len(shape) != 2:
        raise ValueError(f"quant_state.shape: expected two sizes (N, K), got {tuple(shape)}")
    if A.dim() == 0 or A.shape[-1] not in shape:
        raise ValueError(f"A: expected a last size of {shape[1]} for a weight of {tuple(shape)}, got {tuple(A.shape)}")
    transposed = A.shape[-1] != shape[1]
    if transposed:
        warnings.warn(
            f"matmul_4bit: quant_state.shape {tuple(shape)} is (K, N); quantize the weight as (N, K)",
            DeprecationWarning,
            stacklevel=3,
        )
    if bias is not None:
        _checks.check_tensor("bias", bias)
        _checks.check_same_device("A", A, "bias", bias)
        rows = shape[1] if transposed else shape[0]
        if bias.shape != (rows,):
            raise ValueError(f"bias: expected shape ({rows},), got {tuple(bias.shape)}")
    return transposed


def _check_out(out: torch.Tensor, A: torch.Tensor, rows: int, differentiable: bool) -> None:
    shape = (*A.shape[:-1], rows)
    _checks.check_tensor("out", out)
    _checks.check_same_device("A", A, "out", out)
    if out.shape != shape or out.dtype != A.dtype:
        raise ValueError(f"out: expected shape {shape} of {A.dtype}, got {tuple(out.shape)} of {out.dtype}")
    if differentiable:
        raise ValueError("out: expected None where a gradient is asked for, got a tensor")


def _product(A: torch.Tensor, bias: torch.Tensor | None, transposed: bool, weight: WeightParts) -> torch.Tensor:
    """Return ``A @ W.T + bias``, or ``A @ W + bias`` of a transposed weight, by whatever serves this caller.

    The compiler and dispatch modes get one op. Transforms and forward-mode derivatives need the autograd.Function,
    which knows their rules. An ordinary call goes straight to native code, by way of the Function if a gradient is
    asked for.
    """
    if not torch.compiler.is_compiling():
        wants_grad = torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad))
        if _launch.is_transformed() or (wants_grad and _launch.is_direct(A, bias, *weight_tensors(weight))):
            product: torch.Tensor = _MatMul4Bit.apply(A, *weight, bias, transposed)
            return product
    return _run(A, bias, transposed, weight)


def _run(A: torch.Tensor, bias: torch.Tensor | None, transposed: bool, weight: WeightParts) -> torch.Tensor:
    run: Any = _matmul if _launch.is_direct(A, bias, *weight_tensors(weight)) else _weight_ops
    if not transposed:
        product: torch.Tensor = run.matmul_4bit(A, *weight, bias)
        return product
    product = run.matmul_4bit_grad(A, *weight)
    return product if bias is None else product + bias


def _save(ctx: Any, A: torch.Tensor, weight: WeightParts, transposed: bool) -> None:
    B, absmax, nested_code, nested_absmax, nested_blocksize, offset, *rest = weight
    tensors = (B, absmax, nested_code, nested_absmax, offset)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
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
        grad_A = _product(grad_output.to(ctx.dtype), None, not ctx.transposed, _saved(ctx))
    if wants_bias:
        grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
    return grad_A, grad_bias


class _MatMul4Bit(torch.autograd.Function):
    """The product for eager autograd, forward-mode derivatives and functorch.

    Arguments: A, the parts of the weight, bias, transposed.
    """

    @staticmethod
    def forward(A: torch.Tensor, *rest: Any) -> torch.Tensor:
        *weight, bias, transposed = rest
        return _run(A, bias, transposed, tuple(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        A, *weight, _bias, transposed = inputs
        _save(ctx, A, tuple(weight), transposed)
        ctx.product_shape = output.shape

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_A, grad_bias = _gradients(ctx, grad_output, ctx.needs_input_grad[0], ctx.needs_input_grad[-2])
        return grad_A, *[None] * 9, grad_bias, None

    @staticmethod
    def jvp(ctx: Any, A: torch.Tensor | None, *rest: Any) -> torch.Tensor:
        bias: torch.Tensor | None = rest[-2]
        if A is not None:
            return _product(A, bias, ctx.transposed, _saved(ctx))
        assert bias is not None
        return bias.expand(ctx.product_shape)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], A: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, int]:
        if all(dim is None for dim in tree_leaves(in_dims[1:])):  # a shape has a dim for each of its sizes
            return _MatMul4Bit.apply(A.movedim(in_dims[0], 0), *rest), 0
        products = [
            _MatMul4Bit.apply(
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
