"""What parameters that hold quantized values have in common: casts that spare the codes, assignment and pickling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fewbits.nn.shard import Shard

if TYPE_CHECKING:
    from typing_extensions import Self


class QuantizedParameter(torch.nn.Parameter):
    """A parameter whose instance attributes are keywords of its constructor, and say how to read its data."""

    prepared: Any = None  # what a product needs of this memory and these scales; see `fewbits._prepared`
    # Not among the attributes, which are keywords: whether the data were quantized by this class, so that a file, if
    # there is one, has values; and whether this is on meta in the place of such codes, which were moved there.
    # And which of how many pieces this is, where `torch.chunk` made it.
    __slots__ = ("_cut", "_from_values", "_shell")

    def _is_quantized(self) -> bool:
        raise NotImplementedError

    def _like(self, data: torch.Tensor, **changes: Any) -> Self:
        """Return a parameter of other data, with the attributes of this one but for changes."""
        requires_grad = self.requires_grad and data.is_floating_point()
        return type(self)(data, requires_grad, **{**self.__dict__, **changes})

    @property
    def data(self) -> torch.Tensor:
        """The values or codes, as a plain tensor. See the notes of the class about assigning to it."""
        return super().data

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        self.__dict__.pop("prepared", None)
        if isinstance(value, QuantizedParameter):
            if self.requires_grad and not value.is_floating_point():
                self.requires_grad_(False)
            torch.Tensor.data.__set__(self, value.data)  # type: ignore[attr-defined]
            self.__dict__.update(attributes(value))
        else:
            torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self._from_values = self._shell = False
        if isinstance(value, QuantizedParameter):
            self._after(value)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of the data; that of values where codes that this class made of values were moved to meta.

        Offloaders leave such a shell behind, and cast what they bring back to its dtype. From a file they bring values:
        cast to an integer dtype, these would be lost.
        """
        held = self._held_dtype()
        return self._value_dtype() if self._is_shell() and not held.is_floating_point else held

    def _is_shell(self) -> bool:
        return self.is_meta and getattr(self, "_shell", False)

    def _held_dtype(self) -> torch.dtype:
        """Return the dtype of the data, on meta too."""
        held: torch.dtype = torch.Tensor.dtype.__get__(self)  # type: ignore[attr-defined]
        return held

    def _value_dtype(self) -> torch.dtype:
        """Return the dtype of the values that codes stand for."""
        raise NotImplementedError

    def _after(self, source: QuantizedParameter) -> Self:
        """Take over where a moved parameter's codes come from."""
        if getattr(source, "_from_values", False):
            self._from_values, self._shell = True, self.is_meta
        return self

    # ---- moving and casting ----------------------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast as ``Tensor.to``. Quantizes first if this is a first move; never casts codes."""
        raise NotImplementedError

    def cuda(self, device: torch.device | str | int | None = None, non_blocking: bool = False) -> Self:  # type: ignore[override]
        """Call ``.to`` with a CUDA device, the current one by default."""
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def cpu(self) -> Self:  # type: ignore[override]
        """Call ``.to("cpu")``. That quantizes, like a move to any other device."""
        return self.to("cpu")

    def xpu(self, device: torch.device | str | int | None = None, non_blocking: bool = False) -> Self:  # type: ignore[override]
        """Call ``.to`` with an XPU device, the current one by default."""
        return self.to("xpu" if device is None else device, non_blocking=non_blocking)

    def half(self) -> Self:
        """Call ``.to(torch.float16)``."""
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        """Call ``.to(torch.bfloat16)``."""
        return self.to(torch.bfloat16)

    def float(self) -> Self:
        """Call ``.to(torch.float32)``."""
        return self.to(torch.float32)

    def double(self) -> Self:
        """Call ``.to(torch.float64)``."""
        return self.to(torch.float64)

    def type(self, dtype: Any = None, non_blocking: bool = False) -> Any:
        """Cast as ``Tensor.type``, but never codes."""
        if dtype is None:
            return super().type()
        return self if self._is_quantized() else self._like(self.data.type(dtype, non_blocking))

    # ---- copying ---------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**attributes(self), "data": self.data, "requires_grad": self.requires_grad}

    def __setstate__(self, state: dict[str, Any]) -> None:
        others = dict(state)
        torch.Tensor.data.__set__(self, others.pop("data"))  # type: ignore[attr-defined]
        self.requires_grad = others.pop("requires_grad")
        self.__dict__.update(others)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Parameter's own way back gives a plain Parameter.
        return blank, (type(self),), self.__getstate__()

    def __copy__(self) -> Self:
        return type(self)(self.data, self.requires_grad, **self.__dict__)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _REPOINTING and isinstance(args[0], cls):
            args[0].__dict__.pop("prepared", None)
        kwargs = {} if kwargs is None else kwargs
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if func is torch.Tensor.new_zeros and isinstance(args[0], cls):
            return args[0]._blank_shard(result)
        return result

    def _blank_shard(self, zeros: torch.Tensor) -> torch.Tensor:
        """Return zeros that FSDP2 will copy a piece of this parameter into, as what keeps the piece's scales too."""
        if zeros.shape[1:] != self.shape[1:] or zeros.dtype != self._held_dtype() or zeros.dim() != self.dim():
            return zeros
        from fewbits.nn.gathered import recipe_of  # which reads this module

        recipe = recipe_of(self)
        return zeros if recipe is None else Shard(zeros, recipe)

    @staticmethod
    def _number_pieces(pieces: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the pieces that ``torch.chunk`` made know which they are."""
        count = args[1] if len(args) > 1 else kwargs["chunks"]
        for i, piece in enumerate(pieces):
            piece._cut = (i, count)


def no_scales(what: str) -> ValueError:
    """Return the error for codes that come back from an offload without what it takes to read them."""
    return ValueError(
        f"{what}: expected values, got quantized codes without their scales, as the offload of a pre-quantized model "
        "to disk leaves them behind; keep its layers off the disk (device_map, max_memory), or offload a model that is "
        "quantized as it is loaded"
    )


# What gives a tensor other memory without a new storage address.
_REPOINTING = {torch.Tensor.data.__set__, torch.Tensor.set_, torch.Tensor.resize_}  # type: ignore[attr-defined]


def attributes(parameter: QuantizedParameter) -> dict[str, Any]:
    """Return what a copy of a parameter takes over."""
    return {key: value for key, value in parameter.__dict__.items() if key not in ("module", "prepared")}


def blank(cls: type[QuantizedParameter]) -> QuantizedParameter:
    """Return an empty parameter, which a pickled state then fills."""
    return cls(torch.empty(0), requires_grad=False)
