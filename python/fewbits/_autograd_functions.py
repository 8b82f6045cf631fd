"""The autograd functions of bitsandbytes by name: `apply` is `matmul` or `matmul_4bit`, whose gradients these are."""

from __future__ import annotations

from typing import Any

import torch

from fewbits._int8_matmul import MatmulLtState, matmul
from fewbits.autograd import matmul_4bit
from fewbits.quant_state import QuantState

__all__ = ["GlobalOutlierPooler", "MatMul4Bit", "MatMul8bitFp", "MatMul8bitLt"]


class MatMul4Bit:
    """`matmul_4bit` in the shape of an autograd function."""

    @staticmethod
    def apply(
        A: torch.Tensor,
        B: torch.Tensor,
        out: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        quant_state: QuantState | None = None,
    ) -> torch.Tensor:
        """Return `matmul_4bit`'s result."""
        return matmul_4bit(A, B, quant_state, out, bias)  # type: ignore[arg-type]


class MatMul8bitLt:
    """`matmul` in the shape of an autograd function."""

    @staticmethod
    def apply(
        A: torch.Tensor,
        B: torch.Tensor,
        out: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        state: MatmulLtState | None = None,
    ) -> torch.Tensor:
        """Return `matmul`'s result."""
        return matmul(A, B, out, state, bias=bias)


class MatMul8bitFp(MatMul8bitLt):
    """`MatMul8bitLt`: here the weight is never dequantized as a whole, on no device."""


class GlobalOutlierPooler:
    """Collects outlier columns over the layers of one width. A singleton: see `get_instance`. Nothing here uses it."""

    _instance: GlobalOutlierPooler | None = None

    def __init__(self) -> None:
        raise RuntimeError("GlobalOutlierPooler: expected a call of GlobalOutlierPooler.get_instance()")

    def initialize(self) -> None:
        """Forget everything."""
        self.outliers: set[int] = set()
        self.model_dim: int | None = None

    @classmethod
    def get_instance(cls) -> GlobalOutlierPooler:
        """Return the one instance."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def add_outliers(self, outlier_idx: Any, feature_dim: int) -> None:
        """Add columns of a layer, if it has the width of the first one."""
        if self.model_dim is None:
            self.model_dim = feature_dim
        if feature_dim == self.model_dim:
            self.outliers.update(outlier_idx.tolist())

    def get_current_outlier_idx(self) -> torch.Tensor:
        """Return the columns collected, int64 on the CPU."""
        return torch.tensor(sorted(self.outliers), dtype=torch.int64)
