"""Embedding tables held in int8."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fewbits import _checks
from fewbits.compat import _differences
from fewbits.nn.int8_params import Int8Params
from fewbits.nn.module8bit import Module8bit

__all__ = ["Embedding8bit"]


class Embedding8bit(Module8bit, nn.Embedding):
    """An embedding whose table is held in int8, one scale a row: the rows asked for are dequantized, and no others.

    Made like ``nn.Embedding``, it quantizes its table on the first move to a device, the CPU included. It is saved and
    loaded as `Linear8bitLt` is. The table has no gradient, so ``padding_idx`` changes nothing.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        The sizes `N` and `K`.
    device : torch.device, optional
        Where the table is made. It is not quantized there before a ``.to``.
    dtype : torch.dtype, optional
        Of the table before it is quantized, and of what ``forward`` returns, to which values are rounded once. By
        default torch's default dtype.

    Examples
    --------
    >>> table = Embedding8bit(1000, 64).to("cpu")
    >>> table(torch.tensor([[1, 2, 999]])).shape, table.weight.dtype
    (torch.Size([1, 3, 64]), torch.int8)
    """

    weight: Int8Params  # not nn.Embedding's Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Int8Params(self.weight.data, has_fp16_weights=False, requires_grad=False)

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
            On the CPU, if an index names no row.
        RuntimeError
            If the table is not quantized yet.
        ValueError
            If ``max_norm`` was set: rows in int8 cannot be rescaled in place.
        """
        if self.max_norm is not None:
            raise ValueError(f"max_norm: expected None with a table in int8, got {self.max_norm}")
        _checks.check_tensor("input", input)
        if input.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"input: expected torch.int32 or torch.int64, got {input.dtype}")
        SCB = self._scales()
        if SCB is None or self.weight.is_floating_point():
            raise RuntimeError(
                "Embedding8bit: expected a quantized weight, got a floating-point one; "
                "move the module to a device first, as by .to('cuda') or .to('cpu')"
            )
        _checks.check_same_device("input", input, "weight", self.weight)
        indices = input.reshape(-1)
        codes = self.weight.detach().index_select(0, indices)
        scales = SCB.index_select(0, indices).mul(1 / 127)
        rows = codes.to(torch.float32).mul(scales.unsqueeze(1)).to(self.dtype)
        return rows.view(*input.shape, self.embedding_dim)

    def _scales(self) -> torch.Tensor | None:
        SCB: torch.Tensor | None = getattr(self.weight, "SCB", None)
        return SCB

    def _adopt(self, weight: Int8Params) -> None:
        """Keep nothing: the scales stay with the weight."""

    def _follow(self, weight: torch.Tensor) -> None:
        """Move nothing: see `_adopt`."""
