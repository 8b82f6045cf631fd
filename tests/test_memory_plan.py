"""Memory of a model: exact where it says so, and every estimate with its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_files import CONFIG, linear_names, load_directory, tiny_tensors, write_checkpoint
from fewbits.checkpoint import UsageError, quantize_checkpoint
from fewbits.memory_gpus import STRATEGIES, Gpus, layer_sizes
from fewbits.memory_plan import MemoryPlan, plan_memory


def estimate(plan: MemoryPlan, name: str) -> int:
    return next(e.bytes for e in plan.estimates if e.name == name)


@pytest.mark.parametrize(("label", "quant_format", "double_quant"), [
    ("8-bit", "int8rows", False), ("NF4", "nf4", False), ("NF4 double quant", "nf4", True)
])  # fmt: skip
def test_weights_are_exact(tmp_path: Path, label: str, quant_format: str, double_quant: bool) -> None:
    """The plan's bytes are those of the tensors that ``quantize`` writes, but for the JSON, which stays on the host."""
    tensors = tiny_tensors(torch.bfloat16)
    src = write_checkpoint(tmp_path / "src", tensors)
    quantize_checkpoint(src, tmp_path / "dst", quant_format=quant_format, double_quant=double_quant)
    written = load_directory(tmp_path / "dst")
    plan = plan_memory(src)
    (row,) = [r for r in plan.rows if r.label == label]
    assert row.weight_bytes == sum(t.nbytes for name, t in written.items() if "quant_state" not in name)
    assert row.other_bytes == sum(t.nbytes for name, t in tensors.items() if name not in linear_names())


def test_sixteen_bits(tmp_path: Path) -> None:
    """Whatever the floats of the file are, 2 bytes each; integers as they are."""
    tensors = tiny_tensors(torch.float32)
    plan = plan_memory(write_checkpoint(tmp_path / "src", tensors))
    expected = sum(t.numel() * 2 if t.is_floating_point() else t.nbytes for t in tensors.values())
    assert plan.rows[0].weight_bytes == expected
    assert plan.linear_layers == len(linear_names())
    assert plan.linear_parameters == sum(tensors[n].numel() for n in linear_names())
    assert plan.linear_parameters + plan.other_parameters == sum(t.numel() for t in tensors.values())


def test_estimates(tmp_path: Path) -> None:
    src = write_checkpoint(tmp_path / "src")
    plan = plan_memory(src, context=100, batch=3, lora_rank=8)
    # 2 layers, 2 key-value heads of 64 / 4, keys and values, 2 bytes.
    assert estimate(plan, "KV cache") == 2 * 2 * 16 * 2 * 100 * 3 * 2
    assert estimate(plan, "LoRA and optimizer") == sum(8 * sum(tiny_tensors()[n].shape) for n in linear_names()) * 16
    assert estimate(plan, "dequantized weight") == 160 * 64 * 2
    assert all(e.formula for e in plan.estimates)
    for row in plan.rows:
        extra = [e for e in plan.estimates if row.label != "16-bit" or e.name != "dequantized weight"]
        assert row.inference_bytes == row.weight_bytes + sum(e.bytes for e in extra if e.inference)
        assert row.training_bytes == row.weight_bytes + sum(e.bytes for e in extra if e.training)


def test_cache_grows_with_context_and_batch(tmp_path: Path) -> None:
    src = write_checkpoint(tmp_path / "src")
    small, large = plan_memory(src, context=10), plan_memory(src, context=20, batch=2)
    assert estimate(large, "KV cache") == 4 * estimate(small, "KV cache")


@pytest.mark.parametrize("config", [
    None, {}, CONFIG | {"architectures": ["BertModel"]}, CONFIG | {"num_hidden_layers": "many"}, {"architectures": None}
])  # fmt: skip
def test_no_cache_without_a_generating_model(tmp_path: Path, config: dict[str, object] | None) -> None:
    plan = plan_memory(write_checkpoint(tmp_path / "src", config=config))
    assert all(e.name != "KV cache" for e in plan.estimates)
    assert any("no KV cache" in n for n in plan.notes)


def test_nested_config(tmp_path: Path) -> None:
    config = {"architectures": ["TinyForConditionalGeneration"], "text_config": CONFIG}
    plan = plan_memory(write_checkpoint(tmp_path / "src", config=config), context=10)
    assert estimate(plan, "KV cache") == 2 * 2 * 16 * 2 * 10 * 2


def test_latent_attention_heads(tmp_path: Path) -> None:
    config = CONFIG | {"qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
    plan = plan_memory(write_checkpoint(tmp_path / "src", config=config), context=10)
    assert estimate(plan, "KV cache") == 2 * 2 * (20 + 10) * 10 * 2


def test_no_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = write_checkpoint(tmp_path / "src")
    monkeypatch.setattr("fewbits._safetensors.TensorEntry.read", lambda self: pytest.fail("read a tensor"))
    plan_memory(src)


def test_refused(tmp_path: Path) -> None:
    src = write_checkpoint(tmp_path / "src")
    quantize_checkpoint(src, tmp_path / "dst")
    with pytest.raises(UsageError, match="already quantized"):
        plan_memory(tmp_path / "dst")
    with pytest.raises(UsageError, match="no such directory"):
        plan_memory(tmp_path / "none")
    for option in ("context", "batch", "lora_rank"):
        with pytest.raises(UsageError, match=f"{option}: got 0"):
            plan_memory(src, **{option: 0})


# ---- several GPUs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "tp"])
def test_one_gpu_shares_with_nobody(tmp_path: Path, strategy: Any) -> None:
    src = write_checkpoint(tmp_path / "src")
    assert plan_memory(src, gpus=1, strategy=strategy) == plan_memory(src)


def test_gpus(tmp_path: Path) -> None:
    """What is divided, and what is there because of the others."""
    src = write_checkpoint(tmp_path / "src")
    one = plan_memory(src)
    plans = {strategy: plan_memory(src, gpus=4, strategy=strategy) for strategy in STRATEGIES}
    adapters = sum(16 * sum(tiny_tensors()[n].shape) for n in linear_names())
    assert estimate(plans["ddp"], "gradient buckets") == adapters * 4
    lora = estimate(one, "LoRA and optimizer")
    assert estimate(plans["fsdp"], "LoRA and optimizer") == lora // 4
    assert estimate(plans["tp"], "LoRA and optimizer") == lora
    assert estimate(plans["tp"], "KV cache") == estimate(one, "KV cache") // 4
    for i, row in enumerate(one.rows):
        ddp, fsdp, tp = (plans[strategy].rows[i] for strategy in STRATEGIES)
        assert ddp.inference_bytes == row.inference_bytes
        assert ddp.training_bytes == row.training_bytes + adapters * 4
        temporary = estimate(one, "dequantized weight") if row.label != "16-bit" else 0
        cut = row.quantized_bytes - -(-row.quantized_bytes // 4) + temporary - -(-temporary // 4)
        assert row.inference_bytes - tp.inference_bytes == cut + estimate(one, "KV cache") * 3 // 4
        gathered = estimate(plans["fsdp"], f"gathered weights, {row.label}")
        saved = row.weight_bytes - -(-row.weight_bytes // 4)
        assert row.inference_bytes - fsdp.inference_bytes == saved - gathered
        assert row.training_bytes - fsdp.training_bytes == saved + lora * 3 // 4 - gathered
        assert (ddp.weight_bytes, fsdp.weight_bytes) == (row.weight_bytes, row.weight_bytes)


def test_layers_are_gathered_one_at_a_time() -> None:
    sizes = {"layers.0.a.weight": 5, "layers.0.b.weight": 2, "layers.1.a.weight": 4, "head.weight": 9}
    assert layer_sizes(sizes) == {"layers.0": 7, "layers.1": 4}
    (gathered,) = Gpus(2, "fsdp").extra("NF4", sizes, 0)
    assert gathered.bytes == 2 * 7 + 9


def test_wrong_strategy(tmp_path: Path) -> None:
    src = write_checkpoint(tmp_path / "src")
    with pytest.raises(UsageError, match="strategy: got 'pp', expected one of ddp, fsdp, tp"):
        plan_memory(src, gpus=2, strategy="pp")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="gpus: got 0"):
        plan_memory(src, gpus=0)
