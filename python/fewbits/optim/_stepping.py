"""One step over all parameters: a plan that still holds, the factor of the gradients, and the launches."""

from __future__ import annotations

from typing import Any, cast

import torch

from fewbits.optim._paged_states import is_capturing
from fewbits.optim._persistent import Persistent
from fewbits.optim._plan import Plan
from fewbits.optim._prepare import Member


class Stepping(Persistent):
    """An optimizer that updates all of its parameters at once."""

    max_grad_norm: float | None
    skip_nonfinite: bool
    stochastic_rounding: bool
    seed: int
    _decoupled = True  # weight decay of the rule "adam"; `Adam` says otherwise

    def check_overrides(self) -> None:
        """Look up overrides for modules."""
        raise NotImplementedError

    def init_state(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        """Give a parameter the states that it lacks."""
        raise NotImplementedError

    def _step_all(self) -> None:
        plan = cast("Plan | None", self._watch.plan)
        if self.is_paged and self._pages_want_to_move():
            plan = None
        found = plan.match(self) if plan is not None else None
        if plan is None or found is None or plan.refresh():
            plan = self._make_plan()
            if plan is None:
                return
            found = plan.match(self)
            if found is None:
                raise RuntimeError("step: expected parameters, gradients and states that hold still, got changes")
        self._watch.plan = plan
        self._run(plan, *found)

    def _make_plan(self) -> Plan | None:
        self._watch.plan = None
        self.check_overrides()
        members, known, ordinal = [], set(), 0
        for gindex, group in enumerate(self.param_groups):
            for pindex, p in enumerate(group["params"]):
                if p.grad is not None and id(p) not in known:
                    known.add(id(p))
                    members.append(Member(gindex, pindex, ordinal, p))
                ordinal += 1
        return Plan(self, members) if members else None

    def _run(self, plan: Plan, addresses: bytes, grads: list[torch.Tensor]) -> None:
        capturing = any(bundle.device.type == "cuda" for bundle in plan.bundles) and is_capturing()
        if capturing:
            self._captured.append(plan)
        for bundle in plan.bundles:
            bundle.send(addresses, grads, capturing)
        controls = self._control(plan)
        for bundle, control in zip(plan.bundles, controls, strict=True):
            bundle.step(control, capturing)
        _increment_version(plan.params)

    def _control(self, plan: Plan) -> list[int]:
        """Return where each device finds the factor of the gradients and whether to leave the step out, or zeros."""
        scale, inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        need_norm = self.max_grad_norm is not None or self.skip_nonfinite
        if not need_norm and scale is None and inf is None:
            return [0] * len(plan.bundles)
        first = plan.bundles[0]
        for bundle in plan.bundles:
            if bundle.control is None:
                bundle.control = torch.zeros(2, dtype=torch.int32, device=bundle.device)
        partials = [bundle.norms() for bundle in plan.bundles] if need_norm else []
        joined = partials[0] if len(partials) == 1 else None
        if plan.reducer is not None and need_norm:
            rows = [bundle.row_sums(part) for bundle, part in zip(plan.bundles, partials, strict=True)]
            joined = plan.reducer.reduce_total(rows, first.home)
        elif len(partials) > 1:
            joined = torch.cat([part.to(first.home) for part in partials])
        first.decide(joined, float(self.max_grad_norm or 0.0), scale, inf, self.skip_nonfinite)
        for bundle in plan.bundles[1:]:
            assert bundle.control is not None
            assert first.control is not None
            bundle.control.copy_(first.control)
        return [bundle.control.data_ptr() if bundle.control is not None else 0 for bundle in plan.bundles]


def _takes_many() -> bool:
    try:
        torch.autograd.graph.increment_version([])
    except (RuntimeError, TypeError):  # older torch takes one tensor at a time
        return False
    return True


_BUMPS_MANY = _takes_many()


def _increment_version(params: list[torch.Tensor]) -> None:
    """Let autograd see that parameters changed."""
    if _BUMPS_MANY:
        torch.autograd.graph.increment_version(params)
        return
    for p in params:
        if not p.is_inference():
            torch.autograd.graph.increment_version(p)
