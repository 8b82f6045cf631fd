"""The base classes: one native launch for all tensors of a kind, without a wait for the device."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, TypedDict, cast, overload

import torch

from fewbits import _native
from fewbits._launch import target_queue
from fewbits.codebook import create_dynamic_map
from fewbits.optim import _checkpoint, _paging, _states
from fewbits.optim._families import ALIASES, DEFAULTS, FAMILIES, check_8bit, check_values, parse_betas
from fewbits.optim._plan import Member, Plan, local
from fewbits.optim.manager import GlobalOptimManager

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["GlobalOptimManager", "MockArgs", "Optimizer1State", "Optimizer2State", "Optimizer8bit"]

Params = Iterable[Any]


class Options(TypedDict, total=False):
    """Keyword arguments of every optimizer."""

    stochastic_rounding: bool
    seed: int
    max_grad_norm: float | None
    skip_nonfinite: bool
    page_budget: int | float | None


class MockArgs:
    """Attributes made of a mapping: what ``args=`` of an optimizer looks like.

    Examples
    --------
    >>> MockArgs({"optim_bits": 8}).optim_bits
    8
    """

    def __init__(self, initial_data: Mapping[str, Any]) -> None:
        for key, value in initial_data.items():
            setattr(self, key, value)


_ARGS = {"optim_bits": 32, "min_8bit_size": 4096, "max_unorm": 0.0, "skip_zeros": False}


class Optimizer8bit(torch.optim.Optimizer):
    """What all optimizers of this package have in common.

    Parameters
    ----------
    params : iterable
        Parameters or parameter groups, float32, float16 or bfloat16, on the CPU or CUDA devices.
    defaults : dict
        Hyperparameters of groups that do not say otherwise.
    optim_bits : int
        32 or 8: the width of states.
    is_paged : bool
        Whether states of at least 100,000 elements of CUDA parameters may live in page-locked host memory. They stay
        on the GPU as long as the peak of the last step leaves room there; the others visit it in chunks at each step,
        overlapped both ways. On the CPU this means nothing, and a warning says so once.
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
    learning rate that is a float32 tensor on the device is read when the graph runs; schedulers of torch fill it.

    Gradient scalers hand over their scale, which is taken out on the way.

    Subclasses may override `init_state`, `update_step` and `get_config`; with their own `update_step`, parameters are
    stepped one at a time.
    """

    _FSDP_WRAPPED_QUANT_STATE_KEY = _states.QUANT_STATE
    _step_supports_amp_scaling = True
    _decoupled = True  # of the rule "adam"; `Adam` says otherwise
    non_castable_tensor_keys = frozenset(_states.QUANT_KEYS)
    optimizer_name: str
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
            self.args = MockArgs({**_ARGS, "optim_bits": optim_bits})
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
        super().__init__(params, defaults)

    def _configure(
        self, name: str, args: Any, optim_bits: int, min_8bit_size: int, max_unorm: float, skip_zeros: bool
    ) -> None:
        """Take the rule and what concerns states, from `args` if it is given."""
        name = ALIASES.get(name, name)
        if name not in FAMILIES:
            raise ValueError(f"optimizer_name: expected one of {', '.join(FAMILIES)}, got {name!r}")
        self.optimizer_name = name
        if args is None:
            given = (optim_bits, min_8bit_size, max_unorm, skip_zeros)
            args = MockArgs(dict(zip(_ARGS, given, strict=True)))
        for key, default in _ARGS.items():
            if not hasattr(args, key):
                setattr(args, key, default)
        if args.optim_bits not in (8, 32):
            raise ValueError(f"optim_bits: expected 8 or 32, got {args.optim_bits!r}")
        if args.skip_zeros:
            raise ValueError(f"skip_zeros: expected False, got {args.skip_zeros!r}")
        if args.max_unorm and not FAMILIES[name].trust:
            raise ValueError(f"max_unorm: expected 0 for {name}, which has no trust ratio, got {args.max_unorm!r}")
        self.args = args

    def _reset(self) -> None:
        """Begin without anything that is about this process's memory."""
        self.mng = GlobalOptimManager.get_instance()
        self._watch = _states.Watch()
        self._captured: list[Plan] = []  # graphs read the tables of theirs
        self._pagers: dict[torch.device, _paging.Pager] = {}
        self._rooms: dict[torch.device, _paging.Room] = {}

    # ---- groups and hyperparameters ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; see `torch.optim.Optimizer.add_param_group`.

        Raises
        ------
        ValueError
            If a hyperparameter is one that this optimizer cannot obey, or a parameter is complex or not of 16 or 32 bits.
        """
        if isinstance(param_group, dict):
            if "betas" in param_group:
                param_group["betas"] = parse_betas(param_group["betas"])
            values = {"max_unorm": self.args.max_unorm, **self.defaults, **param_group}
            check_values(self.optimizer_name, values, self.args.optim_bits)
            params = param_group.get("params", ())
            param_group["params"] = params = [params] if isinstance(params, torch.Tensor) else list(params)
            for i, p in enumerate(params):
                p = p[1] if isinstance(p, tuple) and len(p) == 2 else p
                if isinstance(p, torch.Tensor) and p.requires_grad and p.dtype not in _DTYPES:
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
        """Look up which parameters the overrides of `GlobalOptimManager` for modules are about."""
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
        config.update({name: getattr(self.args, name, default) for name, default in _ARGS.items()})
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
        if p.numel() < config["min_8bit_size"]:
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

    def _allocator(self, p: torch.Tensor) -> Callable[[tuple[int, ...], torch.dtype], torch.Tensor]:
        if self._is_paged_state(p):
            room = self._room(p.device)
            room.changed(room.resident)
            room.resident += _BYTES_EACH * p.numel()
            if self.page_budget is not None or room.bytes() < room.resident:
                return lambda shape, dtype: _paging.pinned_empty(shape, dtype, p.device)
        return lambda shape, dtype: torch.empty(shape, dtype=dtype, device=p.device)

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

    def _run(self, plan: Plan, addresses: list[int], grads: list[torch.Tensor]) -> None:
        capturing = any(bundle.device.type == "cuda" for bundle in plan.bundles) and _is_capturing()
        if capturing:
            self._captured.append(plan)
        for bundle in plan.bundles:
            bundle.send(addresses, capturing)
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
        if len(partials) > 1:
            joined = torch.cat([part.to(first.device) for part in partials])
        scale, inf = _as_float32(scale, first.device), _as_float32(inf, first.device)
        assert first.control is not None
        _native.optim_control(
            joined.data_ptr() if joined is not None and joined.numel() else 0,
            joined.numel() if joined is not None else 0,
            float(self.max_grad_norm or 0.0),
            scale.data_ptr() if scale is not None else 0,
            inf.data_ptr() if inf is not None else 0,
            self.skip_nonfinite,
            first.control.data_ptr(),
            *target_queue(first.device),
        )
        for bundle in plan.bundles[1:]:
            assert bundle.control is not None
            bundle.control.copy_(first.control)
        return [bundle.control.data_ptr() if bundle.control is not None else 0 for bundle in plan.bundles]

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
            found = plan.addresses([p.grad])
            assert found is not None
            self._run(plan, *found)

    def _steps_itself(self) -> bool:
        """Return whether a subclass has a `step` of its own, which may keep states of other shapes."""
        return inspect.unwrap(type(self).step) is not inspect.unwrap(Optimizer8bit.step)

    # ---- paging ----

    def _is_paged_state(self, p: torch.Tensor) -> bool:
        return _paging.is_paged_state(self, p)

    def _pager(self, device: torch.device) -> _paging.Pager:
        if device not in self._pagers:
            self._pagers[device] = _paging.Pager(device)
        return self._pagers[device]

    def _room(self, device: torch.device) -> _paging.Room:
        if device not in self._rooms:
            self._rooms[device] = _paging.Room(device)
        return self._rooms[device]

    def _budget(self, device: torch.device, total: int) -> int:
        if self.page_budget is None:
            return self._room(device).bytes()
        return int(self.page_budget * total) if isinstance(self.page_budget, float) else self.page_budget

    def _settle_pages(self, owners: list[tuple[Member, torch.Tensor]]) -> None:
        """Decide which paged states stay on the GPU, and bring each where it belongs."""
        if not self.is_paged:
            return
        if any(p.device.type == "cpu" for _, p in owners):
            if not self.__dict__.get("_said_unpaged"):
                self._said_unpaged = True
                warnings.warn(
                    f"{type(self).__name__}: parameters on the CPU keep their states there: nothing is paged",
                    stacklevel=9,  # the caller of step
                )
            return
        if _is_capturing():
            return
        for device in {p.device for _, p in owners}:
            mine = [(self.state[m.p], p) for m, p in owners if p.device == device and self._is_paged_state(p)]
            sizes = [sum(t.nbytes for t in _paging.tensors_of(state).values()) for state, _ in mine]
            resident = sum(size for size, (state, _) in zip(sizes, mine, strict=True) if not _paging.is_evicted(state))
            room = self._room(device)
            room.changed(resident)
            chosen = _paging.choose(sizes, lambda total, device=device: self._budget(device, total))  # type: ignore[misc]
            if not all(chosen) or resident < sum(sizes):
                self._synchronize_pages()
            for keep in (False, True):  # those that leave make room
                for (state, p), stays in zip(mine, chosen, strict=True):
                    if stays is keep:
                        _paging.move(state, p, resident=stays)
            room.resident = sum(size for size, stays in zip(sizes, chosen, strict=True) if stays)

    def _pages_want_to_move(self) -> bool:
        """Return whether the peak of the last step says that fewer, or more, states should be on a GPU."""
        if self.page_budget is not None or self._watch.plan is None or _is_capturing():
            return False
        answer = False
        for device, room in self._rooms.items():
            if not room.changed(room.resident):
                continue
            states = [
                self.state[p]
                for group in self.param_groups
                for p in group["params"]
                if p.device == device and p in self.state and self._is_paged_state(local(p))
            ]
            if not states:
                continue
            sizes = [sum(t.nbytes for t in _paging.tensors_of(state).values()) for state in states]
            away = [size for size, state in zip(sizes, states, strict=True) if _paging.is_evicted(state)]
            resident = sum(sizes) - sum(away)
            allowed = room.bytes()
            answer |= resident > allowed or bool(away and resident + min(away) + _paging.MIN_MARGIN < allowed)
        return answer

    def _synchronize_pages(self) -> None:
        """Wait until states in host memory are what the last step made of them."""
        for device in self._rooms:
            torch.cuda.synchronize(device)

    # ---- state dicts, copies, memory ----

    def state_dict(self) -> dict[str, Any]:
        """Return states and groups in bitsandbytes' layout.

        Returns
        -------
        dict
            As of `torch.optim.Optimizer`. ``step`` is an int; the other states of a parameter are in
            ``"__bnb_optimizer_quant_state__"``, one level down, where FSDP does not gather them. Tensors are shared with
            the optimizer.
        """
        self._synchronize_pages()
        result = super().state_dict()
        result["state"] = _checkpoint.packed(result["state"], FAMILIES[self.optimizer_name].trust)
        return result

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Take over what `state_dict` of this package or of bitsandbytes returned.

        Parameters
        ----------
        state_dict : dict
            Left as it is; its tensors are copied. Hyperparameters that its groups do not have stay as they are here.
        move_to_device : bool
            Whether states go to the devices of their parameters now, rather than at the next step.

        Raises
        ------
        ValueError
            If groups or parameters are of other numbers, or a state is of another shape, dtype or code. Nothing has
            changed then.
        """
        given: Any = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, given)
            given = given if replaced is None else replaced
        states, groups = _checkpoint.loaded(self, given, move_to_device)
        self._synchronize_pages()
        self._watch.plan = None
        self.param_groups = groups
        self.state = _states.States(self._watch, states)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._synchronize_pages()
        kept = ("args", "optimizer_name", "is_paged", "stochastic_rounding", "seed", "max_grad_norm", "skip_nonfinite")
        state = {key: self.__dict__[key] for key in (*kept, "page_budget", "initialized", "name2qmap")}
        plain = {p: dict(value) if isinstance(value, dict) else value for p, value in self.state.items()}
        return {**state, "defaults": self.defaults, "state": plain, "param_groups": self.param_groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_watch" not in self.__dict__:
            self._reset()
        super().__setstate__(state)
        self._watch.plan = None
        self.state = _states.States(self._watch, self.state)

    def memory_report(self) -> dict[str, int]:
        """Return how many bytes parameters and states have.

        Returns
        -------
        dict
            ``parameters``; ``states`` in all, of which ``states_8bit`` (codes and block maxima) and ``states_32bit``;
            ``on_parameter_devices`` and ``in_host_memory`` (paged out); ``tensors_8bit`` and ``tensors_32bit``, numbers of
            parameters. Parameters of fewer than ``min_8bit_size`` elements keep 32-bit states. Maps, which all
            optimizers share, and tables of a few bytes a tensor are not counted.

        Examples
        --------
        >>> from fewbits.optim import AdamW8bit
        >>> p = torch.nn.Parameter(torch.ones(64, 64))
        >>> p.grad = torch.ones(64, 64)
        >>> optimizer = AdamW8bit([p])
        >>> optimizer.step()
        >>> optimizer.memory_report()["states"]
        8320
        """
        params = {id(p): p for p in chain.from_iterable(group["params"] for group in self.param_groups)}
        report = dict.fromkeys(_REPORT, 0)
        for p in params.values():
            mine, state = local(p), self.state.get(p)
            report["parameters"] += mine.nbytes
            if not isinstance(state, dict) or "step" not in state:
                continue
            bits = _states.bits_of(state)
            report[f"tensors_{bits}bit"] += 1
            for tensor in _paging.tensors_of(state).values():
                report["states"] += tensor.nbytes
                report[f"states_{bits}bit"] += tensor.nbytes
                report["on_parameter_devices" if tensor.device == mine.device else "in_host_memory"] += tensor.nbytes
        return report


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
        defaults |= {**DEFAULTS.get(self.optimizer_name, {}), **(hyperparameters or {})}
        super().__init__(params, defaults, optim_bits, is_paged, **options)


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
        defaults = {"lr": lr, "betas": parse_betas(betas), "eps": eps, "weight_decay": weight_decay}
        defaults |= {"alpha": alpha, "t_alpha": t_alpha, "t_beta3": t_beta3}
        defaults |= {**DEFAULTS.get(self.optimizer_name, {}), **(hyperparameters or {})}
        super().__init__(params, defaults, optim_bits, is_paged, **options)


_REPORT = (
    *("parameters", "states", "states_8bit", "states_32bit", "on_parameter_devices", "in_host_memory"),
    *("tensors_8bit", "tensors_32bit"),
)
_BYTES_EACH = 12  # of a paged state at most, an element
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _as_float32(value: Any, device: torch.device) -> torch.Tensor | None:
    if value is None or (isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.device == device):
        return value
    return torch.as_tensor(value, dtype=torch.float32, device=device)


def _increment_version(params: list[torch.Tensor]) -> None:
    """Let autograd see that parameters changed."""
    try:
        torch.autograd.graph.increment_version(params)
    except TypeError:  # older torch takes one at a time
        for p in params:
            torch.autograd.graph.increment_version(p)
