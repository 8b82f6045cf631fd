"""Tensor parallelism for quantized layers: styles for `torch.distributed.tensor.parallel.parallelize_module`.

They are torch's own `ColwiseParallel` and `RowwiseParallel`, which also know how codes are packed: every rank keeps its
rows or columns of a 4-bit or int8 weight, cut out of the quantized one, so that checkpoints are not quantized again.
Other modules are treated as torch treats them.

FSDP2, FSDP1 and DDP need nothing from here: see `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed import tensor as dt
from torch.distributed.tensor import parallel

from fewbits.nn.embedding import Embedding4bit
from fewbits.nn.embedding8bit import Embedding8bit
from fewbits.nn.linear import Linear4bit
from fewbits.nn.linear8bit import Linear8bitLt
from fewbits.nn.split import Split, split_4bit, split_8bit

__all__ = ["ColwiseParallel", "RowwiseParallel", "split_4bit", "split_8bit", "tensor_parallel"]

_MODULES = (Linear4bit, Linear8bitLt, Embedding4bit, Embedding8bit)


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
        if not isinstance(module, _MODULES):
            result: nn.Module = super()._apply(module, device_mesh)  # type: ignore[misc]
            return result
        if not module.weight._is_quantized() or module.weight.is_meta:
            raise ValueError(
                "module.weight: expected a quantized weight, got a floating-point one; "
                "move the module to a device first, as by .to('cuda') or .to('cpu')"
            )
        module._take_part(self.split_of(module, device_mesh))
        return self.attach(module, device_mesh)

    def split_of(self, module: Any, mesh: Any) -> Split:
        """Return which part of its weight a module gets."""
        if mesh.ndim != 1:
            raise ValueError(
                f"device_mesh: expected one dimension, got {mesh.ndim}; give the one for tensor parallelism, "
                "as mesh['tp'], and the other to fully_shard"
            )
        # torch's words: cut by columns are the outputs of a layer, and the vectors of a table.
        dim = 1 - self._dim if isinstance(module, nn.Embedding) else self._dim
        return Split(mesh, dim, tuple(module._weight_shape()))

    def attach(self, module: nn.Module, mesh: Any) -> nn.Module:
        """Let inputs and outputs of a module, which has its part of the weight, travel between ranks."""
        if isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(lambda module, args: self._look_up(module, args, mesh))
            module.register_forward_hook(lambda module, args, output: self._give(_without_others(module, output), mesh))
            return module
        module.register_forward_pre_hook(lambda module, args: self._take(_without_bias(module, args), mesh))
        module.register_forward_hook(
            lambda module, args, output: _with_bias(module, output, lambda y: self._give(y, mesh), mesh),
            always_call=True,
        )
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

    def _look_up(self, module: Any, args: tuple[Any, ...], mesh: Any) -> tuple[Any, ...]:
        """Return indices into this rank's part of a table, which has all of them where vectors are cut."""
        indices, *rest = args
        if isinstance(indices, dt.DTensor):
            indices = indices.redistribute(placements=(dt.Replicate(),)).to_local()
        elif self.input_layouts[0].is_shard() and self.input_layouts != (dt.Shard(-1),):  # RowwiseParallel's default
            indices = dt.DTensor.from_local(indices, mesh, self.input_layouts, run_check=False).full_tensor()
        split: Split = module._split
        if split.dim == 0:
            rows = module.num_embeddings
            indices = indices - split.rank * rows
            module._outside = (indices < 0) | (indices >= rows)
            indices = indices.masked_fill(module._outside, 0)
        return indices, *rest

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


def _without_others(module: Any, output: torch.Tensor) -> torch.Tensor:
    """Return vectors looked up, with zeros for those that other ranks have."""
    outside, module._outside = module._outside, None
    return output if outside is None else output.masked_fill(outside.unsqueeze(-1), 0)


def _without_bias(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Put a bias aside that is trained on every rank: it is added once, to the sum."""
    if module._split.dim == 1 and module._whole_bias is None and module._parameters.get("bias") is not None:
        # Not as an attribute, which would be a parameter of another name.
        module.__dict__["_late_bias"], module._parameters["bias"] = module._parameters["bias"], None
    return args


def _with_bias(module: Any, output: Any, give: Any, mesh: Any) -> Any:
    bias = module.__dict__.pop("_late_bias", None)
    if bias is not None:
        module._parameters["bias"] = bias
    if output is None:  # forward has raised
        return None
    y = give(output)
    if bias is None:
        return y
    if not isinstance(y, dt.DTensor):
        return y + bias.to(y.dtype)
    return y + dt.DTensor.from_local(bias.to(y.dtype), mesh, (dt.Replicate(),), run_check=False)


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
    takes whole quantized checkpoints, of which it keeps this rank's part. An embedding is cut by its vectors.

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
        When the plan is applied, if columns or blocks do not divide evenly.

    Notes
    -----
    Sums over K are added up in another order than in one process. Activations of int8 layers are quantized by each rank
    with the scales of its own columns: finer ones, but other ones. A bias that wants a gradient stays whole on every
    rank, where it gets the same one. An embedding is cut by its rows, as torch does it; each rank looks up its own.
    """

    _dim, _input, _gradient, _output = 1, dt.Shard(-1), None, dt.Partial()


_colwise_to_all = partial(ColwiseParallel, output_layouts=dt.Replicate())
_rowwise_of_all = partial(RowwiseParallel, input_layouts=dt.Replicate())

# By the names that they have in the plans of transformers' models.
STYLES: dict[str, Callable[[], Any]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    **dict.fromkeys(("colwise_rep", "colwise_gather_output", "embedding_colwise"), _colwise_to_all),
    **dict.fromkeys(("rowwise_rep", "rowwise_split_input", "embedding_rowwise"), _rowwise_of_all),
}


def tensor_parallel(model: nn.Module, device_mesh: Any, plan: Mapping[str, str] | None = None) -> nn.Module:
    """Cut a model that is loaded and quantized, by the plan that transformers has for it.

    With transformers 5 ``tp_plan="auto"`` does the same as a model is loaded. This is for transformers 4, which cannot
    load quantized layers in parts, and for models that are quantized in another way.

    Parameters
    ----------
    model : torch.nn.Module
        Quantized and on its device, the same on all ranks.
    device_mesh : DeviceMesh
        One dimension.
    plan : mapping, optional
        Names of styles by names of modules, in which ``*`` stands for the number of a layer; by default
        ``model.tp_plan``.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    ValueError
        If there is no plan, a style in it is unknown here, or a layer cannot be cut without a change of values: before
        that layer is changed.

    Examples
    --------
    >>> mesh = torch.distributed.init_device_mesh("cuda", (2,))  # doctest: +SKIP
    >>> model = tensor_parallel(model, mesh)  # doctest: +SKIP
    """
    plan = getattr(model, "tp_plan", None) if plan is None else plan
    if not plan:
        raise ValueError("plan: expected styles by names of modules, got none, and model.tp_plan has none")
    styles = {}
    for name, style in plan.items():
        if style in STYLES:
            styles[name] = STYLES[style]()
        elif style not in ("replicate", "replicated_with_grad_allreduce"):
            raise ValueError(f"plan: expected one of {', '.join(STYLES)} for {name}, got {style!r}")
    return parallel.parallelize_module(model, device_mesh, styles)
