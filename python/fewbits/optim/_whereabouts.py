"""Whether the tensors of a plan are where they were, and where the gradients are now.

What changes at every step is the gradients' addresses, and there may be hundreds of tensors: one native call looks at
all of them, through the function that torch (2.10 or later) has for reading a tensor from C. Where torch has none, and
where that call finds anything but what it knows, `map` looks at one attribute of all tensors after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, compress
from operator import attrgetter, is_, itemgetter
from typing import Any

import numpy as np
import torch

from fewbits import _native
from fewbits._backend import is_portable
from fewbits._launch import dense
from fewbits.optim import _distributed
from fewbits.optim._paged_states import local

Found = tuple[bytes, list[torch.Tensor]]

HAS_READER = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")

# Called through map: no step of the interpreter a tensor.
_Tensor: Any = torch.Tensor
_address, _numel, _is_contiguous = _Tensor.data_ptr, _Tensor.numel, _Tensor.is_contiguous
_device: Callable[[Any], int] = _Tensor.get_device
_grad, _dtype = attrgetter("grad"), attrgetter("dtype")
_params = itemgetter("params")


class Whereabouts:
    """Where the tensors of a plan are.

    Parameters
    ----------
    everyone : list of torch.Tensor
        The parameters of all groups.
    takes_part : list of bool
        Which of them have a gradient, each once: the members.
    owners, params, grads, sentinels : list of torch.Tensor
        Of each member: the parameter, this process's part of it and of its gradient, and the state that tells whether
        its states have moved.
    """

    def __init__(
        self,
        everyone: list[torch.Tensor],
        takes_part: list[bool],
        owners: list[torch.Tensor],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        sentinels: list[torch.Tensor],
    ) -> None:
        self.everyone, self.owners, self.params, self.sentinels = everyone, owners, params, sentinels
        self.mask = None if all(takes_part) else takes_part
        self.types = list(map(type, map(_grad, everyone)))
        self.distributed = any(map(_distributed.is_distributed, owners))
        self.kinds = _kinds(grads)
        self.places, self.sentinel_places = list(map(_address, params)), list(map(_address, sentinels))
        self.gaps = [(p, p.stride()) for p in params if not p.is_contiguous()]
        # Lazy negation comes from the imaginary part of a conjugate, which has gaps unless it is one element. What is
        # told by now that others come with it, too, is believed.
        told = any(g.is_contiguous() and g.is_neg() for g in grads)
        self.negatable = [i for i, g in enumerate(grads) if told or g.numel() == 1]
        self.native = None
        if HAS_READER and not self.distributed and not any(map(is_portable, {p.device for p in params})):
            lists = everyone, takes_part, self.places, sentinels, self.sentinel_places
            self.native = _native.Whereabouts.of(torch.Tensor, torch.nn.Parameter, *lists)

    def find(self, groups: list[dict[str, Any]]) -> Found | None:
        """Return the addresses of the gradients and who must outlive the launches, or None if something changed."""
        if self.native is not None:
            found = self.native.find(groups, self.sentinels)
            if found is not None and not self._any_negated(found[1]):
                return found
        params: Sequence[Any] = list(chain.from_iterable(map(_params, groups)))
        if len(params) != len(self.everyone) or not all(map(is_, params, self.everyone)):
            return None
        grads = list(map(_grad, params))
        if list(map(type, grads)) != self.types:
            return None
        return self.addresses(grads if self.mask is None else list(compress(grads, self.mask)))

    def addresses(self, grads: list[torch.Tensor]) -> Found | None:
        """Return what `find` does, for the gradients of the members."""
        if self.distributed:
            if any(local(p) is not shard for p, shard in zip(self.owners, self.params, strict=True)):
                return None
            grads = [_distributed.local_gradient(p, g) for p, g in zip(self.owners, grads, strict=True)]
        if not all(map(_is_contiguous, grads)) or self._any_negated(grads):
            if any(g.layout is not torch.strided for g in grads):
                return None
            grads = [g if g.is_contiguous() and not g.is_neg() else dense(g) for g in grads]
        if (
            _kinds(grads) != self.kinds
            or list(map(_address, self.params)) != self.places
            or list(map(_address, self.sentinels)) != self.sentinel_places
            or sum(map(_is_contiguous, self.params)) != len(self.params) - len(self.gaps)
            or any(p.stride() != strides for p, strides in self.gaps)
        ):
            return None
        try:
            return addresses_of(grads), grads
        except RuntimeError:  # no memory of its own: a fresh plan says what it is
            return None

    def _any_negated(self, grads: list[torch.Tensor]) -> bool:
        return any(grads[i].is_neg() for i in self.negatable)


def addresses_of(tensors: list[torch.Tensor]) -> bytes:
    """Return where tensors begin, as int64."""
    return np.fromiter(map(_address, tensors), np.int64, len(tensors)).tobytes()


def _kinds(grads: list[torch.Tensor]) -> tuple[list[torch.dtype], list[int], list[int]]:
    return list(map(_dtype, grads)), list(map(_numel, grads)), list(map(_device, grads))
