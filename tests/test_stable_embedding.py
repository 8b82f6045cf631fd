"""Embeddings whose optimizer states stay in 32 bits."""

from __future__ import annotations

import pytest
import torch

from fewbits import nn, optim


@pytest.mark.parametrize("cls", [nn.StableEmbedding, nn.Embedding])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_initialization(cls: type, padding_idx: int | None) -> None:
    torch.manual_seed(0)
    table = cls(100, 8192, padding_idx)
    bound = (6 / (100 + 8192)) ** 0.5
    rows = [i for i in range(100) if i != padding_idx]
    weight = table.weight.detach()[rows]
    assert weight.abs().max() <= bound
    assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert padding_idx is None or not table.weight[padding_idx].any()


def test_stable_embedding_normalizes() -> None:
    table = nn.StableEmbedding(10, 32, dtype=torch.bfloat16)
    indices = torch.tensor([[1, 2], [3, 9]])
    rows = table(indices)
    assert rows.shape == (2, 2, 32)
    assert rows.dtype == torch.bfloat16
    assert table.norm.weight.dtype == torch.float32
    expected = torch.nn.functional.layer_norm(table.weight[indices].float(), (32,)).to(torch.bfloat16)
    assert torch.equal(rows, expected)
    assert torch.equal(nn.Embedding(10, 32, _weight=table.weight.float())(indices), table.weight.float()[indices])


def test_states_have_32_bits() -> None:
    optim.GlobalOptimManager.get_instance().initialize()
    other = torch.nn.Linear(128, 64)
    params = list(other.parameters())
    table = nn.StableEmbedding(128, 64)
    optimizer = optim.AdamW8bit([*params, *table.parameters()])
    loss = table(torch.arange(128)).sum() + other(torch.ones(1, 128)).sum()
    loss.backward()
    optimizer.step()
    assert optimizer.state[table.weight]["state1"].dtype == torch.float32
    assert optimizer.state[other.weight]["state1"].dtype == torch.uint8
    optim.GlobalOptimManager.get_instance().initialize()


def test_arguments_of_torch() -> None:
    table = nn.StableEmbedding(10, 4, padding_idx=1, max_norm=0.5, sparse=True)
    table(torch.tensor([1, 2, 2])).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad.is_sparse
    assert table.weight[2].norm() <= 0.5 + 1e-6
