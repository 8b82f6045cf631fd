"""The portable backend beside the native one, in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from fewbits import _backend, _direct, _int8, _int8_prepared, _launch, _matmul, _native, _panel, _prepared, codebook
from fewbits.optim import _launches
from fewbits.portable import blockwise, fourbit, int8
from fewbits.portable import optim as portable_optim

SMALL_PIECE = 8192

# What needs no device: tables and constants.
_PLAIN = {"codebook", "cpu_info", "driver_info", "images", "Error"}
_WORKING = [name for name in _native.__all__ if name not in _PLAIN and callable(getattr(_native, name))]


def _refuse(*args: object, **kwargs: object) -> Any:
    raise AssertionError("native code was called")


def refuse_native() -> None:
    """Let every native call fail from now on."""
    for name in _WORKING:
        setattr(_native, name, _refuse)


@contextlib.contextmanager
def portable(piece: int = blockwise.PIECE) -> Iterator[None]:
    """Serve every device by plain torch operations, as FEWBITS_BACKEND=portable does; native calls fail."""
    none: frozenset[str] = frozenset()
    with contextlib.ExitStack() as stack:

        def patch(module: Any, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(module, name, value))

        for module in (_backend, _launch, _direct, codebook):
            patch(module, "NATIVE_TYPES", none)
        for module in (_launch, _panel, _int8, _matmul, _launches):
            patch(module, "target_queue", _launch._target_queue_if_native)
        for module in (_direct, _prepared, _int8_prepared):
            patch(module, "target_of", _direct._target_of_if_native)
        for module in (blockwise, fourbit, int8, portable_optim):
            patch(module, "PIECE", piece)
        for name in _WORKING:
            patch(_native, name, _refuse)
        yield


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
