"""Every kind of optimizer step that the native tests take: families with their choices, lengths, addresses, groups.

``python optim_cases.py`` takes them all on the CPU, checks each against the oracle, and prints the SIMD path in use: it
is run once for each (``FEWBITS_SIMD``).
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from arrays import DTYPES
from fewbits import _native
from optim_launch import Launch, make_piece
from oracle_optim import AMSGRAD, BIAS_CORRECTION, CENTERED, DECOUPLED, FAMILIES, NESTEROV, Group
from strategies import RECIPES

# Every choice of each family; those marked 32 have no 8-bit form.
VARIANTS: dict[str, list[Group]] = {
    "adam": [
        Group(weight_decay=0.01, flags=DECOUPLED),
        Group(weight_decay=0.01),
        Group(flags=DECOUPLED, eps=0.0, beta1=0.0),
        Group(weight_decay=0.1, flags=DECOUPLED | AMSGRAD),
    ],
    "ademamix": [
        Group(weight_decay=0.01),
        Group(t_alpha=50.0, t_beta3=80.0, beta3=0.999),
        Group(t_alpha=2.0, t_beta3=2.0, alpha=3.0),
    ],
    "lion": [Group(lr=1e-4, beta2=0.99, weight_decay=0.1), Group(lr=1e-4, beta1=0.0)],
    "sgd": [
        Group(weight_decay=1e-4),
        Group(beta1=0.0, weight_decay=1e-4),
        Group(flags=NESTEROV, lr=0.1),
        Group(dampening=0.3),
    ],
    "rmsprop": [
        Group(beta1=0.99, beta2=0.0, weight_decay=0.01),
        Group(beta1=0.99, beta2=0.9),
        Group(beta1=0.9, beta2=0.0, flags=CENTERED, eps=1e-3),
        Group(beta1=0.9, beta2=0.5, flags=CENTERED),
    ],
    "adagrad": [Group(lr=0.01, lr_decay=0.1, weight_decay=0.01, eps=1e-10), Group(lr=0.01)],
    "lamb": [
        Group(weight_decay=0.01, flags=DECOUPLED | BIAS_CORRECTION),
        Group(weight_decay=0.01, flags=BIAS_CORRECTION),
        Group(flags=DECOUPLED, weight_decay=0.01, eps=1e-6),
    ],
    "lars": [
        Group(weight_decay=1e-3, trust=0.02, lr=0.1),
        Group(beta1=0.0, trust=0.02, lr=0.1),
        Group(flags=NESTEROV, lr=0.1, dampening=0.1),
    ],
}


def has_8bit(family: str, group: Group) -> bool:
    return not (group.has(AMSGRAD | CENTERED) or (family == "rmsprop" and group.beta2 != 0))


CASES = [
    (family, i, bits)
    for family in FAMILIES
    for i, group in enumerate(VARIANTS[family])
    for bits in (8, 32)
    if bits == 32 or has_8bit(family, group)
]
PAIRS = list(itertools.product(DTYPES, DTYPES))
LENGTHS = [0, 1, 255, 256, 257, 4095, 4096, 4097, 9001]


def launch_of(
    family: str, group: Group, bits: int, pair: tuple[torch.dtype, torch.dtype], recipes: list[str], seed: int,
    device: torch.device, *, zero: bool = True, t: int = 0, stochastic: bool = False, lr_on_device: bool = False,
) -> Launch:  # fmt: skip
    """Tensors of awkward lengths and addresses, in two groups."""
    groups = [group, Group(**{**vars(group), "lr": group.lr * 0.37, "weight_decay": group.weight_decay * 2})]
    pieces = [
        make_piece(family, groups[i % 2], i % 2, n, bits, pair, recipes, seed + 10 * i, i % 4, t + i, 256 * i, 1000 + i,
                   zero)
        for i, n in enumerate(LENGTHS)
    ]  # fmt: skip
    for piece in pieces:
        piece.ratio = np.float32(1 + piece.p.size % 7 / 8)
    return Launch(family, bits, groups, pieces, pair, device, seed * 12345, stochastic, lr_on_device)


def run(launch: Launch, steps: int, **arguments: torch.Tensor) -> None:
    __tracebackhide__ = True
    for _ in range(steps):
        launch.expect()
        launch.step(**arguments)
        launch.check()


if __name__ == "__main__":
    cpu, recipes = torch.device("cpu"), [*RECIPES]
    for seed, (family, variant, bits) in enumerate(CASES):
        for pair in PAIRS:
            for stochastic in (False, True):
                some = recipes[seed % 5 :: 5]
                run(launch_of(family, VARIANTS[family][variant], bits, pair, some, seed, cpu, zero=False, t=seed,
                              stochastic=stochastic), 1)  # fmt: skip
    print(_native.cpu_info()["path"])
