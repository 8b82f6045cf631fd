"""Fine-tune adapters of a language model with peft and the Trainer, over 16-bit weights and over 4-bit ones (QLoRA).

    python examples/qlora.py --model path/to/model --out adapter
    python examples/qlora.py --tiny

The text is the help that comes with Python; the same steps, adapters and optimizer run over both.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import fewbits

fewbits.install_as_bitsandbytes()  # first: `import peft` imports bitsandbytes where it is installed

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from support import Measurements, load, model_directory, model_tensors, parser, text_rows
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


def with_adapters(model: Any, quantized: bool) -> Any:
    """Freeze the model and put adapters beside its linear layers."""
    torch.manual_seed(1)
    if quantized:
        model = prepare_model_for_kbit_training(model)
    else:
        model.enable_input_require_grads()  # as prepare_model_for_kbit_training does: checkpointing needs it
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))


def fine_tune(path: Path, args: argparse.Namespace, quantization: BitsAndBytesConfig | None) -> Trainer:
    """Load, add adapters, train."""
    model = with_adapters(load(path, args.device, quantization), quantization is not None)
    rows = text_rows(path, model.config.vocab_size, args.length, args.steps * args.batch)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            optim="paged_adamw_8bit",
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=1e-3,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=args.device != "cpu",
            use_cpu=args.device == "cpu",
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
        trainer.train()
    return trainer


def main() -> None:
    arguments = parser("Fine-tune adapters over 16-bit and over 4-bit weights.")
    arguments.add_argument("--steps", type=int, default=10)
    arguments.add_argument("--batch", type=int, default=2)
    arguments.add_argument("--length", type=int, default=128, help="tokens in a row (default: 128)")
    arguments.add_argument("--out", type=Path, help="keep the adapters of the 4-bit model in this directory")
    args = arguments.parse_args()
    table = Measurements(args.device, "LoRA of rank 16 on every linear layer")
    learned = []
    with model_directory(args) as path:
        for label, quantization in (("16-bit", None), ("NF4 double quant", NF4)):
            table.begin()
            trainer = fine_tune(path, args, quantization)
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
            assert type(optimizer) is fewbits.optim.AdamW
            states = [value for state in optimizer.state.values() for value in state.values()]
            table.end(label, [*model_tensors(trainer.model), *states], f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
            learned.append(losses[-1] < losses[0])
            if quantization is not None and args.out is not None:
                trainer.model.save_pretrained(args.out)
            del trainer, optimizer, states
    table.show("parameters, gradients and optimizer states")
    assert all(learned)
    assert table.rows[1][1] < table.rows[0][1]


if __name__ == "__main__":
    main()
