"""Adam, with states of 32 or 8 bits, resident or paged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fewbits.optim._families import eight_bits
from fewbits.optim._options import Options, Params
from fewbits.optim.optimizer import Optimizer2State

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Adam", "Adam8bit", "Adam32bit", "PagedAdam", "PagedAdam8bit", "PagedAdam32bit"]


class _Adam(Optimizer2State):
    """What the classes of this rule have in common."""

    _decoupled = False
    _only_8bit = False
    _always_paged = False

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            "adam",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            eight_bits(optim_bits) if self._only_8bit else optim_bits,
            args,
            min_8bit_size,
            is_paged=is_paged or self._always_paged,
            hyperparameters={"amsgrad": amsgrad},
            **options,
        )


class Adam(_Adam):
    """Adam (Kingma and Ba 2015), with weight decay as in `torch.optim.Adam`.

    With the gradient g, plus ``weight_decay * p``::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g ** 2
        p = p - lr / (1 - beta1 ** t) * m / (sqrt(v / (1 - beta2 ** t)) + eps)

    bitsandbytes decouples the weight decay of its Adam; that is `AdamW` here.

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
        Added to the gradient, times the parameter.
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
    >>> Adam([p], lr=0.1).step()
    >>> p.tolist()
    [0.8999999761581421, -0.8999999761581421]
    """


class Adam8bit(_Adam):
    """`Adam` with 8-bit states (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization).

    `optim_bits` is here for compatibility: 8, or the default 32, and the states have 8 bits in either case. `amsgrad`
    must be False.
    """

    _only_8bit = True


class Adam32bit(_Adam):
    """`Adam` with 32-bit states.

    With ``optim_bits=8`` the states have 8 bits after all.
    """


class PagedAdam(_Adam):
    """`Adam` with states that may live in host memory.

    `is_paged` is here for compatibility: these are paged in either case.
    """

    _always_paged = True


class PagedAdam8bit(_Adam):
    """`Adam` with 8-bit states that may live in host memory.

    `optim_bits` is here for compatibility: 8, or the default 32, and the states have 8 bits in either case.
    `is_paged` is here for compatibility: these are paged in either case. `amsgrad` must be False.
    """

    _only_8bit = True
    _always_paged = True


class PagedAdam32bit(_Adam):
    """`Adam` with 32-bit states that may live in host memory.

    With ``optim_bits=8`` the states have 8 bits after all.
    `is_paged` is here for compatibility: these are paged in either case.
    """

    _always_paged = True
