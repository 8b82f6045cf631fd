"""What one step launches: found again cheaply as long as nothing but the gradients' addresses changes.

A plan is made for the parameters that have gradients, where they, their states and their hyperparameters lie. `match`
compares all of that with what it was made for, in as few steps of the interpreter as possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, compress
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fewbits import _native
from fewbits._checks import DTYPES, block_count
from fewbits._launch import dense
from fewbits.optim import _paging, _states
from fewbits.optim._config import Config
from fewbits.optim._launches import Bundle, Key, Launch

if TYPE_CHECKING:
    from fewbits.optim.optimizer import Optimizer8bit

TILE: int = _native.OPTIM_TILE
FIELDS: int = _native.OPTIM_FIELDS
GROUPS: int = _native.OPTIM_GROUPS

# Called through map: no step of the interpreter a tensor.
_grad: Callable[[Any], Any] = torch.Tensor.grad.__get__  # type: ignore[attr-defined]
_dtype: Callable[[Any], Any] = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
_address, _numel, _is_contiguous = torch.Tensor.data_ptr, torch.Tensor.numel, torch.Tensor.is_contiguous
_params = itemgetter("params")


class Member(NamedTuple):
    """A parameter that takes part, and where it stands."""

    group: int
    index: int
    ordinal: int
    p: torch.Tensor


def local(tensor: Any) -> Any:
    """Return this process's part of a distributed tensor, and any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


class Plan:
    """Launches and what they were made for."""

    def __init__(self, optimizer: Optimizer8bit, members: list[Member], *, whole: bool = True) -> None:
        groups = optimizer.param_groups
        self.whole = whole
        everyone = list(chain.from_iterable(map(_params, groups))) if whole else [m.p for m in members]
        chosen = {m.ordinal for m in members} if whole else set(range(len(members)))
        self.ids = list(map(id, everyone))
        self.everyone = everyone
        self.mask = None if len(chosen) == len(everyone) else [i in chosen for i in range(len(everyone))]
        self.types = list(map(type, map(_grad, everyone)))
        self.changes = optimizer.mng.changes
        self.distributed = any(hasattr(m.p, "_local_tensor") for m in members)
        self.owners = [m.p for m in members]
        params = [local(m.p) for m in members]
        grads = [local(m.p.grad) for m in members]
        check_tensors(members, params, grads)
        self.params = params
        self.dtypes, self.numels = list(map(_dtype, grads)), list(map(_numel, grads))
        self.configs: list[Config] = []
        configs = self._configure(optimizer, members, params)
        # Nothing has changed up to here. Now every state comes to be, or is found wrong.
        prepare_states(optimizer, members, params, configs)
        self.places = list(map(_address, params))
        states = [optimizer.state[m.p] for m in members]
        self.sentinels = [state.get("state1", state["step"]) for state in states]
        self.sentinel_places = list(map(_address, self.sentinels))
        self.bundles: list[Bundle] = []
        self._arrange(optimizer, members, params, grads, states, configs)

    # ---- finding it again ----

    def match(self, optimizer: Optimizer8bit) -> tuple[list[int], list[torch.Tensor]] | None:
        """Return the addresses of the gradients and who must outlive the launches, or None if something changed."""
        if optimizer.mng.changes != self.changes or getattr(optimizer.state, "watch", None) is not optimizer._watch:
            return None
        if list(map(id, chain.from_iterable(map(_params, optimizer.param_groups)))) != self.ids:
            return None
        grads = list(map(_grad, self.everyone))
        if list(map(type, grads)) != self.types:
            return None
        return self.addresses(grads if self.mask is None else list(compress(grads, self.mask)))

    def addresses(self, grads: list[torch.Tensor]) -> tuple[list[int], list[torch.Tensor]] | None:
        if self.distributed:
            grads = [local(g) for g in grads]
            if [local(p) for p in self.owners] != self.params:
                return None
        if not all(map(_is_contiguous, grads)):
            if any(g.layout is not torch.strided for g in grads):
                return None
            grads = [g if g.is_contiguous() else dense(g) for g in grads]
        if (
            list(map(_dtype, grads)) != self.dtypes
            or list(map(_numel, grads)) != self.numels
            or list(map(_address, self.params)) != self.places
            or list(map(_address, self.sentinels)) != self.sentinel_places
        ):
            return None
        try:
            return list(map(_address, grads)), grads
        except RuntimeError:  # no memory of its own: a fresh plan says what it is
            return None

    def refresh(self) -> bool:
        """Take over changed hyperparameters. Return whether that needs another plan."""
        stale = [config for config in self.configs if config.refresh()]  # each takes its turn, whatever the others say
        return bool(stale)

    # ---- making it ----

    def _configure(self, optimizer: Optimizer8bit, members: list[Member], params: list[torch.Tensor]) -> list[Config]:
        """Return the configuration of each member; those with the same one share it."""
        found: dict[tuple[int, int, torch.device], Config] = {}
        overrides, result = optimizer.mng.pid2config, []
        for m, p in zip(members, params, strict=True):
            override = overrides.get(id(m.p))
            key = (m.group, 0 if override is None else id(m.p), p.device)
            config = found.get(key)
            if config is None:
                config = found[key] = Config(optimizer, optimizer.param_groups[m.group], override, p.device)
                config.refresh()
                self.configs.append(config)
            result.append(config)
        return result

    def _arrange(
        self,
        optimizer: Optimizer8bit,
        members: list[Member],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: list[dict[str, Any]],
        configs: list[Config],
    ) -> None:
        numbers = self._number(configs)
        homes: dict[torch.device, dict[Key, list[int]]] = {}
        for i, (p, g, state) in enumerate(zip(params, grads, states, strict=True)):
            evicted = optimizer.is_paged and _paging.is_evicted(state) and p.is_cuda
            key = Key(_states.bits_of(state), DTYPES[p.dtype], DTYPES[g.dtype], numbers[i] // GROUPS, evicted)
            homes.setdefault(p.device, {}).setdefault(key, []).append(i)
        for device, keys in homes.items():
            bundle = Bundle(optimizer, device)
            here = [config for config in self.configs if config.device == device]
            for key, indices in keys.items():
                batch = here[key.batch * GROUPS : (key.batch + 1) * GROUPS]
                make = self._chunks if key.evicted else self._whole
                places = [bundle.place(params[i]) for i in indices]
                common = [
                    (i, place, states[i], numbers[i] % GROUPS, members[i].ordinal, configs[i].names)
                    for i, place in zip(indices, places, strict=True)
                ]
                for rows, sources, chunk in make(optimizer, device, common, params, grads):
                    bundle.add(Launch(key, batch, chunk), rows, sources)
            bundle.finish()
            self.bundles.append(bundle)

    def _number(self, configs: list[Config]) -> list[int]:
        """Return the index of each configuration among those of its device."""
        counts: dict[torch.device, int] = {}
        numbers: dict[int, int] = {}
        for config in self.configs:
            numbers[id(config)] = counts.get(config.device, 0)
            counts[config.device] = numbers[id(config)] + 1
        return [numbers[id(config)] for config in configs]

    def _whole(
        self, optimizer: Any, device: torch.device, common: list[Any], params: list[Any], grads: list[Any]
    ) -> Iterator[tuple[list[Any], list[Any], Any]]:
        """Give one launch of whole tensors."""
        rows, sources = [], []
        for i, place, state, number, ordinal, names in common:
            planes = [state[name].data_ptr() if name in names else 0 for name in ("state1", "state2", "state3")]
            maxima = [state[key].data_ptr() if key in state else 0 for key in ("absmax1", "absmax2")]
            step = state["step"].data_ptr()
            rows.append((place, *planes, *maxima, params[i].numel(), step, 0, number, ordinal, 0, 1, 0, 0, 0))
            sources.append((i, 0))
        yield rows, sources, None

    def _chunks(
        self, optimizer: Any, device: torch.device, common: list[Any], params: list[Any], grads: list[Any]
    ) -> Iterator[tuple[list[Any], list[Any], Any]]:
        """Give launches of pieces that fit into the buffers of the pager.

        Pieces are whole tiles, so that partial sums are those of whole tensors.
        """
        pager = optimizer._pager(device)
        slot = 0
        chunk = _paging.Chunk(pager, slot)
        rows: list[Any] = []
        sources: list[Any] = []
        for i, place, state, number, ordinal, names in common:
            n, first = params[i].numel(), 0
            itemsize = state["state1"].element_size()
            width = 2 if optimizer.optimizer_name == "ademamix" else 1
            each = itemsize * (width + len(names) - 1) + (1 if itemsize == 1 else 0)  # with room for block maxima
            while first < n:
                count = min(n - first, chunk.room(each, TILE))
                if not count:
                    yield rows, sources, chunk
                    slot = (slot + 1) % _paging.SLOTS
                    chunk, rows, sources = _paging.Chunk(pager, slot), [], []
                    continue
                planes = {}
                for name in names:
                    halves = width if name == "state1" else 1
                    planes[name] = _visit(chunk, state[name], halves, first, count)
                    key = _states.maxima_name(name)
                    if itemsize == 1:
                        low, size = first // _states.BLOCKSIZE, block_count(count, _states.BLOCKSIZE)
                        planes[key] = _visit(chunk, state[key], halves, low, size)
                order = ("state1", "state2", "state3", "absmax1", "absmax2")
                addresses = [planes.get(name, 0) for name in order]
                p = place + first * params[i].element_size()
                last = int(first + count == n)
                step = state["step"].data_ptr()
                rows.append((p, *addresses, count, step, 0, number, ordinal, first, last, 0, 0, 0))
                sources.append((i, first * grads[i].element_size()))
                first += count
        if rows:
            yield rows, sources, chunk


def _visit(chunk: _paging.Chunk, tensor: torch.Tensor, halves: int, first: int, count: int) -> int:
    """Give elements [first, first + count) of a state, or of both halves of it, a place in a chunk; return where."""
    flat = tensor.view(halves, -1)
    return chunk.place([flat[half, first : first + count] for half in range(halves)])[0].data_ptr()


def check_tensors(members: list[Member], params: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
    """Raise unless a step can update these parameters by these gradients."""
    for m, p, g in zip(members, params, grads, strict=True):
        where = f"parameter {m.index} of group {m.group}"
        for what, tensor in ((where, p), (f"gradient of {where}", g)):
            if tensor.layout is not torch.strided:
                raise ValueError(
                    f"{what}: expected a dense tensor, got layout {tensor.layout}; sparse is not supported"
                )
            if tensor.dtype not in DTYPES:
                raise ValueError(f"{what}: expected float32, float16 or bfloat16, got {tensor.dtype}")
            if not (tensor.is_cpu or tensor.is_cuda) or tensor.is_meta:
                raise ValueError(f"{what}: expected a tensor on cpu or cuda, got one on {tensor.device}")
        if g.shape != p.shape or g.device != p.device:
            raise ValueError(
                f"gradient of {where}: expected shape {tuple(p.shape)} on {p.device}, "
                f"got {tuple(g.shape)} on {g.device}"
            )
        if torch._debug_has_internal_overlap(p) == 1 and p.numel() > 1:
            raise ValueError(f"{where}: expected a tensor of distinct elements, got strides {tuple(p.stride())}")
        if not isinstance(p, torch.nn.Parameter) and type(p) is not torch.Tensor:
            raise TypeError(f"{where}: expected a plain tensor, got {type(p).__name__}")


def prepare_states(
    optimizer: Optimizer8bit, members: list[Member], params: list[torch.Tensor], configs: list[Config]
) -> None:
    """Create states that are missing, bring all to their devices, and check them."""
    _adopt(optimizer)
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    family = optimizer.optimizer_name
    for m, p, config in zip(members, params, configs, strict=True):
        state = optimizer.state[m.p]
        if "step" not in state or any(name not in state for name in config.names):
            if capturing and p.is_cuda:
                raise RuntimeError(
                    f"step: expected parameter {m.index} of group {m.group} to have a state before a CUDA graph is "
                    "captured, got none; run a step before the capture"
                )
            optimizer.init_state(optimizer.param_groups[m.group], m.p, m.group, m.index)
        step = state["step"]
        if not isinstance(step, torch.Tensor) or step.dtype != torch.int64 or step.device != p.device or step.dim():
            state["step"] = torch.full((), int(step), dtype=torch.int64, device=p.device)
        _states.check(f"state of parameter {m.index} of group {m.group}", state, family, p, config.names)
        paged = _paging.is_paged_state(optimizer, p)
        for key in (*_paging.tensors_of(state), *(key for key in _states.MAPS if key in state)):
            tensor = state[key]
            if tensor.device != p.device and not (paged and key not in _states.MAPS):
                state[key] = tensor.to(p.device)
            if not tensor.is_contiguous():
                state[key] = state[key].contiguous()
        if _states.bits_of(state) == 8 and config.names:
            _check_8bit(optimizer, config)
    optimizer._settle_pages([(m, p) for m, p in zip(members, params, strict=True)])


def _check_8bit(optimizer: Optimizer8bit, config: Config) -> None:
    from fewbits.optim._families import check_8bit

    check_8bit(optimizer.optimizer_name, config.values)


def _adopt(optimizer: Optimizer8bit) -> None:
    """Make the optimizer's states ones whose changes are noticed, whoever put them there."""
    state = optimizer.state
    if type(state) is not _states.States or state.watch is not optimizer._watch:
        optimizer.state = _states.States(optimizer._watch, state)
