"""AdamW, with states of 32 or 8 bits, resident or paged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fewbits.optim._options import Options, Params
from fewbits.optim.adam import _Adam

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AdamW", "AdamW8bit", "AdamW32bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit"]


class _AdamW(_Adam):
    """What the classes of this rule have in common."""

    _decoupled = True

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size, is_paged, **options
        )


class AdamW(_AdamW):
    """AdamW (Loshchilov and Hutter 2019): Adam with decoupled weight decay, as `torch.optim.AdamW`.

    With the gradient g::

        p = p * (1 - lr * weight_decay)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g ** 2
        p = p - lr / (1 - beta1 ** t) * m / (sqrt(v / (1 - beta2 ** t)) + eps)

    Parameters
    ----------
    params : iterable
        Parameters or parameter groups, float32, float16 or bfloat16.
    lr : float or torch.Tensor
        Learning rate. A tensor is read on its device, so that a captured CUDA graph follows a scheduler.
    betas : tuple of float or str
        Decay rates of the two averages; text such as ``"(0.9, 0.95)"`` will do.
    eps : float
        Added to the denominator.
    weight_decay : float
        Shrinks the parameter by ``lr * weight_decay``.
    amsgrad : bool
        Whether the largest second average so far is used (Reddi et al. 2018); with 32-bit states only.
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
    >>> AdamW([p], lr=0.1).step()
    >>> p.tolist()
    [0.8989999890327454, -0.8989999890327454]
    """


class AdamW8bit(_AdamW):
    """`AdamW` with 8-bit states (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization).

    `optim_bits` is here for compatibility: 8, or the default 32, and the states have 8 bits in either case. `amsgrad`
    must be False.
    """

    _only_8bit = True


class AdamW32bit(_AdamW):
    """`AdamW` with 32-bit states.

    With ``optim_bits=8`` the states have 8 bits after all.
    """


class _PagedAdamW(_AdamW):
    """The same without the argument `is_paged`."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size, True, **options
        )


class PagedAdamW(_PagedAdamW):
    """`AdamW` with states that may live in host memory."""


class PagedAdamW8bit(_PagedAdamW):
    """`AdamW` with 8-bit states that may live in host memory.

    `optim_bits` is here for compatibility: 8, or the default 32, and the states have 8 bits in either case. `amsgrad`
    must be False.
    """

    _only_8bit = True


class PagedAdamW32bit(_PagedAdamW):
    """`AdamW` with 32-bit states that may live in host memory.

    With ``optim_bits=8`` the states have 8 bits after all.
    """
