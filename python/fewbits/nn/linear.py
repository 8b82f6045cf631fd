"""Linear layers with a 4-bit weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fewbits import _prepared
from fewbits._launch import is_unusual
from fewbits.autograd import multiply
from fewbits.compat import _differences
from fewbits.nn.gathered import Gathered4bit
from fewbits.nn.module import Module4bit
from fewbits.nn.params import Params4bit

__all__ = ["Linear4bit", "LinearFP4", "LinearNF4"]

_is_compiling = torch.compiler.is_compiling


class Linear4bit(Module4bit, nn.Linear):
    """A linear layer whose weight is held in 4 bits: ``x @ W.T + bias``, `W` dequantized for the product.

    Made like ``nn.Linear``, it quantizes its weight on the first move to a device, the CPU included. The state dict
    holds the packed bytes and, beside them, all that it takes to read them back, under bitsandbytes' names;
    ``load_state_dict`` takes those, and takes floating-point weights too.

    Parameters
    ----------
    input_features, output_features : int
        The sizes `K` and `N`.
    bias : bool
        Whether there is one. It stays in floating point.
    compute_dtype : torch.dtype, optional
        Inputs are cast to it for the product, and the result back to the dtype of the input. By default that of the
        first float32 or bfloat16 input.
    compress_statistics : bool
        Double quantization: the block maxima in 8 bits.
    quant_type : str
        ``"fp4"`` or ``"nf4"``.
    quant_storage : torch.dtype
        Dtype under which the packed bytes are held. FSDP1 needs that of the other parameters; FSDP2 takes any.
    device : torch.device, optional
        Where the weight is made. It is not quantized there before a ``.to``.

    Examples
    --------
    >>> layer = Linear4bit(64, 32, quant_type="nf4").to("cpu")
    >>> layer(torch.ones(2, 64)).shape, layer.weight.shape
    (torch.Size([2, 32]), torch.Size([1024, 1]))
    """

    # bitsandbytes' sign that the CPU weight may be repacked in place. Here it never is.
    support_avx512bf16_for_cpu = False

    weight: Params4bit  # not nn.Linear's Tensor

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self._hold(compress_statistics, quant_type, quant_storage)
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None

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
            If the weight is not quantized yet.
        ValueError
            If the last size of `x` is not K.
        """
        tracing = _is_compiling()
        if not tracing:
            weight: Any = self._parameters.get("weight")
            state, compute_dtype, kind = self.quant_state, self.compute_dtype, type(weight)
            if kind is Gathered4bit:
                state = weight.quant_state
            if (
                (kind is Params4bit or kind is Gathered4bit)
                and weight.prepared is not None
                and weight.quant_state is state is not None
                and self.compute_type_is_set
                and (compute_dtype is None or compute_dtype is x.dtype)
            ):
                product = _prepared.multiply(weight.prepared, weight, state, x, self._parameters["bias"])
                if product is not None:
                    return product
        input_dtype = x.dtype
        state = self._find_state(tracing)
        if not tracing:  # a compiled graph must not change the module: it would be compiled again for it
            if not self.compute_type_is_set:
                self.set_compute_type(x)
                self.compute_type_is_set = True
            elif self.compute_dtype is torch.float32 and input_dtype in (torch.float16, torch.bfloat16):
                _differences.warn_once(
                    "Linear4bit: compute_dtype is float32 and the inputs have 16 bits: this is slow; "
                    "set compute_dtype (bnb_4bit_compute_dtype) to the dtype of the inputs"
                )
            _differences.cast_bias(self.bias, input_dtype)
        columns = self.in_features
        if x.dim() and x.shape[-1] != columns and state.shape == (self.out_features, columns):
            # matmul_4bit, which knows no layer, would take the weight for a transposed one where that fits.
            raise ValueError(
                f"x: expected a last size of {columns} for this {type(self).__name__}, got {tuple(x.shape)}"
            )
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        codes = self.weight if tracing else self.weight.data
        is_new = not tracing and type(weight) is Params4bit and weight.prepared is None and weight.quant_state is state
        if is_new and not is_unusual():  # for the next call, and no part of what a tracer sees of this one
            weight.prepared = _prepared.prepare(codes, state, _prepared.count_writes(weight, state))
        return multiply(x, codes, state, None, self.bias).to(input_dtype)

    def set_compute_type(self, x: torch.Tensor) -> None:
        """Take the dtype of a first input as the compute dtype, if products are accurate in it."""
        if x.dtype in (torch.float32, torch.bfloat16):
            self.compute_dtype = x.dtype
        elif x.dtype == torch.float16 and self.compute_dtype is None:
            use = "inference" if x.numel() == x.shape[-1] else "inference or training"
            _differences.warn_of_layer(
                "Linear4bit: compute_dtype is not set and the first input is float16: products are computed in "
                f"float16, which overflows past 65504 in {use}. Set compute_dtype (bnb_4bit_compute_dtype)"
            )


class LinearNF4(Linear4bit):
    """`Linear4bit` with ``quant_type="nf4"``: 16 quantiles of a normal distribution (Dettmers et al. 2023, QLoRA)."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "nf4", quant_storage, device
        )


class LinearFP4(Linear4bit):
    """`Linear4bit` with ``quant_type="fp4"``: sign, two bits of exponent, one of mantissa."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "fp4", quant_storage, device
        )
