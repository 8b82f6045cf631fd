"""LARS, with a state of 32 or 8 bits, and in plain torch operations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fewbits.optim._naming import Named
from fewbits.optim._options import Options, Params
from fewbits.optim.optimizer import Optimizer1State

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LARS", "LARS8bit", "LARS32bit", "PytorchLARS"]


class _LARS(Optimizer1State):
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
        max_unorm: float = 0.02,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            "lars",
            params,
            lr,
            (momentum, 0.0),
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            max_unorm,
            hyperparameters={"dampening": dampening, "nesterov": nesterov},
            **options,
        )


class LARS(_LARS):
    """LARS (You, Gitman and Ginsburg 2017, Large Batch Training of Convolutional Networks, algorithm 1).

    SGD whose gradient is scaled for each tensor before it enters the momentum::

        ratio = max_unorm * |p| / (|g| + weight_decay * |p|)        1 where either norm is 0
        g = ratio * (g + weight_decay * p)

    and then as in `SGD`. Norms stay on the device.

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
    max_unorm : float
        The trust coefficient, eta in the paper. 0: no ratio, as in `SGD`.
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
    >>> LARS([p], lr=1.0, max_unorm=0.5).step()
    >>> p.tolist()
    [0.5, -0.5]
    """


class _SizedLARS(_LARS):
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
        max_unorm: float = 0.02,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            self._width,
            args,
            min_8bit_size,
            max_unorm,
            **options,
        )


class LARS8bit(_SizedLARS):
    """`LARS` with 8-bit states (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization)."""

    _width = 8


class LARS32bit(_SizedLARS):
    """`LARS` with 32-bit states."""

    _width = 32


class PytorchLARS(torch.optim.Optimizer, metaclass=Named):
    """The rule of `LARS` in plain torch operations, one tensor at a time, for comparisons.

    Runs wherever torch does, and waits for nothing. The class of this name in bitsandbytes clips the update instead of
    scaling the gradient, as the classes called LARS there do.

    Parameters
    ----------
    params : iterable
        Parameters or parameter groups.
    lr : float
        Learning rate.
    momentum, dampening, weight_decay, nesterov : float, float, float, bool
        As in `LARS`.
    max_unorm : float
        The trust coefficient; 0: no ratio.

    Raises
    ------
    ValueError
        Naming the argument that cannot be obeyed.

    Examples
    --------
    >>> p = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
    >>> p.grad = torch.tensor([8.0, 0.0])
    >>> PytorchLARS([p], lr=1.0, max_unorm=0.5).step()
    >>> p.tolist()
    [0.5, 0.0]
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
    ) -> None:
        values = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "max_unorm": max_unorm}
        for name, value in values.items():
            if not value >= 0:
                raise ValueError(f"{name}: expected at least 0, got {value!r}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                "nesterov: expected a momentum and no dampening beside it, "
                f"got momentum {momentum!r} and dampening {dampening!r}"
            )
        given = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, {**given, "nesterov": nesterov, "max_unorm": max_unorm})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have gradients; return what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        decay = group["weight_decay"]
        update = p.grad.add(p, alpha=decay)
        if group["max_unorm"] > 0:
            norms = [torch.linalg.vector_norm(t, dtype=torch.float32) for t in (p, p.grad)]
            ratio = group["max_unorm"] * norms[0] / (norms[1] + decay * norms[0])
            ratio = torch.where((norms[0] > 0) & (norms[1] > 0), ratio, torch.ones_like(ratio))
            update.mul_(ratio.to(update.dtype))
        momentum = group["momentum"]
        if momentum:
            buffer = self.state[p].get("momentum_buffer")
            if buffer is None:
                buffer = self.state[p]["momentum_buffer"] = update.clone()
            else:
                buffer.mul_(momentum).add_(update, alpha=1 - group["dampening"])
            update = update.add(buffer, alpha=momentum) if group["nesterov"] else buffer
        p.add_(update, alpha=-group["lr"])
