"""A language model small enough for a test, and real text for it: the topics of Python's own help."""

from __future__ import annotations

from collections.abc import Callable
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F

CONTEXT, WIDTH, HIDDEN, BATCH = 12, 32, 128, 96


class Model(torch.nn.Module):
    """The next character from the last twelve, by two layers."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(characters, WIDTH)
        self.hidden = torch.nn.Linear(CONTEXT * WIDTH, HIDDEN)
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.out = torch.nn.Linear(HIDDEN, characters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(F.gelu(self.norm(self.hidden(self.embedding(x).flatten(1)))))


def corpus() -> tuple[torch.Tensor, int]:
    """The text as numbers, and how many characters there are."""
    text = "\n".join(topics[name] for name in sorted(topics))[:200_000]
    known = sorted(set(text))
    index = {character: i for i, character in enumerate(known)}
    return torch.tensor([index[character] for character in text]), len(known)


def train(
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], steps: int, device: torch.device
) -> tuple[float, torch.optim.Optimizer]:
    """Return the mean loss on text that was not trained on, and the optimizer.

    One thread: these products are so small that two would wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(make, steps, device)
    finally:
        torch.set_num_threads(threads)


def _train(
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], steps: int, device: torch.device
) -> tuple[float, torch.optim.Optimizer]:
    text, characters = corpus()
    windows = text.unfold(0, CONTEXT + 1, 1).to(device)
    split = len(windows) * 9 // 10
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model(characters).to(device)
        picks = torch.randint(split, (steps, BATCH))
    optimizer = make(list(model.parameters()))
    for pick in picks:
        batch = windows[pick.to(device)]
        loss = F.cross_entropy(model(batch[:, :-1]), batch[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        held = windows[split::5]
        return F.cross_entropy(model(held[:, :-1]), held[:, -1]).item(), optimizer
