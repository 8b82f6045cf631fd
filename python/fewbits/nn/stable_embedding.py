"""Embeddings whose optimizer states are kept in 32 bits."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["Embedding", "StableEmbedding"]


class _WithWideStates(nn.Embedding):
    """An embedding with Xavier's initialization, which asks optimizers for 32-bit states of its table.

    Rows of rare tokens have few gradients, and those are large: 8-bit states are least accurate there
    (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, §2.3).
    """

    def _ask_for_wide_states(self) -> None:
        from fewbits.optim.manager import GlobalOptimManager  # not everyone trains

        GlobalOptimManager.get_instance().register_module_override(self, "weight", {"optim_bits": 32})

    def reset_parameters(self) -> None:
        """Draw the table from Xavier's uniform distribution, and zero the row of ``padding_idx``."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class StableEmbedding(_WithWideStates):
    """An embedding for training with 8-bit optimizers: Xavier's initialization, layer norm, 32-bit states.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        The sizes `N` and `K` of the table.
    padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        As of ``torch.nn.Embedding``.
    _weight : torch.Tensor, optional
        The table, in place of a new one.
    device : torch.device, optional
        Where the table is made.
    dtype : torch.dtype, optional
        Of the table and of what ``forward`` returns.

    Attributes
    ----------
    norm : torch.nn.LayerNorm
        In torch's default dtype, whatever that of the table.

    Examples
    --------
    >>> table = StableEmbedding(1000, 64)
    >>> table(torch.tensor([[1, 2, 999]])).shape
    torch.Size([1, 3, 64])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: torch.Tensor | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
            dtype=dtype,
        )
        self.norm = nn.LayerNorm(embedding_dim, device=device)
        self._ask_for_wide_states()

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  (nn.Embedding's name)
        """Return the normalized rows that indices name.

        Parameters
        ----------
        input : torch.Tensor
            int32 or int64, any shape.

        Returns
        -------
        torch.Tensor
            Shape ``(*input.shape, K)``, dtype of the table.
        """
        rows: torch.Tensor = self.norm(super().forward(input).to(self.norm.weight.dtype))
        return rows.to(self.weight.dtype)


class Embedding(_WithWideStates):
    """`StableEmbedding` without the layer norm.

    Parameters
    ----------
    num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight, device
        As of `StableEmbedding`.

    Examples
    --------
    >>> Embedding(1000, 64)(torch.tensor([1, 2])).shape
    torch.Size([2, 64])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: torch.Tensor | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
        )
        self._ask_for_wide_states()
