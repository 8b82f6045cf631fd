"""The base class: one native launch for all tensors of a kind, without a wait for the device."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, overload

import torch

from fewbits._checks import DTYPES
from fewbits.codebook import create_dynamic_map
from fewbits.compat import _differences
from fewbits.optim import _states
from fewbits.optim._distributed import whole_numel
from fewbits.optim._families import ALIASES, DEFAULTS, FAMILIES, check_8bit, check_values, parse_betas, take_betas
from fewbits.optim._naming import Named
from fewbits.optim._options import ARGS, MockArgs, Params
from fewbits.optim._paged_states import local
from fewbits.optim._plan import Plan
from fewbits.optim._prepare import Member
from fewbits.optim._stepping import Stepping

# In a compiled function a graph ends at a step: addresses mean nothing to a tracer. It is torch's way with its own
# optimizers; `torch.compiler.disable` would import the compiler here and now.
_untraced: Any = torch._disable_dynamo  # type: ignore[attr-defined]


class Optimizer8bit(Stepping, metaclass=Named):
    """What all optimizers of this package have in common.

    Parameters
    ----------
    params : iterable
        Parameters or parameter groups, float32, float16 or bfloat16, on any device.
    defaults : dict
        Hyperparameters of groups that do not say otherwise.
    optim_bits : int
        32 or 8: the width of states.
    is_paged : bool
        Whether states of at least 100,000 elements of CUDA parameters may live in page-locked host memory. They stay
        on the GPU as long as the peak of the last step leaves room there; the others visit it in chunks at each step,
        overlapped both ways. Anywhere but on NVIDIA GPUs this means nothing, and a warning says so once.
    stochastic_rounding : bool
        Whether bfloat16 parameters are rounded up or down at random, with the probability that makes the mean exact,
        instead of to the nearest. The random numbers are counted, not drawn: the same on every device and after a
        resume.
    seed : int
        Of the random numbers.
    max_grad_norm : float, optional
        Gradients are used as if `torch.nn.utils.clip_grad_norm_` had clipped the norm over all parameters of this
        optimizer. ``p.grad`` is left as it is.
    skip_nonfinite : bool
        Whether a step is left out, states and counters included, when a gradient is infinite or NaN.
    page_budget : int or float, optional
        With `is_paged`: how many bytes of these states stay on each GPU (int), or which fraction of them (float).

    Notes
    -----
    ``state[p]["step"]`` is a number on the parameter's device; `state_dict` makes it an int. A step reads nothing back
    from the device and can be captured in a CUDA graph once the states exist, that is after one ordinary step. A
    learning rate that is a float32 tensor on the device is read when the graph runs; schedulers of torch fill it. This
    is about CUDA: on devices that native code does not know, a step waits for the device once and cannot be captured.

    Gradient scalers hand over their scale, which is taken out on the way; not so after `install_as_bitsandbytes`.

    Distributed parameters (`torch.distributed.tensor.DTensor`, as ``fully_shard`` makes them) are stepped shard by
    shard: states are those of the shard, ``min_8bit_size`` counts the elements of the whole parameter, and norms (trust
    ratios, `max_grad_norm`, `skip_nonfinite`) are those of whole tensors.

    Subclasses may override `init_state`, `update_step` and `get_config`; with their own `update_step`, parameters are
    stepped one at a time.
    """

    _FSDP_WRAPPED_QUANT_STATE_KEY = _states.QUANT_STATE
    non_castable_tensor_keys = frozenset(_states.QUANT_KEYS)
    args: Any

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        optim_bits: int = 32,
        is_paged: bool = False,
        *,
        stochastic_rounding: bool = False,
        seed: int = 0,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        page_budget: int | float | None = None,
    ) -> None:
        if not hasattr(self, "optimizer_name"):
            self.optimizer_name = "adam"
        if not hasattr(self, "args"):
            self.args = MockArgs({**ARGS, "optim_bits": optim_bits})
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: expected a positive number or None, got {max_grad_norm!r}")
        if not isinstance(seed, int):
            raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
        if isinstance(page_budget, bool) or (page_budget is not None and not page_budget >= 0):
            raise ValueError(f"page_budget: expected bytes (int) or a fraction (float), got {page_budget!r}")
        if isinstance(page_budget, float) and page_budget > 1:
            raise ValueError(f"page_budget: expected a fraction of at most 1.0, got {page_budget!r}")
        if page_budget is not None and not is_paged:
            raise ValueError(f"page_budget: expected None without is_paged, got {page_budget!r}")
        if is_paged and not FAMILIES[self.optimizer_name].paged:
            raise ValueError(f"is_paged: expected False for {self.optimizer_name}, got {is_paged!r}")
        self.is_paged = bool(is_paged)
        self.stochastic_rounding, self.seed = bool(stochastic_rounding), seed % 2**64
        self.max_grad_norm, self.skip_nonfinite = max_grad_norm, bool(skip_nonfinite)
        self.page_budget = page_budget
        self.initialized = False
        self.name2qmap: dict[str, torch.Tensor] = {}
        self._reset()
        super().__init__(params, {**DEFAULTS.get(self.optimizer_name, {}), **defaults})
        self.state = _states.States(self._watch, self.state)  # now, for those who keep it: not at the first step

    def _configure(
        self, name: str, args: Any, optim_bits: int, min_8bit_size: int, max_unorm: float, skip_zeros: bool
    ) -> None:
        """Take the rule and what concerns states, from `args` if it is given."""
        name = ALIASES.get(name, name)
        if name not in FAMILIES:
            raise ValueError(f"optimizer_name: expected one of {', '.join(FAMILIES)}, got {name!r}")
        self.optimizer_name = name
        if args is None:
            max_unorm, skip_zeros = _differences.read_older_signature(max_unorm, skip_zeros)
            given = (optim_bits, min_8bit_size, max_unorm, skip_zeros)
            args = MockArgs(dict(zip(ARGS, given, strict=True)))
        for key, default in ARGS.items():
            if not hasattr(args, key):
                setattr(args, key, default)
        if args.optim_bits not in (8, 32):
            raise ValueError(f"optim_bits: expected 8 or 32, got {args.optim_bits!r}")
        if args.skip_zeros:
            raise ValueError(f"skip_zeros: expected False, got {args.skip_zeros!r}")
        if args.max_unorm and not FAMILIES[name].trust:
            raise ValueError(f"max_unorm: expected 0 for {name}, which has no trust ratio, got {args.max_unorm!r}")
        self.args = args

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether gradient scalers may leave scaled gradients to the step."""
        return _differences.takes_scaled_gradients()

    # ---- groups and hyperparameters ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; see `torch.optim.Optimizer.add_param_group`.

        ``momentum`` of SGD and LARS, ``alpha`` and ``momentum`` of RMSprop become the group's ``betas``.

        Raises
        ------
        ValueError
            If a hyperparameter is one that this optimizer cannot obey, or a parameter is complex or of 64 bits.
        """
        if isinstance(param_group, dict):
            if "betas" in param_group:
                param_group["betas"] = parse_betas(param_group["betas"])
            take_betas(self.optimizer_name, param_group, self.defaults)
            values = {"max_unorm": self.args.max_unorm, **self.defaults, **param_group}
            check_values(self.optimizer_name, values, self.args.optim_bits)
            params = param_group.get("params", ())
            param_group["params"] = params = [params] if isinstance(params, torch.Tensor) else list(params)
            for i, p in enumerate(params):
                p = p[1] if isinstance(p, tuple) and len(p) == 2 else p
                if isinstance(p, torch.Tensor) and p.requires_grad and p.dtype not in DTYPES:
                    raise ValueError(
                        f"params: expected float32, float16 or bfloat16, got {p.dtype} for parameter {i}"
                        + ("; complex parameters are not supported" if p.is_complex() else "")
                    )
        super().add_param_group(param_group)
        self._watch.plan = None

    def fill_qmap(self) -> None:
        """Fill `name2qmap` with the maps of 8-bit states, for subclasses that make their own."""
        self.name2qmap["dynamic"] = create_dynamic_map(signed=True)
        self.name2qmap["udynamic"] = create_dynamic_map(signed=False)

    def check_overrides(self) -> None:
        """Look up which parameters the overrides of `GlobalOptimManager` for modules and moved tensors are about."""
        for gindex, pindex in list(self.mng._registered):
            if gindex < len(self.param_groups) and pindex < len(self.param_groups[gindex]["params"]):
                self.mng.adopt(gindex, pindex, self.param_groups[gindex]["params"][pindex])
        for module, name, config in self.mng.module_weight_config_triple:
            p = getattr(module, name)
            for gindex, group in enumerate(self.param_groups):
                for pindex, candidate in enumerate(group["params"]):
                    if candidate is p:
                        self.mng.set_config(p, config)
                        self.mng.index2config[gindex, pindex] = self.mng.pid2config[id(p)]

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """Return the hyperparameters of one parameter, overrides included.

        Parameters
        ----------
        gindex, pindex : int
            Of the group, and in the group.
        group : dict
            The group.

        Returns
        -------
        dict
            Those of the group, and ``optim_bits``, ``min_8bit_size``, ``max_unorm``, ``skip_zeros``.
        """
        config = {**self.defaults, **{key: value for key, value in group.items() if key != "params"}}
        config.setdefault("alpha", 0.0)
        config.setdefault("t_alpha", None)
        config.setdefault("t_beta3", None)
        config.update({name: getattr(self.args, name, default) for name, default in ARGS.items()})
        config.update(self.mng.pid2config.get(id(self.param_groups[gindex]["params"][pindex]), {}))
        return config

    # ---- states ----

    def init_state(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        """Give a parameter the states that it lacks.

        Parameters
        ----------
        group : dict
            Its group.
        p : torch.Tensor
            The parameter.
        gindex, pindex : int
            Of the group, and in the group.

        Raises
        ------
        ValueError
            If ``optim_bits`` is neither 8 nor 32, or a state exists in 32 bits only.
        """
        config = self.get_config(gindex, pindex, group)
        if isinstance(config.get("betas"), str):
            config["betas"] = parse_betas(config["betas"])
        bits = config["optim_bits"]
        if bits not in (8, 32):
            raise ValueError(f"optim_bits: expected 8 or 32, got {bits!r}")
        if config["skip_zeros"]:
            raise ValueError(f"skip_zeros: expected False, got {config['skip_zeros']!r}")
        mine, state = local(p), self.state[p]
        if whole_numel(p) < config["min_8bit_size"]:
            bits = 32
        if "state1" in state:
            bits = _states.bits_of(state)
        if bits == 8:
            check_8bit(self.optimizer_name, config)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.int64, device=mine.device)
        names = FAMILIES[self.optimizer_name].states(config)
        begin = float(config.get("initial_accumulator_value", 0.0))
        _states.create(state, self.optimizer_name, names, mine, bits, begin, self._allocator(mine))

    def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return zeros in the shape of a parameter, where its state lives: for subclasses' `init_state`."""
        mine = local(p)
        return self._allocator(mine)(tuple(mine.shape), dtype).zero_()

    def prefetch_state(self, p: torch.Tensor) -> None:
        """Do nothing: a step brings paged states itself. Here for subclasses that call it."""

    def to_gpu(self) -> None:
        """Bring states to the devices of their parameters. A step does the same; here for those that call it."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p)
                if not isinstance(state, dict) or p.device.type == "cpu" or self._is_paged_state(local(p)):
                    continue
                for key, value in list(state.items()):
                    if isinstance(value, torch.Tensor) and value.device != p.device:
                        state[key] = value.to(p.device)

    # ---- step ----

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have gradients.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss again, with gradients; called first.

        Returns
        -------
        float or None
            What `closure` returned.

        Raises
        ------
        TypeError, ValueError
            If a parameter, gradient, state or hyperparameter is one that cannot be used (sparse, complex, of another
            shape, ...). No parameter has changed then.
        """
        loss: float | None = self._step_once(closure)
        return loss

    @_untraced  # type: ignore[untyped-decorator]
    def _step_once(self, closure: Callable[[], float] | None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        if type(self).update_step is Optimizer8bit.update_step:
            self._step_all()
        else:
            self._step_each()
        return loss

    def _step_each(self) -> None:
        """Step as subclasses with their own `update_step` expect: one parameter at a time."""
        if self.max_grad_norm is not None:
            raise ValueError(
                f"max_grad_norm: expected None with an update_step of {type(self).__name__}, got {self.max_grad_norm!r}"
            )
        for gindex, group in enumerate(self.param_groups):
            for pindex, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if len(self.state[p]) == 0:
                    self.init_state(group, p, gindex, pindex)
                self.prefetch_state(p)
                self.update_step(group, p, gindex, pindex)

    def update_step(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        """Update one parameter: for subclasses that do so between steps of their own.

        Parameters
        ----------
        group : dict
            Its group.
        p : torch.Tensor
            The parameter, as it is now; its state and ``p.grad`` must have its shape.
        gindex, pindex : int
            Of the group, and in the group.
        """
        ordinal = sum(len(other["params"]) for other in self.param_groups[:gindex]) + pindex
        with torch.no_grad():
            plan = Plan(self, [Member(gindex, pindex, ordinal, p)], whole=False)
            assert p.grad is not None
            found = plan.whereabouts.addresses([p.grad])
            assert found is not None
            self._run(plan, *found)

    def _steps_itself(self) -> bool:
        """Return whether a subclass has a `step` of its own, which may keep states of other shapes."""
        return inspect.unwrap(type(self).step) is not inspect.unwrap(Optimizer8bit.step)
