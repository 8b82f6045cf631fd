"""Matrix products with quantized weights, and their gradients."""

from __future__ import annotations

import warnings

import torch

from fewbits import _checks, _launch, _matmul, _prepared
from fewbits._int8_matmul import MatmulLtState, matmul
from fewbits._product import product
from fewbits._states import check_state, weight_parts, weight_tensors
from fewbits.quant_state import QuantState

__all__ = ["MatmulLtState", "matmul", "matmul_4bit"]


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
    return multiply(A, B, quant_state, out, bias)


def multiply(
    A: torch.Tensor, B: torch.Tensor, quant_state: QuantState, out: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return `matmul_4bit`'s result after a look at everything: for calls that are not the ordinary one."""
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
        return product(A, bias, transposed, weight)
    differentiable = torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad))
    _check_out(out, A, weight[-1][1 if transposed else 0], differentiable)
    if not transposed and _launch.is_direct(A, bias, out, *weight_tensors(weight)):
        return _matmul.matmul_4bit(A, *weight, bias, out)
    return out.copy_(product(A, bias, transposed, weight))


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
            f"matmul_4bit: quant_state.shape {tuple(shape)} is (K, N). Re-quantize from the weight as (N, K)",
            DeprecationWarning,
            stacklevel=4,
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
