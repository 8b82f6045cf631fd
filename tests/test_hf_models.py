"""Models of transformers, quantized as they are loaded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits import functional as F
from fewbits import nn
from hf_models import CONFIGS, IDS, install, load, logits, make_llama

transformers: Any = install()

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(transformers, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=CONFIGS)
def quantized(request: pytest.FixtureRequest, base: Path) -> tuple[str, Any]:
    return request.param, load(transformers, base, request.param)


def test_availability() -> None:
    import accelerate.utils
    import bitsandbytes
    from transformers.utils import is_bitsandbytes_available

    assert is_bitsandbytes_available()
    assert accelerate.utils.is_bnb_available()
    assert bitsandbytes.nn.Linear4bit is nn.Linear4bit


def test_layers_are_quantized(quantized: tuple[str, Any]) -> None:
    name, model = quantized
    expected = nn.Linear8bitLt if name.startswith("int8") else nn.Linear4bit
    found = {key.rpartition(".")[2] for key, module in model.named_modules() if type(module) is expected}
    assert found == set(LAYERS)
    assert model.num_parameters() == 90432
    assert model.get_memory_footprint() < 0.5 * 4 * 90432
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"": torch.device("cpu")}])
@pytest.mark.parametrize("name", ["nf4-double", "int8"])
def test_device_maps(base: Path, name: str, device_map: Any) -> None:
    plain, mapped = load(transformers, base, name), load(transformers, base, name, device_map=device_map)
    assert torch.equal(logits(plain), logits(mapped))


def test_values_are_those_of_the_weights(quantized: tuple[str, Any], base: Path) -> None:
    name, model = quantized
    dtype = CONFIGS[name][1]
    original = load(transformers, base, dtype=dtype)
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear4bit):
            weight, state = module.weight, module.weight.quant_state
            codes, made = F.quantize_4bit(
                original.get_submodule(key).weight.data,
                quant_type=state.quant_type,
                compress_statistics=state.nested,
                quant_storage=weight.dtype,
            )
            assert torch.equal(codes.view(torch.uint8), weight.data.view(torch.uint8))
            assert made == state
        elif isinstance(module, nn.Linear8bitLt):
            codes, SCB, _ = F.int8_vectorwise_quant(original.get_submodule(key).weight.data)
            assert torch.equal(codes, module.weight.data)
            assert torch.equal(SCB, module.state_dict()["SCB"])
    # Random weights say little, but the error of a model is of the order of that of its weights.
    difference = (logits(model).float() - logits(original).float()).norm() / logits(original).float().norm()
    assert difference < (0.05 if name.startswith("int8") else 0.25)


def test_generate(quantized: tuple[str, Any]) -> None:
    _, model = quantized
    tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False)
    assert tokens.shape == (2, 14)
    step = model(tokens[:, :-1]).logits.argmax(-1)[:, -1]
    assert torch.equal(step, tokens[:, -1])


def test_save_and_reload(quantized: tuple[str, Any], tmp_path: Path) -> None:
    name, model = quantized
    before = logits(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "bitsandbytes"
    safetensors = pytest.importorskip("safetensors.torch")
    keys = set(safetensors.load_file(tmp_path / "model.safetensors"))
    prefix = "model.layers.0.mlp.up_proj."
    own = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
    if name.startswith("int8"):
        assert own == {"weight", "SCB", "weight_format"}
    else:
        kind = "fp4" if name == "fp4" else "nf4"
        nested = {"weight.nested_absmax", "weight.nested_quant_map"} if name == "nf4-double" else set()
        assert own == {
            *("weight", "weight.absmax", "weight.quant_map", f"weight.quant_state.bitsandbytes__{kind}"),
            *nested,
        }
    reloaded = load(transformers, tmp_path, dtype=CONFIGS[name][1])
    assert torch.equal(logits(reloaded), before)
    assert torch.equal(logits(model), before), "saving or loading changed the model"
    # transformers 5 does not save such a model again: look at what it would.
    held = reloaded.state_dict()
    for key, tensor in safetensors.load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(held[key].view(torch.uint8), tensor.view(torch.uint8)), key


def test_dequantize(quantized: tuple[str, Any], base: Path) -> None:
    name, _ = quantized
    model = load(transformers, base, name)
    before = logits(model)
    plain = model.dequantize()
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    after = logits(plain)
    tolerance = 0.05 if name.startswith("int8") or CONFIGS[name][1] is torch.bfloat16 else 0.01
    assert (after.float() - before.float()).norm() / before.float().norm() < tolerance


def test_copies(quantized: tuple[str, Any]) -> None:
    _, model = quantized
    before = logits(model)
    duplicate = copy.deepcopy(model)
    assert torch.equal(logits(duplicate), before)
    assert duplicate.model.layers[0].mlp.up_proj.weight.data_ptr() != (
        model.model.layers[0].mlp.up_proj.weight.data_ptr()
    )


def test_conv1d_is_transposed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=128, n_positions=32, n_embd=64, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for name, tolerance in (("fp4", 0.3), ("int8", 0.05)):
        model, original = load(transformers, tmp_path, name), load(transformers, tmp_path, dtype=torch.float32)
        difference = (logits(model) - logits(original)).norm() / logits(original).norm()
        assert difference < tolerance


def test_skipped_modules(base: Path) -> None:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "down_proj"])
    model = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear4bit
