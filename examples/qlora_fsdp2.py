"""QLoRA on several GPUs with FSDP2: a 4-bit model in shards, LoRA adapters beside it, checkpoints that can be resumed.

::

    torchrun --nproc-per-node 2 examples/qlora_fsdp2.py
    torchrun --nproc-per-node 4 examples/qlora_fsdp2.py --resume run      # on another number of GPUs
    torchrun --nproc-per-node 2 examples/qlora_fsdp2.py --device cpu --steps 10

Needs torch and nothing else: the model is a small decoder with random weights that learns to continue a repeating
sequence. Only the lines marked with a number have to do with 4 bits and shards; in a script for a real model they are
the same:

1. layers are quantized before they are sharded, by the move to the device;
2. `fully_shard` is given layer by layer, as for any model: what is sharded and gathered are the packed bytes and their
   scales, whatever the storage dtype, and there is nothing to set. Embedding and head are units of their own, which
   would be gathered through the whole step otherwise;
3. the optimizer is made after that, from the parameters that are trained;
4. checkpoints are `torch.distributed.checkpoint`'s, of what is trained and of the optimizer.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import fewbits

VOCABULARY, HIDDEN, WIDE, HEADS, LAYERS, TOKENS, PERIOD = 64, 128, 256, 4, 3, 48, 12


class Lora(nn.Module):
    """A layer in 4 bits and its adapter."""

    def __init__(self, k: int, n: int, rank: int = 16) -> None:
        super().__init__()
        self.base = fewbits.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        self.down, self.up = nn.Linear(k, rank, bias=False), nn.Linear(rank, n, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


class Layer(nn.Module):
    """Causal attention and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = Lora(HIDDEN, 3 * HIDDEN), Lora(HIDDEN, HIDDEN)
        self.up, self.down = Lora(HIDDEN, WIDE), Lora(WIDE, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(F.rms_norm(x, (HIDDEN,))).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(F.rms_norm(x, (HIDDEN,)))))


class Model(nn.Module):
    """Embedding, layers, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.positions = nn.Parameter(torch.randn(TOKENS, HIDDEN) * 0.3)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(F.rms_norm(x, (HIDDEN,)))


def batch(step: int, rank: int, device: torch.device) -> torch.Tensor:
    """Sequences that repeat themselves, other ones on each rank."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    start = torch.randint(VOCABULARY, (16, PERIOD), generator=generator)
    return start.repeat(1, -(-(TOKENS + 1) // PERIOD))[:, : TOKENS + 1].to(device)


def checkpoint_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    """Return what a checkpoint holds: everything but the weights in 4 bits, which do not change."""
    weights, states = get_state_dict(model, optimizer)
    return {"model": {k: v for k, v in weights.items() if ".base." not in k}, "optimizer": states, "step": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save", type=Path, metavar="DIR", help="write a checkpoint at the end")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="begin with a checkpoint")
    args = parser.parse_args()

    rank = int(os.environ["RANK"])
    device = torch.device(args.device, int(os.environ["LOCAL_RANK"]) if args.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)  # the same model on every rank

    model = Model()
    for module in model.modules():
        if isinstance(module, fewbits.nn.Linear4bit):
            module.requires_grad_(False)
    model.to(device)  # 1

    for unit in (model.embedding, *model.layers):  # 2
        fully_shard(unit)
    fully_shard(model.head, reshard_after_forward=False)  # the backward pass begins with it
    fully_shard(model)
    for layer, following in zip(model.layers, [*model.layers[1:], model.head], strict=True):
        layer.set_modules_to_forward_prefetch([following])  # while the one before works

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = fewbits.optim.AdamW8bit(trained, lr=1e-2, max_grad_norm=1.0)  # 3

    begin = 0
    if args.resume is not None:  # 4
        state = checkpoint_of(model, optimizer, 0)
        dcp.load(state, checkpoint_id=args.resume)
        options = StateDictOptions(strict=False)
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
        )
        begin = state["step"]

    loss = torch.zeros((), device=device)
    for step in range(begin, begin + args.steps):
        tokens = batch(step, rank, device)
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == begin + args.steps - 1:
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step}: loss {float(mean) / dist.get_world_size():.4f}", flush=True)

    if args.save is not None:  # 4
        dcp.save(checkpoint_of(model, optimizer, begin + args.steps), checkpoint_id=args.save)
        if rank == 0:
            print(f"saved to {args.save}")
    report = optimizer.memory_report()
    if rank == 0:
        print(f"on this rank: adapters {report['parameters']:,} bytes, optimizer states {report['states']:,} bytes")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
