"""Linear layers with a 4-bit weight."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fewbits._prepared import multiply, prepare
from fewbits.autograd import matmul_4bit
from fewbits.nn.params import Params4bit, as_packed, keywords, to_storage
from fewbits.quant_state import QuantState

__all__ = ["Linear4bit", "LinearFP4", "LinearNF4"]

_is_compiling = torch.compiler.is_compiling
_logger = logging.getLogger("fewbits.nn")
_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        _logger.warning(message)


class Linear4bit(nn.Linear):
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
        Dtype under which the packed bytes are held; FSDP needs that of the other parameters.
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

    weight: Params4bit

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
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.quant_state: QuantState | None = None
        self.quant_storage = quant_storage

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
        """
        tracing = _is_compiling()
        if not tracing:
            weight = self._parameters.get("weight")
            state, compute_dtype = self.quant_state, self.compute_dtype
            if (
                type(weight) is Params4bit
                and weight.prepared is not None
                and weight.quant_state is state is not None
                and self.compute_type_is_set
                and (compute_dtype is None or compute_dtype is x.dtype)
            ):
                product = multiply(weight.prepared, weight, state, x, self._parameters["bias"])
                if product is not None:
                    return product
        input_dtype = x.dtype
        state = self._find_state(tracing)
        if not tracing:  # a compiled graph must not change the module: it would be compiled again for it
            if not self.compute_type_is_set:
                self.set_compute_type(x)
                self.compute_type_is_set = True
            elif self.compute_dtype is torch.float32 and input_dtype in (torch.float16, torch.bfloat16):
                _warn_once(
                    "Linear4bit: compute_dtype is float32 and the inputs have 16 bits: this is slow; "
                    "set compute_dtype (bnb_4bit_compute_dtype) to the dtype of the inputs"
                )
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        codes = self.weight if tracing else self.weight.data
        if not tracing and type(weight) is Params4bit and weight.prepared is None and weight.quant_state is state:
            weight.prepared = prepare(codes, state)  # for the next call
        return matmul_4bit(x, codes, state, bias=self.bias).to(input_dtype)

    def set_compute_type(self, x: torch.Tensor) -> None:
        """Take the dtype of a first input as the compute dtype, if products are accurate in it."""
        if x.dtype in (torch.float32, torch.bfloat16):
            self.compute_dtype = x.dtype
        elif x.dtype == torch.float16 and self.compute_dtype is None:
            _warn_once(
                "Linear4bit: compute_dtype is not set and the first input is float16: products are computed in "
                "float16, which overflows past 65504; set compute_dtype (bnb_4bit_compute_dtype)"
            )

    def _find_state(self, tracing: bool) -> QuantState:
        weight = self.weight
        state: QuantState | None = getattr(weight, "quant_state", None)
        if state is None:
            # FSDP and others put plain tensors in the place of parameters; the module remembers what they are.
            state = self.quant_state
            if state is None:
                raise RuntimeError(
                    f"{type(self).__name__}: expected a quantized weight, got a floating-point one; "
                    "move the module to a device first, as by .to('cuda') or .to('cpu')"
                )
            if not tracing and state.absmax.device != weight.device:
                state = self.quant_state = state.moved(weight.device)
        elif not tracing and self.quant_state is not state:
            self.quant_state = state
        return state

    # ---- moving ----------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Linear4bit:
        """Apply `fn` to weight and bias. nn.Module's own way would lose the class of the weight on a move to meta."""
        weight = self._parameters["weight"]
        if not isinstance(weight, Params4bit):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            if self.quant_state is not None and weight is not None and not self.weight.is_meta:
                self.quant_state = self.quant_state.moved(self.weight.device)
            return self
        with torch.no_grad():
            applied = fn(weight)
            if not isinstance(applied, Params4bit):
                applied = Params4bit(applied, weight.requires_grad and applied.is_floating_point(), **weight.__dict__)
            grad = None if weight.grad is None or applied.bnb_quantized else fn(weight.grad)
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters["weight"] = weight
        if applied is not weight:
            weight.grad = None
            self._replace_weight(applied, keep_identity=applied.is_meta == weight.is_meta)
            self.weight.grad = grad
        if applied.bnb_quantized:
            self.quant_state = applied.quant_state
        return self

    def _replace_weight(self, weight: Params4bit, keep_identity: bool) -> None:
        if keep_identity:
            self.weight.data = weight
        else:
            self._parameters["weight"] = weight

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if isinstance(self.weight, Params4bit):
            self.weight.module = self  # a pickled parameter leaves its module behind

    # ---- state dicts -----------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state: QuantState | None = getattr(self.weight, "quant_state", None)
        if state is not None:
            for key, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight, name = self._parameters["weight"], f"{prefix}weight"
        load = super()._load_from_state_dict
        if not isinstance(weight, Params4bit) or not any(key.startswith(name) for key in state_dict):
            load(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            return
        stats = {key: value for key, value in state_dict.items() if key.startswith(f"{name}.")}
        rest = {key: value for key, value in state_dict.items() if key not in stats}
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        try:
            loaded = self._read_weight(weight, rest.pop(name, None), stats, assign)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"While loading {name}: {error}")
            return
        bias = rest.get(f"{prefix}bias")
        if self.bias is not None and self.bias.is_meta and isinstance(bias, torch.Tensor) and not assign:
            # There is nothing to copy into: a copy takes its place.
            rest[f"{prefix}bias"] = bias.detach().clone()
            local_metadata = {**local_metadata, "assign_to_params_buffers": True}
        self._parameters["weight"] = None
        try:
            load(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        finally:
            self._parameters["weight"] = weight
        self._replace_weight(loaded, keep_identity=not assign and not weight.is_meta)
        self.quant_storage = loaded.quant_storage
        self.quant_state = loaded.quant_state

    def _read_weight(
        self, weight: Params4bit, entry: torch.Tensor | None, stats: Mapping[str, Any], assign: bool
    ) -> Params4bit:
        """Return the weight that a state dict holds, for the device of the present one, without touching anything."""
        if not isinstance(entry, torch.Tensor):
            raise ValueError(f"weight: expected a tensor, got {type(entry).__name__}")
        shape = torch.Size((self.out_features, self.in_features))
        device = entry.device if assign or weight.is_meta else weight.device
        if not stats:
            if entry.shape != shape:
                raise ValueError(
                    f"weight: expected shape {tuple(shape)}, or packed codes with weight.absmax and the rest of their "
                    f"state beside them, got shape {tuple(entry.shape)} alone"
                )
            return self._read_values(weight, entry, device, assign)
        state = QuantState.from_dict(stats, device)
        if state.shape != shape:
            raise ValueError(f"shape: expected {tuple(shape)}, got {tuple(state.shape or ())}")
        packed = as_packed("weight", entry, state).to(device)
        if not assign:
            packed, state = to_storage(packed.clone(), state, self.quant_storage), copy.deepcopy(state)
        requires_grad = weight.requires_grad and packed.is_floating_point()
        kwargs = keywords(state, packed.dtype)
        return Params4bit(packed, requires_grad, **kwargs, module=self, bnb_quantized=True)

    def _read_values(self, weight: Params4bit, entry: torch.Tensor, device: torch.device, assign: bool) -> Params4bit:
        attributes = {**weight.__dict__, "quant_state": None, "bnb_quantized": False, "module": None}
        values = entry.detach()
        if not weight.bnb_quantized:
            if not assign:
                dtype = values.dtype if weight.is_meta else weight.dtype
                values = values.to(device, dtype, copy=True)
            loaded = Params4bit(values, weight.requires_grad, **attributes)
        else:
            loaded = Params4bit(values, **attributes).to(device)
        loaded.module = self
        return loaded


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
