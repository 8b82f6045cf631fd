"""Linear layers with an int8 weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fewbits import _int8_prepared
from fewbits._checks_int8 import check_threshold
from fewbits._int8_matmul import MatmulLtState, multiply, quantize_weight
from fewbits._int8_product import Weight
from fewbits.compat import _differences
from fewbits.nn.gathered import Gathered8bit
from fewbits.nn.int8_params import Int8Params, Scales
from fewbits.nn.module8bit import Module8bit

__all__ = ["Linear8bitLt"]

_is_compiling = torch.compiler.is_compiling


class Linear8bitLt(Module8bit, nn.Linear):
    """A linear layer by LLM.int8() (Dettmers et al. 2022): an int8 weight, activations quantized row by row.

    Made like ``nn.Linear``. With ``has_fp16_weights=False``, for inference and adapters, it quantizes its weight on the
    first move to a device, the CPU included, and holds codes from then on. With ``has_fp16_weights=True`` the weight
    stays in floating point, can be trained, and is quantized for each product.

    Activations are float32, float16 or bfloat16 and taken as they are. No product waits for the device, whatever the
    threshold: products can be captured in a CUDA graph, and compiled with ``fullgraph=True``.

    Parameters
    ----------
    input_features, output_features : int
        The sizes `K` and `N`.
    bias : bool
        Whether there is one. It stays in floating point.
    has_fp16_weights : bool
        Whether the weight stays in floating point.
    threshold : float
        Columns of the activations that hold a magnitude of this or more (the paper: 6.0) are multiplied in floating
        point; 0: none are.
    index : int, optional
        Kept as the attribute ``index``.
    device : torch.device, optional
        Where the weight is made. It is not quantized there before a ``.to``.

    Raises
    ------
    TypeError, ValueError
        If the threshold is no number, or below 0.

    Notes
    -----
    The codes are ``weight.data``. Their scales are ``weight.SCB`` until the first product, which takes them over as
    ``state.SCB``; scales set as ``weight.SCB`` later on are taken over by the next product. The state dict holds
    ``weight`` (int8), ``bias``, ``SCB`` and ``weight_format``, as bitsandbytes' does; ``load_state_dict`` takes those
    at any time, and takes floating-point weights too.

    On CUDA the outlier columns of a batch cost little while they are few, as in trained language models: some percent
    of the time for one in a thousand. Thousands of them, as an untrained model has at a threshold of 6, take a multiple
    of the time of the whole product: set a higher threshold, or 0.

    Examples
    --------
    >>> layer = Linear8bitLt(64, 32, has_fp16_weights=False, threshold=6.0).to("cpu")
    >>> layer(torch.ones(2, 64)).shape, layer.weight.dtype
    (torch.Size([2, 32]), torch.int8)
    """

    weight: Int8Params  # not nn.Linear's Tensor

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: int | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        check_threshold(threshold)
        super().__init__(input_features, output_features, bias, device)
        self.state = MatmulLtState()
        self._SCB: torch.Tensor | None = None  # the scales of the last move or load
        self.index = index
        self.state.threshold = float(threshold)
        self.state.has_fp16_weights = has_fp16_weights
        self.state.use_pool = threshold > 0.0 and not has_fp16_weights
        self.weight = Int8Params(self.weight.data, has_fp16_weights=has_fp16_weights, requires_grad=has_fp16_weights)

    def _weight_shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ W.T + bias`` in the dtype of `x`.

        Parameters
        ----------
        x : torch.Tensor
            Floating point, shape ``(..., K)``.

        Returns
        -------
        torch.Tensor
            Shape ``(..., N)``.

        Raises
        ------
        RuntimeError
            If the weight has codes without scales, or is on the meta device.
        """
        tracing, state = _is_compiling(), self.state
        weight: Any = self._parameters.get("weight")
        if not tracing:
            state.is_training = self.training
            kind = type(weight)
            if kind is Int8Params:
                scales = state.SCB if weight.SCB is None else None
            elif kind is Gathered8bit:
                scales = weight.SCB
                if self._SCB is not None or state.SCB is not None:
                    self._forget_scales()
            else:
                scales = None
            if scales is not None and weight.prepared is not None:
                done = self._multiply_prepared(weight, scales, x)
                if done is not None:
                    return done
            _differences.cast_bias(self.bias, x.dtype)
        weight = self.weight
        if not tracing and not state.has_fp16_weights and hasattr(weight, "_local_tensor"):
            raise RuntimeError(
                "Linear8bitLt: expected a whole weight, got a distributed tensor; call the module that fully_shard was "
                "given, or for tensor parallelism use ColwiseParallel and RowwiseParallel of fewbits.distributed"
            )
        if not weight.is_floating_point():
            quantized = self._find_weight(weight, tracing)
            if not tracing and type(weight) is Int8Params and weight.prepared is None:
                prepared = _int8_prepared.prepare(weight.data, quantized.SCB)
                weight.prepared = prepared or Scales(quantized.SCB)
                done = None if prepared is None else self._multiply_prepared(weight, quantized.SCB, x)
                if done is not None:
                    return done
            return multiply(x, quantized, state.threshold, self.bias, None, integers=not state.force_no_igemmlt)
        if state.has_fp16_weights:
            source = weight if weight.requires_grad else None
            return multiply(x, quantize_weight(weight, state, tracing), state.threshold, self.bias, source)
        if tracing or weight.is_meta:
            raise RuntimeError(
                "Linear8bitLt: expected a quantized weight, got a floating-point one; "
                "move the module to a device first, as by .to('cuda') or .to('cpu')"
            )
        self._quantize_in_place(weight)
        return self.forward(x)

    def _multiply_prepared(self, weight: Any, scales: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
        """Return the product in the fewest steps, or None where the long way must be taken."""
        prepared, state = weight.prepared, self.state
        if state.force_no_igemmlt:
            return None
        done = _int8_prepared.multiply(prepared, weight, scales, x, state.threshold, self._parameters["bias"])
        if done is not None and state.threshold:
            state._found = prepared.found  # type: ignore[misc]
        return done

    def _find_weight(self, weight: torch.Tensor, tracing: bool) -> Weight:
        """Return codes and scales; scales that have come with a new weight are taken over into the state."""
        if type(weight) is Gathered8bit:
            assert weight.SCB is not None
            if not tracing:
                self._forget_scales()
            return Weight(weight if tracing else weight.data, weight.SCB)
        state, fresh = self.state, getattr(weight, "SCB", None) is not None
        SCB = self._scales()
        if SCB is None:
            raise RuntimeError(
                "Linear8bitLt: expected scales beside the codes of the weight, got None as weight.SCB and state.SCB"
            )
        if SCB.device != weight.device:
            SCB = SCB.to(weight.device)
        if tracing:
            return Weight(weight, SCB)
        codes = weight.data
        if fresh:
            self.init_8bit_state()
        if state.CB is None or state.CB.data_ptr() != codes.data_ptr():
            state.CB = codes
        state.SCB = self._SCB = SCB
        return Weight(codes, SCB)

    def init_8bit_state(self) -> None:
        """Take the codes and scales of the weight over into ``state``."""
        weight: Any = self.weight
        self.state.CB, self.state.SCB = weight.data, weight.SCB
        weight.CB = weight.SCB = None

    def _quantize_in_place(self, weight: torch.Tensor) -> None:
        values = Int8Params(weight.data, requires_grad=False)
        if isinstance(weight, Int8Params):
            weight.data = values.to(weight.device)
        else:
            self.weight = values.to(weight.device)

    # ---- what moves, copies, saves and loads ask for -----------------------------------------------------------------

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        refusal = _differences.refuse_codes(
            self, state_dict, prefix, bool(local_metadata.get("assign_to_params_buffers"))
        )
        if refusal is None:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        else:
            args[-1].append(refusal)

    def _forget_scales(self) -> None:
        self.state.CB = self.state.SCB = self._SCB = None

    def _scales(self) -> torch.Tensor | None:
        weight = self.weight
        SCB: torch.Tensor | None = getattr(weight, "SCB", None)
        if SCB is None and not self.state.has_fp16_weights:
            SCB = self.state.SCB
            if SCB is None:
                # Sharding, serving and exporting leave plain tensors where the parameter was. And another module that
                # shares the parameter may have taken its scales over.
                if not isinstance(weight, Int8Params):
                    SCB = self._SCB
                elif weight.prepared is not None:
                    SCB = weight.prepared.scales
        return SCB

    def _adopt(self, weight: Int8Params) -> None:
        state, own = self.state, self.weight
        if not own._is_quantized():
            return
        if own.SCB is not None:  # came with the weight
            state.CB = state.SCB = None
            self._SCB = own.SCB
        else:
            self._follow(own)

    def _follow(self, weight: torch.Tensor) -> None:
        state = self.state
        if state.has_fp16_weights or weight.is_meta:
            return
        if state.CB is not None:
            state.CB = weight.data
        if state.SCB is not None:
            state.SCB = self._SCB = state.SCB.to(weight.device)
        elif self._SCB is not None:
            self._SCB = self._SCB.to(weight.device)

    def _undo(self) -> Callable[[], None]:
        undo, state = super()._undo(), dict(self.state.__dict__)

        def undo_all() -> None:
            undo()
            self.state.__dict__.clear()
            self.state.__dict__.update(state)

        return undo_all

    def __getstate__(self) -> dict[str, Any]:
        # The codes are the weight's: a copy or a pickle holds them once.
        state = copy.copy(self.state)
        state.CB = None
        if state.has_fp16_weights:
            state.reset_grads()
        return {**self.__dict__, "state": state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.state.SCB is not None:
            self.state.CB = self.weight.data
