"""Small checkpoints for the tests of checkpoint.py, memory_plan.py and the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FORMATS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8rows", False), ("blockwise8", False)]
CONFIG = {
    "architectures": ["TinyForCausalLM"],
    "model_type": "tiny",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "tie_word_embeddings": False,
}
LINEAR = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "mlp.up_proj": (160, 64),
    "mlp.down_proj": (64, 160),
}


def tiny_tensors(dtype: torch.dtype = torch.float32, layers: int = 2) -> dict[str, torch.Tensor]:
    """Tensors of a small language model with everything that must be left alone."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).to(dtype)

    tensors = {
        "model.embed_tokens.weight": normal(100, 64),
        "lm_head.weight": normal(100, 64),
        "model.norm.weight": normal(64),
        "model.rotary.inv_freq": normal(16),
        "model.position_ids": torch.arange(8)[None],
        "model.scale": torch.tensor(0.5, dtype=dtype),
        "model.empty.weight": torch.empty(0, 64, dtype=dtype),
    }
    for i in range(layers):
        for name, shape in LINEAR.items():
            tensors[f"model.layers.{i}.{name}.weight"] = normal(*shape)
        tensors[f"model.layers.{i}.mlp.gate.weight"] = normal(4, 64)
        tensors[f"model.layers.{i}.input_layernorm.weight"] = normal(64)
        tensors[f"model.layers.{i}.self_attn.q_proj.bias"] = normal(64)
    return tensors


def linear_names(layers: int = 2) -> list[str]:
    """Names of the weights that are quantized by default."""
    return [f"model.layers.{i}.{name}.weight" for i in range(layers) for name in LINEAR]


def write_checkpoint(
    path: Path,
    tensors: Mapping[str, torch.Tensor] | None = None,
    config: Mapping[str, Any] | None = CONFIG,
    shards: int = 1,
) -> Path:
    """Write a directory as transformers would."""
    path.mkdir(parents=True)
    tensors = dict(tiny_tensors() if tensors is None else tensors)
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {k: v for j, (k, v) in enumerate(tensors.items()) if j % shards == i}
            save_file(part, path / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def load_directory(path: Path) -> dict[str, torch.Tensor]:
    """Load every safetensors file of a directory with the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        part = load_file(file)
        assert not set(part) & set(tensors)
        tensors |= part
    return tensors


def leftovers(folder: Path) -> list[str]:
    """Everything in a folder, hidden names included."""
    return sorted(p.name for p in folder.iterdir())


def write_llama_8b(path: Path) -> Path:
    """Write the configuration and the headers of a model of the shapes of Llama 3.1 8B: a file full of holes."""
    path.mkdir(parents=True)
    hidden, inner, keys, layers, vocabulary = 4096, 14336, 1024, 32, 128256
    config = CONFIG | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": vocabulary,
    }
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    for i in range(layers):
        prefix = f"model.layers.{i}."
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        for name, rows in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            shapes[f"{prefix}mlp.{name}_proj.weight"] = shape
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (path / "config.json").write_text(json.dumps(config))
    return path
