"""Small helpers of bitsandbytes' API that belong to no one operation."""

from __future__ import annotations

import json
from typing import Any

import torch


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
    except ValueError as error:
        raise ValueError(f"tensor_data: expected the bytes of JSON text, got something else ({error})") from error
    if not isinstance(unpacked, dict):
        raise ValueError(f"tensor_data: expected the JSON text of a dictionary, got a {type(unpacked).__name__}")
    return unpacked
