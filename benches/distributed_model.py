"""Llama's decoder in plain torch, quantized, with LoRA on every linear layer: what the distributed bench runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fewbits.nn import Linear4bit, Params4bit

CHUNK = 512  # tokens whose logits exist at a time


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    hidden: int
    wide: int
    layers: int
    heads: int
    cached_heads: int
    vocabulary: int

    @property
    def head(self) -> int:
        return self.hidden // self.heads


LLAMA_8B = Shape(4096, 14336, 32, 32, 8, 32000)
LLAMA_70B = Shape(8192, 28672, 4, 64, 8, 32000)  # four layers of it
TINY = Shape(128, 256, 2, 4, 2, 100)


def nf4(k: int, n: int, device: torch.device) -> Linear4bit:
    """A layer of random weights, made where it will be used."""
    layer = Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    values = torch.randn(n, k, dtype=torch.bfloat16, device=device) / k**0.5
    layer.weight = Params4bit(values, requires_grad=False, quant_type="nf4", module=layer).to(device)
    layer.quant_state = layer.weight.quant_state
    return layer


class Lora(nn.Module):
    """A quantized layer and its adapter, in bfloat16."""

    def __init__(self, k: int, n: int, device: torch.device, rank: int) -> None:
        super().__init__()
        self.base = nf4(k, n, device)
        self.down: nn.Linear | None = None
        if rank:
            self.down = nn.Linear(k, rank, bias=False, device=device, dtype=torch.bfloat16)
            self.up = nn.Linear(rank, n, bias=False, device=device, dtype=torch.bfloat16)
            nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        return y if self.down is None else y + self.up(self.down(x))


class Layer(nn.Module):
    """Attention and MLP; `cache` (2, batch, heads, tokens, head) holds keys and values of the tokens before."""

    def __init__(self, shape: Shape, device: torch.device, rank: int) -> None:
        super().__init__()
        self.head = shape.head
        wide = shape.cached_heads * shape.head
        self.norms = nn.ParameterList([torch.ones(shape.hidden, dtype=torch.bfloat16, device=device) for _ in range(2)])
        self.norms.requires_grad_(False)
        self.q, self.k, self.v, self.o = (
            Lora(shape.hidden, n, device, rank) for n in (shape.hidden, wide, wide, shape.hidden)
        )
        self.gate, self.up = (Lora(shape.hidden, shape.wide, device, rank) for _ in range(2))
        self.down = Lora(shape.wide, shape.hidden, device, rank)

    def heads_of(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head)).transpose(1, 2)

    def run(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> torch.Tensor:
        h = F.rms_norm(x, x.shape[-1:], self.norms[0])
        q, k, v = (self.heads_of(f(h)) for f in (self.q, self.k, self.v))
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        h = F.rms_norm(x, x.shape[-1:], self.norms[1])
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> torch.Tensor:
        if torch.is_grad_enabled():
            return checkpoint(self.run, x, cache, use_reentrant=False)
        return self.run(x, cache)


class Head(nn.Module):
    """The last product and the loss, with the logits of a few tokens at a time.

    One unit for FSDP2: its weight is gathered once for all pieces, forward, and kept until they are done backward.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__()
        self.linear = nn.Linear(shape.hidden, shape.vocabulary, bias=False, device=device, dtype=torch.bfloat16)

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        pieces = zip(hidden.flatten(0, 1).split(CHUNK), labels.flatten().split(CHUNK), strict=True)
        return torch.stack([checkpoint(self.loss_of, *piece, use_reentrant=False) for piece in pieces]).sum()

    def loss_of(self, hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.linear(hidden).float(), wanted, reduction="sum")


class Model(nn.Module):
    """Embedding, layers, head. The embedding and the head stay in bfloat16; adapters alone are trained."""

    def __init__(self, shape: Shape, device: torch.device, rank: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden, device=device, dtype=torch.bfloat16)
        self.layers = nn.ModuleList([Layer(shape, device, rank) for _ in range(shape.layers)])
        self.head = Head(shape, device)
        for part in (self.embedding, self.head):
            part.requires_grad_(False)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean loss."""
        x = self.embedding(tokens)
        if torch.is_grad_enabled():
            x.requires_grad_()
        for layer in self.layers:
            x = layer(x)
        return self.head(x, labels) / labels.numel()


def packed_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the weights in 4 bits with their scales, and of all parameters with those."""
    packed = total = 0
    for module in model.modules():
        size = sum(p.nbytes for p in module.parameters(recurse=False))
        state = getattr(module, "quant_state", None)
        if state is not None:
            size += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
            packed += size
        total += size
    return packed, total
