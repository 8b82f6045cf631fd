"""RMSprop, with states of 32 or 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fewbits.optim._options import Options, Params
from fewbits.optim.optimizer import Optimizer1State

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["RMSprop", "RMSprop8bit", "RMSprop32bit"]


class _RMSprop(Optimizer1State):
    """What the classes of this rule have in common."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            "rmsprop",
            params,
            lr,
            (alpha, momentum),
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            hyperparameters={"centered": centered},
            **options,
        )


class RMSprop(_RMSprop):
    """RMSprop (Tieleman and Hinton 2012), as `torch.optim.RMSprop`.

    With the gradient g, plus ``weight_decay * p``::

        s = alpha * s + (1 - alpha) * g ** 2
        p = p - lr * g / (sqrt(s) + eps)

    With a momentum, a buffer ``b = momentum * b + g / (sqrt(s) + eps)`` takes the place of the fraction; centered, an
    average h of the gradient is subtracted: ``sqrt(s - h ** 2)``. Groups keep ``(alpha, momentum)`` as ``betas``.

    Parameters
    ----------
    params : iterable
        Parameters or parameter groups, float32, float16 or bfloat16.
    lr : float or torch.Tensor
        Learning rate. A tensor is read on its device, so that a captured CUDA graph follows a scheduler.
    alpha : float
        Decay rate of the average.
    eps : float
        Added to the denominator.
    weight_decay : float
        Added to the gradient, times the parameter.
    momentum : float
        Decay rate of the buffer; with 32-bit states only.
    centered : bool
        Whether the variance is divided by; with 32-bit states only.
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
    >>> RMSprop([p], lr=0.025, alpha=0.75).step()
    >>> p.tolist()
    [0.949999988079071, -0.949999988079071]
    """


class _SizedRMSprop(_RMSprop):
    """The same with states of one width, without the argument `optim_bits`."""

    _width: int

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, lr, alpha, eps, weight_decay, momentum, centered, self._width, args, min_8bit_size, **options
        )


class RMSprop8bit(_SizedRMSprop):
    """`RMSprop` with 8-bit states (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization)."""

    _width = 8


class RMSprop32bit(_SizedRMSprop):
    """`RMSprop` with 32-bit states."""

    _width = 32
