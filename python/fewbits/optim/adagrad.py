"""Adagrad, with a state of 32 or 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fewbits.optim._options import Options, Params
from fewbits.optim.optimizer import Optimizer1State

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Adagrad", "Adagrad8bit", "Adagrad32bit"]


class _Adagrad(Optimizer1State):
    """What the classes of this rule have in common."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            "adagrad",
            params,
            lr,
            (0.0, 0.0),
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            hyperparameters={"lr_decay": lr_decay, "initial_accumulator_value": initial_accumulator_value},
            **options,
        )


class Adagrad(_Adagrad):
    """Adagrad (Duchi, Hazan and Singer 2011), as `torch.optim.Adagrad`.

    With the gradient g, plus ``weight_decay * p``::

        s = s + g ** 2
        p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)

    Parameters
    ----------
    params : iterable
        Parameters or parameter groups, float32, float16 or bfloat16.
    lr : float or torch.Tensor
        Learning rate. A tensor is read on its device, so that a captured CUDA graph follows a scheduler.
    lr_decay : float
        How fast the learning rate falls.
    weight_decay : float
        Added to the gradient, times the parameter.
    initial_accumulator_value : float
        What s begins with.
    eps : float
        Added to the denominator.
    optim_bits : int
        8 or 32: the width of the states.
    args : object, optional
        Has the attributes ``optim_bits``, ``min_8bit_size``, ``max_unorm`` and ``skip_zeros``, in place of the
        arguments.
    min_8bit_size : int
        Parameters of fewer elements have 32-bit states.
    **options
        ``stochastic_rounding``, ``seed``, ``max_grad_norm``, ``skip_nonfinite``, ``page_budget``: see `Optimizer8bit`.

    Raises
    ------
    ValueError
        Naming the argument that cannot be obeyed.

    Examples
    --------
    >>> p = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    >>> p.grad = torch.tensor([0.5, -0.5])
    >>> Adagrad([p], lr=0.25).step()
    >>> p.tolist()
    [0.75, -0.75]
    """


class Adagrad8bit(_Adagrad):
    """`Adagrad` with 8-bit states (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization)."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 8,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        if optim_bits != 8:
            raise ValueError(f"optim_bits: expected 8, got {optim_bits!r}")
        super().__init__(
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            optim_bits,
            args,
            min_8bit_size,
            **options,
        )


class Adagrad32bit(_Adagrad):
    """`Adagrad` with 32-bit states."""
