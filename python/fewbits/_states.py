"""From a quantization state to the call that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from fewbits import _direct, _launch, _ops
from fewbits.quant_state import QuantState

# A weight in parts, as ops and autograd take it: B, absmax, nested code, nested absmax, nested block size, offset,
# block size, quant type, shape.
WeightParts = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor | None,
    int,
    torch.Tensor | None,
    int,
    str,
    Sequence[int],
]


def backend(*tensors: torch.Tensor | None) -> ModuleType:
    """Return who runs a call: native code at once, or torch's dispatcher where somebody traces or wraps tensors."""
    return _launch if _launch.is_direct(*tensors) else _ops


def check_state(quant_state: object) -> QuantState:
    """Return a 4-bit state after a look at the attributes that the kernels need."""
    if not isinstance(quant_state, QuantState):
        raise TypeError(f"quant_state: expected a QuantState, got {type(quant_state).__name__}")
    for name in ("shape", "dtype", "blocksize", "quant_type"):
        if getattr(quant_state, name) is None:
            raise ValueError(f"quant_state.{name}: expected the value of a 4-bit state, got None")
    shape: object = quant_state.shape
    if type(shape) is not torch.Size and not (isinstance(shape, (tuple, list)) and all(map(_is_size, shape))):
        raise ValueError(f"quant_state.shape: expected sizes as integers, got {shape!r}")
    return quant_state


def _is_size(size: object) -> bool:
    return isinstance(size, (int, torch.SymInt)) and bool(size >= 0)


def ordinary(codes: torch.Tensor, state: QuantState) -> tuple[torch.Tensor, QuantState]:
    """Return codes and state in the layout that kernels read."""
    if not state.packing_format_for_cpu:
        return codes, state
    from fewbits import _cpu_layout  # which needs the functions that come from here

    return _cpu_layout.ordinary(codes, state)


def dequantize_as(
    A: torch.Tensor, state: QuantState, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return 4-bit codes dequantized straight to a dtype: one rounding, whatever dtype the state was made from."""
    if type(state) is QuantState:
        done = _direct.dequantize_4bit(A, state, dtype, out)
        if done is not None:
            return done
    A, state = ordinary(A, state)
    shape, blocksize, quant_type = state.shape, state.blocksize, state.quant_type
    if not state.nested:
        run: Any = backend(A, state.absmax, out)
        values: torch.Tensor = run.dequantize_4bit(A, state.absmax, blocksize, quant_type, shape, dtype, out)
        return values
    offset, state2 = nested_parts(state, A.device)
    nested = (state2.code, state2.absmax, state2.blocksize, offset)
    run = backend(A, state.absmax, state2.absmax, out)
    result: torch.Tensor = run.dequantize_4bit_nested(
        A, state.absmax, *nested, blocksize, quant_type, shape, dtype, out
    )
    return result


def nested_parts(state: QuantState, device: torch.device) -> tuple[torch.Tensor, QuantState]:
    """Return the offset and the state of the maxima of a nested state. Some writers leave the offset as a number."""
    if state.state2 is None or state.offset is None:
        missing = "state2" if state.state2 is None else "offset"
        raise ValueError(f"quant_state.{missing}: expected a value in a nested state, got None")
    offset = state.offset
    if not isinstance(offset, torch.Tensor):
        offset = torch.tensor(offset, dtype=torch.float32, device=device)
    return offset, state.state2


def weight_parts(B: torch.Tensor, state: QuantState) -> WeightParts:
    """Return codes and a checked state as ops and autograd take them."""
    B, state = ordinary(B, state)
    blocksize, quant_type, shape = state.blocksize, state.quant_type, state.shape
    assert blocksize is not None
    assert quant_type is not None
    assert shape is not None
    if not state.nested:
        return B, state.absmax, None, None, 0, None, blocksize, quant_type, shape
    offset, state2 = nested_parts(state, B.device)
    assert state2.blocksize is not None
    return B, state.absmax, state2.code, state2.absmax, state2.blocksize, offset, blocksize, quant_type, shape


def weight_tensors(weight: WeightParts) -> tuple[torch.Tensor | None, ...]:
    """Return the tensors among the parts of a weight."""
    B, absmax, nested_code, nested_absmax, _, offset, *_ = weight
    return B, absmax, nested_code, nested_absmax, offset
