"""Models that do not fit: layers on disk, quantized as they are loaded, over several forwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits import nn
from hf_models import IDS, install, load, logits, make_llama

transformers: Any = install()

CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


PLACES = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(transformers, tmp_path_factory.mktemp("base"))


def load_offloaded(path: Path, folder: Path, name: str, *, flag: bool, **kwargs: Any) -> Any:
    config = transformers.BitsAndBytesConfig(**CONFIGS[name], llm_int8_enable_fp32_cpu_offload=flag)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=config,
        torch_dtype=torch.float32,
        offload_folder=folder,
        **{"device_map": "auto", "max_memory": {"cpu": 60000}, **kwargs},
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU would hold all of it")
@pytest.mark.parametrize("name", CONFIGS)
def test_quantized_on_the_fly(base: Path, tmp_path: Path, name: str) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=transformers.BitsAndBytesConfig(**CONFIGS[name]), torch_dtype=torch.float32
    )
    expected = logits(plain)
    model = load_offloaded(base, tmp_path, name, flag=True)
    assert "disk" in model.hf_device_map.values() or set(map(str, model.hf_device_map.values())) == {"disk"}
    layer = model.model.layers[1].mlp.up_proj
    assert type(layer) in (nn.Linear4bit, nn.Linear8bitLt)
    assert layer.weight.is_meta
    first = logits(model)
    assert layer.weight.is_meta, "the weights stayed in memory"
    for _ in range(3):
        assert torch.equal(logits(model), first)
    # accelerate takes 8-bit weights through float16, and quantizes again.
    torch.testing.assert_close(first, expected, rtol=0, atol=0 if name == "nf4" else 0.05)
    tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)
    assert tokens.shape == (2, 12)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_map_of_places_leaves_layers_unquantized(base: Path, tmp_path: Path, name: str) -> None:
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = load_offloaded(base, tmp_path, name, flag=True, device_map={**places, "model.layers.1": "disk"})
    assert type(model.model.layers[1].mlp.up_proj) is torch.nn.Linear
    torch.testing.assert_close(logits(model), logits(load(transformers, base, dtype=torch.float32)), rtol=0, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU would hold all of it")
@pytest.mark.parametrize("name", CONFIGS)
def test_without_the_flag_the_error_says_so(base: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="llm_int8_enable_fp32_cpu_offload"):
        load_offloaded(base, tmp_path, name, flag=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU would hold all of it")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("places", ["auto", "map"])
def test_a_prequantized_model_is_right_or_refused(base: Path, tmp_path: Path, name: str, places: str) -> None:
    config = transformers.BitsAndBytesConfig(**CONFIGS[name])
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, torch_dtype=torch.float32
    )
    expected = logits(plain)
    plain.save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "config.json").read_text())
    settings["quantization_config"]["llm_int8_enable_fp32_cpu_offload"] = True
    (tmp_path / "saved" / "config.json").write_text(json.dumps(settings))
    device_map: Any = {"device_map": "auto", "max_memory": {"cpu": 60000}}
    if places == "map":
        device_map = {"device_map": {**PLACES, "model.layers.1": "disk"}}

    def run() -> list[torch.Tensor]:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "saved", torch_dtype=torch.float32, offload_folder=tmp_path / "folder", **device_map
        )
        return [logits(model) for _ in range(2)]

    # Which of them transformers can load depends on its version; none may give other numbers.
    try:
        found = run()
    except ValueError as error:
        assert "offload" in str(error)  # noqa: PT017
    except RuntimeError as error:
        assert places == "map"
        assert "mismatch" in str(error) or "loading state_dict" in str(error)  # noqa: PT017
    else:
        assert all(torch.equal(values, expected) for values in found)
