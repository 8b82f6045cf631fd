"""State dicts in bitsandbytes' layout: what is written, and what is taken back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from fewbits.codebook import shared_table
from fewbits.optim import _distributed, _sharded_states, _states
from fewbits.optim._families import FAMILIES, check_values, parse_betas
from fewbits.optim._paged_states import local

if TYPE_CHECKING:
    from fewbits.optim._persistent import Persistent


def packed(state: Mapping[Any, Any], params: Sequence[Any], family: str) -> dict[Any, Any]:
    """Return the states with what is not of a parameter's shape one level down, and counters as numbers.

    FSDP1 gathers every tensor that it finds at the first level. Parameters are known by their numbers.
    """
    trust = FAMILIES[family].trust
    counters: dict[torch.device, list[tuple[Any, torch.Tensor]]] = {}
    result: dict[Any, Any] = {}
    for key, given in state.items():
        if not isinstance(given, dict):
            result[key] = given
            continue
        p = params[key] if type(key) is int and key < len(params) else None
        if _distributed.is_distributed(p):
            result[key] = _sharded_states.exported(family, p, given)
        elif _distributed.is_flattened(p):
            result[key] = _sharded_states.flattened(family, given)
        else:
            result[key] = _nested(given, trust)
        if isinstance(step := given.get("step"), torch.Tensor):
            counters.setdefault(step.device, []).append((key, step))
    for found in counters.values():  # one wait a device
        for (key, _), count in zip(found, torch.stack([step.reshape(()) for _, step in found]).tolist(), strict=True):
            result[key]["step"] = int(count)
    return result


def _nested(given: Mapping[str, Any], trust: bool) -> dict[str, Any]:
    """Return the state of an ordinary parameter."""
    outer = {name: value for name, value in given.items() if name not in _states.QUANT_KEYS}
    inner = {name: given[name] for name in _states.QUANT_KEYS if name in given}
    if trust and inner:  # bitsandbytes keeps a norm there; it only has to exist
        inner["unorm_vec"] = torch.zeros(1, device=inner["state1"].device if "state1" in inner else None)
    if inner:
        outer[_states.QUANT_STATE] = inner
    return outer


def loaded(
    optimizer: Persistent, state_dict: Mapping[str, Any], move_to_device: bool
) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """Return states and groups as the optimizer holds them, made of copies. Nothing has changed if this raises."""
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"state_dict: expected the entries 'state' and 'param_groups', got {sorted(state_dict)}")
    groups, saved = optimizer.param_groups, state_dict["param_groups"]
    if len(groups) != len(saved):
        raise ValueError(f"state_dict['param_groups']: expected {len(groups)} groups, got {len(saved)}")
    for i, (group, other) in enumerate(zip(groups, saved, strict=True)):
        if len(group["params"]) != len(other["params"]):
            raise ValueError(
                f"state_dict['param_groups'][{i}]: expected {len(group['params'])} parameters, "
                f"got {len(other['params'])}"
            )
    merged = [_merged(optimizer, i, group, other) for i, (group, other) in enumerate(zip(groups, saved, strict=True))]
    names = chain.from_iterable(group["params"] for group in saved)
    owners = dict(zip(names, chain.from_iterable(group["params"] for group in groups), strict=True))
    by_owner = {id(p): group for group in merged for p in group["params"]}
    states: dict[Any, Any] = {}
    for name, given in state_dict["state"].items():
        p = owners.get(name)
        if p is None or not isinstance(given, Mapping):
            states[name] = deepcopy(given)  # not a parameter's: as torch does, kept
            continue
        states[p] = _state(optimizer, f"state_dict['state'][{name!r}]", given, p, by_owner[id(p)], move_to_device)
    return states, merged


def _merged(optimizer: Persistent, i: int, group: dict[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group with the saved hyperparameters, and its own where the file has none."""
    result = {**group, **{key: deepcopy(value) for key, value in saved.items() if key != "params"}}
    if isinstance(result.get("betas"), str):
        result["betas"] = parse_betas(result["betas"])
    values = {**optimizer.defaults, **result, "max_unorm": optimizer.args.max_unorm}
    if len(values["betas"]) < len(group["betas"]):
        raise ValueError(
            f"state_dict['param_groups'][{i}]['betas']: expected {len(group['betas'])} numbers, got {values['betas']}"
        )
    try:
        check_values(optimizer.optimizer_name, values, 32)
    except ValueError as error:
        raise ValueError(f"state_dict['param_groups'][{i}]: {error}") from error
    result["params"] = group["params"]
    return result


def _state(
    optimizer: Persistent, where: str, given: Mapping[str, Any], p: Any, group: dict[str, Any], move: bool
) -> dict[str, Any]:
    inner = given.get(_states.QUANT_STATE, {})
    if not isinstance(inner, Mapping):
        raise ValueError(f"{where}[{_states.QUANT_STATE!r}]: expected a mapping, got {type(inner).__name__}")
    flat = {**{key: value for key, value in given.items() if key != _states.QUANT_STATE}, **inner}
    flat = {key: value for key, value in flat.items() if key not in _states.IGNORED_KEYS}
    if not flat:
        return {}
    whose = local(p)
    if not optimizer._steps_itself():
        if _distributed.is_flattened(p):
            flat = _sharded_states.unflattened(optimizer.optimizer_name, flat, _wanted_bits(optimizer, p))
        flat = _sharded_states.imported(where, optimizer.optimizer_name, p, flat)
        family = FAMILIES[optimizer.optimizer_name]
        needed = family.states({**optimizer.defaults, **group})
        if "step" not in flat:
            raise ValueError(f"{where}: expected an entry 'step', got {sorted(flat)}")
        # States that this rule does not use, or does not have yet, are nobody's error.
        present = tuple(name for name in ("state1", "state2", "state3") if name in flat)
        if needed and "state1" not in present:
            raise ValueError(f"{where}: expected an entry 'state1', got {sorted(flat)}")
        if "state2" in needed and "state2" not in present and optimizer.optimizer_name != "rmsprop":
            raise ValueError(f"{where}: expected an entry 'state2', got {sorted(flat)}")
        _states.check(where, flat, optimizer.optimizer_name, whose, present)
    for key in _states.MAPS:
        if key in flat:
            _states.check_map(where, key, flat[key])
    result: dict[str, Any] = {}
    for key, value in flat.items():
        if key == "step":
            result[key] = _counter(where, value, whose)
        elif key in _states.MAPS:
            result[key] = shared_table(_states.MAPS[key], whose.device)
        elif isinstance(value, torch.Tensor):
            # Paged states come to the GPU, if at all, when the next step finds room for them.
            stays = not move or optimizer._is_paged_state(whose)
            device = value.device if stays else whose.device
            result[key] = value.detach().to(device, copy=True, memory_format=torch.contiguous_format)
        else:
            result[key] = deepcopy(value)
    return result


def _wanted_bits(optimizer: Persistent, p: Any) -> int:
    """Return the width of the states that a parameter gets."""
    config = {**vars(optimizer.args), **optimizer.mng.pid2config.get(id(p), {})}
    return 8 if config["optim_bits"] == 8 and _distributed.whole_numel(p) >= config["min_8bit_size"] else 32


def _counter(where: str, step: Any, p: torch.Tensor) -> torch.Tensor:
    try:
        count = int(step)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where}['step']: expected a number of steps, got {type(step).__name__}") from error
    if count < 0:
        raise ValueError(f"{where}['step']: expected at least 0, got {count}")
    return torch.full((), count, dtype=torch.int64, device=p.device)
