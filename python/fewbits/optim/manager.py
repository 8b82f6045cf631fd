"""`GlobalOptimManager`: hyperparameters of single parameters, told to every optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch

__all__ = ["GlobalOptimManager"]


class GlobalOptimManager:
    """The one place that overrides hyperparameters for single parameters.

    An override is a mapping with any of ``lr``, ``betas``, ``eps``, ``weight_decay``, ``alpha``, ``t_alpha``,
    ``t_beta3``, ``optim_bits``, ``min_8bit_size``, ``max_unorm``. Optimizers look overrides up at their first step, and
    again when new ones were given, so it does not matter whether they come before or after the optimizer was made.
    ``optim_bits`` and ``min_8bit_size`` decide what state a parameter gets and are without effect once it has one.

    Parameters are known by identity. What was said of a parameter or a module is forgotten when it is gone: the manager
    keeps no model alive. But for tensors that were registered, and of which a move to a device made other tensors: what
    was said of one passes to the parameter of its shape that the next optimizer has in its place.

    Attributes
    ----------
    pid2config : dict
        Overrides by ``id(parameter)``.
    index2config : dict
        The same by (index of the group, index in the group) in the last optimizer or list that registered them.

    Examples
    --------
    >>> layer = torch.nn.Linear(2, 2)
    >>> manager = GlobalOptimManager.get_instance()
    >>> manager.override_config(layer.weight, "optim_bits", 32)
    >>> manager.pid2config[id(layer.weight)]
    {'optim_bits': 32}
    """

    _instance: GlobalOptimManager | None = None
    pid2config: dict[int, dict[str, Any]]
    index2config: dict[tuple[int, int], dict[str, Any]]
    _modules: list[tuple[weakref.ref[torch.nn.Module], str, Mapping[str, Any]]]
    _registered: dict[tuple[int, int], tuple[weakref.ref[torch.Tensor], torch.Size, dict[str, Any]]]

    def __init__(self) -> None:
        raise RuntimeError("GlobalOptimManager: expected a call of GlobalOptimManager.get_instance()")

    def initialize(self) -> None:
        """Forget everything."""
        self.pid2config = {}
        self.index2config = {}
        self.optimizer = None
        self.uses_config_override = False
        self._modules = []
        self._registered = {}
        self.changes = 0  # so that an optimizer sees that something was said since it last looked

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """Return the manager."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    @property
    def module_weight_config_triple(self) -> list[tuple[torch.nn.Module, str, Mapping[str, Any]]]:
        """What `register_module_override` was given, of the modules that are still there."""
        found = ((of(), name, config) for of, name, config in self._modules)
        return [(module, name, config) for module, name, config in found if module is not None]

    def register_parameters(self, params: Iterable[Any]) -> None:
        """Note under which index parameters with overrides stand, in `index2config`.

        Optimizers need this only where the parameters are moved to their device as tensors, hence become others.

        Parameters
        ----------
        params : iterable
            Parameters, or parameter groups.
        """
        groups = list(params)
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for group_index, group in enumerate(groups):
            for index, p in enumerate(group["params"]):
                config = self.pid2config.get(id(p))
                if config is not None:
                    self.index2config[group_index, index] = config
                    self._registered[group_index, index] = (weakref.ref(p), p.shape, config)

    def adopt(self, group_index: int, index: int, p: torch.Tensor) -> None:
        """Pass to a parameter what was said of the one registered in its place, if that is gone."""
        of, shape, config = self._registered.get((group_index, index), (None, None, {}))
        if of is not None and of() is None and p.shape == shape and id(p) not in self.pid2config:
            del self._registered[group_index, index]
            self.set_config(p, config)

    def override_config(
        self,
        parameters: torch.Tensor | Iterable[torch.Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Override hyperparameters of some parameters.

        Parameters
        ----------
        parameters : torch.Tensor or iterable of torch.Tensor
            Whose.
        key, value : str and any
            One hyperparameter, or
        key_value_dict : mapping
            several.

        Raises
        ------
        ValueError
            If both or neither are given.
        """
        if (key is None) == (key_value_dict is None):
            raise ValueError(
                f"key: expected either key and value or key_value_dict, got {key!r} and {key_value_dict!r}"
            )
        given = {key: value} if key is not None else dict(key_value_dict or {})
        self.uses_config_override = True
        for p in [parameters] if isinstance(parameters, torch.Tensor) else parameters:
            self.set_config(p, given)

    def set_config(self, p: torch.Tensor, config: Mapping[Any, Any]) -> None:
        """Add to the overrides of one parameter."""
        known = self.pid2config.get(id(p))
        if known is None:
            known = self.pid2config[id(p)] = {}
            # Another tensor may get the same id later on.
            weakref.finalize(p, self.pid2config.pop, id(p), None).atexit = False
        if any(name not in known or known[name] is not value for name, value in config.items()):
            known.update(config)
            self.changes += 1

    def register_module_override(self, module: torch.nn.Module, param_name: str, config: Mapping[str, Any]) -> None:
        """Override hyperparameters of the parameter that a module has under a name, at an optimizer's first step.

        And at once of the parameter that it has now.

        Parameters
        ----------
        module : torch.nn.Module
            Whose. It is not kept alive.
        param_name : str
            Such as ``"weight"``.
        config : mapping
            Hyperparameters.
        """
        self._modules = [entry for entry in self._modules if entry[0]() is not None]
        self._modules.append((weakref.ref(module), param_name, config))
        parameter = getattr(module, param_name, None)
        if isinstance(parameter, torch.Tensor):  # should the module be gone before the step, and the parameter not
            self.set_config(parameter, config)
        self.changes += 1
