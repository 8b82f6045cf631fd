"""What each of several GPUs needs: the part of `fewbits.memory_plan` that is about a strategy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .memory_plan import Estimate

Strategy = Literal["ddp", "fsdp", "tp"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp", "tp")
_LAYER = re.compile(r"(^|.*\.)(?:layers|layer|h|blocks|block)\.\d+(?=\.)")

# By strategy, what is divided among the GPUs. Everything else each of them has whole.
_DIVIDED = {"ddp": (), "fsdp": ("LoRA and optimizer",), "tp": ("KV cache", "dequantized weight")}


@dataclass(frozen=True)
class Gpus:
    """Several GPUs and how they share a model.

    Attributes
    ----------
    count : int
    strategy : {"ddp", "fsdp", "tp"}
        Copies of the model; shards of everything, gathered layer by layer; parts of every linear layer.
    """

    count: int = 1
    strategy: Strategy = "ddp"

    def weights(self, quantized: int, others: int) -> int:
        """Return the bytes of weights that one GPU keeps."""
        if self.strategy == "fsdp":
            return -(-(quantized + others) // self.count)
        return -(-quantized // self.count) + others if self.strategy == "tp" else quantized + others

    def share(self, estimate: Estimate) -> Estimate:
        """Return what an estimate for a whole model comes to on one GPU."""
        if self.count == 1 or estimate.name not in _DIVIDED[self.strategy]:
            return estimate
        return replace(
            estimate, bytes=-(-estimate.bytes // self.count), formula=f"({estimate.formula}) / {self.count} GPUs"
        )

    def extra(self, label: str, sizes: Mapping[str, int], adapters: int) -> list[Estimate]:
        """Return what there is on a GPU only because there are others.

        Parameters
        ----------
        label : str
            The format.
        sizes : mapping
            Bytes of each tensor in it, by name.
        adapters : int
            Parameters of the adapters.
        """
        from .memory_plan import Estimate

        if self.count == 1 or self.strategy == "tp":
            return []
        if self.strategy == "ddp":
            formula = f"{adapters} parameters of adapters x 4 bytes (float32)"
            return [Estimate("gradient buckets", formula, adapters * 4, training=True, inference=False)]
        layers = layer_sizes(sizes)
        largest = max(layers.values(), default=0)
        rest = sum(sizes.values()) - sum(layers.values())
        formula = f"largest layer {largest} x 2 (one works, the next is gathered) + outside the layers {rest} bytes"
        return [Estimate(f"gathered weights, {label}", formula, 2 * largest + rest, training=True, inference=True)]


def layer_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the bytes of each decoder layer, by the prefix of its tensors' names."""
    layers: dict[str, int] = {}
    for name, size in sizes.items():
        match = _LAYER.match(name)
        if match:
            layers[match.group()] = layers.get(match.group(), 0) + size
    return layers


def describe(gpus: Gpus) -> Sequence[str]:
    """Return notes about what the numbers of a plan stand for."""
    if gpus.count == 1:
        return []
    return {
        "ddp": ["ddp: every GPU has the whole model; batch and context are those of one GPU"],
        "fsdp": [
            "fsdp: weights, adapters and optimizer are divided; layers are gathered one at a time; batch and context "
            "are those of one GPU"
        ],
        "tp": [
            "tp: linear layers and the KV cache are divided; batch and context are those of all GPUs together; "
            "activations and adapters are counted whole, an upper bound"
        ],
    }[gpus.strategy]
