"""What it takes to read quantized codes back: block maxima, code table, shape and dtype, and their files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

import torch

from fewbits import codebook
from fewbits._checks import BLOCKSIZES, DTYPES, LARGE_BLOCKSIZES, block_count
from fewbits._safetensors import MAX_BLOB_BYTES
from fewbits.utils import pack_dict_to_tensor, unpack_tensor_to_dict

_LARGEST = torch.finfo(torch.float32).max
_TENSOR_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


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
        items = _unpack(qs_dict, cls)
        quant_type = items.get("quant_type")
        if quant_type is not None and quant_type not in cls.valid_quant_types:
            raise ValueError(f"quant_type: expected one of {cls.valid_quant_types}, got {_short(quant_type)}")
        shape = _parse_shape(items.get("shape"), required=quant_type is not None)
        blocksize = _parse_blocksize("blocksize", items, large=quant_type is None)
        nested_keys = ("nested_absmax", "nested_blocksize", "nested_quant_map", "nested_dtype", "nested_offset")
        present = [key for key in nested_keys if key in items]
        nested = bool(present)
        for key in nested_keys:
            if nested and key not in items:
                raise ValueError(f"{key}: expected it beside {present[0]}, got no such key")
        blocks = None if shape is None else block_count(prod(shape), blocksize)
        absmax = _parse_absmax("absmax", items, blocks, uint8=nested)
        code = _parse_code("quant_map", items, 256 if quant_type is None else 16, quant_type or "dynamic", device)
        offset = state2 = None
        if nested:
            nested_blocksize = _parse_blocksize("nested_blocksize", items)
            nested_blocks = block_count(absmax.numel(), nested_blocksize)
            state2 = cls(
                absmax=_parse_absmax("nested_absmax", items, nested_blocks, uint8=False).to(device),
                blocksize=nested_blocksize,
                code=_parse_code("nested_quant_map", items, 256, "dynamic", device),
                dtype=_parse_dtype("nested_dtype", items),
            )
            number = items["nested_offset"]
            # What float32 cannot hold would make every value infinite or NaN.
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) <= _LARGEST:
                raise ValueError(f"nested_offset: expected a finite float32 number, got {_short(number)}")
            offset = torch.tensor(float(number), dtype=torch.float32, device=device)
        return cls(
            absmax=absmax.to(device),
            shape=shape,
            code=code,
            blocksize=blocksize,
            quant_type=quant_type,
            dtype=_parse_dtype("dtype", items),
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


# ---- reading a dictionary: every function names the key it dislikes ------------------------------------------------


def _unpack(qs_dict: Mapping[str, Any], cls: type[QuantState]) -> dict[str, Any]:
    """Return the items by bare key, with a packed tensor's JSON among them."""
    items: dict[str, Any] = {}
    packed: list[tuple[str, Any]] = []
    for key, value in qs_dict.items():
        name = key.rpartition(".")[2]
        if name in cls.valid_qs_type_keys or (name == "quant_state" and isinstance(value, torch.Tensor)):
            packed.append((name, value))
        elif name.startswith("bitsandbytes__"):
            raise ValueError(f"{key}: expected a suffix among {cls.valid_qs_type_keys}, got {name!r}")
        elif name not in cls.valid_qs_keys or name == "quant_state":
            raise ValueError(f"{key}: expected a key among {cls.valid_qs_keys}, got {name!r}")
        elif name in items:
            raise ValueError(f"{key}: expected one {name!r}, got two")
        else:
            items[name] = value
    if "quant_type" not in items:
        if len(packed) != 1 or packed[0][0] not in cls.valid_qs_type_keys:
            raise ValueError(
                f"quant_state: expected a key 'quant_type', or one packed tensor among {cls.valid_qs_type_keys}, "
                f"got the keys {sorted(qs_dict)}"
            )
        name, tensor = packed[0]
        if isinstance(tensor, torch.Tensor) and tensor.numel() > MAX_BLOB_BYTES:
            raise ValueError(f"quant_state.{name}: expected at most {MAX_BLOB_BYTES} bytes, got {tensor.numel()}")
        try:
            unpacked = unpack_tensor_to_dict(tensor)
        except (TypeError, ValueError) as error:
            raise ValueError(f"quant_state.{name}: {error}") from error
        if (quant_type := unpacked.get("quant_type")) != name.removeprefix("bitsandbytes__"):
            raise ValueError(f"quant_state.{name}: expected a quant_type to match, got {_short(quant_type)}")
        items = {**{key: value for key, value in unpacked.items() if key not in _TENSOR_KEYS}, **items}
    elif packed:
        raise ValueError(f"quant_state.{packed[0][0]}: expected no packed tensor beside the key 'quant_type'")
    for key in ("absmax", "quant_map", "blocksize", "dtype"):
        if key not in items:
            raise ValueError(f"{key}: expected it in the quantization state, got the keys {sorted(qs_dict)}")
    return items


def _short(value: Any) -> str:
    """Return a value for an error message: files may hold numbers of thousands of digits, or too many to print."""
    try:
        text = repr(value)
    except ValueError:
        return f"a {type(value).__name__} too long to print"
    return text if len(text) <= 80 else f"{text[:80]}..."


def _parse_shape(shape: Any, required: bool) -> torch.Size | None:
    if shape is None and not required:
        return None
    if not isinstance(shape, (list, tuple)) or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise ValueError(f"shape: expected a list of sizes, got {_short(shape)}")
    return torch.Size(shape)


def _parse_blocksize(key: str, items: dict[str, Any], large: bool = False) -> int:
    blocksize, sizes = items[key], BLOCKSIZES + LARGE_BLOCKSIZES if large else BLOCKSIZES
    if type(blocksize) is not int or blocksize not in sizes:
        raise ValueError(f"{key}: expected a power of two from 32 to {sizes[-1]}, got {_short(blocksize)}")
    return blocksize


def _parse_dtype(key: str, items: dict[str, Any]) -> torch.dtype:
    value = items[key]
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise ValueError(f"{key}: expected float32, float16 or bfloat16, got {_short(value)}")
    return dtype


def _parse_absmax(key: str, items: dict[str, Any], blocks: int | None, uint8: bool) -> torch.Tensor:
    absmax = items[key]
    if not isinstance(absmax, torch.Tensor):
        raise ValueError(f"{key}: expected a tensor, got {type(absmax).__name__}")
    if uint8 != (absmax.dtype == torch.uint8) or not (uint8 or absmax.is_floating_point()):
        expected = "torch.uint8 beside nested_absmax" if uint8 else "a floating-point dtype"
        raise ValueError(f"{key}: expected {expected}, got {absmax.dtype}")
    if blocks is not None and absmax.numel() != blocks:
        raise ValueError(f"{key}: expected {blocks} elements, one a block, got {absmax.numel()}")
    # Some writers leave other float dtypes and shapes; the values and their order are what counts.
    return absmax.detach().reshape(-1).to(torch.uint8 if uint8 else torch.float32)


def _parse_code(key: str, items: dict[str, Any], size: int, name: str, device: torch.device) -> torch.Tensor:
    code = items[key]
    if not isinstance(code, torch.Tensor):
        raise ValueError(f"{key}: expected a tensor, got {type(code).__name__}")
    if not code.is_floating_point() or code.numel() != size:
        raise ValueError(f"{key}: expected {size} floating-point values, got {code.numel()} of {code.dtype}")
    code = code.detach().reshape(-1).to(torch.float32)
    if size == 16:
        # The kernels decode by quant_type: a table that says otherwise (past the rounding of a 16-bit copy) is corrupt.
        # One on a GPU is not read here, because the host would have to wait for it.
        own = codebook.shared_table(name, torch.device("cpu"))
        if code.device.type == "cpu" and not torch.allclose(code, own, rtol=0, atol=4e-3):
            raise ValueError(f"{key}: expected the table of {name}, got other values")
    return codebook.share_if_equal(name, code, device)
