"""Train all parameters of a 16-bit language model with an 8-bit optimizer, and compare with torch's.

    python examples/optimizer_8bit.py --model path/to/model
    python examples/optimizer_8bit.py --tiny

One line changes: ``torch.optim.AdamW(...)`` becomes ``fewbits.optim.AdamW8bit(...)``. With the Trainer of transformers
it is ``optim="adamw_8bit"`` instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support import Measurements, held_bytes, load, model_directory, model_tensors, parser, text_rows

from fewbits.optim import AdamW, AdamW8bit

# torch keeps the two averages in the dtype of the parameters, bfloat16 here, and rounds every update to it.
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "torch.optim.AdamW, 16 bits": torch.optim.AdamW,
    "AdamW, 32 bits": lambda *args, **kwargs: AdamW(*args, **kwargs, stochastic_rounding=True),
    "AdamW8bit": lambda *args, **kwargs: AdamW8bit(*args, **kwargs, stochastic_rounding=True),
}


def train(path: Path, args: argparse.Namespace, make: Callable[..., Any]) -> tuple[Any, Any, list[float]]:
    """Return the model, the optimizer and the loss of each step."""
    model = load(path, args.device)
    model.train()
    rows = text_rows(path, model.config.vocab_size, args.length, args.steps * args.batch)
    optimizer = make(model.parameters(), lr=args.lr)
    losses = []
    for step in range(args.steps):
        batch = torch.stack(rows[step * args.batch : (step + 1) * args.batch]).to(args.device)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return model, optimizer, torch.stack(losses).tolist()


def main() -> None:
    arguments = parser("Train with torch's AdamW, with 32-bit and with 8-bit states.")
    arguments.add_argument("--steps", type=int, default=10)
    arguments.add_argument("--batch", type=int, default=2)
    arguments.add_argument("--length", type=int, default=128, help="tokens in a row (default: 128)")
    arguments.add_argument("--lr", type=float, default=1e-3)
    args = arguments.parse_args()
    table = Measurements(args.device, "training all parameters in bfloat16")
    sizes, learned = [], []
    with model_directory(args) as path:
        for label, make in OPTIMIZERS.items():
            table.begin()
            model, optimizer, losses = train(path, args, make)
            states = [value for state in optimizer.state.values() for value in state.values()]
            sizes.append(held_bytes(states))
            note = f"states {sizes[-1] / 1e6:,.1f} MB, loss {losses[0]:.3f} -> {losses[-1]:.3f}"
            table.end(label, [*model_tensors(model), *states], note)
            learned.append(losses[-1] < losses[0])
            del model, optimizer, states
    table.show("parameters, gradients and optimizer states")
    assert all(learned)
    assert sizes[2] < sizes[0] < sizes[1]


if __name__ == "__main__":
    main()
