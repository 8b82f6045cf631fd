"""Quantizing a directory of safetensors: which tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checkpoint_files import write_checkpoint
from fewbits._selection import matches
from fewbits.checkpoint import quantize_checkpoint


@pytest.mark.parametrize(("name", "quantized"), [
    ("model.layers.0.mlp.gate_proj", True),
    ("encoder.layer.0.output.dense", True),
    ("time_embedding.linear_1", True),
    ("model.layers.0.mlp.experts.3.w1", True),
    ("transformer.wte", False),
    ("shared", False),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", False),
    ("embeddings.word_embeddings", False),
    ("lm_head", False),
    ("model.lm_head.dense", False),
    ("score", False),
    ("output", False),
    ("model.layers.0.block_sparse_moe.gate", False),
    ("model.layers.0.q_proj.lora_A", False),
    ("model.layers.0.post_norm", False),
    ("encoder.block.0.layer.1.DenseReluDense.wi", True),
    ("encoder.block.0.layer.1.DenseReluDense.wo", False),
    ("qformer.encoder.layer.0.attention.query", False),
    ("proj_out", False),
    ("block.proj_out", True),
    ("predictions.dense", False),
])  # fmt: skip
def test_default_choice(tmp_path: Path, name: str, quantized: bool) -> None:
    src = write_checkpoint(tmp_path / "src", {f"{name}.weight": torch.randn(8, 64)}, None)
    assert (f"{name}.weight" in quantize_checkpoint(src, tmp_path / "dst").errors) == quantized


@pytest.mark.parametrize(("pattern", "names"), [
    ("layers.1", {"model.layers.1.mlp.up.weight"}),
    ("mlp", {"model.layers.1.mlp.up.weight", "model.layers.11.mlp.up.weight"}),
    ("model.layers.1*", {"model.layers.1.mlp.up.weight", "model.layers.11.mlp.up.weight", "model.layers.1.q.weight"}),
    ("*.q", {"model.layers.1.q.weight"}),
    ("re:layers\\.1\\.", {"model.layers.1.mlp.up.weight", "model.layers.1.q.weight"}),
    ("re:^layers", set()),
    ("up_proj", set()),
])  # fmt: skip
def test_skip_patterns(pattern: str, names: set[str]) -> None:
    every = ["model.layers.1.mlp.up.weight", "model.layers.11.mlp.up.weight", "model.layers.1.q.weight"]
    if pattern == "layers.1":
        names = names | {"model.layers.1.q.weight"}
    assert {n for n in every if matches(pattern, n)} == names


def test_skip_that_names_nothing_is_noted(source: Path, tmp_path: Path) -> None:
    report = quantize_checkpoint(source, tmp_path / "dst", skip=["layres.1"])
    assert any("layres.1" in n for n in report.notes)


def test_what_a_loader_would_skip_is_not_quantized(tmp_path: Path) -> None:
    """Transformers compares suffixes: skipping `head.out` skips `other.head.out` too."""
    tensors = {f"{n}.weight": torch.randn(8, 64) for n in ("head.out", "other.head.out", "free")}
    src = write_checkpoint(tmp_path / "src", tensors, None)
    report = quantize_checkpoint(src, tmp_path / "dst", skip=["head.out*"])
    assert list(report.errors) == ["free.weight"]
    assert any("other.head.out" in n for n in report.notes)


@pytest.mark.parametrize(("architecture", "other", "expected"), [
    ("BertForPreTraining", "encoder.dense", {"lm_head", "cls.predictions.decoder", "predictions.decoder"}),
    ("WhisperForConditionalGeneration", "encoder.dense", {"lm_head", "proj_out"}),
    ("OtherForConditionalGeneration", "vision.proj_out", {"lm_head"}),
    ("LlamaForCausalLM", "model.dense", {"lm_head"}),
])  # fmt: skip
def test_tied_heads_are_named(tmp_path: Path, architecture: str, other: str, expected: set[str]) -> None:
    """A tied head is not in the file, yet a loader must be told to leave it alone."""
    src = write_checkpoint(tmp_path / "src", {f"{other}.weight": torch.randn(8, 64)}, {"architectures": [architecture]})
    report = quantize_checkpoint(src, tmp_path / "dst")
    assert list(report.errors) == [f"{other}.weight"]
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert set(config["quantization_config"]["llm_int8_skip_modules"]) == expected


def test_experts_are_noted(tmp_path: Path) -> None:
    src = write_checkpoint(tmp_path / "src", {"layers.0.mlp.experts.7.w1.weight": torch.randn(8, 64)}, None)
    assert any("experts" in n for n in quantize_checkpoint(src, tmp_path / "a").notes)
    assert not quantize_checkpoint(src, tmp_path / "b", skip=["experts"]).errors
