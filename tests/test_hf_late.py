"""`install_as_bitsandbytes` after the libraries that look for bitsandbytes have looked."""

from __future__ import annotations

import pytest

from test_install_as_bitsandbytes import run

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

# Where bitsandbytes is installed, it is hidden first: importing the libraries would import it.
HIDE = """
import importlib.machinery, importlib.metadata, sys
real_find = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name == "bitsandbytes" else real_find(name, path, target)
importlib.machinery.PathFinder.find_spec = find_spec
real_distributions = importlib.metadata.MetadataPathFinder.find_distributions
def find_distributions(context=importlib.metadata.DistributionFinder.Context()):
    return [d for d in real_distributions(context) if d.metadata["Name"] != "bitsandbytes"]
importlib.metadata.MetadataPathFinder.find_distributions = find_distributions
"""


def test_transformers_and_accelerate() -> None:
    run(
        HIDE
        + """
import torch, transformers, accelerate.utils
from transformers import Trainer
from transformers.utils import is_bitsandbytes_available
import transformers.integrations.bitsandbytes as integration
assert not is_bitsandbytes_available() and not accelerate.utils.is_bnb_available()
assert not hasattr(integration, "bnb")
import fewbits
fewbits.install_as_bitsandbytes()
assert is_bitsandbytes_available() and accelerate.utils.is_bnb_available()
assert integration.bnb.nn.Linear4bit is fewbits.nn.Linear4bit
with torch.device("meta"):
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config)
quantization = transformers.BitsAndBytesConfig(load_in_4bit=True)
integration.replace_with_bnb_linear(model, quantization_config=quantization)
assert type(model.model.layers[0].mlp.up_proj) is fewbits.nn.Linear4bit
"""
    )


def test_peft() -> None:
    pytest.importorskip("peft")
    run(
        HIDE
        + """
import peft, peft.import_utils, peft.helpers, torch
assert not peft.import_utils.is_bnb_available() and not peft.import_utils.is_bnb_4bit_available()
assert getattr(peft.helpers, "bnb", None) is None
import fewbits
fewbits.install_as_bitsandbytes()
assert peft.import_utils.is_bnb_available() and peft.import_utils.is_bnb_4bit_available()
model = torch.nn.Sequential(fewbits.nn.LinearNF4(64, 64)).to("cpu")
model.is_loaded_in_4bit = True
tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
assert type(tuned.base_model.model[0]).__name__ == "Linear4bit", type(tuned.base_model.model[0])
assert isinstance(tuned.base_model.model[0], peft.tuners.lora.LoraLayer)
"""
    )


def test_diffusers() -> None:
    pytest.importorskip("diffusers")
    run(
        HIDE
        + """
import diffusers
from diffusers.utils import is_bitsandbytes_available
assert not is_bitsandbytes_available()
import fewbits
fewbits.install_as_bitsandbytes()
from diffusers.utils import is_bitsandbytes_version
assert is_bitsandbytes_available() and is_bitsandbytes_version(">=", "0.43.3")
"""
    )
