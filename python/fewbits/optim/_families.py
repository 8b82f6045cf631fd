"""What the native step must know of each update rule: its states, and its hyperparameters as one packed record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from struct import Struct
from typing import Any, NamedTuple

import torch

# Order and meaning are those of `Group` in rust/core/src/optim.rs.
_RECORD = Struct("=dQ11dQ2Q")
DECOUPLED, AMSGRAD, NESTEROV, CENTERED, BIAS_CORRECTION = 1, 2, 4, 8, 16

Values = Mapping[str, Any]


class Family(NamedTuple):
    """An update rule."""

    number: int  # in `_native.OPTIM_FAMILIES`
    keys: tuple[str, ...]  # what it reads of a parameter group
    states: Callable[[Values], tuple[str, ...]]
    record: Callable[[Values], dict[str, float]]  # of `_FIELDS` without lr; flags is an int
    paged: bool = False
    trust: bool = False


_FIELDS = (
    *("beta1", "beta2", "beta3", "alpha", "t_alpha", "t_beta3", "eps", "weight_decay", "dampening", "lr_decay"),
    "trust",
)
_COMMON = ("lr", "betas", "eps", "weight_decay")


def _two(values: Values) -> tuple[str, ...]:
    return ("state1", "state2", "state3") if values.get("amsgrad") else ("state1", "state2")


def _one(values: Values) -> tuple[str, ...]:
    return ("state1",)


def _momentum(values: Values) -> tuple[str, ...]:
    return ("state1",) if values["betas"][0] else ()


def _rmsprop_states(values: Values) -> tuple[str, ...]:
    momentum, centered = ("state2",) if values["betas"][1] else (), ("state3",) if values["centered"] else ()
    return ("state1", *momentum, *centered)


def _adam(values: Values) -> dict[str, float]:
    beta1, beta2 = values["betas"][:2]
    flags = DECOUPLED * bool(values["decoupled"]) | AMSGRAD * bool(values.get("amsgrad"))
    return {"beta1": beta1, "beta2": beta2, "eps": values["eps"], "flags": flags}


def _ademamix(values: Values) -> dict[str, float]:
    beta1, beta2, beta3 = values["betas"]
    schedule = {"t_alpha": values["t_alpha"] or 0, "t_beta3": values["t_beta3"] or 0}
    return {
        **{"beta1": beta1, "beta2": beta2, "beta3": beta3, "alpha": values["alpha"], "eps": values["eps"]},
        **{**schedule, "flags": DECOUPLED},
    }


def _lion(values: Values) -> dict[str, float]:
    return {"beta1": values["betas"][0], "beta2": values["betas"][1], "flags": DECOUPLED}


def _sgd(values: Values) -> dict[str, float]:
    flags = NESTEROV * bool(values["nesterov"])
    return {"beta1": values["betas"][0], "dampening": values["dampening"], "flags": flags}


def _lars(values: Values) -> dict[str, float]:
    return {**_sgd(values), "trust": values["max_unorm"]}


def _rmsprop(values: Values) -> dict[str, float]:
    alpha, momentum = values["betas"][:2]
    return {"beta1": alpha, "beta2": momentum, "eps": values["eps"], "flags": CENTERED * bool(values["centered"])}


def _adagrad(values: Values) -> dict[str, float]:
    return {"eps": values["eps"], "lr_decay": values["lr_decay"]}


def _lamb(values: Values) -> dict[str, float]:
    flags = DECOUPLED * bool(values["adam_w_mode"]) | BIAS_CORRECTION * bool(values["bias_correction"])
    return {**_adam({**values, "decoupled": False}), "trust": values["max_unorm"], "flags": flags}


_SGD_KEYS = ("lr", "betas", "weight_decay", "dampening", "nesterov")
FAMILIES = {
    "adam": Family(0, (*_COMMON, "amsgrad"), _two, _adam, paged=True),
    "ademamix": Family(1, (*_COMMON, "alpha", "t_alpha", "t_beta3"), lambda _: ("state1", "state2"), _ademamix, True),
    "lion": Family(2, ("lr", "betas", "weight_decay"), _one, _lion, paged=True),
    "sgd": Family(3, _SGD_KEYS, _momentum, _sgd),
    "rmsprop": Family(4, (*_COMMON, "centered"), _rmsprop_states, _rmsprop),
    "adagrad": Family(5, ("lr", "eps", "weight_decay", "lr_decay"), _one, _adagrad),
    "lamb": Family(6, (*_COMMON, "bias_correction", "adam_w_mode"), lambda _: ("state1", "state2"), _lamb, trust=True),
    "lars": Family(7, _SGD_KEYS, _momentum, _lars, trust=True),
}
# What groups have besides lr, betas, eps and weight_decay, where their maker does not say otherwise.
DEFAULTS: dict[str, dict[str, Any]] = {
    "adam": {"amsgrad": False},
    "sgd": {"dampening": 0, "nesterov": False},
    "lars": {"dampening": 0, "nesterov": False},
    "rmsprop": {"centered": False},
    "adagrad": {"lr_decay": 0, "initial_accumulator_value": 0},
    "lamb": {"bias_correction": True, "adam_w_mode": True},
}
# What groups may say by the name of an argument instead of in `betas`, in the order of `betas`.
BETAS = {"sgd": ("momentum",), "lars": ("momentum",), "rmsprop": ("alpha", "momentum")}
ALIASES = {"momentum": "sgd"}  # as bitsandbytes calls it


def pack(family: Family, values: Values, lr: float, lr_address: int) -> bytes:
    """Return the record of a group."""
    fields = family.record(values)
    fields.setdefault("weight_decay", values["weight_decay"])
    numbers = (float(fields.get(name, 0.0)) for name in _FIELDS)
    return _RECORD.pack(lr, lr_address, *numbers, int(fields.get("flags", 0)), 0, 0)


def unpack(record: bytes) -> dict[str, Any]:
    """Return the hyperparameters of a record by name."""
    lr, _address, *numbers, flags, _, _ = _RECORD.unpack(record)
    return {"lr": lr, **dict(zip(_FIELDS, numbers, strict=True)), "flags": flags}


def parse_betas(betas: Any) -> tuple[float, ...]:
    """Return betas given as numbers or as text such as ``"(0.9, 0.95)"``."""
    try:
        if isinstance(betas, str):
            return tuple(float(part) for part in betas.strip().strip("()[]").split(",") if part.strip())
        return tuple(betas)
    except (TypeError, ValueError) as error:
        raise ValueError(f"betas: expected numbers such as (0.9, 0.999), got {betas!r}") from error


def take_betas(name: str, group: dict[str, Any], defaults: Values) -> None:
    """Bring what a new group says as ``momentum`` or ``alpha`` into its ``betas``, where the rule reads it.

    Raises
    ------
    ValueError
        If it says both, of different values.
    """
    said = {i: key for i, key in enumerate(BETAS.get(name, ())) if key in group}
    if not said:
        return
    betas: list[Any] = list(group["betas"] if "betas" in group else defaults["betas"])
    for i, key in said.items():
        if "betas" in group and betas[i : i + 1] != [group[key]]:
            raise ValueError(f"{key}: expected what betas {tuple(betas)} say, or none beside them, got {group[key]!r}")
        betas[i : i + 1] = [group[key]]
    group["betas"] = tuple(betas)
    for key in said.values():
        del group[key]


def check_values(name: str, values: Values, bits: int) -> None:
    """Raise unless the hyperparameters of a group are what the rule can do."""
    lr = values["lr"]
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1 or lr.is_complex():
            raise ValueError(f"lr: expected one number, got a tensor of shape {tuple(lr.shape)} of {lr.dtype}")
        if lr.device.type == "cpu":  # nobody waits for a GPU here
            _at_least_zero("lr", float(lr))
    else:
        _at_least_zero("lr", lr)
    for key in ("eps", "weight_decay", "alpha", "lr_decay", "initial_accumulator_value", "t_alpha", "t_beta3"):
        if values.get(key) is not None:
            _at_least_zero(key, values[key])
    if values.get("maximize"):
        raise ValueError(f"maximize: expected False, got {values['maximize']!r}; negate the loss instead")
    betas = values["betas"]
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas: expected numbers in [0, 1), got {beta!r} at index {i}")
    count = {"ademamix": 3, "adagrad": 0, "sgd": 1, "lars": 1}.get(name, 2)
    if len(betas) < count:
        raise ValueError(f"betas: expected {count} numbers, got {tuple(betas)}")
    if name in ("sgd", "lars") and values["nesterov"] and (not betas[0] or values["dampening"]):
        raise ValueError(
            "nesterov: expected a momentum and no dampening beside it, "
            f"got momentum {betas[0]!r} and dampening {values['dampening']!r}"
        )
    if FAMILIES[name].trust:
        _at_least_zero("max_unorm", values["max_unorm"])
    if bits == 8:
        check_8bit(name, values)


def check_8bit(name: str, values: Values) -> None:
    """Raise if the rule would need a state that is kept in 32 bits only."""
    for key in ("amsgrad", "centered"):
        if values.get(key):
            raise ValueError(f"{key}: expected False with 8-bit states, got {values[key]!r}")
    if name == "rmsprop" and values["betas"][1]:
        raise ValueError(f"momentum: expected 0 with 8-bit states, got {values['betas'][1]!r}")


def _at_least_zero(name: str, value: Any) -> None:
    if isinstance(value, bool) or not (isfinite(value) and value >= 0.0):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")


def eight_bits(optim_bits: int) -> int:
    """Return 8 for the classes whose name says so. Their default is 32, for compatibility, and means nothing."""
    if optim_bits not in (8, 32):
        raise ValueError(f"optim_bits: expected 8, or 32 for compatibility, got {optim_bits!r}")
    return 8


def no_amsgrad(amsgrad: bool, **hyperparameters: Any) -> dict[str, Any]:
    """Return the other hyperparameters of a rule that takes `amsgrad` and cannot obey it."""
    if amsgrad:
        raise ValueError(f"amsgrad: expected False, got {amsgrad!r}")
    return hyperparameters
