"""4-bit weights for the tests of products with them, and activations of every shape and layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

import fewbits
import fewbits.functional as F
from fewbits import _panel
from fewbits._states import dequantize_as

STORAGES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]
REAL_SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (28672, 8192), (8192, 28672), (4097, 4104)]


def randn(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


class Weight:
    """A quantized weight of N × K, with what it stands for in float64."""

    def __init__(
        self,
        n: int,
        k: int,
        device: torch.device,
        *,
        blocksize: int = 64,
        quant_type: str = "nf4",
        nested: bool = False,
        storage: torch.dtype = torch.uint8,
        seed: int = 0,
    ) -> None:
        values = randn(n, k, seed=seed, device=device) / k**0.5
        self.codes, self.state = F.quantize_4bit(
            values, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested, quant_storage=storage
        )

    @property
    def exact(self) -> torch.Tensor:
        return self.dense(torch.float32).double()

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_as(self.codes, self.state, dtype)

    def times(self, x: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        return fewbits.matmul_4bit(x, self.codes, self.state, out, bias)

    def bound(self) -> _panel.Bound:
        state, state2 = self.state, self.state.state2
        nested: tuple[Any, ...] = (None, None, 0, None)
        if state2 is not None:
            nested = (state2.code, state2.absmax, state2.blocksize, state.offset)
        assert state.shape is not None
        assert state.blocksize is not None
        assert state.quant_type is not None
        return _panel.bind(self.codes, state.absmax, *nested, state.blocksize, state.quant_type, state.shape)


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, ...]:
    """Leading sizes of the activations: none, one of up to 70, or several, some of them 0."""
    return draw(
        st.one_of(
            st.just(()),
            st.tuples(st.integers(0, 70)),
            st.lists(st.integers(0, 5), min_size=2, max_size=3).map(tuple),
        )
    )


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another place: off by an element, with gaps, or with another order of dimensions."""
    if layout == "offset":
        memory = x.new_zeros(x.numel() + 1)
        return memory[1:].copy_(x.reshape(-1)).view(x.shape)
    if layout == "stepped":
        memory = x.new_zeros(*x.shape[:-1], x.shape[-1], 3)
        memory[..., 1] = x
        return memory[..., 1]
    if layout == "transposed":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    return x


@contextmanager
def panels_of(size: int | None) -> Iterator[None]:
    """Let panels of a weight have so many bytes; None: as many as ever."""
    with pytest.MonkeyPatch.context() as patch:
        if size is not None:
            patch.setattr(_panel, "PANEL_BYTES", {"cpu": size, "cuda": size})
        yield
