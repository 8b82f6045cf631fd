"""SGD with momentum, with a state of 32 or 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fewbits.optim._options import Options, Params
from fewbits.optim.optimizer import Optimizer1State

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SGD", "SGD8bit", "SGD32bit"]


class _SGD(Optimizer1State):
    """What the classes of this rule have in common."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            "momentum",
            params,
            lr,
            (momentum, 0.0),
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            hyperparameters={"dampening": dampening, "nesterov": nesterov},
            **options,
        )


class SGD(_SGD):
    """Stochastic gradient descent with momentum, as `torch.optim.SGD`.

    With the gradient g, plus ``weight_decay * p``::

        b = g                                       at the first step
        b = momentum * b + (1 - dampening) * g      later
        p = p - lr * b                              or, nesterov, lr * (g + momentum * b)

    Groups keep the momentum as the first of ``betas``, as bitsandbytes does.

    Parameters
    ----------
    params : iterable
        Parameters or parameter groups, float32, float16 or bfloat16.
    lr : float or torch.Tensor
        Learning rate. A tensor is read on its device, so that a captured CUDA graph follows a scheduler.
    momentum : float
        Decay rate of the buffer; without one there is no state.
    dampening : float
        How much less than the whole gradient goes into the buffer after the first step.
    weight_decay : float
        Added to the gradient, times the parameter.
    nesterov : bool
        Nesterov's momentum; needs a momentum and no dampening.
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
    >>> SGD([p], lr=0.5, momentum=0.9).step()
    >>> p.tolist()
    [0.75, -0.75]
    """


class _SizedSGD(_SGD):
    """The same with states of one width, without the argument `optim_bits`."""

    _width: int

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, self._width, args, min_8bit_size, **options
        )


class SGD8bit(_SizedSGD):
    """`SGD` with 8-bit states (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization)."""

    _width = 8


class SGD32bit(_SizedSGD):
    """`SGD` with 32-bit states."""

    _width = 32
