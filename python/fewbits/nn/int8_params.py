"""`Int8Params`: a parameter that turns into int8 codes, one scale a row, when it first moves to a device."""

from __future__ import annotations

import copy
from typing import Any

import torch

from fewbits import _checks, _launch
from fewbits._int8_functional import int8_vectorwise_quant
from fewbits.nn.parameter import QuantizedParameter, attributes, blank, no_scales

__all__ = ["Int8Params"]


class Scales:
    """In the place of a prepared weight that there is none of: the scales, for another layer of the same weight."""

    __slots__ = ("scales",)

    def __init__(self, scales: torch.Tensor) -> None:
        self.scales = scales

    def describes(self, CB: torch.Tensor, SCB: torch.Tensor) -> bool:
        """Return False: the short way is not taken."""
        return False


class Int8Params(QuantizedParameter):
    """A parameter held in int8, one float32 scale a row.

    It is born with floating-point data and quantizes on the first ``.to(device)``, ``.cuda()`` or ``.cpu()``, straight
    from its dtype; the original is left as it was. From then on its data are codes: moving it moves codes and scales,
    nothing quantizes again, and a change of dtype (``.half()``, ``.to(torch.bfloat16)``) leaves it alone.

    Parameters
    ----------
    data : torch.Tensor, optional
        Floating-point values, or int8 codes together with their scales.
    requires_grad : bool
        Codes have no gradient: it counts for floating-point data alone.
    has_fp16_weights : bool
        Whether this stays a floating-point parameter, whatever it moves to. `Linear8bitLt` then quantizes it for each
        product.
    CB : torch.Tensor, optional
        The codes, in the memory of `data`.
    SCB : torch.Tensor, optional
        float32, one element a row: its largest magnitude.
    **kwargs
        Not looked at, so that ``Int8Params(data, **other.__dict__)`` works whatever others left on the parameter.

    Notes
    -----
    The first product of a `Linear8bitLt` takes ``CB`` and ``SCB`` over into its ``state``; the data stay here.
    Assigning an Int8Params to ``.data`` takes over its scales along with its codes.

    Examples
    --------
    >>> weight = Int8Params(torch.tensor([[1.0, -2.0]]), requires_grad=False).to("cpu")
    >>> weight.tolist(), weight.SCB.tolist()
    ([[64, -127]], [2.0])
    """

    CB: torch.Tensor | None = None
    SCB: torch.Tensor | None = None
    has_fp16_weights: bool = False
    prepared: Any  # Prepared8, Scales or None

    def __new__(  # noqa: D102
        cls,
        data: torch.Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: torch.Tensor | None = None,
        SCB: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Int8Params:
        if data is None:
            data = torch.empty(0)
        elif not isinstance(data, torch.Tensor):
            raise TypeError(f"data: expected a tensor, got {type(data).__name__}")
        source = data
        if isinstance(data, QuantizedParameter):
            data = data.data
        if isinstance(source, Int8Params) and SCB is None:
            SCB = source.SCB
        self: Int8Params = torch.Tensor._make_subclass(cls, data, requires_grad and data.is_floating_point())
        self.has_fp16_weights = has_fp16_weights
        if CB is not None or SCB is not None:
            # Codes of another parameter, copied along with its attributes, must not keep their memory alive.
            CB = data if data.dtype == torch.int8 and not data.is_meta else None
        self.CB = CB
        self.SCB = SCB
        return self._after(source) if isinstance(source, Int8Params) else self

    def _is_quantized(self) -> bool:
        return self._held_dtype() == torch.int8

    def _value_dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def data(self) -> torch.Tensor:
        """The values or codes, as a plain tensor. See the notes of the class about assigning to it."""
        return super().data

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        QuantizedParameter.data.fset(self, value)  # type: ignore[attr-defined]
        if self.CB is not None:
            self.CB = self.data if self._is_quantized() and not self.is_meta else None

    def to(self, *args: Any, **kwargs: Any) -> Int8Params:
        """Move or cast as ``Tensor.to``. Quantizes first if this is a first move; never casts codes."""
        always_copy = kwargs.pop("copy", False)
        if args and type(args[0]) is int and not torch.cuda.is_available():
            if self._is_quantized() and self.SCB is None:
                raise no_scales("Int8Params.data")
            args = ("cpu", *args[1:])  # offloaders quantize on "device 0", the only device there is
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if not self._is_quantized():
            return self._to_values(device, dtype, non_blocking, always_copy)
        data = self.data if device is None else self.data.to(device, non_blocking=non_blocking)
        SCB = self.SCB
        if SCB is None and data.is_meta and self.prepared is not None:
            SCB = self.prepared.scales  # a module took them over: they must be here when the codes come back
        if SCB is not None and not data.is_meta:
            # A meta parameter is the shell of an offloaded one: its scales stay where they are.
            SCB = SCB.to(data.device, non_blocking=non_blocking)
        if data.device == self.device and SCB is self.SCB and not always_copy:
            return self
        if always_copy and data.device == self.device:
            data, SCB = data.clone(), None if SCB is None else SCB.clone()
        return self._like(data, SCB=SCB)._after(self)

    def _to_values(
        self, device: torch.device | None, dtype: torch.dtype | None, non_blocking: bool, always_copy: bool
    ) -> Int8Params:
        if device is not None and device.type != "meta" and not self.has_fp16_weights and not self.is_meta:
            data = self.data if dtype is None or not dtype.is_floating_point else self.data.to(dtype)
            return self._quantize(data.to(device, non_blocking=non_blocking))
        if not always_copy and dtype in (None, self.dtype) and device in (None, self.device):
            return self
        device, dtype = device or self.device, dtype or self.dtype
        return self._like(self.data.to(device, dtype, non_blocking, always_copy))

    def _quantize(self, data: torch.Tensor) -> Int8Params:
        if data.dtype == torch.float64:
            data = data.to(torch.float32)
        _checks.check_dtype("Int8Params.data", data.dtype)
        if self.data.is_cpu and _are_codes(self.data):
            raise no_scales("Int8Params.data")
        codes, SCB, _ = int8_vectorwise_quant(data)
        quantized = self._like(codes, CB=codes, SCB=SCB)
        quantized._from_values = True
        return quantized

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear:
            _check_linear(*args, **({} if kwargs is None else kwargs))
        result = super().__torch_function__(func, types, args, kwargs)
        if func is torch.chunk:
            cls._number_pieces(result, args, {} if kwargs is None else kwargs)
        return result

    def __getstate__(self) -> dict[str, Any]:
        # The codes are the data: they are written once.
        return {**super().__getstate__(), "CB": self.CB is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.CB = self.data if state["CB"] else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Params:
        if id(self) in memo:
            done: Int8Params = memo[id(self)]
            return done
        others = {**copy.deepcopy(attributes(self), memo)}
        # Codes that a state shares with this parameter are one memory in the copy too.
        duplicate = type(self)(copy.deepcopy(self.data, memo), self.requires_grad, **others)
        memo[id(self)] = duplicate
        return duplicate


def _check_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:  # noqa: A002
    """Raise if a plain linear layer is about to take codes for values.

    transformers gives them to layers that a device_map puts on the CPU or the disk, when a checkpoint is pre-quantized;
    those on the disk get them without their scales.
    """
    if isinstance(weight, Int8Params) and weight._is_quantized():
        raise ValueError(
            "weight: expected floating-point values in a torch.nn.Linear, got int8 codes, as in a pre-quantized model "
            "that a device_map offloads layer by layer; use device_map='auto' with max_memory, or offload the model "
            "that it was quantized from"
        )


def _are_codes(data: torch.Tensor) -> bool:
    """Return whether values are int8 codes that somebody cast: whole numbers, the largest of every row 127 or 0.

    The first row of a weight settles it.
    """
    if data.dim() != 2 or data.shape[1] < 16:
        return False
    for rows in (data[:1], data):
        largest = rows.abs().amax(1)
        if not bool(((largest == 127) | (largest == 0)).all() and (rows == rows.round()).all()) or not rows.any():
            return False
    return True


_launch.PLAIN_TYPES.add(Int8Params)
torch.serialization.add_safe_globals([Int8Params, blank])
