"""Small helpers of bitsandbytes' API that belong to no one operation."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable, Collection
from typing import Any

import torch

from fewbits._outliers import OutlierTracer, find_outlier_dims, outlier_hook

__all__ = [
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "OutlierTracer",
    "execute_and_return",
    "find_outlier_dims",
    "outlier_hook",
    "pack_dict_to_tensor",
    "replace_linear",
    "sync_gpu",
    "unpack_tensor_to_dict",
]

# What checkpoints say as `weight_format`. Only the first is written, and read: the others were layouts of older GPUs.
LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}
INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {
    number: name for name, number in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.items()
}


def pack_dict_to_tensor(source_dict: dict[str, Any]) -> torch.Tensor:
    """Return a dictionary as the bytes of its JSON text.

    Parameters
    ----------
    source_dict : dict
        Anything that ``json.dumps`` takes.

    Returns
    -------
    torch.Tensor
        uint8, one dimension, on the CPU: what a safetensors file can hold.

    Examples
    --------
    >>> unpack_tensor_to_dict(pack_dict_to_tensor({"blocksize": 64}))
    {'blocksize': 64}
    """
    return torch.tensor(list(json.dumps(source_dict).encode("utf-8")), dtype=torch.uint8, device="cpu")


def unpack_tensor_to_dict(tensor_data: torch.Tensor) -> dict[str, Any]:
    """Return the dictionary that `pack_dict_to_tensor` packed.

    Parameters
    ----------
    tensor_data : torch.Tensor
        uint8, one dimension, on any device.

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        If the bytes are not the JSON text of a dictionary.
    """
    if not isinstance(tensor_data, torch.Tensor):
        raise TypeError(f"tensor_data: expected a tensor, got {type(tensor_data).__name__}")
    if tensor_data.dtype != torch.uint8 or tensor_data.dim() != 1:
        raise ValueError(
            "tensor_data: expected one dimension of torch.uint8, "
            f"got shape {tuple(tensor_data.shape)} of {tensor_data.dtype}"
        )
    try:
        unpacked = json.loads(bytes(tensor_data.tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tensor_data: expected the bytes of JSON text, got something else ({error})") from error
    if not isinstance(unpacked, dict):
        raise ValueError(f"tensor_data: expected the JSON text of a dictionary, got a {type(unpacked).__name__}")
    return unpacked


def replace_linear(
    model: torch.nn.Module,
    linear_replacement: Callable[[int, int, bool], torch.nn.Module],
    skip_modules: Collection[str] = ("lm_head",),
    copy_weights: bool = False,
    post_processing_function: str | None = None,
) -> torch.nn.Module:
    """Replace the linear layers inside a model, in place.

    Parameters
    ----------
    model : torch.nn.Module
        Holds the layers, at any depth. Subclasses of ``torch.nn.Linear`` count.
    linear_replacement : callable
        Called with ``in_features``, ``out_features`` and whether there is a bias; a class or a ``functools.partial``.
    skip_modules : collection of str
        Last parts of names that stay.
    copy_weights : bool
        Whether the replacement takes over weight and bias, as they are. Otherwise it keeps its own.
    post_processing_function : str, optional
        Method of the layer that is replaced, called with that layer where there is one.

    Returns
    -------
    torch.nn.Module
        `model`.

    Raises
    ------
    TypeError
        If `skip_modules` is one string.

    Examples
    --------
    >>> from fewbits.nn import LinearNF4
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    >>> type(replace_linear(model, LinearNF4, copy_weights=True)[0]).__name__
    'LinearNF4'
    """
    if isinstance(skip_modules, str):
        raise TypeError(f"skip_modules: expected a collection of names, got {skip_modules!r}")
    for name, old in list(model.named_children()):
        if not isinstance(old, torch.nn.Linear):
            replace_linear(old, linear_replacement, skip_modules, copy_weights, post_processing_function)
        elif name not in skip_modules:
            new: Any = linear_replacement(old.in_features, old.out_features, old.bias is not None)
            if copy_weights:
                _take_over(new, old)
            setattr(model, name, new)
            process = getattr(old, post_processing_function, None) if post_processing_function is not None else None
            if process is not None:
                process(old)
    return model


def _take_over(new: Any, old: torch.nn.Linear) -> None:
    """Give a new layer the weight and bias of an old one; a quantized layer's weight keeps its class."""
    if isinstance(new.weight, type(old.weight)) and type(new.weight) is not type(old.weight):
        new.weight.data = old.weight.data
    else:
        new.weight = old.weight
    new.bias = old.bias


def sync_gpu(t: torch.Tensor) -> None:
    """Wait for the device of a tensor. Nothing in this package needs it.

    Examples
    --------
    >>> sync_gpu(torch.ones(1))
    """
    if t.device.type == "cuda":
        torch.cuda.synchronize(t.device)
    elif t.device.type == "xpu":
        torch.xpu.synchronize(t.device)
    elif t.device.type == "mps":
        torch.mps.synchronize()


def execute_and_return(command_string: str) -> tuple[str, str]:
    """Run a command, not through a shell, and return what it wrote.

    Parameters
    ----------
    command_string : str
        Program and arguments, quoted as for a shell.

    Returns
    -------
    stdout, stderr : str
        Without white space at the ends.

    Raises
    ------
    OSError
        If there is no such program.

    Examples
    --------
    >>> execute_and_return("echo 'one two'")
    ('one two', '')
    """
    done = subprocess.run(shlex.split(command_string), capture_output=True, text=True, check=False)
    return done.stdout.strip(), done.stderr.strip()
