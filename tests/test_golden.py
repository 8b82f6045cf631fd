"""What bitsandbytes 0.50.2 wrote is read bit for bit, and written again where the two define the same bytes.

``golden/make.py`` made the files, on the CPU. There FP4's two zeros are swapped (its code 8 is read as +0.0 and written
for small positive numbers), unlike bitsandbytes on CUDA, which we follow; and its 8-bit encoder is a lossy table, so
that 8-bit codes are only read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fewbits.functional as F
from arrays import as_numpy, assert_same_bits, dtype_name
from fewbits.functional import QuantState
from fewbits.nn import Linear4bit, Params4bit

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from inputs import (  # noqa: E402
    CASES_4BIT,
    CASES_8BIT,
    LINEARS,
    Case,
    LinearCase,
    all_bytes,
    case_name,
    linear_name,
    ordinary,
)

DTYPES = {dtype_name(d): d for d in (torch.float32, torch.float16, torch.bfloat16)}


def plus_zero(tensor: torch.Tensor, quant_type: str | None) -> torch.Tensor:
    """FP4 decoded by bitsandbytes' CPU has no -0.0: forget the sign of zeros there, and only there."""
    return torch.where(tensor == 0, torch.zeros_like(tensor), tensor) if quant_type == "fp4" else tensor


def group(file: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in file.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def quantized_4bit() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "quantize_4bit.safetensors")


@pytest.fixture(scope="module")
def quantized_8bit() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "quantize_blockwise.safetensors")


@pytest.mark.parametrize("case", CASES_4BIT, ids=case_name)
def test_read_4bit(case: Case, quantized_4bit: dict[str, torch.Tensor], device: torch.device) -> None:
    golden = group(quantized_4bit, f"{case_name(case)}/")
    state = QuantState.from_dict(group(golden, "state/"), device=device)
    assert (state.quant_type, state.blocksize, state.dtype) == (case.quant_type, case.blocksize, case.dtype)
    assert (tuple(state.shape), state.nested) == (case.shape, case.nested)
    got = F.dequantize_4bit(golden["packed"].to(device), state)
    assert got.shape == case.shape
    assert got.dtype == case.dtype
    expected = plus_zero(golden["dequantized"], case.quant_type)
    assert_same_bits(plus_zero(got, case.quant_type), expected, "dequantize_4bit")


@pytest.mark.parametrize("case", CASES_4BIT, ids=case_name)
def test_write_4bit(case: Case, quantized_4bit: dict[str, torch.Tensor], device: torch.device) -> None:
    golden = group(quantized_4bit, f"{case_name(case)}/")
    packed, state = F.quantize_4bit(
        ordinary(case.shape, case.dtype).to(device),
        blocksize=case.blocksize,
        quant_type=case.quant_type,
        compress_statistics=case.nested,
        quant_storage=case.storage,
    )
    assert packed.dtype == case.storage
    assert packed.shape == golden["packed"].shape
    ours, theirs = packed.view(torch.uint8), golden["packed"].view(torch.uint8)
    if case.quant_type == "fp4":
        ours, theirs = (torch.from_numpy(one_zero(as_numpy(t))) for t in (ours, theirs))
    assert_same_bits(ours, theirs, "packed")
    written, expected = state.as_dict(packed=True), group(golden, "state/")
    assert written.keys() == expected.keys()
    blob = f"quant_state.bitsandbytes__{case.quant_type}"
    for key in expected.keys() - {blob}:
        assert_same_bits(written[key], expected[key], key)
    ours_json, theirs_json = (json.loads(bytes(d[blob].tolist())) for d in (written, expected))
    # Their mean is a float32 sum, ours a float64 one: the last bit may differ.
    if case.nested:
        offset = theirs_json.pop("nested_offset")
        assert ours_json.pop("nested_offset") == pytest.approx(offset, rel=2.0**-22)
    assert list(ours_json.items()) == list(theirs_json.items())


def one_zero(packed: np.ndarray) -> np.ndarray:
    """Read FP4's code 8 (-0.0) as code 0 (+0.0)."""
    high, low = packed >> 4, packed & 15
    return (np.where(high == 8, 0, high) << 4 | np.where(low == 8, 0, low)).astype(np.uint8)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("name", DTYPES)
def test_read_every_byte(quant_type: str, name: str, device: torch.device) -> None:
    codes, absmax = all_bytes(64)
    expected = load_file(GOLDEN / "decode_4bit.safetensors")[f"{quant_type}/{name}"]
    state = QuantState(
        absmax.to(device),
        shape=expected.shape,
        code=F.get_4bit_type(quant_type, device=device),
        blocksize=64,
        quant_type=quant_type,
        dtype=DTYPES[name],
    )
    got = F.dequantize_4bit(codes.view(-1, 1).to(device), state)
    assert_same_bits(plus_zero(got, quant_type), plus_zero(expected, quant_type), name)


@pytest.mark.parametrize("case", CASES_8BIT, ids=case_name)
def test_read_8bit(case: Case, quantized_8bit: dict[str, torch.Tensor], device: torch.device) -> None:
    golden = group(quantized_8bit, f"{case_name(case)}/")
    state = QuantState(
        golden["absmax"].to(device),
        code=quantized_8bit["dynamic"].to(device),
        blocksize=case.blocksize,
        dtype=case.dtype,
    )
    got = F.dequantize_blockwise(golden["codes"].to(device), state)
    assert_same_bits(got, golden["dequantized"], "dequantize_blockwise")


def test_dynamic_maps(quantized_8bit: dict[str, torch.Tensor]) -> None:
    assert_same_bits(F.create_dynamic_map(), quantized_8bit["dynamic"], "signed")
    assert_same_bits(F.create_dynamic_map(signed=False), quantized_8bit["dynamic_unsigned"], "unsigned")


@pytest.mark.parametrize("case", LINEARS, ids=linear_name)
def test_linear_state_dict(case: LinearCase, device: torch.device) -> None:
    """Loaded strictly, dequantized to the same bits, and saved again with the same keys and bytes."""
    file = load_file(GOLDEN / f"{linear_name(case)}.safetensors")
    expected, state_dict = file["dequantized"], group(file, "layer.")
    layer = Linear4bit(
        case.in_features,
        case.out_features,
        bias=case.bias,
        compute_dtype=case.dtype,
        compress_statistics=case.nested,
        quant_type=case.quant_type,
        quant_storage=case.storage,
        device=device,
    )
    if layer.bias is not None:  # load_state_dict keeps the layer's dtype
        layer.bias.data = layer.bias.data.to(case.dtype)
    layer.load_state_dict({k: v.clone() for k, v in state_dict.items()})
    assert isinstance(layer.weight, Params4bit)
    got = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert_same_bits(plus_zero(got, case.quant_type), plus_zero(expected, case.quant_type), "weight")
    saved = layer.state_dict()
    assert saved.keys() == state_dict.keys()
    for key, value in state_dict.items():
        assert saved[key].dtype == value.dtype, key
        assert_same_bits(saved[key], value, key)


@pytest.mark.parametrize("case", LINEARS, ids=linear_name)
def test_from_prequantized(case: LinearCase, device: torch.device) -> None:
    """The route of Hugging Face's loaders, keys with their full prefix included."""
    file = load_file(GOLDEN / f"{linear_name(case)}.safetensors")
    stats = {k: v for k, v in file.items() if k.startswith("layer.weight.")}
    before = dict(stats)
    weight = Params4bit.from_prequantized(
        data=file["layer.weight"], quantized_stats=stats, requires_grad=False, device=str(device)
    )
    assert stats.keys() == before.keys(), "the caller's dictionary was changed"
    got = F.dequantize_4bit(weight.data, weight.quant_state)
    assert_same_bits(plus_zero(got, case.quant_type), plus_zero(file["dequantized"], case.quant_type), "weight")
