"""A base class for linear layers that keep outlier columns apart."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["OutlierAwareLinear"]


class OutlierAwareLinear(nn.Linear):
    """A linear layer that keeps the input columns with outliers apart: a base class, whose two methods decide how.

    The first input says which columns those are, unless ``outlier_dim`` was set before. Then the weight is replaced by
    what `quantize_weight` returns, once, and every product is `forward_with_outliers`.

    Parameters
    ----------
    input_features, output_features : int
        The sizes `K` and `N`.
    bias : bool
        Whether there is one.
    device : torch.device, optional
        Where the weight is made.

    Attributes
    ----------
    outlier_dim : torch.Tensor or None
        int64: the columns of the input that hold outliers.
    is_quantized : bool
        Whether the weight has been replaced.

    Examples
    --------
    >>> class Rounded(OutlierAwareLinear):
    ...     def quantize_weight(self, w, outlier_idx):
    ...         rounded = w.round()
    ...         rounded[:, outlier_idx] = w[:, outlier_idx]
    ...         return rounded
    ...
    ...     def forward_with_outliers(self, x, outlier_idx):
    ...         return torch.nn.functional.linear(x, self.weight, self.bias)
    >>> layer = Rounded(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[0.3, 0.3]]))
    >>> layer(torch.tensor([[1.0, 10.0]])).tolist(), layer.outlier_dim.tolist()
    ([[3.0]], [1])
    """

    outlier_threshold = 6.0

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.outlier_dim: torch.Tensor | None = None
        self.is_quantized = False

    def find_outliers(self, x: torch.Tensor) -> torch.Tensor:
        """Return the columns of an input that hold a magnitude of ``outlier_threshold`` (6.0) or more."""
        columns = x.detach().reshape(-1, x.shape[-1]).abs() >= self.outlier_threshold
        return columns.any(0).nonzero().flatten()

    def forward_with_outliers(self, x: torch.Tensor, outlier_idx: torch.Tensor) -> torch.Tensor:
        """Return the product of an input with the quantized weight; subclasses say how."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method forward_with_outliers(x, outlier_idx)")

    def quantize_weight(self, w: torch.Tensor, outlier_idx: torch.Tensor) -> torch.Tensor:
        """Return what replaces the weight, in its shape; subclasses say how."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method quantize_weight(w, outlier_idx)")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `forward_with_outliers` of an input; the first one quantizes the weight."""
        if self.outlier_dim is None:
            self.outlier_dim = self.find_outliers(x)
        if not self.is_quantized:
            with torch.no_grad():
                self.weight.copy_(self.quantize_weight(self.weight.detach(), self.outlier_dim))
            self.is_quantized = True
        return self.forward_with_outliers(x, self.outlier_dim)
