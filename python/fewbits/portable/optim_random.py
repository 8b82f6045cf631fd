"""Random numbers that depend on nothing but their place, and the rounding that they decide.

Philox4x32-10 (Salmon et al. 2011). Words are int32 and products are made of 16-bit halves, so that a device needs no
integers of 64 bits.
"""

from __future__ import annotations

import torch


def _signed(word: int) -> int:
    """Return the int32 of the same bits."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def _high(x: torch.Tensor) -> torch.Tensor:
    return (x >> 16) & 0xFFFF


def _product(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the low and the high word of a product of unsigned words."""
    low, high = a & 0xFFFF, _high(a)
    first, second, third = low * (b & 0xFFFF), high * (b & 0xFFFF), low * (b >> 16)
    middle = _high(first) + (second & 0xFFFF) + (third & 0xFFFF)
    return a * _signed(b), high * (b >> 16) + _high(second) + _high(third) + (middle >> 16)


def philox(counter: list[torch.Tensor], key: int) -> list[torch.Tensor]:
    """Return the four words of each of the counters."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        low0, high0 = _product(c0, 0xD2511F53)
        low1, high1 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ _signed(k0), low1, high0 ^ c3 ^ _signed(k1), low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def halves(first: int, count: int, t: int, ordinal: int, seed: int, device: torch.device) -> torch.Tensor:
    """Return sixteen random bits, int32, for each of `count` elements from `first`, a multiple of 8, on.

    Eight elements share a counter, whose words are taken from the low half on.
    """
    numbers = (count + 7) // 8
    # Pieces begin at multiples of a power of two that is no shorter than they are: the high word is the same in all.
    start = first // 8
    low = torch.arange(numbers, dtype=torch.int32, device=device) + _signed(start)
    high = torch.full_like(low, _signed(start >> 32))
    words = philox([low, high, torch.full_like(low, _signed(t)), torch.full_like(low, _signed(ordinal))], seed)
    bits = [part for word in words for part in (word & 0xFFFF, _high(word))]
    return torch.stack(bits, dim=1).view(-1)[:count]


def round_stochastically(p: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """Return float32 numbers as bfloat16, up or down with the probability that makes the mean exact."""
    up = ((p.view(torch.int32) + random) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(torch.isfinite(p), up, p.to(torch.bfloat16))
