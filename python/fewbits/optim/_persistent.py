"""Saving, loading, copying and measuring an optimizer."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from fewbits.optim import _checkpoint, _paging, _states
from fewbits.optim._paged_states import PagedStates, local
from fewbits.optim.manager import GlobalOptimManager

_REPORT = (
    *("parameters", "states", "states_8bit", "states_32bit", "on_parameter_devices", "in_host_memory"),
    *("tensors_8bit", "tensors_32bit"),
)


class Persistent(PagedStates):
    """An optimizer whose states can be saved, loaded and copied."""

    optimizer_name: str
    args: Any

    def _steps_itself(self) -> bool:
        """Return whether a subclass has a `step` of its own, which may keep states of other shapes."""
        raise NotImplementedError

    def _reset(self) -> None:
        """Begin without anything that is about this process's memory."""
        self.mng = GlobalOptimManager.get_instance()
        self._watch = _states.Watch()
        self._captured: list[Any] = []  # graphs read the tables of theirs
        self._pagers: dict[torch.device, _paging.Pager] = {}
        self._rooms: dict[torch.device, _paging.Room] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return states and groups in bitsandbytes' layout.

        Returns
        -------
        dict
            As of `torch.optim.Optimizer`. ``step`` is an int; the other states of a parameter are in
            ``"__bnb_optimizer_quant_state__"``, one level down, where FSDP does not gather them. Tensors are shared
            with the optimizer. States of a distributed parameter are distributed tensors at the first level, laid out
            as it is, so that `torch.distributed.checkpoint` saves them and loads them on any number of ranks.
        """
        self._synchronize_pages()
        result = super().state_dict()
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        result["state"] = _checkpoint.packed(result["state"], params, self.optimizer_name)
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
            ``on_parameter_devices`` and ``in_host_memory`` (paged out); ``tensors_8bit`` and ``tensors_32bit``, numbers
            of parameters. Parameters of fewer than ``min_8bit_size`` elements keep 32-bit states. Maps, which all
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
