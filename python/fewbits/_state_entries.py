"""The entries of a dictionary that describes a `QuantState`: every function names the key that it dislikes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fewbits import codebook
from fewbits._checks import BLOCKSIZES, DTYPES, LARGE_BLOCKSIZES
from fewbits._safetensors import MAX_BLOB_BYTES
from fewbits.utils import unpack_tensor_to_dict

_TENSOR_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def unpack(qs_dict: Mapping[str, Any], keys: Sequence[str], type_keys: Sequence[str]) -> dict[str, Any]:
    """Return the items by bare key, with a packed tensor's JSON among them.

    They are those of `keys`; a packed tensor has one of `type_keys`.
    """
    items: dict[str, Any] = {}
    packed: list[tuple[str, Any]] = []
    for key, value in qs_dict.items():
        name = key.rpartition(".")[2]
        if name in type_keys or (name == "quant_state" and isinstance(value, torch.Tensor)):
            packed.append((name, value))
        elif name.startswith("bitsandbytes__"):
            raise ValueError(f"{key}: expected a suffix among {type_keys}, got {name!r}")
        elif name not in keys or name == "quant_state":
            raise ValueError(f"{key}: expected a key among {keys}, got {name!r}")
        elif name in items:
            raise ValueError(f"{key}: expected one {name!r}, got two")
        else:
            items[name] = value
    if "quant_type" not in items:
        if len(packed) != 1 or packed[0][0] not in type_keys:
            raise ValueError(
                f"quant_state: expected a key 'quant_type', or one packed tensor among {type_keys}, "
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
            raise ValueError(f"quant_state.{name}: expected a quant_type to match, got {short(quant_type)}")
        items = {**{key: value for key, value in unpacked.items() if key not in _TENSOR_KEYS}, **items}
    elif packed:
        raise ValueError(f"quant_state.{packed[0][0]}: expected no packed tensor beside the key 'quant_type'")
    for key in ("absmax", "quant_map", "blocksize", "dtype"):
        if key not in items:
            raise ValueError(f"{key}: expected it in the quantization state, got the keys {sorted(qs_dict)}")
    return items


def short(value: Any) -> str:
    """Return a value for an error message: files may hold numbers of thousands of digits, or too many to print."""
    try:
        text = repr(value)
    except ValueError:
        return f"a {type(value).__name__} too long to print"
    return text if len(text) <= 80 else f"{text[:80]}..."


def parse_shape(shape: Any, required: bool) -> torch.Size | None:
    if shape is None and not required:
        return None
    if not isinstance(shape, (list, tuple)) or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise ValueError(f"shape: expected a list of sizes, got {short(shape)}")
    return torch.Size(shape)


def parse_blocksize(key: str, items: dict[str, Any], large: bool = False) -> int:
    blocksize, sizes = items[key], BLOCKSIZES + LARGE_BLOCKSIZES if large else BLOCKSIZES
    if type(blocksize) is not int or blocksize not in sizes:
        raise ValueError(f"{key}: expected a power of two from 32 to {sizes[-1]}, got {short(blocksize)}")
    return blocksize


def parse_dtype(key: str, items: dict[str, Any]) -> torch.dtype:
    value = items[key]
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise ValueError(f"{key}: expected float32, float16 or bfloat16, got {short(value)}")
    return dtype


def parse_absmax(key: str, items: dict[str, Any], blocks: int | None, uint8: bool) -> torch.Tensor:
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


def parse_code(key: str, items: dict[str, Any], size: int, name: str, device: torch.device) -> torch.Tensor:
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
