"""Matrix products with quantized weights, and their gradients."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from fewbits import _checks
from fewbits.functional import check_state, dequantize_as
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

    The weight is dequantized to the dtype of `A` for the product, and again for the gradient of `A`: nothing of its
    full size is kept in between. It has no gradient itself.

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
    if quant_state is None:
        raise ValueError("quant_state: expected the state of B, got None")
    state = check_state(quant_state)
    transposed = _check_product(A, B, state, bias)
    if A.device.type != "meta" and torch.is_autocast_enabled(A.device.type) and A.dtype != torch.float64:
        A = A.to(torch.get_autocast_dtype(A.device.type))
    if bias is not None:
        bias = bias.to(A.dtype)
    differentiable = torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad))
    if out is not None:
        _check_out(out, A, state.shape[1 if transposed else 0] if state.shape is not None else 0, differentiable)
    if differentiable:
        product: torch.Tensor = _MatMul4Bit.apply(A, bias, transposed, B, *_parts(state))
    else:
        product = F.linear(A, _weight(B, state, A.dtype, transposed), bias)
    return product if out is None else out.copy_(product)


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


def _weight(B: torch.Tensor, state: QuantState, dtype: torch.dtype, transposed: bool) -> torch.Tensor:
    if dtype in _checks.DTYPES:
        weight = dequantize_as(B, state, dtype)
    else:
        weight = dequantize_as(B, state, torch.float32).to(dtype)
    return weight.t() if transposed else weight


# What autograd (and torch.compile's view of it) must see are tensors and plain values, so a state travels in parts.
_Parts = tuple[
    torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, int | None, Any, int | None, str | None
]


def _parts(state: QuantState) -> _Parts:
    state2 = state.state2 if state.nested else None
    nested = (
        (None, None, None, None) if state2 is None else (state.offset, state2.absmax, state2.code, state2.blocksize)
    )
    return (state.absmax, *nested, state.shape, state.blocksize, state.quant_type)


def _whole(
    absmax: torch.Tensor,
    offset: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    nested_blocksize: int | None,
    shape: Any,
    blocksize: int | None,
    quant_type: str | None,
) -> QuantState:
    state2 = None
    if nested_absmax is not None:
        state2 = QuantState(nested_absmax, None, nested_code, nested_blocksize)
    return QuantState(absmax, shape, None, blocksize, quant_type, None, offset, state2)


class _MatMul4Bit(torch.autograd.Function):
    @staticmethod
    def forward(
        A: torch.Tensor, bias: torch.Tensor | None, transposed: bool, B: torch.Tensor, *parts: Any
    ) -> torch.Tensor:
        return F.linear(A, _weight(B, _whole(*parts), A.dtype, transposed), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        A, bias, ctx.transposed, B, *parts = inputs
        ctx.dtype, ctx.bias_shape = A.dtype, None if bias is None else bias.shape
        ctx.save_for_backward(B, *parts[:4])
        ctx.plain = parts[4:]

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_A = grad_bias = None
        if ctx.needs_input_grad[0]:
            B, *tensors = ctx.saved_tensors
            weight = _weight(B, _whole(*tensors, *ctx.plain), ctx.dtype, ctx.transposed)
            grad_A = torch.matmul(grad_output, weight)
        if ctx.needs_input_grad[1]:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
        return grad_A, grad_bias, *[None] * (2 + 4 + len(ctx.plain))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], A: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, int]:
        if any(dim is not None for dim in tree_leaves(in_dims[1:])):  # a shape has a dim for each of its sizes
            raise NotImplementedError("matmul_4bit: vmap is possible over A only, not over the weight or the bias")
        return _MatMul4Bit.apply(A.movedim(in_dims[0], 0), *rest), 0
