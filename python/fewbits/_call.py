"""What the quick products with a prepared weight have in common: their arguments, and their gradients.

A decode loop makes hundreds of these calls a token, a training step as many forward and backward, so their time on the
host counts. Whatever is not as it nearly always is returns None: the caller then takes the long way, which does the
work, or says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from fewbits._checks import DTYPES
from fewbits._direct import fits
from fewbits._launch import PLAIN_TYPES, is_unusual
from fewbits._panel import Bound, multiply_panels_transposed

_Tensor = torch.Tensor
_is_grad_enabled, _get_num_threads = torch.is_grad_enabled, torch.get_num_threads
_is_autocast, _autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
# Asks no subclass's __torch_function__, which takes longer than all the rest.
storage_address: Callable[[torch.Tensor], int] = getattr(
    torch._C, "_data_address", lambda tensor: tensor.untyped_storage().data_ptr()
)


class PreparedWeight(Protocol):
    """A quantized weight as native code takes it."""

    n: int
    k: int
    device: torch.device
    ordinal: int
    bound: Bound


class Arguments(NamedTuple):
    """What a native product is called with besides a weight."""

    m: int
    dtype: int
    bias_address: int
    y: torch.Tensor
    queue: int


def arguments(weight: PreparedWeight, A: Any, bias: Any) -> Arguments | None:
    """Return the arguments of ``A @ W.T + bias``, its memory included, if it is an ordinary product."""
    if type(A) is not _Tensor or is_unusual():
        return None
    dtype, shape, n, ordinal = A.dtype, A.shape, weight.n, weight.ordinal
    number = DTYPES.get(dtype)
    if number is None or A.device != weight.device or not A.is_contiguous() or A.is_neg():
        return None
    if ordinal >= 0:
        if _is_autocast() and _autocast_dtype("cuda") is not dtype:
            return None
        queue = torch._C._cuda_getCurrentRawStream(ordinal)
    else:
        if _is_autocast("cpu") and _autocast_dtype("cpu") is not dtype:
            return None
        queue = _get_num_threads()
    if bias is None:
        bias_address = 0
    else:
        if type(bias) not in PLAIN_TYPES or not (bias.dim() == 1 and fits(bias, dtype, n, ordinal)):
            return None
        bias_address = bias.data_ptr()
    k = weight.k
    # Sizes one by one take half the time of a tuple.
    if len(shape) == 3:
        batch, length, columns = shape
        m = batch * length
        if columns != k or not m:
            return None
        y = A.new_empty(batch, length, n)
    elif len(shape) == 2:
        m, columns = shape
        if columns != k or not m:
            return None
        y = A.new_empty(m, n)
    else:
        m = A.numel() // k
        if shape[-1:] != (k,) or not m:
            return None
        y = A.new_empty(*shape[:-1], n)
    return Arguments(m, number, bias_address, y, queue)


def wants_grad(A: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Return whether the product of these has gradients."""
    return (A.requires_grad or (bias is not None and bias.requires_grad)) and _is_grad_enabled()


class Weight(Protocol):
    """A weight held for the gradients of a product with it."""

    def run(self, A: torch.Tensor, bias: torch.Tensor | None, call: Arguments) -> torch.Tensor:
        """Return ``A @ W.T + bias``."""

    def parts(self) -> tuple[torch.Tensor | None, ...]:
        """Return the weight's tensors, those that the long way saves and in its order."""

    def current(self) -> PreparedWeight | None:
        """Return the prepared weight, if it is still what it was."""

    def grad(self, grad_output: torch.Tensor) -> torch.Tensor:
        """Return ``grad_output @ W`` by the long way, with gradients of its own."""


class Product(torch.autograd.Function):
    """A product with a prepared weight for plain autograd. Arguments: A, bias, the weight, the call's arguments.

    What it saves is what the long way saves: a checkpoint may go one way at first and the other when it recomputes.
    """

    @staticmethod
    def forward(ctx: Any, A: torch.Tensor, bias: torch.Tensor | None, weight: Weight, call: Arguments) -> torch.Tensor:
        ctx.weight, ctx.dtype = weight, A.dtype
        ctx.save_for_backward(*weight.parts())
        return weight.run(A, bias, call)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_A = grad_bias = None
        wants_A, wants_bias, _, _ = ctx.needs_input_grad
        _ = ctx.saved_tensors  # raises if the weight has been written to
        if wants_A:
            grad_A = _grad(ctx.weight, grad_output if grad_output.dtype is ctx.dtype else grad_output.to(ctx.dtype))
        if wants_bias:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
        return grad_A, grad_bias, None, None


def _grad(weight: Weight, g: torch.Tensor) -> torch.Tensor:
    prepared = weight.current()
    if (
        prepared is None
        or type(g) is not _Tensor
        or (g.requires_grad and _is_grad_enabled())
        or g.device != prepared.device
        or g.is_neg()
        or is_unusual()
    ):
        return weight.grad(g)
    y = g.new_empty(*g.shape[:-1], prepared.k)
    multiply_panels_transposed(prepared.bound, g.reshape(-1, prepared.n), y.view(-1, prepared.k))
    return y
