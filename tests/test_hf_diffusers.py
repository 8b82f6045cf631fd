"""Models of diffusers, quantized as they are loaded. Its quantizers want a GPU; the rest of them works without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits import nn
from hf_models import CONFIGS, install

install()
diffusers: Any = pytest.importorskip("diffusers")
quantizers: Any = pytest.importorskip("diffusers.quantizers.bitsandbytes.bnb_quantizer")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
KINDS: dict[str, tuple[type, float]] = {
    "nf4-double": (nn.Linear4bit, 0.3),
    "fp4": (nn.Linear4bit, 0.3),
    "int8": (nn.Linear8bitLt, 0.05),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    folder = tmp_path_factory.mktemp("flux")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not CUDA:
        for name in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
            quantizer = getattr(quantizers, name)
            monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
            monkeypatch.setattr(quantizer, "update_device_map", lambda _, device_map: device_map)


def load(path: Path, **kwargs: Any) -> Any:
    model = diffusers.FluxTransformer2DModel.from_pretrained(path, torch_dtype=torch.bfloat16, **kwargs)
    return model if getattr(model, "hf_quantizer", None) else model.to(DEVICE)


@torch.no_grad()
def denoised(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shapes = {"hidden_states": (1, 16, 4), "encoder_hidden_states": (1, 8, 32), "pooled_projections": (1, 32)}
    inputs = {name: torch.randn(*shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    inputs |= {"timestep": torch.ones(1).bfloat16(), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3)}
    result: torch.Tensor = model(**{name: value.to(DEVICE) for name, value in inputs.items()}).sample
    return result


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", KINDS)
def test_load_save_and_reload(name: str, base: Path, tmp_path: Path) -> None:
    kind, bound = KINDS[name]
    model = load(base, quantization_config=diffusers.BitsAndBytesConfig(**CONFIGS[name][0]))
    assert type(model.transformer_blocks[0].attn.to_q) is kind
    values = denoised(model)
    assert 0 < distance(values, denoised(load(base))) < bound
    model.save_pretrained(tmp_path)
    assert torch.equal(denoised(load(tmp_path)), values)


@pytest.mark.parametrize("name", KINDS if CUDA else ["int8"])  # diffusers moves a 4-bit model to a GPU for it
def test_dequantize(name: str, base: Path) -> None:
    model = load(base, quantization_config=diffusers.BitsAndBytesConfig(**CONFIGS[name][0]))
    values = denoised(model)
    model.dequantize()
    assert type(model.transformer_blocks[0].attn.to_q) is torch.nn.Linear
    assert distance(denoised(model), values) < 0.02
