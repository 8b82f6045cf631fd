"""Tensor parallelism for quantized layers: styles for `torch.distributed.tensor.parallel.parallelize_module`.

They are torch's own `ColwiseParallel` and `RowwiseParallel`, which also know how codes are packed: every rank keeps its
rows or columns of a 4-bit or int8 weight, cut out of the quantized one, so that checkpoints are not quantized again.
Other modules are treated as torch treats them.

FSDP2, FSDP1 and DDP need nothing from here: see `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed import tensor as dt
from torch.distributed.tensor import parallel

from fewbits.nn.int8_params import Int8Params
from fewbits.nn.linear import Linear4bit
from fewbits.nn.linear8bit import Linear8bitLt
from fewbits.nn.params import Params4bit, keywords
from fewbits.nn.split import Split, part_of_bias, split_4bit, split_8bit

__all__ = ["ColwiseParallel", "RowwiseParallel", "split_4bit", "split_8bit"]


class _Style:
    """What both styles have in common; comes before torch's class among the bases."""

    input_layouts: Any
    output_layouts: Any
    use_local_output: bool
    _dim: int  # of the weight, which is cut
    _input: dt.Placement  # what the module takes
    _gradient: dt.Placement | None  # what the gradient of its input is
    _output: dt.Placement  # what it returns

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        if not isinstance(module, (Linear4bit, Linear8bitLt)):
            result: nn.Module = super()._apply(module, device_mesh)  # type: ignore[misc]
            return result
        if device_mesh.ndim != 1:
            raise ValueError(f"device_mesh: expected one dimension, got {device_mesh.ndim}")
        _split(module, Split(device_mesh, self._dim, (module.out_features, module.in_features)))
        module.register_forward_pre_hook(lambda _, args: self._take(args, device_mesh))
        module.register_forward_hook(lambda _, args, output: self._give(output, device_mesh))
        return module

    def _take(self, args: tuple[Any, ...], mesh: Any) -> tuple[Any, ...]:
        x, *rest = args
        if not isinstance(x, dt.DTensor):
            if self.input_layouts == (self._input,) and not (torch.is_grad_enabled() and x.requires_grad):
                return args  # nothing to send, no gradient to add up
            x = dt.DTensor.from_local(x, mesh, self.input_layouts, run_check=False)
        if x.placements != (self._input,):
            x = x.redistribute(placements=(self._input,))
        gradient = None if self._gradient is None else (self._gradient,)
        return x.to_local(grad_placements=gradient), *rest

    def _give(self, output: torch.Tensor, mesh: Any) -> Any:
        if self.use_local_output and not (torch.is_grad_enabled() and output.requires_grad):
            if self.output_layouts == (self._output,):
                return output
            added_up = self._output.is_partial() and self.output_layouts == (dt.Replicate(),)
            if added_up and not torch.compiler.is_compiling():
                torch.distributed.all_reduce(output, group=mesh.get_group())
                return output
        y = dt.DTensor.from_local(output, mesh, (self._output,), run_check=False)
        if y.placements != self.output_layouts:
            y = y.redistribute(placements=self.output_layouts)
        return y.to_local() if self.use_local_output else y


class ColwiseParallel(_Style, parallel.ColwiseParallel):
    """Cut a layer by its outputs: every rank has N / world rows of the weight (N, K).

    Parameters
    ----------
    input_layouts : Placement, optional
        How the input lies; replicated by default.
    output_layouts : Placement, optional
        How the output shall lie; sharded in its last dimension by default.
    use_local_output : bool
        Whether the output is a plain tensor, this rank's part, rather than a `DTensor`.

    Raises
    ------
    ValueError
        When the plan is applied, if rows or blocks do not divide evenly: naming the size.

    Notes
    -----
    Products are those of one process. ``state_dict`` returns distributed tensors; ``load_state_dict`` takes those, and
    takes whole quantized checkpoints, of which it keeps this rank's part.

    Examples
    --------
    >>> from torch.distributed.tensor.parallel import parallelize_module
    >>> plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    >>> model = parallelize_module(model, mesh, plan)  # doctest: +SKIP
    """

    _dim, _input, _gradient, _output = 0, dt.Replicate(), dt.Partial(), dt.Shard(-1)


class RowwiseParallel(_Style, parallel.RowwiseParallel):
    """Cut a layer by its inputs: every rank has K / world columns of the weight (N, K), and outputs are added up.

    Parameters
    ----------
    input_layouts : Placement, optional
        How the input lies; sharded in its last dimension by default.
    output_layouts : Placement, optional
        How the output shall lie; replicated by default.
    use_local_output : bool
        Whether the output is a plain tensor rather than a `DTensor`.

    Raises
    ------
    ValueError
        When the plan is applied, if columns or blocks do not divide evenly, or the bias wants a gradient.

    Notes
    -----
    Sums over K are added up in another order than in one process. Activations of int8 layers are quantized by each rank
    with the scales of its own columns: finer ones, but other ones.
    """

    _dim, _input, _gradient, _output = 1, dt.Shard(-1), None, dt.Partial()


def _split(module: Any, split: Split) -> None:
    """Leave a layer its part of its weight and bias."""
    weight, bias = module.weight, module.bias
    rank, world, dim = split.rank, split.world, split.dim
    if not weight._is_quantized() or weight.is_meta:
        raise ValueError(
            "module.weight: expected a quantized weight, got a floating-point one; "
            "move the module to a device first, as by .to('cuda') or .to('cpu')"
        )
    if isinstance(module, Linear4bit):
        state = module._find_state(False)
        codes, part = split_4bit(weight.data, state, dim, rank, world)
        _check_bias(bias, dim)
        module.weight = Params4bit(codes, False, **keywords(part, codes.dtype), module=module, bnb_quantized=True)
        module.quant_state = part
    else:
        scales = module._scales()
        if scales is None:
            raise ValueError("module.weight: expected scales beside the codes, got None as weight.SCB and state.SCB")
        CB, SCB = split_8bit(weight.data, scales, dim, rank, world)
        _check_bias(bias, dim)
        module._forget_scales()
        module.weight = Int8Params(CB, requires_grad=False, CB=CB, SCB=SCB)
    module._split = split
    if dim == 0:
        module.out_features //= world
    else:
        module.in_features //= world
    if bias is not None:
        module._whole_bias = bias.detach() if dim == 1 else None
        module.bias = nn.Parameter(part_of_bias(bias.detach(), split), requires_grad=bias.requires_grad)


def _check_bias(bias: torch.Tensor | None, dim: int) -> None:
    if dim == 1 and bias is not None and bias.requires_grad:
        raise ValueError("module.bias: expected requires_grad=False, as the first rank alone adds it, got True")
