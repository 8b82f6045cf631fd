"""What parameters that hold quantized values have in common: casts that spare the codes, assignment and pickling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from typing_extensions import Self


class QuantizedParameter(torch.nn.Parameter):
    """A parameter whose instance attributes are keywords of its constructor, and say how to read its data."""

    prepared: Any = None  # what a product needs of this memory and these scales; see `fewbits._prepared`

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
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **({} if kwargs is None else kwargs))


# What gives a tensor other memory without a new storage address.
_REPOINTING = {torch.Tensor.data.__set__, torch.Tensor.set_, torch.Tensor.resize_}  # type: ignore[attr-defined]


def attributes(parameter: QuantizedParameter) -> dict[str, Any]:
    """Return what a copy of a parameter takes over."""
    return {key: value for key, value in parameter.__dict__.items() if key not in ("module", "prepared")}


def blank(cls: type[QuantizedParameter]) -> QuantizedParameter:
    """Return an empty parameter, which a pickled state then fills."""
    return cls(torch.empty(0), requires_grad=False)
