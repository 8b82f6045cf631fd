"""Which columns of linear layers hold outliers, found from their weights."""

from __future__ import annotations

import logging
from typing import Any

import torch

__all__ = ["OutlierTracer", "find_outlier_dims", "outlier_hook"]

_logger = logging.getLogger("fewbits.utils")


def find_outlier_dims(
    weight: torch.Tensor, reduction_dim: int = 0, zscore: float = 4.0, topk: int | None = None, rdm: bool = False
) -> torch.Tensor:
    """Return the indices along a matrix whose standard deviation stands out.

    Parameters
    ----------
    weight : torch.Tensor
        A matrix of floating-point numbers.
    reduction_dim : int
        The dimension over which standard deviations are taken.
    zscore : float
        A standard deviation this many of their standard deviations above their mean stands out.
    topk : int, optional
        Return this many, the largest, instead.
    rdm : bool
        Return `topk` column indices at random, for comparison.

    Returns
    -------
    torch.Tensor
        int64, one dimension, on the device of `weight`.

    Raises
    ------
    ValueError
        If `rdm` is set without `topk`.

    Examples
    --------
    >>> weight = torch.cat([torch.randn(64, 31), 50 * torch.randn(64, 1)], dim=1)
    >>> find_outlier_dims(weight).tolist()
    [31]
    """
    if rdm:
        if topk is None:
            raise ValueError("topk: expected a number with rdm=True, got None")
        return torch.randint(0, weight.shape[1], (topk,), device=weight.device)
    deviations = weight.std(reduction_dim)
    if topk is not None:
        return deviations.topk(topk).indices
    return ((deviations - deviations.mean()) / deviations.std() > zscore).nonzero().flatten()


class OutlierTracer:
    """Finds the outlier columns of the linear layers of a model as a first input runs through it.

    A singleton: see `get_instance`. Each layer is taken to have the outlier columns that its weight shows; the first
    one also those of its input.

    Attributes
    ----------
    hvalue2outlier_idx : dict
        The columns by the address of a weight.
    hvalues, outliers : list
        The addresses and the columns found, in the order of the layers.
    hooks : list
        What `initialize` registered; gone after a second input.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    >>> tracer = OutlierTracer.get_instance()
    >>> tracer.initialize(model)
    >>> _ = model(torch.ones(2, 8))
    >>> tracer.get_outliers(model[0].weight).tolist()
    []
    """

    _instance: OutlierTracer | None = None

    def __init__(self) -> None:
        raise RuntimeError("OutlierTracer: expected a call of OutlierTracer.get_instance()")

    def initialize(self, model: torch.nn.Module) -> None:
        """Forget everything, and watch the linear layers of a model."""
        self.last_w = None
        self.current_outlier_dims = None
        self.hvalues: list[int] = []
        self.outliers: list[torch.Tensor] = []
        self.hvalue2outlier_idx: dict[int, torch.Tensor] = {}
        self.hooks = [
            module.register_forward_pre_hook(outlier_hook)
            for module in model.modules()
            if isinstance(module, torch.nn.Linear)
        ]
        self.initialized = True

    def is_initialized(self) -> bool:
        """Return whether `initialize` was called."""
        return getattr(self, "initialized", False)

    def get_hvalue(self, weight: torch.Tensor) -> int:
        """Return what a weight is known by: the address of its memory."""
        return weight.data.untyped_storage().data_ptr()

    def get_outliers(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Return the outlier columns of a layer by its weight, or None if it was not seen."""
        if not self.is_initialized():
            _logger.warning("OutlierTracer: asked for outliers before initialize(model)")
            return None
        return self.hvalue2outlier_idx.get(self.get_hvalue(weight))

    @classmethod
    def get_instance(cls) -> OutlierTracer:
        """Return the tracer."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
        return cls._instance


def outlier_hook(module: torch.nn.Module, input: Any) -> None:  # noqa: A002  (bitsandbytes' name)
    """Tell `OutlierTracer` of a linear layer and its input, as a forward pre-hook.

    Raises
    ------
    TypeError
        If the module is no linear layer.
    """
    if not isinstance(module, torch.nn.Linear):
        raise TypeError(f"module: expected a torch.nn.Linear, got {type(module).__name__}")
    tracer = OutlierTracer.get_instance()
    known = tracer.get_hvalue(module.weight)
    if known in tracer.hvalue2outlier_idx:  # a second input: everyone has been seen
        for hook in tracer.hooks:
            hook.remove()
        return
    columns = find_outlier_dims(module.weight)
    tracer.hvalues.append(known)
    tracer.outliers.append(columns)
    if len(tracer.outliers) == 1:
        # No layer comes before the first: its input counts too, by deviation and by magnitude (LLM.int8(), §3.2).
        x = input[0].detach().reshape(-1, input[0].shape[-1])
        large = (x.abs() > 6).any(0).nonzero().flatten()
        columns = torch.cat([find_outlier_dims(x, reduction_dim=0, zscore=3), large]).unique()
    tracer.hvalue2outlier_idx[known] = columns
