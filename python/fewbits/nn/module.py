"""What modules with a 4-bit weight have in common: saving, loading, and finding the state of the weight."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from fewbits.nn.base import QuantizedModule
from fewbits.nn.gathered import Gathered4bit
from fewbits.nn.params import Params4bit, as_packed, keywords, to_storage
from fewbits.nn.shard import Shard, distributed, fill, gathered, shard_of
from fewbits.nn.split import Split, joined, split_4bit
from fewbits.quant_state import QuantState


class Module4bit(QuantizedModule):
    """A module whose parameter ``weight`` is a matrix held in 4 bits. Comes before torch's class among the bases.

    The state dict holds the packed bytes and, beside them, all that it takes to read them back, under bitsandbytes'
    names; ``load_state_dict`` takes those, and takes floating-point weights too.
    """

    _parameter_class = Params4bit
    _with_state = "packed codes with weight.absmax and the rest of their state beside them"

    weight: Params4bit
    quant_state: QuantState | None
    quant_storage: torch.dtype

    def _hold(self, compress_statistics: bool, quant_type: str, quant_storage: torch.dtype) -> None:
        """Put the weight that torch's class made into a `Params4bit`, to be quantized on its first move."""
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.quant_state = None
        self.quant_storage = quant_storage

    def _find_state(self, tracing: bool) -> QuantState:
        weight = self.weight
        state: QuantState | None = getattr(weight, "quant_state", None)
        if type(weight) is Gathered4bit and state is not None:  # its maxima go when its codes go
            return state
        if not tracing and hasattr(weight, "_local_tensor"):
            raise RuntimeError(
                f"{type(self).__name__}: expected a whole weight, got a distributed tensor; call the module that "
                "fully_shard was given, or for tensor parallelism use ColwiseParallel and RowwiseParallel of "
                "fewbits.distributed"
            )
        if state is None:
            # FSDP and others put plain tensors in the place of parameters; the module remembers what they are.
            state = self.quant_state
            if state is None:
                raise RuntimeError(
                    f"{type(self).__name__}: expected a quantized weight, got a floating-point one; "
                    "move the module to a device first, as by .to('cuda') or .to('cpu')"
                )
            if not tracing and state.absmax.device != weight.device:
                state = self.quant_state = state.moved(weight.device)
            if not tracing and isinstance(weight, Params4bit):  # a parameter that has lost its state gets it back
                weight.quant_state = state
        elif not tracing and self.quant_state is not state:
            self.quant_state = state
        return state

    def _keep_part(self, split: Split) -> None:
        state = self._find_state(False)
        codes, part = split_4bit(self.weight.data, state, split.dim, split.rank, split.world, self._sizes())
        kwargs = keywords(part, codes.dtype)
        self._parameters["weight"] = Params4bit(codes, False, **kwargs, module=self, bnb_quantized=True)
        self.quant_state = part

    def _blocksize(self) -> int | None:
        return self.weight.blocksize

    # ---- what moves and loads ask for ------------------------------------------------------------------------------

    def _forget_scales(self) -> None:
        self.quant_state = None

    def _adopt(self, weight: Params4bit) -> None:
        if weight.bnb_quantized:
            self.quant_state, self.quant_storage = weight.quant_state, weight.quant_storage

    def _follow(self, weight: torch.Tensor) -> None:
        if self.quant_state is not None:
            self.quant_state = self.quant_state.moved(weight.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if isinstance(self.weight, Params4bit):
            self.weight.module = self  # a pickled parameter leaves its module behind

    # ---- state dicts -----------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight: Any = self.weight
        codes = weight
        shard: Shard | None = shard_of(weight)
        if shard is not None:
            recipe: Any = shard.recipe
            codes, absmax = distributed(weight)
            if self._split is not None and not keep_vars:  # of a mesh with two dimensions: this rank's part of one
                codes, absmax = gathered(codes), gathered(absmax)
            elif not keep_vars:
                destination[f"{prefix}weight"] = codes
            state: QuantState | None = recipe.with_maxima(absmax, shard.device)
        else:
            state = getattr(weight, "quant_state", None)
            if state is None and weight is not None and not isinstance(weight, Params4bit):
                state = self.quant_state  # FSDP1 has put a plain tensor in the place of the parameter
        if state is None:
            return
        if self._split is not None and not keep_vars:
            state, destination[f"{prefix}weight"] = _whole(self._split, state, codes.data)
            self._join_bias(destination, prefix, self._split)
        if shard is not None:
            weight.quant_state = state
        for key, value in state.as_dict(packed=True).items():
            destination[f"{prefix}weight.{key}"] = value if keep_vars or shard is not None else value.detach()
            # Distributed checkpoints find "weight.absmax" by walking attributes.
            if shard is not None and not key.startswith("quant_state"):
                setattr(weight, key, value)

    def _statistics(self, state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        return {key: value for key, value in state_dict.items() if key.startswith(f"{prefix}weight.")}

    def _read_weight(
        self, weight: Params4bit, entry: torch.Tensor, stats: Mapping[str, Any], assign: bool
    ) -> Params4bit:
        shape, device = self._weight_shape(), self._load_device(weight, entry, assign)
        state = QuantState.from_dict(stats, device)
        if state.shape != shape:
            raise ValueError(f"shape: expected {tuple(shape)}, got {tuple(state.shape or ())}")
        packed = as_packed("weight", entry, state).to(device)
        if not assign:
            packed, state = to_storage(packed.clone(), state, self.quant_storage), copy.deepcopy(state)
        requires_grad = weight.requires_grad and packed.is_floating_point()
        kwargs = keywords(state, packed.dtype)
        return Params4bit(packed, requires_grad, **kwargs, module=self, bnb_quantized=True)

    def _cut_entries(self, state_dict: dict[str, Any], prefix: str, split: Split) -> dict[str, Any]:
        state_dict, name = super()._cut_entries(state_dict, prefix, split), f"{prefix}weight"
        entry, weight = state_dict.get(name), self.weight
        stats = self._statistics(state_dict, prefix)
        if isinstance(entry, torch.Tensor) and not stats and entry.shape == split.shape:
            kwargs = {**weight.__dict__, "quant_state": None, "bnb_quantized": False, "module": None}
            quantized = Params4bit(gathered(entry.detach()), **kwargs).to(weight.device)
            packed, state = quantized.data, quantized.quant_state
            assert state is not None
        elif isinstance(entry, torch.Tensor) and stats:
            stats = {key: gathered(value) if isinstance(value, torch.Tensor) else value for key, value in stats.items()}
            state = QuantState.from_dict(stats, entry.device)
            if state.shape != split.shape:
                return state_dict
            packed = as_packed("weight", gathered(entry.detach()), state)
        else:
            return state_dict
        state_dict[name], part = split_4bit(packed, state, split.dim, split.rank, split.world)
        rest = {key: value for key, value in state_dict.items() if key not in stats}
        return {**rest, **{f"{name}.{key}": value for key, value in part.as_dict(packed=True).items()}}

    def _blank(self, shard: Shard) -> Params4bit:
        recipe: Any = shard.recipe
        blank = torch.empty(0, dtype=recipe.dtype, device=shard.device)
        return Params4bit(blank, False, **recipe.keywords, bnb_quantized=True)

    def _take_whole(self, weight: Any, loaded: Params4bit) -> None:
        shard, state = shard_of(weight), loaded.quant_state
        assert shard is not None
        assert state is not None
        recipe: Any = shard.recipe
        for what in ("blocksize", "nested", "quant_type", "shape"):
            mine, given = getattr(recipe.state, what), getattr(state, what)
            if mine != given:
                raise ValueError(f"{what}: expected {mine} for a weight that is sharded already, got {given}")
        fill(weight, to_storage(loaded.data, state, recipe.dtype), state.absmax).take(state)

    def _read_values(self, weight: Params4bit, entry: torch.Tensor, device: torch.device, assign: bool) -> Params4bit:
        attributes = {**weight.__dict__, "quant_state": None, "bnb_quantized": False, "module": None}
        values = entry.detach()
        if not weight.bnb_quantized:
            if not assign:
                dtype = values.dtype if weight.is_meta else weight.dtype
                values = values.to(device, dtype, copy=True)
            loaded = Params4bit(values, weight.requires_grad, **attributes)
        else:
            loaded = Params4bit(values, **attributes).to(device)
        loaded.module = self
        return loaded


def _whole(split: Split, state: QuantState, codes: torch.Tensor) -> tuple[QuantState, Any]:
    """Return the state and the codes of all parts of a weight as distributed tensors, for state dicts."""
    whole = copy.copy(state)
    whole.shape = torch.Size(split.shape)
    if split.dim == 0:
        whole.absmax = joined(split, state.absmax, 0)
        if state.state2 is not None:
            whole.state2 = copy.copy(state.state2)
            whole.state2.absmax = joined(split, state.state2.absmax, 0)
        return whole, joined(split, codes, 0)
    rows = split.shape[0]
    grid = joined(split, state.absmax.view(rows, -1), 1)
    whole.absmax = grid
    return whole, joined(split, codes.view(rows, -1), 1)
