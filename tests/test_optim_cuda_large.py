"""A large launch, whose warps take several neighbouring blocks at a time, against launches whose warps take one."""

from __future__ import annotations

import pytest
import torch

from fewbits import optim

pytestmark = pytest.mark.cuda

# 80 M elements in all, so that warps take 16 blocks each; a tensor alone leaves them one. Whole blocks, a part of one
# at the end, and ends that no vector reaches.
SIZES = [7 * 2**20 + 256 * i + (0, 8, 3)[i % 3] for i in range(11)]


def step_twice(name: str, groups: list[list[torch.nn.Parameter]]) -> list[torch.Tensor]:
    """Two steps with one optimizer a group; parameters and states afterwards."""
    found = []
    for params in groups:
        optimizer = getattr(optim, name)(params, lr=1e-3)
        for _ in range(2):
            optimizer.step()
        for p in params:
            state = optimizer.state[p]
            found += [p.detach(), *(state[key] for key in sorted(state) if isinstance(state[key], torch.Tensor))]
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "AdEMAMix8bit", "AdamW32bit"])
def test_bytes_are_those_of_tensors_alone(name: str, dtype: torch.dtype, cuda: torch.device) -> None:
    torch.manual_seed(0)

    def parameter(n: int) -> torch.nn.Parameter:
        p = torch.nn.Parameter((torch.randn(n, device=cuda) * 0.02).to(dtype))
        p.grad = (torch.randn(n, device=cuda) * 1e-3).to(dtype)
        p.grad[::7] = 0
        p.grad[n // 3 : n // 2] = 0
        return p

    def copy(p: torch.nn.Parameter) -> torch.nn.Parameter:
        twin = torch.nn.Parameter(p.detach().clone())
        twin.grad = p.grad
        return twin

    together = [parameter(n) for n in SIZES]
    alone = [[copy(p)] for p in together]
    for ours, expected in zip(step_twice(name, [together]), step_twice(name, alone), strict=True):
        assert torch.equal(ours.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
