"""Embedding tables held in 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fewbits import _checks, _launch, _panel, _weight_ops
from fewbits._states import check_state, weight_parts, weight_tensors
from fewbits.compat import _differences
from fewbits.nn.module import Module4bit
from fewbits.nn.params import Params4bit

__all__ = ["Embedding4bit", "EmbeddingFP4", "EmbeddingNF4"]


class Embedding4bit(Module4bit, nn.Embedding):
    """An embedding whose table is held in 4 bits: the rows asked for are gathered and dequantized, and no others.

    Made like ``nn.Embedding``, it quantizes its table on the first move to a device, the CPU included. It is saved and
    loaded as `Linear4bit` is. The table has no gradient, so ``padding_idx`` changes nothing.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        The sizes `N` and `K`. Blocks are cut from the flattened table: any `K` will do.
    dtype : torch.dtype, optional
        Of the table before it is quantized, and of what ``forward`` returns, to which values are rounded once. By
        default torch's default dtype.
    quant_type : str
        ``"fp4"`` or ``"nf4"``.
    quant_storage : torch.dtype
        Dtype under which the packed bytes are held.
    device : torch.device, optional
        Where the table is made. It is not quantized there before a ``.to``.

    Examples
    --------
    >>> table = Embedding4bit(1000, 64, quant_type="nf4").to("cpu")
    >>> table(torch.tensor([[1, 2, 999]])).shape, table.weight.shape
    (torch.Size([1, 3, 64]), torch.Size([32000, 1]))
    """

    weight: Params4bit  # not nn.Embedding's Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self._hold(False, quant_type, quant_storage)
        _differences.warn_of_shared_blocks(embedding_dim, self.weight.blocksize)

    def _weight_shape(self) -> torch.Size:
        return torch.Size((self.num_embeddings, self.embedding_dim))

    def _sizes(self) -> tuple[str, str]:
        return ("num_embeddings", "embedding_dim")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        _differences.refuse_saving(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  (nn.Embedding's name)
        """Return the rows that indices name.

        Parameters
        ----------
        input : torch.Tensor
            int32 or int64, any shape, on the device of the table.

        Returns
        -------
        torch.Tensor
            Shape ``(*input.shape, K)``, dtype ``self.dtype``.

        Raises
        ------
        IndexError
            On the CPU, if an index names no row. On CUDA nobody waits to see that: such an index gives a row of NaN.
        RuntimeError
            If the table is not quantized yet.
        ValueError
            If ``max_norm`` was set: rows in 4 bits cannot be rescaled in place.
        """
        if self.max_norm is not None:
            raise ValueError(f"max_norm: expected None with a table in 4 bits, got {self.max_norm}")
        _checks.check_tensor("input", input)
        tracing = torch.compiler.is_compiling()
        state = check_state(self._find_state(tracing))
        parts = weight_parts(self.weight if tracing else self.weight.data, state)
        # A dtype that no kernel writes is rounded from float32.
        dtype = self.dtype if self.dtype in _checks.DTYPES else torch.float32
        if _launch.is_direct(input, *weight_tensors(parts)):
            rows = _panel.dequantize_4bit_rows(input, *parts, dtype)
        else:
            rows = _weight_ops.dequantize_4bit_rows(input, *parts, dtype)
        return rows.to(self.dtype)


class EmbeddingNF4(Embedding4bit):
    """`Embedding4bit` with ``quant_type="nf4"``: 16 quantiles of a normal distribution."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


class EmbeddingFP4(Embedding4bit):
    """`Embedding4bit` with ``quant_type="fp4"``: sign, two bits of exponent, one of mantissa."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)
