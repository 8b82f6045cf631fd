"""What a `Linear8bitLt` keeps: state dicts, files, copies and pickles, and the rebuilding that model loaders do."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fewbits.functional as F
from arrays import assert_same_bits
from fewbits.autograd import MatmulLtState
from fewbits.nn import Embedding8bit, Int8Params, Linear8bitLt
from linear8bit_layers import K, N, activations, assert_same_layer, make, randn, raw, scales

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from inputs import LINEARS_8BIT, activations_8bit, linear_8bit_name, ordinary  # noqa: E402


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- what bitsandbytes wrote ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threshold", "bias"), LINEARS_8BIT)
def test_golden(threshold: float, bias: bool, device: torch.device) -> None:
    file = load_file(GOLDEN / f"{linear_8bit_name(threshold, bias)}.safetensors")
    saved = {key.removeprefix("layer."): value for key, value in file.items() if key.startswith("layer.")}
    layer = Linear8bitLt(64, 48, bias=bias, has_fp16_weights=False, threshold=threshold).to(device)
    layer.load_state_dict(saved)
    again = layer.state_dict()
    assert again.keys() == saved.keys()
    for key, value in saved.items():
        assert again[key].dtype == value.dtype
        assert again[key].shape == value.shape
        assert_same_bits(again[key], value, key)
    # Its product goes through float16 four times.
    got = layer(activations_8bit().to(device)).cpu()
    torch.testing.assert_close(got, file["output"], rtol=2.0**-9, atol=2.0**-9)
    # One multiplication more than ours.
    values = F.int8_vectorwise_dequant(layer.weight.data, scales(layer)).cpu()
    torch.testing.assert_close(values, file["dequantized"], rtol=2.0**-22, atol=0)


@pytest.mark.parametrize(("threshold", "bias"), LINEARS_8BIT)
def test_golden_codes(threshold: float, bias: bool, device: torch.device) -> None:
    """Of float16 numbers, both libraries make the same codes."""
    file = load_file(GOLDEN / f"{linear_8bit_name(threshold, bias)}.safetensors")
    codes, row_stats, columns = F.int8_vectorwise_quant(activations_8bit().to(device), threshold)
    assert_same_bits(codes, file["codes"], "codes")
    assert_same_bits(row_stats, file["row_stats"], "row_stats")
    assert (None if columns is None else columns.tolist()) == (file["columns"].tolist() if threshold else None)
    weight = Int8Params((ordinary((48, 64), torch.float32) * 0.02).half(), requires_grad=False).to(device)
    assert_same_bits(weight.data, file["layer.weight"], "weight")
    assert weight.SCB is not None
    assert_same_bits(weight.SCB, file["layer.SCB"], "SCB")


# ---- state dicts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True])
def test_entries(warm: bool, device: torch.device) -> None:
    layer = make(device)
    if warm:
        layer(activations(1, K).to(device))
    saved = nn.Sequential(layer).state_dict()
    assert list(saved) == ["0.weight", "0.bias", "0.SCB", "0.weight_format"]
    assert (saved["0.weight"].dtype, saved["0.weight"].shape) == (torch.int8, (N, K))
    assert (saved["0.SCB"].dtype, saved["0.SCB"].shape) == (torch.float32, (N,))
    assert (saved["0.weight_format"].dtype, saved["0.weight_format"].shape) == (torch.uint8, ())
    assert int(saved["0.weight_format"]) == 0
    assert all(type(value) is torch.Tensor for value in saved.values())


TARGETS: dict[str, Callable[[], Linear8bitLt]] = {
    "quantized": make,
    "unquantized": lambda: make(None),
    "meta": lambda: Linear8bitLt(K, N, has_fp16_weights=False, threshold=6.0, device="meta"),
    "used": lambda: used(make()),
}


def used(layer: Linear8bitLt) -> Linear8bitLt:
    layer(activations(1, K))
    layer(activations(1, K))
    return layer


def other() -> Linear8bitLt:
    layer = make(None)
    layer.weight.data = randn(N, K, seed=11)
    return layer.to("cpu")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_load(target: str, assign: bool, warm: bool) -> None:
    source = used(other()) if warm else other()
    saved = source.state_dict()
    layer = TARGETS[target]()
    assert str(layer.load_state_dict(saved, assign=assign)) == "<All keys matched successfully>"
    if not assign:
        assert layer.weight.data_ptr() != saved["weight"].data_ptr()
        assert scales(layer).data_ptr() != saved["SCB"].data_ptr()
    assert_same_layer(layer, source)
    assert_same_layer(used(layer), source)


def test_load_keeps_the_parameter_and_its_device(device: torch.device) -> None:
    layer = make(device)
    layer(activations(1, K).to(device))
    weight = layer.weight
    layer.load_state_dict(other().state_dict())
    assert layer.weight is weight
    assert weight.device.type == scales(layer).device.type == device.type
    assert_same_layer(layer, other())


@pytest.mark.parametrize("target", TARGETS)
def test_load_floating_point_values(target: str) -> None:
    layer = TARGETS[target]()
    values = {"weight": randn(N, K, seed=11), "bias": randn(N, seed=1)}
    layer.load_state_dict(values)
    assert_same_layer(layer.to("cpu"), other())


def test_load_a_trained_layer() -> None:
    layer = make(None, has_fp16_weights=True)
    source = make(None, has_fp16_weights=True)
    source.weight.data = randn(N, K, seed=3)
    layer(activations(1, K))
    layer.eval().load_state_dict(source.state_dict())
    assert torch.equal(layer(activations(1, K)), source(activations(1, K)))
    assert layer.weight.requires_grad
    with pytest.raises(RuntimeError, match="has_fp16_weights=True"):
        layer.load_state_dict(make().state_dict())


BROKEN: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "format": (r"weight_format.*got 1", lambda d: d.update(weight_format=torch.tensor(1, dtype=torch.uint8))),
    "format name": (r"weight_format.*col32", lambda d: d.update(weight_format="col32")),
    "no scales": (r"SCB", lambda d: (d.pop("SCB"), d.pop("weight_format"))),
    "short scales": (r"SCB.*got 23", lambda d: d.update(SCB=d["SCB"][1:])),
    "integer scales": (r"SCB.*int32", lambda d: d.update(SCB=d["SCB"].int())),
    "shape": (r"weight.*got torch.int8 of shape", lambda d: d.update(weight=d["weight"].t())),
    "dtype": (r"weight.*got torch.float32", lambda d: d.update(weight=d["weight"].float())),
    "no weight": (r"weight.*NoneType", lambda d: d.pop("weight")),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("target", ["quantized", "unquantized"])
def test_broken_state_dicts_change_nothing(case: str, target: str) -> None:
    match, spoil = BROKEN[case]
    layer = TARGETS[target]()
    before, keys = raw(layer.weight), dict(layer.weight.__dict__)
    saved = dict(other().state_dict())
    spoil(saved)
    with pytest.raises(RuntimeError, match=rf"(?s)While loading weight: .*{match}"):
        layer.load_state_dict(saved)
    assert torch.equal(raw(layer.weight), before)
    assert layer.weight.__dict__ == keys


def test_unexpected_and_missing_keys() -> None:
    layer, saved = make(), dict(other().state_dict())
    del saved["bias"]
    saved["extra"] = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*bias.*Unexpected.*extra|Unexpected.*extra.*Missing.*bias"):
        layer.load_state_dict(saved)
    assert layer.load_state_dict({}, strict=False).missing_keys == ["weight", "bias"]


def test_safetensors(tmp_path: Path, device: torch.device) -> None:
    model = nn.Sequential(make(device), make(device, n=K))
    model[0](activations(1, K).to(device))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = nn.Sequential(make(None), make(None, n=K))
    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
    for i in range(2):
        assert_same_layer(loaded[i], model[i])


# ---- copies and pickles --------------------------------------------------------------------------------------------


def saved_and_loaded(module: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch": saved_and_loaded}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("warm", [False, True])
def test_copies_of_a_layer(how: str, warm: bool, device: torch.device) -> None:
    layer = make(device)
    if warm:
        used(layer.to("cpu")).to(device)
    duplicate = COPIES[how](layer)
    assert duplicate.weight.data_ptr() != layer.weight.data_ptr()
    assert scales(duplicate).data_ptr() != scales(layer).data_ptr()
    for held in (duplicate.weight.CB, duplicate.state.CB):
        assert held is None or held.data_ptr() == duplicate.weight.data_ptr()
    assert duplicate.state.threshold == 6.0
    assert not duplicate.state.has_fp16_weights
    assert (layer.state.CB is None) == (not warm)
    assert_same_layer(duplicate, layer)


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_parameter(how: str) -> None:
    weight = make().weight
    duplicate = COPIES[how](weight)
    assert type(duplicate) is Int8Params
    assert torch.equal(duplicate.data, weight.data)
    assert torch.equal(duplicate.SCB, weight.SCB)
    assert duplicate.CB.data_ptr() == duplicate.data_ptr()
    trained = COPIES[how](Int8Params(randn(2, 3), has_fp16_weights=True))
    assert trained.requires_grad
    assert trained.has_fp16_weights


def test_weights_only_load_of_a_state_dict() -> None:
    buffer = io.BytesIO()
    torch.save(make().state_dict(), buffer)
    buffer.seek(0)
    layer = make(None)
    layer.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_layer(layer, make())


def test_copy_of_a_trained_layer_forgets_its_codes() -> None:
    layer = make(None, has_fp16_weights=True).eval()
    expected = layer(activations(1, K))
    duplicate = copy.deepcopy(layer)
    assert duplicate.state.CB is None
    assert torch.equal(duplicate(activations(1, K)), expected)


# ---- Int8Params ----------------------------------------------------------------------------------------------------


def test_parameter_attributes_are_its_keywords() -> None:
    weight = Int8Params(randn(N, K), requires_grad=False).to("cpu")
    assert set(weight.__dict__) == {"CB", "SCB", "has_fp16_weights"}
    rebuilt = Int8Params(weight.data, requires_grad=False, **weight.__dict__, _is_hf_initialized=True)
    assert rebuilt.SCB is weight.SCB
    assert rebuilt.to("cpu") is rebuilt
    moved = Int8Params(weight.data.clone(), requires_grad=False, SCB=weight.SCB).to("cpu")
    assert torch.equal(moved.data, weight.data)
    assert moved.CB is not None
    assert not Int8Params(weight.data).requires_grad
    assert Int8Params(randn(2, 2)).requires_grad
    assert Int8Params().shape == (0,)
    with pytest.raises(TypeError, match="data: expected a tensor"):
        Int8Params([1.0])  # type: ignore[arg-type]


def test_attributes_taken_away_from_a_meta_parameter() -> None:
    shell = Int8Params(torch.empty(N, K, device="meta"), requires_grad=False)
    attributes = shell.__dict__
    attributes.pop("SCB")
    weight = Int8Params(randn(N, K), requires_grad=False, **attributes).to("cpu")
    assert weight.SCB is not None
    assert shell.SCB is None


def test_offloading_hooks() -> None:
    """What accelerate does around a forward of a layer whose weight waits elsewhere."""
    layer, x = make(), activations(2, K)
    expected, codes, SCB = layer(x), layer.weight.data.clone(), scales(layer).clone()
    for _ in range(2):
        old = layer.weight
        shell = Int8Params(codes.to("meta"), requires_grad=False, **old.__dict__).to("meta")
        assert shell.CB is None
        layer._parameters["weight"] = shell
        layer.state.SCB = layer.state.CxB = None
        weight = Int8Params(codes, requires_grad=False, **{**shell.__dict__, "SCB": SCB}).to("cpu")
        layer._parameters["weight"] = weight
        assert torch.equal(layer(x), expected)


def test_plain_weight_is_used() -> None:
    """Sharding and serving leave plain tensors where the parameter was."""
    layer, x = make(), activations(2, K)
    expected = layer(x)
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)  # type: ignore[assignment]
    assert torch.equal(layer(x), expected)
    layer.to(torch.device("cpu"))
    assert torch.equal(layer(x), expected)
    assert list(layer.state_dict()) == ["weight", "bias", "SCB", "weight_format"]


def test_embedding_state_dict(tmp_path: Path) -> None:
    table = Embedding8bit(10, 32)
    values = table.weight.data.clone()
    assert list(table.state_dict()) == ["weight"]
    table.to("cpu")
    assert list(table.state_dict()) == ["weight", "SCB", "weight_format"]
    fresh = Embedding8bit(10, 32, device="meta")
    fresh.load_state_dict({"weight": values})
    assert fresh.to("cpu").weight.dtype == torch.int8
    assert torch.equal(pickle.loads(pickle.dumps(table))(torch.arange(10)), fresh(torch.arange(10)))


@pytest.mark.parametrize(("m", "k"), [(1, 4096), (3, 1000), (7, 14336), (12, 4096), (16, 77), (40, 1040), (300, 4096)])
def test_outlier_columns_of_the_last_product(m: int, k: int, device: torch.device) -> None:
    layer = Linear8bitLt(k, 48, bias=False, has_fp16_weights=False, threshold=6.0).to(device)
    assert layer.state.idx is None
    generator = torch.Generator().manual_seed(m * k)
    for count in (5, 5, 0, min(k, 70)):
        columns = torch.randperm(k, generator=generator)[:count]
        x = torch.rand(m, k, generator=generator)
        x[torch.randint(m, (count,), generator=generator), columns] = -7.0
        layer(x.to(device, torch.bfloat16))
        found = layer.state.idx
        assert (found is None) == (device.type == "cpu")
        assert found is None or found.dtype == torch.int64
        assert found is None or found.tolist() == columns.sort().values.tolist()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.state.idx is None
    layer.state.idx = torch.tensor([3])
    assert layer.state.idx.tolist() == [3]
    state = MatmulLtState(idx=torch.tensor([1]))
    assert state.idx is not None
    assert state.idx.tolist() == [1]
