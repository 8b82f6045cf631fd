"""Parameters of any module in 4 bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from fewbits.functional import dequantize_4bit, quantize_4bit
from fewbits.nn.parametrize import (
    Bnb4bitParametrization,
    _disable_parametrization_cache,
    replace_parameter_4bit,
    replace_parameter_4bit_prequantized,
)


class Experts(torch.nn.Module):
    """Two stacked matrices an expert, as mixtures have them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(3, 16, 32, dtype=dtype))
        self.down = torch.nn.Parameter(torch.randn(3, 32, 16, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("ti,eoi->teo", x, self.up)
        y = y + torch.einsum("ti,eoi->teo", x, self.up)  # reads the parameter twice
        return torch.einsum("teo,eio->ti", y, self.down)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_reading_gives_the_dequantized_tensor(dtype: torch.dtype, quant_type: Any, nested: bool) -> None:
    experts = Experts(dtype)
    original = experts.up.detach().clone()
    replace_parameter_4bit(experts, "up", compress_statistics=nested, quant_type=quant_type, blocksize=32)
    state = quantize_4bit(original, blocksize=32, quant_type=quant_type, compress_statistics=nested)
    assert torch.equal(experts.up, dequantize_4bit(*state))
    assert experts.up.dtype == dtype
    stored = dict(experts.named_parameters())["parametrizations.up.original"]
    assert stored.dtype == torch.uint8
    assert not stored.requires_grad


def test_state_dict_and_back() -> None:
    experts = Experts()
    for name in ("up", "down"):
        replace_parameter_4bit(experts, name, compress_statistics=True)
    saved = torch.nn.ModuleDict({"layer": experts}).state_dict()
    assert not [key for key in saved if "parametrizations" in key]
    assert saved["layer.up"].shape == (3 * 16 * 32 // 2, 1)
    loaded = Experts()
    for name in ("up", "down"):
        entries = {key: value for key, value in saved.items() if key.startswith(f"layer.{name}.")}
        setattr(loaded, name, torch.nn.Parameter(saved[f"layer.{name}"], requires_grad=False))
        replace_parameter_4bit_prequantized(loaded, name, entries, torch.device("cpu"))
    x = torch.randn(5, 32)
    assert torch.equal(loaded(x), experts(x))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_loading_what_was_saved(nested: bool, assign: bool) -> None:
    def quantized() -> torch.nn.Module:
        model = torch.nn.Sequential(Experts(), torch.nn.Linear(32, 32))
        for name in ("up", "down"):
            replace_parameter_4bit(model[0], name, compress_statistics=nested)
        return model

    model, other, x = quantized(), quantized(), torch.randn(5, 32)
    expected, saved = model(x), model.state_dict()
    for target in (other, copy.deepcopy(other), quantized().to("meta")):
        if assign or not next(target.parameters()).is_meta:
            target.load_state_dict(saved, assign=assign)
            assert torch.equal(target(x), expected)
            assert sorted(target.state_dict()) == sorted(saved)
    assert sorted(saved) == sorted(model.state_dict()), "the state dict is left as it is"
    if not assign:
        for value in saved.values():
            value.zero_()
        assert torch.equal(other(x), expected), "nothing is shared with the state dict"


def test_loading_something_else_changes_nothing() -> None:
    experts, wider = Experts(), Experts()
    wider.up = torch.nn.Parameter(torch.randn(3, 16, 64))
    for module in (experts, wider):
        replace_parameter_4bit(module, "up")
    before, good = experts.up.clone(), wider.state_dict()
    truncated = {**experts.state_dict(), "up": experts.state_dict()["up"][1:]}
    for wrong, message in (
        (good, r"While loading up: shape: expected \(3, 16, 32\), got \(3, 16, 64\)"),
        (truncated, "While loading up: up: expected 768 elements"),
        ({k: v for k, v in experts.state_dict().items() if k != "up.absmax"}, "While loading up: absmax"),
    ):
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=message):
                experts.load_state_dict(wrong, strict=strict)
            assert torch.equal(experts.up, before)


def test_once_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = Experts()
    for name in ("up", "down"):
        replace_parameter_4bit(experts, name)
    calls = []
    inner = Bnb4bitParametrization.forward
    monkeypatch.setattr(Bnb4bitParametrization, "forward", lambda self, x: calls.append(1) or inner(self, x))
    experts(torch.randn(2, 32))
    assert len(calls) == 2
    assert not parametrize._cache
    assert parametrize._cache_enabled == 0


def test_the_cache_is_off_after_an_exception() -> None:
    experts = Experts()
    replace_parameter_4bit(experts, "up")
    with pytest.raises(RuntimeError):
        experts(torch.randn(2, 31))
    assert parametrize._cache_enabled == 0
    assert not parametrize._cache
    _disable_parametrization_cache(experts, (), None)
    assert parametrize._cache_enabled == 0


def test_training_through_checkpoints() -> None:
    experts = Experts()
    reference = Experts()
    for name in ("up", "down"):
        replace_parameter_4bit(experts, name)
        setattr(reference, name, torch.nn.Parameter(getattr(experts, name).clone(), requires_grad=False))
    x, y = (torch.ones(2, 32, requires_grad=True) for _ in range(2))
    checkpoint(experts, x, use_reentrant=False).sum().backward()
    reference(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert parametrize._cache_enabled == 0


def test_bad_input_changes_nothing() -> None:
    experts = Experts()
    experts.number = torch.ones(2)
    with pytest.raises(AttributeError, match="'absent'"):
        replace_parameter_4bit(experts, "absent")
    with pytest.raises(TypeError, match="'number'"):
        replace_parameter_4bit(experts, "number")
    with pytest.raises(ValueError, match="quant_type"):
        replace_parameter_4bit(experts, "up", quant_type="nf5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="blocksize"):
        replace_parameter_4bit(experts, "up", blocksize=48)
    entries = quantize_4bit(torch.ones(4, 8))[1].as_dict(packed=True)
    with pytest.raises(ValueError, match="up: expected 16 bytes"):
        replace_parameter_4bit_prequantized(experts, "up", entries, torch.device("cpu"))
    with pytest.raises(ValueError, match="absmax"):
        replace_parameter_4bit_prequantized(
            experts, "up", {key: v for key, v in entries.items() if key != "absmax"}, torch.device("cpu")
        )
    assert not parametrize.is_parametrized(experts)
    assert list(experts.state_dict()) == ["up", "down"]


def test_other_parametrizations_are_left_alone() -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4))
    layer.extra = torch.nn.Parameter(torch.randn(4, 32))
    replace_parameter_4bit(layer, "extra")
    assert "parametrizations.weight.original0" in layer.state_dict()
    assert "extra.absmax" in layer.state_dict()
