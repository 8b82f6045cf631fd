"""`Params4bit`: a parameter that turns into 4-bit codes when it first moves to a device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from math import prod
from operator import attrgetter
from typing import Any

import torch

from fewbits import _checks, _launch
from fewbits._prepared import Prepared
from fewbits._states import ordinary
from fewbits.functional import quantize_4bit
from fewbits.nn.parameter import QuantizedParameter, attributes, blank, no_scales
from fewbits.quant_state import QuantState

__all__ = ["Params4bit"]


def _of_state(path: str) -> Any:
    """Return a property that reads ``quant_state.<path>``.

    FSDP and distributed checkpoints find the entry ``weight.nested_absmax`` of a state dict by walking attributes.
    """
    read: Callable[[QuantState], Any] = attrgetter(path)

    def get(self: Params4bit) -> Any:
        state = self.quant_state
        if state is None or (path.startswith(("state2", "offset")) and not state.nested):
            kind = "not quantized" if state is None else "without double quantization"
            raise AttributeError(f"{type(self).__name__}: no {path!r} in a parameter that is {kind}")
        return read(state)

    return property(get, doc=f"``quant_state.{path}``.")


class Params4bit(QuantizedParameter):
    """A parameter held in 4 bits.

    It is born with floating-point data and quantizes on the first ``.to(device)``, ``.cuda()`` or ``.cpu()``; the
    original is left as it was. From then on its data are packed codes, shape ``(k, 1)`` of `quant_storage`: moving it
    moves bytes, and a change of dtype (``.half()``, ``.to(torch.bfloat16)``) leaves it alone.

    Parameters
    ----------
    data : torch.Tensor, optional
        Floating-point values, or packed codes together with their `quant_state`.
    requires_grad : bool
        Packed codes have no gradient, so this should stay False.
    quant_state : QuantState, optional
        The state of packed codes.
    blocksize : int, optional
        A power of two from 32 to 4096; 64 by default.
    compress_statistics : bool
        Double quantization.
    quant_type : str
        ``"fp4"`` or ``"nf4"``.
    quant_storage : torch.dtype
        Dtype under which the packed bytes are held.
    module : torch.nn.Module, optional
        Told the state (``module.quant_state``) when this parameter quantizes.
    bnb_quantized : bool
        Whether `data` are packed codes. Data that have exactly the size of the codes of `quant_state` are.
    **kwargs
        Not looked at, so that ``Params4bit(data, **other.__dict__)`` works whatever others left on the parameter.

    Notes
    -----
    Assigning a Params4bit to ``.data`` takes over its quantization state along with its bytes: that is how
    ``module.to(device)`` keeps the identity of its parameters.

    Examples
    --------
    >>> weight = Params4bit(torch.ones(16, 64), quant_type="nf4").to("cpu")
    >>> weight.shape, weight.quant_state.shape
    (torch.Size([512, 1]), torch.Size([16, 64]))
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_state: QuantState | None
    quant_storage: torch.dtype
    bnb_quantized: bool
    module: torch.nn.Module | None
    prepared: Prepared | None

    def __new__(  # noqa: D102
        cls,
        data: torch.Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: torch.nn.Module | None = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Params4bit:
        blocksize = 64 if blocksize is None else blocksize
        _checks.check_blocksize(blocksize)
        _checks.check_quant_type(quant_type)
        _checks.check_quant_storage(quant_storage)
        if data is None:
            data = torch.empty(0)
        elif not isinstance(data, torch.Tensor):
            raise TypeError(f"data: expected a tensor, got {type(data).__name__}")
        source = data
        if isinstance(data, Params4bit):
            data = data.data
        if quant_state is None and module is not None:
            quant_state = _state_of_module(data, module)
        if quant_state is not None and quant_state.shape is not None:
            data, bnb_quantized = _recognize(data, quant_state.shape, quant_storage, bnb_quantized)
        self: Params4bit = torch.Tensor._make_subclass(cls, data, requires_grad)
        self.blocksize = blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self._after(source) if isinstance(source, Params4bit) else self

    @classmethod
    def from_prequantized(
        cls,
        data: torch.Tensor,
        quantized_stats: Mapping[str, Any],
        requires_grad: bool = False,
        device: torch.device | str | int = "cuda",
        module: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> Params4bit:
        """Return the parameter that a checkpoint holds.

        Parameters
        ----------
        data : torch.Tensor
            Packed codes.
        quantized_stats : mapping
            The tensors beside them, as `QuantState.from_dict` takes them. Left as it is.
        requires_grad : bool
            As in the constructor.
        device : torch.device, str or int
            Where everything goes.
        module : torch.nn.Module, optional
            Gets the state as ``module.quant_state``.
        **kwargs
            Not looked at.

        Returns
        -------
        Params4bit

        Raises
        ------
        ValueError
            If an entry is missing, corrupt, or does not fit the others.
        """
        state = QuantState.from_dict(quantized_stats, device)
        data = as_packed("data", data, state).to(device)
        parameter = cls(data, requires_grad, **keywords(state, data.dtype), module=module, bnb_quantized=True)
        if module is not None:
            module.quant_state = state  # type: ignore[assignment]
        return parameter

    absmax = _of_state("absmax")
    code = _of_state("code")
    quant_map = _of_state("code")
    offset = _of_state("offset")
    state2 = _of_state("state2")
    nested_absmax = _of_state("state2.absmax")
    nested_blocksize = _of_state("state2.blocksize")
    nested_quant_map = _of_state("state2.code")
    nested_dtype = _of_state("state2.dtype")
    nested_offset = _of_state("offset")

    # ---- moving and casting ----------------------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:
        """Move or cast as ``Tensor.to``. Quantizes first if this is a first move; never casts packed codes."""
        always_copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if not self.bnb_quantized:
            return self._to_unpacked(device, dtype, non_blocking, always_copy)
        data = self.data if device is None else self.data.to(device, non_blocking=non_blocking)
        state = self.quant_state
        if state is not None and data.device.type != "meta":
            # A meta parameter is the shell of an offloaded one: its state stays where it is, for when the bytes return.
            state = state.moved(data.device, non_blocking)
        if data.device == self.device and state is self.quant_state and not always_copy:
            return self
        if always_copy and data.device == self.device:
            data = data.clone()
        return self._like(data, quant_state=state)._after(self)

    def _to_unpacked(
        self, device: torch.device | None, dtype: torch.dtype | None, non_blocking: bool, always_copy: bool
    ) -> Params4bit:
        if device is not None and device.type != "meta":
            data = self.data if dtype is None else self.data.to(dtype)
            return self._quantize(data.to(device, non_blocking=non_blocking))
        if not always_copy and dtype in (None, self.dtype) and (device is None or self.is_meta):
            return self
        device, dtype = device or self.device, dtype or self.dtype
        return self._like(self.data.to(device, dtype, non_blocking, always_copy))

    def _quantize(self, data: torch.Tensor) -> Params4bit:
        shape = getattr(self.module, "_weight_shape", lambda: data.shape)()
        if data.shape != shape and data.shape == (_checks.storage_count(prod(shape), torch.uint8), 1):
            raise no_scales("Params4bit.data")
        _checks.check_dtype("Params4bit.data", data.dtype)
        codes, state = quantize_4bit(
            data,
            blocksize=self.blocksize,
            compress_statistics=bool(self.compress_statistics),
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        if self.module is not None:
            self.module.quant_state = state  # type: ignore[assignment]
        quantized = self._like(codes, quant_state=state, bnb_quantized=True)
        quantized._from_values = True
        return quantized

    def _is_quantized(self) -> bool:
        return self.bnb_quantized

    def _value_dtype(self) -> torch.dtype:
        state = self.quant_state
        return torch.float32 if state is None or state.dtype is None else state.dtype

    # ---- copying ---------------------------------------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        found = state.get("quant_state")
        if isinstance(found, QuantState):
            data, found = ordinary(state["data"], found)
            state = {**state, "data": data, "quant_state": found}
        super().__setstate__(state)

    def __getstate__(self) -> dict[str, Any]:
        # Without the module: whoever pickles or copies a lone parameter does not want the model with it.
        return {**super().__getstate__(), "module": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        if id(self) in memo:
            done: Params4bit = memo[id(self)]
            return done
        # The copy of a module knows its weight; the copy of a lone weight knows no module.
        others = {**copy.deepcopy(attributes(self), memo), "module": memo.get(id(self.module))}
        duplicate = type(self)(self.data.clone(memory_format=torch.preserve_format), self.requires_grad, **others)
        memo[id(self)] = duplicate
        return duplicate

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        result = super().__torch_function__(func, types, args, kwargs)
        if func is torch.chunk or func is torch.split:  # FSDP2 shards with these, and needs to know what it holds
            source = args[0] if args else next(value for value in kwargs.values() if isinstance(value, cls))
            result = tuple(type(source)(piece, source.requires_grad, **source.__dict__) for piece in result)
            if func is torch.chunk:
                cls._number_pieces(result, args, kwargs)
        return result


def keywords(state: QuantState, quant_storage: torch.dtype) -> dict[str, Any]:
    """Return the constructor's keywords for packed codes of a state."""
    return {
        "quant_state": state,
        "blocksize": state.blocksize,
        "compress_statistics": state.nested,
        "quant_type": state.quant_type,
        "quant_storage": quant_storage,
    }


def _state_of_module(data: torch.Tensor, module: torch.nn.Module) -> QuantState | None:
    """Return the state that a module has kept, for packed codes of just that shape that come without one."""
    state: QuantState | None = getattr(module, "quant_state", None)
    if state is None or state.shape is None or data.is_meta or data.shape == state.shape:
        return None
    count = _checks.storage_count(prod(state.shape), torch.uint8)
    return state if data.shape == (count, 1) else None


def _recognize(
    data: torch.Tensor, shape: torch.Size, quant_storage: torch.dtype, bnb_quantized: bool
) -> tuple[torch.Tensor, bool]:
    """Tell packed codes from values by their number, which is more reliable than a flag that was copied along."""
    if data.is_meta:
        return data, bnb_quantized
    size, n = data.numel(), prod(shape)
    if size == _checks.storage_count(n, data.dtype) and size != n:
        return data, True
    if size != n and quant_storage == torch.uint8 and size == (n + 1) // 2 and data.is_floating_point():
        return data.to(torch.uint8), True  # an offloader cast the bytes: 0 to 255 are exact in every float dtype
    return data, bnb_quantized and not (size == n != 1 and data.is_floating_point())


def as_packed(name: str, data: torch.Tensor, state: QuantState) -> torch.Tensor:
    """Return the packed codes of a state, or raise if `data` cannot be that."""
    if not isinstance(data, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(data).__name__}")
    assert state.shape is not None
    n = prod(state.shape)
    if data.is_complex() or data.dtype == torch.bool or (data.is_floating_point() and data.itemsize == 1):
        raise ValueError(f"{name}: expected packed bytes as integers or floats of 16 bits or more, got {data.dtype}")
    count = _checks.storage_count(n, data.dtype)
    if data.numel() != count:
        _checks.check_count(name, data, count, f"the codes of shape {tuple(state.shape)}, two a byte, in {data.dtype}")
    return data.detach().reshape(-1, 1)


def to_storage(packed: torch.Tensor, state: QuantState, quant_storage: torch.dtype) -> torch.Tensor:
    """Return the same bytes under another storage dtype."""
    if packed.dtype == quant_storage:
        return packed
    assert state.shape is not None
    assert state.quant_type is not None
    n = prod(state.shape)
    target = _launch.codes_target(n, state.quant_type, quant_storage, packed.device, None)
    size = (n + 1) // 2
    target.view(-1).view(torch.uint8)[:size] = packed.contiguous().view(-1).view(torch.uint8)[:size]
    return target


_launch.PLAIN_TYPES.add(Params4bit)
torch.serialization.add_safe_globals([Params4bit, QuantState, blank])
