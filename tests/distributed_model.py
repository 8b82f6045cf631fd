"""A tiny QLoRA model for the distributed tests: quantized layers of awkward sizes, an adapter beside each."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from fewbits.nn import Linear4bit, Linear8bitLt

# Sizes that divide, blocks that straddle ranks, a last block that is short, fewer blocks than ranks.
LAYERS: list[tuple[str, dict[str, Any], int, int]] = [
    ("4", {"quant_type": "nf4"}, 128, 64),
    ("4", {"quant_type": "nf4", "compress_statistics": False}, 64, 33),
    ("4", {"quant_type": "fp4", "quant_storage": torch.bfloat16}, 33, 50),
    ("4", {"quant_type": "nf4", "quant_storage": torch.float32, "bias": False}, 50, 7),
    ("4", {"quant_type": "nf4"}, 7, 9),
    ("8", {}, 9, 33),
    ("8", {"threshold": 2.0, "bias": False}, 33, 3),
]


class Layer(nn.Module):
    """A quantized linear layer with an adapter beside it."""

    def __init__(self, kind: str, options: dict[str, Any], k: int, n: int, dtype: torch.dtype) -> None:
        super().__init__()
        if kind == "4":
            self.base: nn.Module = Linear4bit(k, n, compute_dtype=dtype, **options)
        else:
            self.base = Linear8bitLt(k, n, has_fp16_weights=False, **options)
        self.down, self.up = nn.Linear(k, 4, bias=False), nn.Linear(4, n, bias=False)
        nn.init.normal_(self.up.weight, std=0.1)
        self.recompute = False

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.base(x) + self.up(self.down(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.run, x, use_reentrant=False) if self.recompute else self.run(x)


def build(device: torch.device, dtype: torch.dtype = torch.float32, layers: list[Any] | None = None) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(*(Layer(*layer, dtype) for layer in layers or LAYERS))
    for name, p in model.named_parameters():
        p.requires_grad_("down" in name or "up" in name)
    return model.to(device)


def shard(model: nn.Sequential, **options: Any) -> nn.Sequential:
    for layer in model:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def inputs(device: torch.device, seed: int, rows: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, LAYERS[0][2], generator=generator).to(device, dtype).requires_grad_()


def backward_of_both(sharded: nn.Module, whole: nn.Module, batch: torch.Tensor) -> None:
    """Give both gradients, of one on this rank's part of the batch, and compare their losses."""
    rank, world = dist.get_rank(), dist.get_world_size()
    loss = (sharded(batch.chunk(world)[rank]) - 0.5).square().mean()
    expected = (whole(batch) - 0.5).square().mean()
    loss.backward()
    expected.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total / world, expected.detach(), rtol=1e-4, atol=1e-6)


def same(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    a, b = (t.detach().contiguous().cpu() for t in (a, b))
    if a.dtype.is_floating_point and a.dtype == b.dtype:  # bytes held as bfloat16 may read as NaN
        width = {2: torch.int16, 4: torch.int32}[a.element_size()]
        a, b = a.view(width), b.view(width)
    if a.shape != b.shape or not torch.equal(a, b):
        raise AssertionError(f"{what}: {a.shape} of {a.dtype} and {b.shape} of {b.dtype} differ")
