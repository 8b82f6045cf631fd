"""Lion, with a state of 32 or 8 bits, resident or paged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fewbits.optim._options import Options, Params
from fewbits.optim.optimizer import Optimizer1State

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Lion", "Lion8bit", "Lion32bit", "PagedLion", "PagedLion8bit", "PagedLion32bit"]


class _Lion(Optimizer1State):
    """What the classes of this rule have in common."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            "lion", params, lr, betas, 0.0, weight_decay, optim_bits, args, min_8bit_size, is_paged=is_paged, **options
        )


class Lion(_Lion):
    """Lion (Chen et al. 2023, Symbolic Discovery of Optimization Algorithms).

    With the gradient g::

        p = p * (1 - lr * weight_decay)
        p = p - lr * sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g

    Parameters
    ----------
    params : iterable
        Parameters or parameter groups, float32, float16 or bfloat16.
    lr : float or torch.Tensor
        Learning rate. A tensor is read on its device, so that a captured CUDA graph follows a scheduler.
    betas : tuple of float or str
        Weight of the average in the update, and decay rate of the average.
    weight_decay : float
        Shrinks the parameter by ``lr * weight_decay``.
    optim_bits : int
        8 or 32: the width of the states.
    args : object, optional
        Has the attributes ``optim_bits``, ``min_8bit_size``, ``max_unorm`` and ``skip_zeros``, in place of the
        arguments.
    min_8bit_size : int
        Parameters of fewer elements have 32-bit states.
    is_paged : bool
        Whether large states may live in page-locked host memory; see `Optimizer8bit`.
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
    >>> Lion([p], lr=0.25).step()
    >>> p.tolist()
    [0.75, -0.75]
    """


class _SizedLion(_Lion):
    """The same with states of one width, without the argument `optim_bits`."""

    _width: int

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, self._width, args, min_8bit_size, is_paged, **options)


class Lion8bit(_SizedLion):
    """`Lion` with 8-bit states (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization)."""

    _width = 8


class Lion32bit(_SizedLion):
    """`Lion` with 32-bit states."""

    _width = 32


class PagedLion(_Lion):
    """`Lion` with states that may live in host memory."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, optim_bits, args, min_8bit_size, True, **options)


class _PagedSizedLion(_SizedLion):
    """The same without the argument `is_paged`."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, args, min_8bit_size, True, **options)


class PagedLion8bit(_PagedSizedLion):
    """`Lion` with 8-bit states that may live in host memory."""

    _width = 8


class PagedLion32bit(_PagedSizedLion):
    """`Lion` with 32-bit states that may live in host memory."""

    _width = 32
