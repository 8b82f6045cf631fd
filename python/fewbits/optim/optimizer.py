"""The base classes that others build on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fewbits.optim._base import Optimizer8bit
from fewbits.optim._families import parse_betas
from fewbits.optim._options import MockArgs, Options, Params
from fewbits.optim.manager import GlobalOptimManager

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["GlobalOptimManager", "MockArgs", "Optimizer1State", "Optimizer2State", "Optimizer8bit"]


class Optimizer1State(Optimizer8bit):
    """Base of rules with one state: ``"lion"``, ``"momentum"``, ``"rmsprop"``, ``"adagrad"``, ``"lars"``.

    Parameters
    ----------
    optimizer_name : str
        The rule.
    params : iterable
        Parameters or parameter groups.
    lr : float or torch.Tensor
        Learning rate.
    betas : tuple of float or str
        What the rule makes of them: decay rates (lion), momentum (momentum, lars), smoothing constant and momentum
        (rmsprop).
    eps, weight_decay : float
        As in the rule.
    optim_bits : int
        8 or 32.
    args : object, optional
        Has the attributes ``optim_bits``, ``min_8bit_size``, ``max_unorm`` and ``skip_zeros``, in place of the
        arguments.
    min_8bit_size : int
        Smaller parameters have 32-bit states.
    max_unorm : float
        Trust coefficient of LAMB and LARS; 0 for all others.
    skip_zeros : bool
        Must be False.
    is_paged : bool
        See `Optimizer8bit`.
    hyperparameters : mapping, optional
        What else parameter groups have, such as ``nesterov``.
    **options
        See `Optimizer8bit`.

    Raises
    ------
    ValueError
        Naming the argument that the rule cannot obey.
    """

    def __init__(
        self,
        optimizer_name: str,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        betas: Any = (0.9, 0.0),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        *,
        hyperparameters: Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._configure(optimizer_name, args, optim_bits, min_8bit_size, max_unorm, skip_zeros)
        defaults = {"lr": lr, "betas": parse_betas(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, **(hyperparameters or {})}, optim_bits, is_paged, **options)


class Optimizer2State(Optimizer8bit):
    """Base of rules with two states: ``"adam"``, ``"lamb"``, ``"ademamix"``.

    Parameters
    ----------
    optimizer_name : str
        The rule.
    params : iterable
        Parameters or parameter groups.
    lr : float or torch.Tensor
        Learning rate.
    betas : tuple of float or str
        Decay rates: two, or three for AdEMAMix.
    eps, weight_decay : float
        As in the rule. ``"adam"`` decouples weight decay, as bitsandbytes does; `Adam` itself does not.
    optim_bits : int
        8 or 32.
    args : object, optional
        Has the attributes ``optim_bits``, ``min_8bit_size``, ``max_unorm`` and ``skip_zeros``, in place of the
        arguments.
    min_8bit_size : int
        Smaller parameters have 32-bit states.
    max_unorm : float
        Trust coefficient of LAMB; 0 for all others.
    skip_zeros : bool
        Must be False.
    is_paged : bool
        See `Optimizer8bit`.
    alpha, t_alpha, t_beta3 : float, int, int
        Of AdEMAMix.
    hyperparameters : mapping, optional
        What else parameter groups have, such as ``amsgrad``.
    **options
        See `Optimizer8bit`.

    Raises
    ------
    ValueError
        Naming the argument that the rule cannot obey.
    """

    def __init__(
        self,
        optimizer_name: str,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        alpha: float = 0.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        *,
        hyperparameters: Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._configure(optimizer_name, args, optim_bits, min_8bit_size, max_unorm, skip_zeros)
        defaults: dict[str, Any] = {"lr": lr, "betas": parse_betas(betas), "eps": eps, "weight_decay": weight_decay}
        defaults |= {"alpha": alpha, "t_alpha": t_alpha, "t_beta3": t_beta3}
        super().__init__(params, {**defaults, **(hyperparameters or {})}, optim_bits, is_paged, **options)
