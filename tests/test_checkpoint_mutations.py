"""Damaged state dicts: each loads with equal values, or is refused by one error that says what is wrong with it.

After a refusal the module is what it was, to the byte. 350 are tried here, and 150 files in test_file_mutations.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mutations
from arrays import assert_same_bits
from fewbits.functional import dequantize_4bit, int8_vectorwise_dequant
from fewbits.nn import Embedding4bit, Embedding8bit, Linear4bit, Linear8bitLt

N, K = 48, 64
EACH = 10  # damaged state dicts for each module and target

MODULES: dict[str, Callable[[], nn.Module]] = {
    "nf4": lambda: Linear4bit(K, N, quant_type="nf4", compress_statistics=False),
    "fp4 nested": lambda: Linear4bit(K, N, quant_type="fp4"),
    "nf4 nested, stored as bfloat16": lambda: Linear4bit(K, N, quant_type="nf4", quant_storage=torch.bfloat16),
    "int8": lambda: Linear8bitLt(K, N, has_fp16_weights=False, threshold=6.0),
    "embedding 4bit": lambda: Embedding4bit(N, K, quant_type="nf4"),
    "embedding 8bit": lambda: Embedding8bit(N, K),
    "nf4 without bias": lambda: Linear4bit(K, N, bias=False, quant_type="nf4"),
}
# What a state dict is loaded into.
TARGETS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "quantized": lambda module: module.to("cpu"),
    "after a product": lambda module: _used(module.to("cpu")),
    "not quantized": lambda module: module,
    "meta": lambda module: module.to("meta"),
    "assigned": lambda module: module.to("cpu"),
}


def _used(module: nn.Module) -> nn.Module:
    module(torch.ones(2, K) if isinstance(module, nn.Linear) else torch.tensor([1, 2]))
    return module


def make(name: str, seed: int) -> nn.Module:
    """A module with its own values, not quantized."""
    torch.manual_seed(seed)
    return MODULES[name]()


def values(module: Any) -> list[torch.Tensor]:
    """Return all numbers that a module holds, dequantized."""
    weight, bias = module.weight, getattr(module, "bias", None)
    if isinstance(module, (Linear4bit, Embedding4bit)):
        matrix = dequantize_4bit(weight.data, weight.quant_state)
    else:
        matrix = int8_vectorwise_dequant(weight.data, module._scales())
    return [matrix] if bias is None else [matrix, bias.detach()]


def picture(module: Any) -> dict[str, Any]:
    """Return everything that a load may change: objects by identity, tensors by their bytes."""
    taken: dict[str, Any] = {}
    for name, p in module._parameters.items():
        if p is None:
            continue
        attributes = {key: value for key, value in p.__dict__.items() if key != "prepared"}
        taken |= {f"{name} itself": id(p), f"{name} data": p.data, f"{name} requires_grad": p.requires_grad}
        taken |= {f"{name} {key}": value for key, value in attributes.items()}
    for name in ("quant_state", "quant_storage", "compute_dtype", "_SCB"):
        taken[name] = module.__dict__.get(name)
    if isinstance(module, Linear8bitLt):
        taken |= {f"state {key}": value for key, value in module.state.__dict__.items()}
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in taken.items()}


def assert_same_picture(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor) and not value.is_meta:
            assert_same_bits(got[key], value, key)
        elif isinstance(value, torch.Tensor):
            assert got[key].is_meta, key
        else:
            assert got[key] is value or got[key] == value, key


def load(module: nn.Module, state: mutations.State, assign: bool) -> Exception | None:
    """Load a state dict; return the error, which must be one that a user expects."""
    try:
        module.load_state_dict(state, assign=assign)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        return error
    return None


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MODULES)
def test_state_dict(name: str, target: str) -> None:
    good = make(name, 1).to("cpu")
    saved, expected = good.state_dict(), values(good)
    refused = 0
    for seed in range(EACH):
        rng = random.Random(f"{name} {target} {seed}")
        recipe = mutations.RECIPES[rng.randrange(len(mutations.RECIPES))]
        state = {key: value.clone() for key, value in saved.items()}
        words = recipe(rng, state)
        module = TARGETS[target](make(name, 2))
        before = picture(module)
        what = f"{name}, {target}, seed {seed}: {recipe.__name__}"
        error = load(module, state, target == "assigned")
        if error is not None:
            refused += 1
            assert not isinstance(error, (RecursionError, NotImplementedError)), what
            assert any(word in str(error) for word in words), f"{what}: expected one of {words} in {error}"
            assert len(str(error)) < 2000, what
            assert_same_picture(picture(module), before)
        elif not any(p.is_meta for p in module.parameters()):  # which takes an entry on meta
            for got, value in zip(values(module), expected, strict=True):
                assert_same_bits(got.to(value.dtype), value, what)
    assert refused


def test_their_number() -> None:
    assert len(MODULES) * len(TARGETS) * EACH == 350


def test_in_a_model() -> None:
    """The layer whose entries are damaged stays as it was; the error calls them by their whole names."""
    saved = nn.Sequential(make("fp4 nested", 1), nn.ReLU(), make("int8", 1)).to("cpu").state_dict()
    for damaged, key in ((0, "0.weight.nested_absmax"), (2, "2.SCB")):
        model = nn.Sequential(make("fp4 nested", 2), nn.ReLU(), make("int8", 2)).to("cpu")
        before = picture(model[damaged])
        with pytest.raises(RuntimeError, match=key.rpartition(".")[2]) as caught:
            model.load_state_dict({**saved, key: torch.ones(5)})
        assert f"{damaged}.weight" in str(caught.value)
        assert_same_picture(picture(model[damaged]), before)
