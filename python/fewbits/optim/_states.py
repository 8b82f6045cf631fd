"""The states of parameters: what they are called, how large they are, and who notices when one is exchanged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from fewbits import _checks
from fewbits.codebook import TABLES, shared_table
from fewbits.compat import _differences

BLOCKSIZE = 256
QUANT_STATE = "__bnb_optimizer_quant_state__"
MAPS = {"qmap1": "dynamic", "qmap2": "dynamic_unsigned"}
# What a checkpoint holds under QUANT_STATE. The last four are of older versions of bitsandbytes, and not looked at.
QUANT_KEYS = (
    *("state1", "qmap1", "absmax1", "state2", "qmap2", "absmax2", "state3", "unorm_vec"),
    *("max1", "max2", "new_max1", "new_max2", "gnorm_vec"),
)
IGNORED_KEYS = ("unorm_vec", "max1", "max2", "new_max1", "new_max2", "gnorm_vec")


class Watch:
    """Holds an optimizer's plan, which goes when a state is exchanged: it knows the addresses of all of them."""

    __slots__ = ("plan",)

    def __init__(self) -> None:
        self.plan: Any = None


class State(dict[str, Any]):
    """The state of one parameter: a dict whose changes are noticed."""

    __slots__ = ("watch",)
    watch: Watch | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.watch = None

    def __missing__(self, name: str) -> Any:
        norm = _differences.norm_of_update(self) if name == "unorm_vec" else None
        if norm is None:
            raise KeyError(name)
        return norm

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class States(defaultdict[Any, Any]):
    """The states of all parameters."""

    __slots__ = ("watch",)
    watch: Watch

    def __init__(self, watch: Watch, states: Mapping[Any, Any]) -> None:
        super().__init__(dict)
        self.watch = watch
        for p, state in states.items():
            dict.__setitem__(self, p, self._watched(state))

    def _watched(self, state: Any) -> Any:
        if isinstance(state, dict):  # nothing else is a parameter's state
            state = State(state)
            state.watch = self.watch
        return state

    def __missing__(self, p: Any) -> Any:
        self[p] = {}
        return self[p]

    def __setitem__(self, p: Any, state: Any) -> None:
        self.watch.plan = None
        super().__setitem__(p, self._watched(state))

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict, dict(self))


def _noticed(base: type, name: str) -> Any:
    method = getattr(base, name)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.watch is not None:
            self.watch.plan = None
        return method(self, *args, **kwargs)

    call.__name__ = name
    return call


for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(State, _name, _noticed(dict, _name))
for _name in ("__delitem__", "__ior__", "clear", "pop", "popitem", "update"):
    setattr(States, _name, _noticed(defaultdict, _name))


# ---- layout --------------------------------------------------------------------------------------------------------


def shapes(family: str, name: str, p: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of a state and of its block maxima. AdEMAMix keeps its two averages in one state."""
    blocks = _checks.block_count(p.numel(), BLOCKSIZE)
    if family == "ademamix" and name == "state1":
        return (2, *p.shape), (2, blocks)
    return tuple(p.shape), (blocks,)


def maxima_name(name: str) -> str:
    return name.replace("state", "absmax")


def map_name(name: str) -> str:
    return name.replace("state", "qmap")


def create(
    state: dict[str, Any], family: str, names: tuple[str, ...], p: torch.Tensor, bits: int, value: float, empty: Any
) -> None:
    """Add the states that are missing. `empty` takes a shape and a dtype; `value` is what state1 begins with."""
    for name in names:
        if name in state:
            continue
        shape, maxima_shape = shapes(family, name, p)
        begin = value if name == "state1" else 0.0
        if bits == 32:
            state[name] = empty(shape, torch.float32).fill_(begin)
        else:
            # Whatever the code, a block whose maximum is 0 is zeros; the last code of both maps is 1.
            state[name] = empty(shape, torch.uint8).fill_(255 if begin else 0)
            state[map_name(name)] = shared_table(MAPS[map_name(name)], p.device)
            state[maxima_name(name)] = empty(maxima_shape, torch.float32).fill_(begin)


def bits_of(state: Mapping[str, Any]) -> int:
    """Return the width of a parameter's states."""
    first = state.get("state1")
    return 8 if isinstance(first, torch.Tensor) and first.dtype == torch.uint8 else 32


def check(where: str, state: Mapping[str, Any], family: str, p: torch.Tensor, names: tuple[str, ...]) -> None:
    """Raise unless the states have the shapes and dtypes that a step reads and writes."""
    bits = bits_of(state)
    for name in names:
        shape, maxima_shape = shapes(family, name, p)
        _check_tensor(f"{where}[{name!r}]", state.get(name), shape, torch.uint8 if bits == 8 else torch.float32)
        if bits == 8:
            key = maxima_name(name)
            if key not in ("absmax1", "absmax2"):
                raise ValueError(f"{where}[{name!r}]: expected no third state beside 8-bit states, got one")
            _check_tensor(f"{where}[{key!r}]", state.get(key), maxima_shape, torch.float32)


def check_map(where: str, key: str, table: Any) -> None:
    """Raise unless a map is the one that 8-bit states are in. Waits for the device that it lies on."""
    values = torch.tensor(TABLES[MAPS[key]], device="cpu")
    if not isinstance(table, torch.Tensor) or table.shape != values.shape:
        got = tuple(table.shape) if isinstance(table, torch.Tensor) else type(table).__name__
        raise ValueError(f"{where}[{key!r}]: expected a tensor of shape (256,), got {got}")
    # 16-bit training of old kept the map in 16 bits; what it was made of is not in doubt.
    if not torch.allclose(table.detach().to("cpu", torch.float32), values, rtol=1e-2, atol=1e-6):
        raise ValueError(f"{where}[{key!r}]: expected the {MAPS[key].replace('_', ', ')} map, got another code")


def _check_tensor(where: str, tensor: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{where}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise ValueError(f"{where}: expected {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{where}: expected shape {shape}, got {tuple(tensor.shape)}")
