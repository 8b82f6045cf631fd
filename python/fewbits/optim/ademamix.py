"""AdEMAMix, with states of 32 or 8 bits, resident or paged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fewbits.optim._options import Options, Params
from fewbits.optim.optimizer import Optimizer2State

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AdEMAMix", "AdEMAMix8bit", "AdEMAMix32bit", "PagedAdEMAMix", "PagedAdEMAMix8bit", "PagedAdEMAMix32bit"]


class AdEMAMix(Optimizer2State):
    """AdEMAMix (Pagliardini, Ablin and Grangier 2024): Adam with a fast and a slow average of the gradient.

    With the gradient g::

        p = p * (1 - lr * weight_decay)
        m1 = beta1 * m1 + (1 - beta1) * g
        m2 = beta3 * m2 + (1 - beta3) * g
        v = beta2 * v + (1 - beta2) * g ** 2
        p = p - lr * (m1 / (1 - beta1 ** t) + alpha * m2) / (sqrt(v / (1 - beta2 ** t)) + eps)

    With `t_alpha`, alpha rises from 0 over so many steps; with `t_beta3`, beta3 rises from beta1 such that its
    half-life does so linearly. Both are computed where the step runs, from its own counter. The first state holds both
    averages.

    Parameters
    ----------
    params : iterable
        Parameters or parameter groups, float32, float16 or bfloat16.
    lr : float or torch.Tensor
        Learning rate. A tensor is read on its device, so that a captured CUDA graph follows a scheduler.
    betas : tuple of float or str
        Decay rates of the fast average, the second moment, and the slow average.
    alpha : float
        Weight of the slow average.
    t_alpha, t_beta3 : int, optional
        Steps over which `alpha` and beta3 reach their values.
    eps : float
        Added to the denominator.
    weight_decay : float
        Shrinks the parameter by ``lr * weight_decay``.
    optim_bits : int
        8 or 32: the width of the states.
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
    >>> AdEMAMix([p], lr=0.1, weight_decay=0.0).step()
    >>> p.tolist()
    [0.8999500274658203, -0.8999500274658203]
    """

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        betas: Any = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            "ademamix",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            None,
            min_8bit_size,
            is_paged=is_paged,
            alpha=alpha,
            t_alpha=t_alpha,
            t_beta3=t_beta3,
            **options,
        )


class _SizedAdEMAMix(AdEMAMix):
    """The same with states of one width, without the argument `optim_bits`."""

    _width: int

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        betas: Any = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            alpha,
            t_alpha,
            t_beta3,
            eps,
            weight_decay,
            self._width,
            min_8bit_size,
            is_paged,
            **options,
        )


class AdEMAMix8bit(_SizedAdEMAMix):
    """`AdEMAMix` with 8-bit states (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization)."""

    _width = 8


class AdEMAMix32bit(_SizedAdEMAMix):
    """`AdEMAMix` with 32-bit states."""

    _width = 32


class PagedAdEMAMix(AdEMAMix):
    """`AdEMAMix` with states that may live in host memory."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        betas: Any = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, lr, betas, alpha, t_alpha, t_beta3, eps, weight_decay, optim_bits, min_8bit_size, True, **options
        )


class _PagedSizedAdEMAMix(_SizedAdEMAMix):
    """The same without the argument `is_paged`."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        betas: Any = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, alpha, t_alpha, t_beta3, eps, weight_decay, min_8bit_size, True, **options)


class PagedAdEMAMix8bit(_PagedSizedAdEMAMix, AdEMAMix8bit):
    """`AdEMAMix` with 8-bit states that may live in host memory."""


class PagedAdEMAMix32bit(_PagedSizedAdEMAMix, AdEMAMix32bit):
    """`AdEMAMix` with 32-bit states that may live in host memory."""
