"""Load a language model in 8 and in 4 bits, generate with it, and compare the memory with that of 16 bits.

    python examples/load_large_model.py --model path/to/model
    python examples/load_large_model.py --tiny

The two lines that a script of one's own needs are ``fewbits.install_as_bitsandbytes()`` and a ``BitsAndBytesConfig``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import fewbits

fewbits.install_as_bitsandbytes()  # before anything can import bitsandbytes

import torch
from support import Measurements, load, model_directory, model_tensors, parser, text_rows
from transformers import BitsAndBytesConfig

from fewbits.memory_plan import plan_memory

CONFIGS: dict[str, BitsAndBytesConfig | None] = {
    "16-bit": None,
    "8-bit": BitsAndBytesConfig(load_in_8bit=True),
    "NF4 double quant": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
}


def generate(path: Path, args: argparse.Namespace, quantization: BitsAndBytesConfig | None) -> tuple[Any, float]:
    """Load the model and let it go on after a few tokens; return it and the seconds that took."""
    began = time.perf_counter()
    model = load(path, args.device, quantization)
    prompt = text_rows(path, model.config.vocab_size, 16, 1)[0][None].to(args.device)
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=args.tokens, do_sample=False)
    assert tokens.shape[1] > prompt.shape[1]
    return model, time.perf_counter() - began


def main() -> None:
    arguments = parser("Load a model in 16, 8 and 4 bits and generate.")
    arguments.add_argument("--tokens", type=int, default=16, help="how many to generate (default: 16)")
    args = arguments.parse_args()
    with model_directory(args) as path:
        planned = {row.label: row.weight_bytes for row in plan_memory(path).rows}
        table = Measurements(args.device, "loading and generating")
        for label, quantization in CONFIGS.items():
            table.begin()
            model, seconds = generate(path, args, quantization)
            note = f"`fewbits plan` says {planned[label] / 1e6:,.1f} MB of weights; {seconds:.1f} s"
            table.end(label, model_tensors(model), note)
            del model
    table.show("parameters and buffers")
    assert table.rows[0][1] > table.rows[1][1] > table.rows[2][1]


if __name__ == "__main__":
    main()
