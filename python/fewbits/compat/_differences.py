"""What fewbits does otherwise while it stands in for bitsandbytes, beside its name: all of it is here.

Programs written for bitsandbytes, its own tests among them, count on a few refusals and side effects that fewbits has
no need of. They hold in a process where `install_as_bitsandbytes` was called, and nowhere else; none changes a result.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

stands_in_as: str | None = None  # "bitsandbytes" after `install_as_bitsandbytes`

_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Log a warning about layers, once in a process."""
    if message not in _warned:
        _warned.add(message)
        logging.getLogger("fewbits.nn" if stands_in_as is None else f"{stands_in_as}.nn.modules").warning(message)


def warn_of_layer(message: str) -> None:
    """Log a warning about layers, for each of them where bitsandbytes does so."""
    if stands_in_as is not None:
        _warned.discard(message)
    warn_once(message)


def warn_of_shared_blocks(embedding_dim: int, blocksize: int) -> None:
    """Warn of rows that are not whole blocks, where bitsandbytes does; that it is slow is not so here."""
    if stands_in_as is not None and embedding_dim % blocksize:
        warn_of_layer(
            f"Embedding4bit: rows of {embedding_dim} are no whole blocks of {blocksize}: at inference, values at the "
            "ends of a row have the scale of a block that they share with the next row"
        )


def cast_bias(bias: torch.nn.Parameter | None, dtype: torch.dtype) -> None:
    """Bring a bias into the dtype of the input, in place, for programs that read its dtype after a forward.

    A bias that has a gradient stays: it is being trained, and an optimizer has its address.
    """
    if stands_in_as is not None and bias is not None and bias.dtype != dtype and bias.grad is None:
        bias.data = bias.data.to(dtype)


def refuse_codes(module: torch.nn.Module, state_dict: Mapping[str, Any], prefix: str, assign: bool) -> str | None:
    """Return why int8 codes must not be copied into a layer that is not quantized yet.

    Where parameters are assigned, or made from nothing, bitsandbytes' users have their own ways of loading, which work.
    """
    weight: Any = module._parameters["weight"]
    if stands_in_as is None or assign or f"{prefix}SCB" not in state_dict or weight is None:
        return None
    if weight.is_meta or not weight.is_floating_point():
        return None
    return (
        "Loading a quantized checkpoint into non-quantized Linear8bitLt is refused, as by bitsandbytes: "
        f"move {prefix.removesuffix('.') or 'the module'} to a device first, as by .to('cuda') or .to('cpu')"
    )


def refuse_saving(module: torch.nn.Module) -> None:
    """Raise where an embedding that is not quantized yet is to be saved; a quantized one can be.

    Raises
    ------
    NotImplementedError
        Which programs expect of embeddings.
    """
    weight: Any = module._parameters["weight"]
    if stands_in_as is not None and not weight.is_meta and weight.is_floating_point() and not _is_packed(weight):
        raise NotImplementedError(
            f"{type(module).__name__}: saving one that is not quantized is not implemented, as in bitsandbytes; "
            "move it to a device first, as by .to('cuda') or .to('cpu')"
        )


def _is_packed(weight: Any) -> bool:
    return getattr(weight, "quant_state", None) is not None


def norm_of_update(state: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the norm of a momentum buffer, which programs read as ``state["unorm_vec"]``. It is not kept anywhere."""
    buffer = state.get("state1")
    if stands_in_as is None or "state2" in state or not isinstance(buffer, torch.Tensor):
        return None
    if buffer.dtype == torch.uint8:
        from fewbits.functional import dequantize_blockwise

        buffer = dequantize_blockwise(buffer, absmax=state["absmax1"], code=state["qmap1"], blocksize=256)
    norm: torch.Tensor = torch.linalg.vector_norm(buffer)
    return norm.reshape(1)


def refuse_trust_of_8_bits(max_unorm: float) -> None:
    """Raise where LAMB with 8-bit states is to have a trust factor of its own.

    Raises
    ------
    ValueError
        Naming the argument.
    """
    if stands_in_as is not None and max_unorm != 1.0:
        raise ValueError(
            f"max_unorm: expected 1.0 with 8-bit states, as in bitsandbytes, got {max_unorm!r}; fewbits.optim, "
            "without install_as_bitsandbytes, takes other factors"
        )


def takes_scaled_gradients() -> bool:
    """Return whether gradient scalers may leave gradients as they are, and ask for a step whatever they hold.

    Lightning refuses to clip gradients for optimizers that take them so. accelerate, and with it transformers' Trainer,
    knows by a step that never came that gradients were not finite, and holds its scheduler back.
    """
    return stands_in_as is None


def read_older_signature(max_unorm: float, skip_zeros: Any) -> tuple[float, Any]:
    """Return the two arguments of optimizers' bases where older programs pass others, by position.

    Before bitsandbytes 0.50 ``percentile_clipping`` and ``block_wise`` stood there. Their defaults, 100 and True, which
    GaLore's optimizers pass on, ask for nothing.
    """
    if stands_in_as is not None and skip_zeros is True and max_unorm == 100:
        return 0.0, False
    return max_unorm, skip_zeros
