"""`Embedding8bit` and `OutlierAwareLinear`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fewbits.functional as F
from arrays import DTYPES
from fewbits.nn import Embedding8bit, OutlierAwareLinear
from linear8bit_layers import K, N, activations, randn


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype: torch.dtype, device: torch.device) -> None:
    table = Embedding8bit(10, 33, dtype=dtype)
    values = table.weight.data.clone()
    table = table.to(device)
    indices = torch.tensor([[1, 9], [0, 1]], device=device)
    got = table(indices)
    assert (got.shape, got.dtype) == ((2, 2, 33), dtype)
    codes, stats, _ = F.int8_vectorwise_quant(values)
    assert torch.equal(got.cpu(), F.int8_vectorwise_dequant(codes, stats)[indices.cpu()].to(dtype))
    again = Embedding8bit(10, 33, dtype=dtype)
    again.load_state_dict(table.state_dict())
    assert torch.equal(again(indices.cpu()), got.cpu())
    assert torch.equal(copy.deepcopy(table)(indices.int()), got)


def test_wrong_embeddings() -> None:
    with pytest.raises(RuntimeError, match=r"Embedding8bit.*\.to\('cpu'\)"):
        Embedding8bit(4, 8)(torch.tensor([1]))
    table = Embedding8bit(4, 8).to("cpu")
    with pytest.raises(IndexError):
        table(torch.tensor([4]))
    with pytest.raises(ValueError, match="input: expected"):
        table(torch.tensor([1.0]))


class Kept(OutlierAwareLinear):
    def quantize_weight(self, w: torch.Tensor, outlier_idx: torch.Tensor) -> torch.Tensor:
        codes, stats, _ = F.int8_vectorwise_quant(w)
        kept = F.int8_vectorwise_dequant(codes, stats)
        kept[:, outlier_idx] = w[:, outlier_idx]
        return kept

    def forward_with_outliers(self, x: torch.Tensor, outlier_idx: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def test_outlier_aware_linear(device: torch.device) -> None:
    layer = Kept(K, N).to(device)
    before, x = layer.weight.detach().clone(), activations(4, K).to(device)
    y = layer(x)
    assert layer.is_quantized
    assert layer.outlier_dim is not None
    columns = layer.outlier_dim
    assert torch.equal(columns, (x.abs() >= 6).any(0).nonzero().flatten())
    assert torch.equal(layer.weight[:, columns], before[:, columns])
    assert not torch.equal(layer.weight, before)
    assert torch.equal(layer(x), y)
    with pytest.raises(NotImplementedError, match="quantize_weight"):
        OutlierAwareLinear(K, N)(randn(1, K))
