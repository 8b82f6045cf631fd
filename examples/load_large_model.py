"""Load a language model in 8 and in 4 bits, generate with it, and compare the memory with that of 16 bits.

    python examples/load_large_model.py --model path/to/model
    python examples/load_large_model.py --tiny

With ``--limit-mb``, one more run holds at most that many megabytes of weights on the device; accelerate keeps the other
layers on the disk and brings each in when it is needed.

The two lines that a script of one's own needs are ``fewbits.install_as_bitsandbytes()`` and a ``BitsAndBytesConfig``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import fewbits

fewbits.install_as_bitsandbytes()  # before anything can import bitsandbytes

import torch
from support import Measurements, load, model_directory, model_tensors, parser, text_rows
from transformers import BitsAndBytesConfig

from fewbits.memory_plan import plan_memory

NF4: dict[str, Any] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}
CONFIGS: dict[str, BitsAndBytesConfig | None] = {
    "16-bit": None,
    "8-bit": BitsAndBytesConfig(load_in_8bit=True),
    "NF4 double quant": BitsAndBytesConfig(**NF4),
}


def generate(
    path: Path, args: argparse.Namespace, quantization: BitsAndBytesConfig | None, **kwargs: Any
) -> tuple[Any, float]:
    """Load the model and let it go on after a few tokens; return it and the seconds that took."""
    began = time.perf_counter()
    model = load(path, args.device, quantization, **kwargs)
    prompt = text_rows(path, model.config.vocab_size, 16, 1)[0][None].to(args.device)
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=args.tokens, do_sample=False)
    assert tokens.shape[1] > prompt.shape[1]
    return model, time.perf_counter() - began


def main() -> None:
    arguments = parser("Load a model in 16, 8 and 4 bits and generate.")
    arguments.add_argument("--tokens", type=int, default=16, help="how many to generate (default: 16)")
    arguments.add_argument("--limit-mb", type=float, help="run again with layers on the disk, within this many MB")
    args = arguments.parse_args()
    with model_directory(args) as path, tempfile.TemporaryDirectory() as folder:
        planned = {row.label: row.weight_bytes for row in plan_memory(path).rows}
        table = Measurements(args.device, "loading and generating")
        for label, quantization in CONFIGS.items():
            table.begin()
            model, seconds = generate(path, args, quantization)
            note = f"`fewbits plan` says {planned[label] / 1e6:,.1f} MB of weights; {seconds:.1f} s"
            table.end(label, model_tensors(model), note)
            del model
        if args.limit_mb is not None:
            table.begin()
            limit = {"cpu" if args.device == "cpu" else 0: int(args.limit_mb * 1e6)}
            model, seconds = generate(
                path,
                args,
                BitsAndBytesConfig(**NF4, llm_int8_enable_fp32_cpu_offload=True),  # in 4 bits as in 8
                device_map="auto",
                max_memory={"cpu": 0, **limit},
                offload_folder=folder,
            )
            on_disk = sum(place == "disk" for place in model.hf_device_map.values())
            table.end("NF4, on disk", model_tensors(model), f"{on_disk} modules on the disk; {seconds:.1f} s")
            assert on_disk
    table.show("parameters and buffers")
    assert all(before[1] > after[1] for before, after in zip(table.rows, table.rows[1:], strict=False))


if __name__ == "__main__":
    main()
