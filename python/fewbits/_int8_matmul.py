"""`matmul`, the LLM.int8() product, and the state that goes with a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fewbits import _checks, _int8, _int8_ops, _int8_prepared, _launch
from fewbits import _checks_int8 as checks
from fewbits._int8_prepared import Found
from fewbits._int8_product import Weight, dense, linear

__all__ = ["MatmulLtState", "matmul"]


@dataclass
class MatmulLtState:
    """An int8 weight and how to multiply by it, with the attributes of ``bitsandbytes.MatmulLtState``.

    Attributes
    ----------
    CB : torch.Tensor or None
        int8 codes of the weight, shape ``(N, K)``.
    SCB : torch.Tensor or None
        float32, shape ``(N,)``: the largest magnitude of each row.
    threshold : float
        Columns of the activations that hold a magnitude of this or more are multiplied in floating point; 0: none are.
    has_fp16_weights : bool
        Whether the weight is a floating-point one, quantized for each product, that may be trained.
    is_training : bool
        Whether such a weight is quantized anew for every product, not just where it was written to.
    force_no_igemmlt : bool
        Whether products with int8 codes take the activations as they are: ``A @ W.T``, `W` dequantized panel by panel.
        Slower; nothing but the weight is rounded. A weight quantized for each product has no use of it.

    idx : torch.Tensor or None
        int64: the outlier columns of the last product on a CUDA device with a threshold, found in what that left there
        (reading it waits for the device), or what was assigned. None on other devices.

    Notes
    -----
    The other attributes are there for code that sets or reads them: nothing here uses them.

    Examples
    --------
    >>> state = MatmulLtState()
    >>> state.CB, state.SCB = torch.tensor([[127, -127]], dtype=torch.int8), torch.tensor([2.0])
    >>> state.has_fp16_weights = False
    >>> matmul(torch.tensor([[1.0, 0.0]]), state.CB, state=state).tolist()
    [[2.0]]
    """

    force_no_igemmlt: bool = False
    CB: torch.Tensor | None = None
    SB: torch.Tensor | None = None
    SCB: torch.Tensor | None = None
    SBt: torch.Tensor | None = None
    CBt: torch.Tensor | None = None
    subB: torch.Tensor | None = None  # noqa: N815
    outlier_pool: Any = None
    idx: torch.Tensor | None = None

    # Plain attributes, no fields: neither arguments of the constructor nor compared.
    has_accumulated_gradients = False
    threshold = 0.0
    is_training = True
    has_fp16_weights = True
    use_pool = False
    # Layouts of GPUs of the past. Others still read and reset them.
    CxB = None
    CxBt = None
    formatB = None  # noqa: N815
    _tile_indices = None

    _source: ClassVar[tuple[int, int, torch.device] | None] = None  # what CB was last quantized from
    _found: ClassVar[Found | None] = None  # by the last product

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_found"}

    def reset_grads(self) -> None:
        """Forget the quantized weight."""
        self.CB = self.SB = self.SCB = self.SBt = self.CBt = None
        self.CxB = self.CxBt = None


def _idx(state: MatmulLtState) -> torch.Tensor | None:
    given: torch.Tensor | None = state.__dict__.get("_idx")
    return given if given is not None or state._found is None else state._found.columns()


# Made a property when the field and its default are known.
MatmulLtState.idx = property(_idx, lambda state, value: state.__dict__.__setitem__("_idx", value))  # type: ignore[assignment]


def matmul(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``A @ W.T + bias`` by LLM.int8() (Dettmers et al. 2022): int8 products, outlier columns apart.

    Each row of `A` and of `W` is scaled to int8 by its own largest magnitude; the codes are multiplied exactly, and
    scaled, summed and rounded once to the dtype of `A`. With a threshold, columns of `A` that hold a magnitude of
    `threshold` or more are multiplied in floating point. Nothing waits for the device to learn which those are.

    The gradient of `A` is ``G @ W``, by panels of `W` of bounded size; that of a floating-point `B` is ``G.T @ A``.

    Parameters
    ----------
    A : torch.Tensor
        float32, float16 or bfloat16, taken as it is; shape ``(..., K)``. Under autocast it is taken in the autocast
        dtype, as by ``F.linear``. Other floating-point dtypes are computed as float32.
    B : torch.Tensor
        The weight, shape ``(N, K)``: int8 codes, or floating point, which is quantized here.
    out : torch.Tensor, optional
        Receives the product. It has no gradient then.
    state : MatmulLtState, optional
        Holds the codes and scales of `B`, where those were made before, and the threshold.
    threshold : float
        If it is not 0, it becomes that of `state`.
    bias : torch.Tensor, optional
        Shape ``(N,)``.

    Returns
    -------
    torch.Tensor
        Shape ``(..., N)``, dtype of `A`, or `out`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that is wrong.

    Examples
    --------
    >>> matmul(torch.tensor([[8.0, 1.0]]), torch.tensor([[1.0, 0.5]]), threshold=6.0).tolist()
    [[8.503936767578125]]
    """
    if state is None:
        state = MatmulLtState()
    checks.check_threshold(threshold)
    if threshold > 0.0:
        state.threshold = float(threshold)
    tracing = torch.compiler.is_compiling()
    weight, source = _weight(B, state, tracing)
    integers = not state.force_no_igemmlt
    if integers and out is None and source is None and not tracing:
        prepared = _int8_prepared.prepare(weight.CB, weight.SCB)
        if prepared is not None:
            done = _int8_prepared.multiply(prepared, weight.CB, weight.SCB, A, state.threshold, bias)
            if done is not None:
                state._found = prepared.found  # type: ignore[misc]
                return done
    return multiply(A, weight, state.threshold, bias, source, out, integers)


def _weight(B: torch.Tensor, state: MatmulLtState, tracing: bool) -> tuple[Weight, torch.Tensor | None]:
    """Return the quantized weight, and the floating-point one if it is to have a gradient."""
    _checks.check_tensor("B", B)
    if not B.is_floating_point() or (not state.has_fp16_weights and state.CB is not None):
        CB = B if state.CB is None else state.CB
        if state.SCB is None:
            raise ValueError("state.SCB: expected the scales of an int8 weight, got None")
        return Weight(CB, state.SCB), None
    return quantize_weight(B, state, tracing), B if B.requires_grad else None


def quantize_weight(B: torch.Tensor, state: MatmulLtState, tracing: bool = False) -> Weight:
    """Return a floating-point weight quantized: anew in training, else if it changed since `state` saw it."""
    if not isinstance(B, torch.Tensor) or B.dim() != 2:
        shape = tuple(B.shape) if isinstance(B, torch.Tensor) else type(B).__name__
        raise ValueError(f"B: expected two dimensions (N, K), got {shape}")
    source = None if tracing or B.is_inference() else (B._version, B.untyped_storage().data_ptr(), B.device)
    CB, SCB = state.CB, state.SCB
    if CB is None or SCB is None or state.is_training or source is None or source != state._source:
        values = B.detach()
        if values.dtype not in _checks.DTYPES:
            values = values.to(torch.float32)
        run: Any = _int8 if _launch.is_direct(values) else _int8_ops
        CB, SCB, _ = run.int8_quantize_rows(values)
        if not tracing:
            state.CB, state.SCB = CB, SCB
            state._source = source  # type: ignore[misc]
    assert CB is not None
    assert SCB is not None
    return Weight(CB, SCB)


def multiply(
    A: torch.Tensor,
    weight: Weight,
    threshold: float,
    bias: torch.Tensor | None,
    B: torch.Tensor | None,
    out: torch.Tensor | None = None,
    integers: bool = True,
) -> torch.Tensor:
    """Return `matmul`'s result after a look at everything: for calls that are not the ordinary one.

    Without `integers`, nothing of `A` is quantized: see ``MatmulLtState.force_no_igemmlt``.
    """
    _checks.check_tensor("A", A)
    if not A.is_floating_point():
        raise ValueError(f"A: expected a floating-point dtype, got {A.dtype}")
    checks.check_threshold(threshold)
    if A.device.type != "meta" and torch.is_autocast_enabled(A.device.type) and A.dtype != torch.float64:
        A = A.to(torch.get_autocast_dtype(A.device.type))
    dtype = A.dtype
    if dtype not in _checks.DTYPES:
        A = A.to(torch.float32)
    if bias is not None:
        _checks.check_tensor("bias", bias)
        bias = bias.to(A.dtype)
    if out is None:
        return _product(A, weight, threshold, bias, B, integers).to(dtype)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (A, bias, B))
    _check_out(out, A, dtype, weight, differentiable)
    if integers and dtype == A.dtype and _launch.is_direct(A, bias, out, *weight):
        return _int8.int8_linear(A, *weight, threshold, bias, out=out)
    return out.copy_(_product(A, weight, threshold, bias, B, integers))


def _product(
    A: torch.Tensor,
    weight: Weight,
    threshold: float,
    bias: torch.Tensor | None,
    B: torch.Tensor | None,
    integers: bool,
) -> torch.Tensor:
    if integers or B is not None:
        return linear(A, bias, B, weight, float(threshold))
    product = dense(A, weight, transposed=False)
    return product if bias is None else product + bias


def _check_out(out: torch.Tensor, A: torch.Tensor, dtype: torch.dtype, weight: Weight, differentiable: bool) -> None:
    checks.check_weight("CB", weight.CB, "SCB", weight.SCB)
    _checks.check_tensor("out", out)
    _checks.check_same_device("A", A, "out", out)
    shape = (*A.shape[:-1], weight.CB.shape[0])
    if out.shape != shape or out.dtype != dtype:
        raise ValueError(f"out: expected shape {shape} of {dtype}, got {tuple(out.shape)} of {out.dtype}")
    if differentiable:
        raise ValueError("out: expected None where a gradient is asked for, got a tensor")
