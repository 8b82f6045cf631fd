"""What it takes to read quantized codes back: block maxima, code table, shape and dtype, and their files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

import torch

from fewbits import codebook
from fewbits._checks import block_count
from fewbits._state_entries import parse_absmax, parse_blocksize, parse_code, parse_dtype, parse_shape, short, unpack
from fewbits.utils import pack_dict_to_tensor

_LARGEST = torch.finfo(torch.float32).max


class QuantState:
    """The state of a quantized tensor.

    Parameters
    ----------
    absmax : torch.Tensor
        float32 maxima, one a block; with double quantization their uint8 codes.
    shape : torch.Size, optional
        Shape of the tensor before quantization. 8-bit codes have it themselves.
    code : torch.Tensor, optional
        float32 values by code, 16 or 256 of them. Tables may be shared between states: do not write to them.
    blocksize : int, optional
        Consecutive elements of the flattened tensor that share a maximum.
    quant_type : str, optional
        ``"nf4"`` or ``"fp4"``; None for 8-bit codes.
    dtype : torch.dtype, optional
        Of the tensor before quantization, and of what dequantizing returns.
    offset : torch.Tensor, optional
        float32 scalar, with double quantization, where a block's maximum is
        ``state2.code[absmax[b]] * state2.absmax[b // 256] + offset``.
    state2 : QuantState, optional
        The state of the quantized maxima.

    Notes
    -----
    Attributes are plain and writable. Indexing gives the list that older programs expect:
    ``[absmax, shape, dtype, blocksize, [offset, state2] or None, quant_type]``.

    Examples
    --------
    >>> from fewbits.functional import quantize_4bit
    >>> codes, state = quantize_4bit(torch.ones(3, 64), quant_type="nf4")
    >>> state.shape, state.dtype, state.absmax.tolist()
    (torch.Size([3, 64]), torch.float32, [1.0, 1.0, 1.0])
    """

    valid_quant_types: ClassVar[tuple[str, ...]] = ("fp4", "nf4")
    valid_qs_type_keys: ClassVar[list[str]] = [f"bitsandbytes__{name}" for name in valid_quant_types]
    valid_qs_keys: ClassVar[list[str]] = [
        *("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state", "quant_type"),
        *("blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"),
    ]

    # `_direct.Reading` of the attributes. Not one of them: no copy and no file has it.
    __slots__ = ("__dict__", "__weakref__", "_reading")

    packing_format_for_cpu = False  # whether the codes are in the layout of `_cpu_layout`

    def __init__(
        self,
        absmax: torch.Tensor,
        shape: torch.Size | None = None,
        code: torch.Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: torch.Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.dtype = dtype
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.offset = offset
        self.state2 = state2
        self.nested = state2 is not None
        self._reading: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __getattr__(self, name: str) -> torch.Tensor | None:
        # FSDP resolves "weight.quant_state.bitsandbytes__nf4" by walking attributes. Only missing attributes come here.
        if name.startswith("bitsandbytes__") and name == f"bitsandbytes__{self.__dict__.get('quant_type')}":
            packed: torch.Tensor = self.as_dict(packed=True)[f"quant_state.{name}"]
            return packed
        if name == "_reading":  # of a copy
            return None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, index: Any) -> Any:
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return NotImplemented
        return (
            self.shape == other.shape
            and self.dtype == other.dtype
            and self.blocksize == other.blocksize
            and self.quant_type == other.quant_type
            and _close(self.absmax, other.absmax)
            and _close(self.code, other.code)
            and _close(self.offset, other.offset)
            and self.state2 == other.state2
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shape = None if self.shape is None else tuple(self.shape)
        return (
            f"{type(self).__name__}(quant_type={self.quant_type!r}, shape={shape}, dtype={self.dtype}, "
            f"blocksize={self.blocksize}, nested={self.nested}, device={str(self.absmax.device)!r})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantState:
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        for name, value in self.__dict__.items():
            shared = isinstance(value, torch.Tensor) and codebook.is_shared(value)
            duplicate.__dict__[name] = value if shared else copy.deepcopy(value, memo)
        return duplicate

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """Return the state as a dictionary, with the keys of bitsandbytes' files.

        Parameters
        ----------
        packed : bool
            Whether everything that is not a tensor goes into one uint8 tensor of JSON text, under the key
            ``quant_state.bitsandbytes__<quant_type>``, as safetensors needs it. Needs a `quant_type`.

        Returns
        -------
        dict
            Code tables are copies: files refuse tensors that share memory.

        Examples
        --------
        >>> from fewbits.functional import quantize_4bit
        >>> list(quantize_4bit(torch.ones(64))[1].as_dict(packed=True))
        ['absmax', 'quant_map', 'quant_state.bitsandbytes__fp4']
        """
        items: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": None if self.code is None else self.code.clone(),
            "dtype": _dtype_name(self.dtype),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.nested:
            state2, offset = self.state2, self.offset
            assert state2 is not None
            items |= {
                "nested_absmax": state2.absmax,
                "nested_blocksize": state2.blocksize,
                "nested_quant_map": None if state2.code is None else state2.code.clone(),
                "nested_dtype": _dtype_name(state2.dtype),
                "nested_offset": offset.item() if isinstance(offset, torch.Tensor) else offset,
            }
        if not packed or self.quant_type is None:
            return items
        tensors = {key: value for key, value in items.items() if isinstance(value, torch.Tensor)}
        rest = {key: value for key, value in items.items() if not isinstance(value, torch.Tensor)}
        return {**tensors, f"quant_state.bitsandbytes__{self.quant_type}": pack_dict_to_tensor(rest)}

    @classmethod
    def from_dict(cls, qs_dict: Mapping[str, Any], device: torch.device | str | int) -> QuantState:
        """Return the state that `as_dict` described.

        Parameters
        ----------
        qs_dict : mapping
            Packed or not. Only what follows the last dot of a key counts (and the ``quant_state.`` before a packed
            one), so keys may carry the name of a parameter. It is left as it is.
        device : torch.device, str or int
            Where the tensors go.

        Returns
        -------
        QuantState
            Maxima of any float dtype and shape are taken as float32 of one dimension.

        Raises
        ------
        ValueError
            Naming the key that is missing, unknown or corrupt.

        Examples
        --------
        >>> from fewbits.functional import quantize_4bit
        >>> state = quantize_4bit(torch.ones(64))[1]
        >>> QuantState.from_dict(state.as_dict(packed=True), device="cpu") == state
        True
        """
        device = torch.device(device)
        items = unpack(qs_dict, cls.valid_qs_keys, cls.valid_qs_type_keys)
        quant_type = items.get("quant_type")
        if quant_type is not None and quant_type not in cls.valid_quant_types:
            raise ValueError(f"quant_type: expected one of {cls.valid_quant_types}, got {short(quant_type)}")
        shape = parse_shape(items.get("shape"), required=quant_type is not None)
        blocksize = parse_blocksize("blocksize", items, large=quant_type is None)
        nested_keys = ("nested_absmax", "nested_blocksize", "nested_quant_map", "nested_dtype", "nested_offset")
        present = [key for key in nested_keys if key in items]
        nested = bool(present)
        for key in nested_keys:
            if nested and key not in items:
                raise ValueError(f"{key}: expected it beside {present[0]}, got no such key")
        blocks = None if shape is None else block_count(prod(shape), blocksize)
        absmax = parse_absmax("absmax", items, blocks, uint8=nested)
        code = parse_code("quant_map", items, 256 if quant_type is None else 16, quant_type or "dynamic", device)
        offset = state2 = None
        if nested:
            nested_blocksize = parse_blocksize("nested_blocksize", items)
            nested_blocks = block_count(absmax.numel(), nested_blocksize)
            state2 = cls(
                absmax=parse_absmax("nested_absmax", items, nested_blocks, uint8=False).to(device),
                blocksize=nested_blocksize,
                code=parse_code("nested_quant_map", items, 256, "dynamic", device),
                dtype=parse_dtype("nested_dtype", items),
            )
            number = items["nested_offset"]
            # What float32 cannot hold would make every value infinite or NaN.
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) <= _LARGEST:
                raise ValueError(f"nested_offset: expected a finite float32 number, got {short(number)}")
            offset = torch.tensor(float(number), dtype=torch.float32, device=device)
        return cls(
            absmax=absmax.to(device),
            shape=shape,
            code=code,
            blocksize=blocksize,
            quant_type=quant_type,
            dtype=parse_dtype("dtype", items),
            offset=offset,
            state2=state2,
        )

    def to(self, device: torch.device | str | int) -> None:
        """Move the state to a device, in place. A nested state that others may hold is replaced, not moved."""
        self.__dict__.update(self.moved(torch.device(device)).__dict__)

    def moved(self, device: torch.device, non_blocking: bool = False) -> QuantState:
        """Return the state on a device: itself if it is there, else a copy."""
        tensors = (self.absmax, self.code, self.offset)
        here = all(not isinstance(t, torch.Tensor) or t.device == device for t in tensors)
        state2 = None if self.state2 is None else self.state2.moved(device, non_blocking)
        if here and state2 is self.state2:
            return self
        duplicate = copy.copy(self)
        duplicate.absmax = self.absmax.to(device, non_blocking=non_blocking)
        if self.code is not None:
            duplicate.code = _move_code(self.code, self.quant_type or "dynamic", device)
        if isinstance(self.offset, torch.Tensor):
            duplicate.offset = self.offset.to(device, non_blocking=non_blocking)
        duplicate.state2 = state2
        return duplicate


def _move_code(code: torch.Tensor, name: str, device: torch.device) -> torch.Tensor:
    if code.device.type != "meta" and code is codebook.shared_table(name, code.device):
        return codebook.shared_table(name, device)
    return code.to(device)


def _close(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return bool(abs(float(a) - float(b)) <= 1e-6)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b.to(a.device)) or torch.allclose(a.float(), b.to(a.device).float(), atol=1e-6)


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
