"""Tiny random models for the tests with Hugging Face's libraries: nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY = 128
IDS = torch.arange(18).view(2, 9) * 7 % VOCABULARY

# Name, keywords of BitsAndBytesConfig, and the dtype of everything that is not quantized.
CONFIGS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "nf4-double": (
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
        torch.float32,
    ),
    "fp4": ({"load_in_4bit": True}, torch.float32),
    "nf4-bfloat16-storage": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
        torch.bfloat16,
    ),
    "int8": ({"load_in_8bit": True}, torch.float32),
    "int8-no-outliers": ({"load_in_8bit": True, "llm_int8_threshold": 0.0}, torch.bfloat16),
}


def install() -> Any:
    """Return transformers, with fewbits as bitsandbytes; skip where it is not installed."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import fewbits

    fewbits.install_as_bitsandbytes()
    return transformers


def make_llama(transformers: Any, path: Path, hidden: int = 64, bias: bool = False) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        attention_bias=bias,
        mlp_bias=bias,
    )
    model = transformers.LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(path)
    return path


def load(transformers: Any, path: Path, name: str | None = None, **kwargs: Any) -> Any:
    """Load a model, quantized as a configuration says, or as it was saved."""
    dtype = CONFIGS[name][1] if name is not None else kwargs.pop("dtype")
    if name is not None:
        kwargs["quantization_config"] = transformers.BitsAndBytesConfig(**CONFIGS[name][0])
    # `torch_dtype` is what both major versions take.
    return transformers.AutoModelForCausalLM.from_pretrained(path, torch_dtype=dtype, **kwargs)


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        values: torch.Tensor = model(IDS).logits
    return values


DATA = [{"input_ids": row, "labels": row} for row in IDS for _ in range(4)]


def train(transformers: Any, model: Any, path: Path, *, steps: int = 3, resume: Any = None, **kwargs: Any) -> Any:
    """Train for a few steps; return the trainer."""
    arguments = transformers.TrainingArguments(
        str(path),
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        **{"save_strategy": "no", **kwargs},
    )
    evaluation = DATA[:2] if "eval_strategy" in kwargs else None
    trainer = transformers.Trainer(model, arguments, train_dataset=DATA, eval_dataset=evaluation)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
