"""What one step launches: found again cheaply as long as nothing but the gradients' addresses changes.

A plan is made for the parameters that have gradients, where they, their states and their hyperparameters lie. `match`
compares all of that with what it was made for.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import is_, itemgetter
from typing import TYPE_CHECKING, Any

import torch

from fewbits import _native
from fewbits._backend import is_portable
from fewbits._checks import DTYPES, block_count
from fewbits.optim import _distributed, _paging, _states
from fewbits.optim._config import Config
from fewbits.optim._launches import Bundle, Key, Launch
from fewbits.optim._paged_states import local
from fewbits.optim._prepare import Member, check_tensors, prepare_states
from fewbits.optim._whereabouts import Found, Whereabouts

if TYPE_CHECKING:
    from fewbits.optim._stepping import Stepping
    from fewbits.portable.optim import PortableBundle

TILE: int = _native.OPTIM_TILE
GROUPS: int = _native.OPTIM_GROUPS

_params = itemgetter("params")


class Plan:
    """Launches and what they were made for."""

    def __init__(self, optimizer: Stepping, members: list[Member], *, whole: bool = True) -> None:
        everyone = list(chain.from_iterable(map(_params, optimizer.param_groups)))
        chosen = {m.ordinal for m in members}
        self.changes = optimizer.mng.changes
        self.groups = list(optimizer.param_groups)
        self.lengths = [len(group["params"]) for group in self.groups]
        distributed = [m for m in members if _distributed.is_distributed(m.p)]
        self.owners = [m.p for m in members]
        for m in distributed:
            _distributed.check_placement(f"parameter {m.position} of group {m.group_index}", m.p)
        self.reducer = _distributed.Reducer(self.owners) if distributed else None
        params = [local(m.p) for m in members]
        grads = [_distributed.local_gradient(m.p, m.p.grad) for m in members]
        check_tensors(members, params, grads)
        self.params = params
        self.configs: list[Config] = []
        configs = self._configure(optimizer, members, params)
        # Nothing has changed up to here. Now every state comes to be, or is found wrong.
        prepare_states(optimizer, members, params, configs)
        states = [optimizer.state[m.p] for m in members]
        sentinels = [state.get("state1", state["step"]) for state in states]
        takes_part = [ordinal in chosen for ordinal in range(len(everyone))] if whole else [True] * len(members)
        self.whereabouts = Whereabouts(
            everyone if whole else self.owners, takes_part, self.owners, params, grads, sentinels
        )
        self.bundles: list[Bundle | PortableBundle] = []
        self._arrange(optimizer, members, params, grads, states, configs)

    # ---- finding it again ----

    def match(self, optimizer: Stepping) -> Found | None:
        """Return the addresses of the gradients and who must outlive the launches, or None if something changed."""
        if optimizer.mng.changes != self.changes or getattr(optimizer.state, "watch", None) is not optimizer._watch:
            return None
        groups = optimizer.param_groups
        if len(groups) != len(self.groups) or not all(map(is_, groups, self.groups)):  # hyperparameters are theirs
            return None
        if list(map(len, map(_params, groups))) != self.lengths:
            return None
        return self.whereabouts.find(groups)

    def refresh(self) -> bool:
        """Take over changed hyperparameters. Return whether that needs another plan."""
        stale = [config for config in self.configs if config.refresh()]  # each takes its turn, whatever the others say
        return bool(stale)

    # ---- making it ----

    def _configure(self, optimizer: Stepping, members: list[Member], params: list[torch.Tensor]) -> list[Config]:
        """Return the configuration of each member; those with the same one share it."""
        found: dict[tuple[int, int, torch.device], Config] = {}
        overrides, result = optimizer.mng.pid2config, []
        for m, p in zip(members, params, strict=True):
            override = overrides.get(id(m.p))
            key = (m.group_index, 0 if override is None else id(m.p), p.device)
            config = found.get(key)
            if config is None:
                config = found[key] = Config(optimizer, optimizer.param_groups[m.group_index], override, p.device)
                config.refresh()
                self.configs.append(config)
            result.append(config)
        return result

    def _arrange(
        self,
        optimizer: Stepping,
        members: list[Member],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: list[dict[str, Any]],
        configs: list[Config],
    ) -> None:
        numbers = self._number(configs)
        homes: dict[torch.device, dict[Key, list[int]]] = {}
        for i, (p, g, state) in enumerate(zip(params, grads, states, strict=True)):
            evicted = optimizer.is_paged and _paging.is_evicted(state, p)
            key = Key(_states.bits_of(state), DTYPES[p.dtype], DTYPES[g.dtype], numbers[i] // GROUPS, evicted)
            homes.setdefault(p.device, {}).setdefault(key, []).append(i)
        for device, keys in homes.items():
            if is_portable(device):
                from fewbits.portable.optim import PortableBundle, entry_of  # which reads this package

                portable = PortableBundle(optimizer, device)
                portable.reducer = self.reducer
                order = chain.from_iterable(keys.values())  # that of native tables, hence of sums
                portable.entries = [
                    entry_of(
                        *(portable.name, i, members[i].ordinal, params[i], states[i], configs[i]),
                        _distributed.first_element(members[i].p),
                    )
                    for i in order
                ]
                self.bundles.append(portable)
                continue
            bundle = Bundle(optimizer, device)
            bundle.reducer = self.reducer
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
            begin = _distributed.first_element(self.owners[i])
            rows.append((place, *planes, *maxima, params[i].numel(), step, 0, number, ordinal, begin, 1, 0, 0, 0))
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
            n, first, begin = params[i].numel(), 0, _distributed.first_element(self.owners[i])
            itemsize = state["state1"].element_size()
            width = 2 if optimizer.optimizer_name == "ademamix" else 1
            maxima = 4 * TILE // _states.BLOCKSIZE if itemsize == 1 else 0
            tile_bytes = (width + len(names) - 1) * (itemsize * TILE + maxima)
            while first < n:
                count = min(n - first, chunk.room(tile_bytes) * TILE)
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
                rows.append((p, *addresses, count, step, 0, number, ordinal, begin + first, last, 0, 0, 0))
                sources.append((i, first * grads[i].element_size()))
                first += count
        if rows:
            yield rows, sources, chunk


def _visit(chunk: _paging.Chunk, tensor: torch.Tensor, halves: int, first: int, count: int) -> int:
    """Give elements [first, first + count) of a state, or of both halves of it, a place in a chunk; return where."""
    flat = tensor.view(halves, -1)
    return chunk.place([flat[half, first : first + count] for half in range(halves)])[0].data_ptr()
