"""LAMB, with states of 32 or 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fewbits.compat import _differences
from fewbits.optim._families import no_amsgrad
from fewbits.optim._options import Options, Params
from fewbits.optim.optimizer import Optimizer2State

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LAMB", "LAMB8bit", "LAMB32bit"]


class _LAMB(Optimizer2State):
    """What the classes of this rule have in common."""

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        bias_correction: bool = True,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            "lamb",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            max_unorm,
            hyperparameters=no_amsgrad(amsgrad, bias_correction=bias_correction, adam_w_mode=adam_w_mode),
            **options,
        )


class LAMB(_LAMB):
    """LAMB (You et al. 2020, Large Batch Optimization for Deep Learning, algorithm 2 with the identity for phi).

    Adam whose update r is given, for each tensor, the norm of the tensor::

        r = m / (1 - beta1 ** t) / (sqrt(v / (1 - beta2 ** t)) + eps) + weight_decay * p
        p = p - lr * max_unorm * |p| / |r| * r                      the ratio is 1 where either norm is 0

    with m and v as in `Adam`. Norms stay on the device.

    Parameters
    ----------
    params : iterable
        Parameters or parameter groups, float32, float16 or bfloat16.
    lr : float or torch.Tensor
        Learning rate. A tensor is read on its device, so that a captured CUDA graph follows a scheduler.
    bias_correction : bool
        Whether the averages are divided by ``1 - beta ** t``.
    betas : tuple of float or str
        Decay rates of the two averages.
    eps : float
        Added to the denominator.
    weight_decay : float
        Added to the update, times the parameter.
    amsgrad : bool
        Must be False.
    adam_w_mode : bool
        If False, weight decay is added to the gradient instead.
    optim_bits : int
        8 or 32: the width of the states.
    args : object, optional
        Has the attributes ``optim_bits``, ``min_8bit_size``, ``max_unorm`` and ``skip_zeros``, in place of the
        arguments.
    min_8bit_size : int
        Parameters of fewer elements have 32-bit states.
    max_unorm : float
        A factor of the trust ratio; 1 in the paper. 0: no ratio, as if it were 1 throughout.
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
    >>> LAMB([p], lr=0.25, eps=0.0).step()
    >>> p.tolist()
    [0.75, -0.75]
    """


class _SizedLAMB(_LAMB):
    """The same with states of one width, without the argument `optim_bits`."""

    _width: int

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        bias_correction: bool = True,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        if self._width == 8:
            _differences.refuse_trust_of_8_bits(max_unorm)
        super().__init__(
            params,
            lr,
            bias_correction,
            betas,
            eps,
            weight_decay,
            amsgrad,
            adam_w_mode,
            self._width,
            args,
            min_8bit_size,
            max_unorm,
            **options,
        )


class LAMB8bit(_SizedLAMB):
    """`LAMB` with 8-bit states (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization)."""

    _width = 8


class LAMB32bit(_SizedLAMB):
    """`LAMB` with 32-bit states."""

    _width = 32
