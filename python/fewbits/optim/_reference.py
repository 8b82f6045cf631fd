"""AdEMAMix in plain torch operations, for comparisons."""

from __future__ import annotations

from typing import Any

import torch

from fewbits.optim._naming import Named
from fewbits.optim._options import Params


class _ReferenceAdEMAMix(torch.optim.Optimizer, metaclass=Named):
    """AdEMAMix (Pagliardini, Ablin and Grangier 2024, algorithm 1), one tensor and one operation at a time.

    Parameters
    ----------
    params : iterable
        Parameters or parameter groups.
    lr, betas, alpha, eps, weight_decay, t_beta3, t_alpha
        As of `AdEMAMix`.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        t_beta3: int | None = None,
        t_alpha: int | None = None,
    ) -> None:
        given: dict[str, Any] = {"lr": lr, "betas": betas, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**given, "t_beta3": t_beta3, "t_alpha": t_alpha})

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
        state, g = self.state[p], p.grad
        assert g is not None
        if not state:
            state["step"] = 0
            state["m1_m2"], state["nu"] = p.new_zeros((2, *p.shape)), torch.zeros_like(p)
        state["step"] += 1
        t, (beta1, beta2, beta3), alpha = state["step"], group["betas"], group["alpha"]
        if group["t_alpha"] is not None:
            alpha = min(t * alpha / group["t_alpha"], alpha)
        if group["t_beta3"] is not None:
            # The half-life of the slow average grows linearly from that of the fast one (equation 4.3).
            low, high = torch.tensor([beta1, beta3], dtype=torch.float64, device="cpu").log().tolist()
            part = t / group["t_beta3"]
            exponent = low * high / ((1 - part) * high + part * low)
            beta3 = min(float(torch.tensor(exponent, dtype=torch.float64, device="cpu").exp()), beta3)
        (m1, m2), nu = state["m1_m2"], state["nu"]
        m1.lerp_(g, 1 - beta1)
        m2.lerp_(g, 1 - beta3)
        nu.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (m1 / (1 - beta1**t) + alpha * m2) / ((nu / (1 - beta2**t)).sqrt() + group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
