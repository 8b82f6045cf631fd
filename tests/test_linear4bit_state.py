"""Copies of `Linear4bit`, and state dicts that load back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

import fewbits.functional as F
from arrays import DTYPES, assert_same_bits
from fewbits.nn import Linear4bit, Linear8bitLt, Params4bit
from linear4bit_layers import STORAGES, K, N, assert_same_layer, dense, make, randn, raw

# ---- copies ---------------------------------------------------------------------------------------------------------


def through_torch_save(layer: Linear4bit) -> Linear4bit:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded: Linear4bit = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_copies(copied: Callable[[Linear4bit], Linear4bit], storage: torch.dtype) -> None:
    layer = make(quant_storage=storage)
    other = copied(layer)
    assert_same_layer(other, layer)
    assert other.weight.module is other
    assert other.weight.data_ptr() != layer.weight.data_ptr()
    unquantized = copied(make(None, quant_storage=storage))
    assert unquantized.weight.module is unquantized
    assert_same_layer(unquantized.to("cpu"), layer)


# ---- state dicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
def test_layout(nested: bool, storage: torch.dtype) -> None:
    state_dict = nn.ModuleDict({"a": make(compress_statistics=nested, quant_storage=storage)}).state_dict()
    assert {
        key: (value.dtype, tuple(value.shape)) for key, value in state_dict.items() if "bitsandbytes" not in key
    } == {
        "a.weight": (storage, (N * K // 2 // storage.itemsize, 1)),
        "a.bias": (torch.float32, (N,)),
        "a.weight.absmax": (torch.uint8 if nested else torch.float32, (N * K // 64,)),
        "a.weight.quant_map": (torch.float32, (16,)),
        **({"a.weight.nested_absmax": (torch.float32, (1,))} if nested else {}),
        **({"a.weight.nested_quant_map": (torch.float32, (256,))} if nested else {}),
    }
    blob = state_dict["a.weight.quant_state.bitsandbytes__nf4"]
    assert (blob.dtype, blob.dim(), blob.device.type) == (torch.uint8, 1, "cpu")
    assert all(type(value) is torch.Tensor and not value.requires_grad for value in state_dict.values())
    kept = make(compress_statistics=nested).state_dict(keep_vars=True)
    assert isinstance(kept["weight"], Params4bit)


def test_layers_share_no_memory(tmp_path: Any) -> None:
    model = nn.Sequential(make(), make(), make(compress_statistics=False))
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    pointers = [value.untyped_storage().data_ptr() for value in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers)


TARGETS: dict[str, Callable[[], Linear4bit]] = {
    "unquantized": lambda: Linear4bit(K, N),
    "quantized": lambda: make(),
    "quantized otherwise": lambda: make(quant_type="fp4", compress_statistics=False),
    "meta": lambda: Linear4bit(K, N, device="meta"),
    "moved to meta": lambda: make().to("meta"),
}


def through_memory(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return state_dict


def through_safetensors(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(safetensors.torch.save(state_dict))


def through_pickle(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("through", [through_memory, through_safetensors, through_pickle])
@pytest.mark.parametrize("inside", [False, True])
def test_load_strictly(
    target: str, assign: bool, nested: bool, through: Callable[..., Any], inside: bool, device: torch.device
) -> None:
    source = make(device, compress_statistics=nested)
    layer = TARGETS[target]()
    was_meta, was = layer.weight.is_meta, layer.weight
    if inside:
        state_dict = through(nn.ModuleDict({"a": source}).state_dict())
        keys = list(state_dict)
        result = nn.ModuleDict({"a": layer}).load_state_dict(state_dict, strict=True, assign=assign)
    else:
        state_dict = through(source.state_dict())
        keys = list(state_dict)
        result = layer.load_state_dict(state_dict, strict=True, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert list(state_dict) == keys, "load_state_dict consumed the caller's dictionary"
    given_on = next(iter(state_dict.values())).device.type  # a file read by safetensors lies on the CPU
    assert layer.weight.device.type == (given_on if assign or was_meta else "cpu")
    assert layer.weight.module is layer
    assert (layer.weight is was) is not (assign or was_meta)
    if not assign:
        loaded = {v.data_ptr() for v in layer.state_dict().values()}
        assert not loaded & {v.data_ptr() for v in state_dict.values()}, "the module shares memory with the file"
    assert_same_layer(layer, source)
    assert_same_layer(layer.to("cpu"), source.to("cpu"))


@given(
    n=st.integers(1, 30),
    k=st.integers(1, 80),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    nested=st.booleans(),
    written=st.sampled_from(STORAGES),
    read=st.sampled_from(STORAGES),
    dtype=st.sampled_from(DTYPES),
)
def test_load_any_size_and_storage(
    n: int, k: int, quant_type: str, nested: bool, written: torch.dtype, read: torch.dtype, dtype: torch.dtype
) -> None:
    source = make(None, n, k, quant_type=quant_type, compress_statistics=nested, quant_storage=written)
    source.to("cpu", dtype)
    layer = Linear4bit(k, n, quant_storage=read)
    layer.load_state_dict(source.state_dict())
    assert layer.weight.dtype == layer.weight.quant_storage == layer.quant_storage == read
    assert torch.equal(dense(layer, dtype), dense(source, dtype))
    state_dict = layer.state_dict()
    again = Linear4bit(k, n, device="meta", quant_storage=written)
    again.load_state_dict(state_dict, assign=True)
    assert again.weight.dtype == again.quant_storage == read
    assert torch.equal(dense(again, dtype), dense(source, dtype))
    assert {key: raw(value).tolist() for key, value in again.state_dict().items()} == {
        key: raw(value).tolist() for key, value in state_dict.items()
    }


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_load_floating_point_weights(assign: bool, target: str) -> None:
    source = nn.Linear(K, N)
    source.weight.data = randn(N, K)
    layer = TARGETS[target]()
    quantized = layer.weight.bnb_quantized
    result = layer.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert type(layer.weight) is Params4bit
    assert layer.weight.bnb_quantized is quantized
    if not quantized:
        assert torch.equal(layer.weight.data, randn(N, K))
        assert layer.weight.data_ptr() != source.weight.data_ptr() or assign
    layer.to("cpu")
    expected = TARGETS[target]()
    kwargs = {key: getattr(expected.weight, key) for key in ("quant_type", "compress_statistics")}
    codes, state = F.quantize_4bit(
        randn(N, K), quant_type=kwargs["quant_type"], compress_statistics=kwargs["compress_statistics"]
    )
    assert_same_bits(layer.weight.data, codes, "codes")
    assert layer.quant_state == state
    assert torch.equal(layer.bias, source.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_load_maxima_of_other_dtypes_and_shapes(dtype: torch.dtype) -> None:
    source = make(compress_statistics=False)
    state_dict = source.state_dict()
    state_dict["weight.absmax"] = state_dict["weight.absmax"].to(dtype).view(1, -1)
    layer = Linear4bit(K, N)
    layer.load_state_dict(state_dict)
    assert layer.quant_state is not None
    assert torch.equal(layer.quant_state.absmax, state_dict["weight.absmax"].view(-1).float())


def drop(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda d: {k: v for k, v in d.items() if k != key}


def change(key: str, function: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda d: {**d, key: function(d[key])}


BLOB = "weight.quant_state.bitsandbytes__nf4"
BROKEN: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = [
    ("absmax", drop("weight.absmax")),
    ("quant_map", drop("weight.quant_map")),
    ("quant_state", drop(BLOB)),
    ("nested_absmax", drop("weight.nested_absmax")),
    ("weight: expected a tensor", drop("weight")),
    ("absmax", change("weight.absmax", lambda v: v[1:])),
    ("nested_absmax", change("weight.nested_absmax", lambda v: v.repeat(2))),
    ("quant_map", change("weight.quant_map", lambda v: v.flip(0))),
    ("bitsandbytes__nf4", change(BLOB, lambda v: v[:-1])),
    ("weight.*1152.*1151", change("weight", lambda v: v[1:])),
    ("weight.*1152", change("weight", lambda v: v.float().view(torch.uint8))),
    ("more", lambda d: {**d, "weight.more": torch.ones(1)}),
    (r"shape.*\(24, 96\).*\(12, 192\)", lambda d: make(n=12, k=192, bias=False).state_dict() | {"bias": d["bias"]}),
    ("weight.*absmax", lambda d: {"weight": d["weight"], "bias": d["bias"]}),
    (r"weight.*\(24, 96\)", lambda d: {"weight": randn(N, K + 1), "bias": d["bias"]}),
    (r"weight.*\(24, 96\)", lambda d: {"weight": randn(N * K), "bias": d["bias"]}),
]


@pytest.mark.parametrize(("match", "corrupt"), BROKEN)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("strict", [False, True])
def test_corrupt_state_dicts_change_nothing(
    match: str, corrupt: Callable[[dict[str, Any]], dict[str, Any]], target: str, strict: bool
) -> None:
    layer = TARGETS[target]()
    weight, state, bias = layer.weight, layer.quant_state, layer.bias
    before = weight.data.clone(), bias.detach().clone(), dict(weight.__dict__)
    broken = corrupt(dict(make(device="cpu").state_dict()))
    with pytest.raises(RuntimeError, match=rf"(?s)While loading weight: .*{match}"):
        layer.load_state_dict(broken, strict=strict)
    assert layer.weight is weight
    assert layer.quant_state is state
    assert weight.__dict__ == before[2]
    if not weight.is_meta:
        assert torch.equal(weight.data, before[0])
        assert torch.equal(layer.bias, before[1])


@pytest.mark.filterwarnings("ignore:for bias. copying from a non-meta")  # torch's own, about a layer left on meta
@pytest.mark.parametrize("target", ["unquantized", "quantized", "meta"])
def test_missing_and_unexpected_keys(target: str) -> None:
    source = make().state_dict()
    layer = TARGETS[target]()
    with pytest.raises(RuntimeError, match=r"Missing.*bias"):
        layer.load_state_dict(drop("bias")(source))
    result = TARGETS[target]().load_state_dict({"bias": source["bias"]}, strict=False)
    assert result.missing_keys == ["weight"]
    result = TARGETS[target]().load_state_dict({**source, "extra": torch.ones(1)}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], ["extra"])
    with pytest.raises(RuntimeError, match="size mismatch for bias"):
        TARGETS[target]().load_state_dict({**source, "bias": torch.ones(N + 1)})


def test_bitsandbytes_files(device: torch.device) -> None:
    peer = pytest.importorskip("bitsandbytes")
    k = 128  # its CPU kernels are wrong where rows are no multiple of the block size
    theirs = peer.nn.Linear4bit(k, N, quant_type="nf4", compress_statistics=True)
    theirs.weight.data.copy_(randn(N, k))
    theirs.to("cpu")
    state_dict = theirs.state_dict()
    assert list(make().state_dict()) == list(state_dict)
    layer = Linear4bit(k, N).to(device)
    layer.load_state_dict(state_dict)
    for key in ("weight", "bias", "weight.absmax", "weight.quant_map", "weight.nested_quant_map", BLOB):
        assert torch.equal(layer.state_dict()[key].cpu(), state_dict[key]), key
    torch.testing.assert_close(layer(randn(3, k).to(device)).cpu(), theirs(randn(3, k)))


@pytest.mark.parametrize("layer", [Linear4bit(64, 32, quant_type="nf4"), Linear8bitLt(64, 32, has_fp16_weights=False)])
def test_distributed_checkpoints_find_one_device(layer: nn.Module, device: torch.device) -> None:
    """A full state dict, on the CPU as files give it, goes through torch's functions for models on any device."""
    model, other = (nn.Sequential(copy.deepcopy(layer).to(device)) for _ in range(2))
    nn.init.normal_(other[0].bias)
    full = {key: value.cpu() for key, value in other.state_dict().items()}
    set_model_state_dict(model, full, options=StateDictOptions(full_state_dict=True))
    x = randn(3, 64).to(device, torch.bfloat16)
    assert_same_bits(model(x), other(x), "loaded")
