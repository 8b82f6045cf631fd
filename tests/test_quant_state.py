"""`QuantState`: dictionaries, moves, comparison, and how it refuses corrupt files."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewbits.functional as F
from arrays import BLOCKSIZES, DTYPES, assert_same_bits
from fewbits import codebook
from fewbits.functional import QuantState, pack_dict_to_tensor, unpack_tensor_to_dict

CPU = torch.device("cpu")


def make(
    nested: bool = True,
    quant_type: str = "nf4",
    n: int = 1000,
    dtype: torch.dtype = torch.float16,
    blocksize: int = 64,
    device: torch.device = CPU,
) -> tuple[torch.Tensor, QuantState]:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(device, dtype)
    return F.quantize_4bit(x, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type)


def snapshot(items: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in items.items()}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return list(left) == list(right) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(left.values(), right.values(), strict=True)
    )


# ---- as_dict --------------------------------------------------------------------------------------------------------

KEYS = ["quant_type", "absmax", "blocksize", "quant_map", "dtype", "shape"]
NESTED_KEYS = ["nested_absmax", "nested_blocksize", "nested_quant_map", "nested_dtype", "nested_offset"]


@pytest.mark.parametrize("nested", [False, True])
def test_unpacked_keys_and_types(nested: bool) -> None:
    items = make(nested)[1].as_dict()
    assert list(items) == KEYS + NESTED_KEYS * nested
    assert (items["quant_type"], items["dtype"], items["shape"], items["blocksize"]) == ("nf4", "float16", (1000,), 64)
    if nested:
        assert (items["nested_dtype"], items["nested_blocksize"]) == ("float32", 256)
        assert isinstance(items["nested_offset"], float)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_packed_layout(nested: bool, quant_type: str) -> None:
    state = make(nested, quant_type)[1]
    items = state.as_dict(packed=True)
    key = f"quant_state.bitsandbytes__{quant_type}"
    tensors = ["absmax", "quant_map"] + ["nested_absmax", "nested_quant_map"] * nested
    assert list(items) == [*tensors, key]
    text = bytes(items[key].tolist()).decode()
    assert text == json.dumps(json.loads(text)), "other separators than bitsandbytes' files have"
    names = ["quant_type", "blocksize", "dtype", "shape"]
    assert list(json.loads(text)) == names + ["nested_blocksize", "nested_dtype", "nested_offset"] * nested
    assert torch.equal(getattr(state, f"bitsandbytes__{quant_type}"), items[key])
    for wrong in ("bitsandbytes__int8", "bitsandbytes__", "anything"):
        with pytest.raises(AttributeError, match=wrong):
            getattr(state, wrong)


def test_dictionaries_share_no_memory_between_states() -> None:
    for packed in (False, True):
        held = [make()[1].as_dict(packed) for _ in range(3)]
        tensors = [value for items in held for value in items.values() if isinstance(value, torch.Tensor)]
        assert len({value.untyped_storage().data_ptr() for value in tensors}) == len(tensors) > 9


def test_8bit_states_are_never_packed() -> None:
    state = F.quantize_blockwise(torch.randn(100), nested=True)[1]
    items = state.as_dict(packed=True)
    assert list(items) == KEYS + NESTED_KEYS
    assert items["quant_type"] is None
    assert QuantState.from_dict(items, "cpu") == state


# ---- round trips ----------------------------------------------------------------------------------------------------


@given(
    n=st.integers(0, 3000),
    nested=st.booleans(),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from(DTYPES),
    blocksize=st.sampled_from(BLOCKSIZES),
    packed=st.booleans(),
    prefix=st.sampled_from(["", "weight.", "model.layers.0.q_proj.weight."]),
)
def test_round_trip(
    n: int, nested: bool, quant_type: str, dtype: torch.dtype, blocksize: int, packed: bool, prefix: str
) -> None:
    codes, state = make(nested, quant_type, n, dtype, blocksize)
    items = {prefix + key: value for key, value in state.as_dict(packed).items()}
    before = snapshot(items)
    back = QuantState.from_dict(items, device="cpu")
    assert same(items, before), "from_dict changed what it was given"
    assert back == state
    assert same(back.as_dict(packed), state.as_dict(packed))
    assert_same_bits(F.dequantize_4bit(codes, back), F.dequantize_4bit(codes, state), "values")


def test_equal_tables_are_shared() -> None:
    """A loaded state keeps no private copy of a table, and quantized maxima are read by the default map's fast path."""
    state = QuantState.from_dict(make()[1].as_dict(packed=True), "cpu")
    assert state.code is codebook.shared_table("nf4", CPU)
    assert state.state2 is not None
    assert state.state2.code is codebook.shared_table("dynamic", CPU)


def test_other_nested_tables_are_obeyed() -> None:
    codes, state = make()
    items = state.as_dict()
    items["nested_quant_map"] = torch.linspace(-1, 1, 256)
    back = QuantState.from_dict(items, "cpu")
    assert back != state
    assert back.state2 is not None
    expected = items["nested_quant_map"][state.absmax.long()] * back.state2.absmax + items["nested_offset"]
    plain = QuantState(expected, state.shape, None, 64, "nf4", state.dtype)
    assert_same_bits(F.dequantize_4bit(codes, back), F.dequantize_4bit(codes, plain), "values")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_maxima_of_other_dtypes_and_shapes(dtype: torch.dtype) -> None:
    items = make(nested=False)[1].as_dict(packed=True)
    odd = {**items, "absmax": items["absmax"].to(dtype).reshape(1, -1)}
    back = QuantState.from_dict(odd, "cpu")
    assert (back.absmax.dtype, back.absmax.shape) == (torch.float32, items["absmax"].shape)
    assert torch.equal(back.absmax, items["absmax"].to(dtype).float())


@pytest.mark.parametrize("device_name", [torch.device("cpu"), "cpu", "meta"])
def test_from_dict_takes_any_name_of_a_device(device_name: Any) -> None:
    state = QuantState.from_dict(make()[1].as_dict(packed=True), device_name)
    assert state.absmax.device == torch.device(device_name)


def test_extra_entries_of_the_json_text_are_ignored() -> None:
    state = make()[1]
    items = state.as_dict(packed=True)
    key = "quant_state.bitsandbytes__nf4"
    items[key] = pack_dict_to_tensor({**unpack_tensor_to_dict(items[key]), "added_later": 1, "absmax": "no"})
    assert QuantState.from_dict(items, "cpu") == state


# ---- corrupt dictionaries -------------------------------------------------------------------------------------------


def repack(items: dict[str, Any], **changes: Any) -> dict[str, Any]:
    key = "quant_state.bitsandbytes__nf4"
    unpacked = {**unpack_tensor_to_dict(items[key]), **changes}
    return {**items, key: pack_dict_to_tensor({k: v for k, v in unpacked.items() if v is not ...})}


def without(items: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in items.items() if k != key}


BLOB = "quant_state.bitsandbytes__nf4"
CORRUPT: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = [
    ("quant_state", lambda d: {}),
    ("quant_state", lambda d: without(d, BLOB)),
    ("unexpected", lambda d: {**d, "weight.unexpected": torch.ones(1)}),
    ("quant_state", lambda d: {**d, "quant_state.bitsandbytes__fp4": d[BLOB]}),
    ("bitsandbytes__int8", lambda d: {**without(d, BLOB), "quant_state.bitsandbytes__int8": d[BLOB]}),
    ("bitsandbytes__fp4", lambda d: {**without(d, BLOB), "quant_state.bitsandbytes__fp4": d[BLOB]}),
    ("quant_state", lambda d: {**without(d, BLOB), "quant_state": d[BLOB]}),
    ("absmax", lambda d: {**d, "a.absmax": d["absmax"]}),
    (BLOB, lambda d: {**d, BLOB: d[BLOB][:-1]}),
    (BLOB, lambda d: {**d, BLOB: d[BLOB].float()}),
    (BLOB, lambda d: {**d, BLOB: torch.tensor(list(b"[1]"), dtype=torch.uint8)}),
    (BLOB, lambda d: {**d, BLOB: torch.tensor([255, 254], dtype=torch.uint8)}),
    (BLOB, lambda d: {**d, BLOB: "text"}),
    (BLOB, lambda d: repack(d, quant_type="fp4")),
    (BLOB, lambda d: repack(d, quant_type=...)),
    ("absmax", lambda d: without(d, "absmax")),
    ("absmax", lambda d: {**d, "absmax": d["absmax"][1:]}),
    ("absmax", lambda d: {**d, "absmax": d["absmax"].float()}),
    ("absmax", lambda d: {**d, "absmax": [1.0]}),
    ("quant_map", lambda d: without(d, "quant_map")),
    ("quant_map", lambda d: {**d, "quant_map": torch.ones(15)}),
    ("quant_map", lambda d: {**d, "quant_map": torch.ones(16)}),
    ("quant_map", lambda d: {**d, "quant_map": d["quant_map"].int()}),
    ("quant_map", lambda d: {**d, "quant_map": None}),
    ("nested_absmax", lambda d: without(d, "nested_absmax")),
    ("nested_absmax", lambda d: {**d, "nested_absmax": torch.ones(2)}),
    ("nested_absmax", lambda d: {**d, "nested_absmax": torch.ones(1, dtype=torch.uint8)}),
    ("nested_quant_map", lambda d: without(d, "nested_quant_map")),
    ("nested_quant_map", lambda d: {**d, "nested_quant_map": torch.ones(16)}),
    ("nested_offset", lambda d: repack(d, nested_offset=...)),
    ("nested_offset", lambda d: repack(d, nested_offset="1")),
    ("nested_blocksize", lambda d: repack(d, nested_blocksize=...)),
    ("nested_blocksize", lambda d: repack(d, nested_blocksize=100)),
    ("nested_dtype", lambda d: repack(d, nested_dtype="float33")),
    ("shape", lambda d: repack(d, shape=...)),
    ("shape", lambda d: repack(d, shape=[-1000])),
    ("shape", lambda d: repack(d, shape="1000")),
    ("absmax", lambda d: repack(d, shape=[1000, 1000])),
    ("blocksize", lambda d: repack(d, blocksize=...)),
    ("blocksize", lambda d: repack(d, blocksize=0)),
    ("blocksize", lambda d: repack(d, blocksize=64.0)),
    ("dtype", lambda d: repack(d, dtype=...)),
    ("dtype", lambda d: repack(d, dtype="save")),
    ("dtype", lambda d: repack(d, dtype=3)),
]


@pytest.mark.parametrize(("key", "corrupt"), CORRUPT)
def test_corrupt_entries_are_named(key: str, corrupt: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    items = corrupt(make()[1].as_dict(packed=True))
    before = snapshot(items)
    with pytest.raises(ValueError, match=rf"^\S*{key}"):
        QuantState.from_dict(items, "cpu")
    assert same(items, before)


def test_unquantized_maxima_of_codes_are_refused() -> None:
    items = make(nested=False)[1].as_dict(packed=True)
    with pytest.raises(ValueError, match=r"absmax.*floating-point.*uint8"):
        QuantState.from_dict({**items, "absmax": items["absmax"].to(torch.uint8)}, "cpu")


@given(data=st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    items = make()[1].as_dict(packed=True)
    with pytest.raises(ValueError, match="quant_state"):
        QuantState.from_dict({**items, BLOB: torch.tensor(list(data), dtype=torch.uint8)}, "cpu")


# ---- moves, copies, comparison --------------------------------------------------------------------------------------


def test_to_moves_in_place(device: torch.device) -> None:
    codes, state = make(device=device)
    expected = F.dequantize_4bit(codes, state)
    assert state.to("cpu") is None
    parts = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]  # type: ignore[union-attr]
    assert all(part is not None and part.device == CPU for part in parts)
    state.to(device)
    assert_same_bits(F.dequantize_4bit(codes, state), expected, "values")


def test_to_spares_whoever_shares_the_nested_state() -> None:
    codes, state = make()
    expected = F.dequantize_4bit(codes, state)
    other = copy.copy(state)
    state.to("meta")
    assert state.absmax.is_meta
    assert state.state2 is not None
    assert state.state2.absmax.is_meta
    assert_same_bits(F.dequantize_4bit(codes, other), expected, "values of the other state")


def test_equality() -> None:
    codes, state = make()
    assert state == make()[1]
    assert state == QuantState.from_dict(state.as_dict(), "cpu")
    changes: dict[str, Any] = {
        "absmax": state.absmax + 1,
        "shape": torch.Size((10, 100)),
        "code": F.get_4bit_type("fp4", device="cpu"),
        "blocksize": 128,
        "quant_type": "fp4",
        "dtype": torch.float32,
        "offset": torch.tensor(3.0),
        "state2": None,
    }
    for name, value in changes.items():
        other = copy.copy(state)
        setattr(other, name, value)
        assert other != state, name
    assert state != make(nested=False)[1]
    assert state != 3
    assert (state == codes) is False


def test_indexing() -> None:
    for nested in (False, True):
        state = make(nested)[1]
        pair = [state.offset, state.state2] if nested else None
        expected = [state.absmax, state.shape, state.dtype, state.blocksize, pair, state.quant_type]
        assert [state[i] for i in range(5)][1:4] == expected[1:4]
        assert state[0] is state.absmax
        assert state[5] == state[-1] == "nf4"
        assert len(state[:]) == 6
        assert (state[4] is None) is not nested
        *_, quant_type = state
        assert quant_type == "nf4"


def test_attributes_are_plain() -> None:
    state = make()[1]
    assert list(state.__dict__) == [
        "absmax", "shape", "code", "dtype", "blocksize", "quant_type", "offset", "state2", "nested"
    ]  # fmt: skip
    state.nested = False
    assert state[4] is None
    assert state.as_dict().keys() == set(KEYS)


def test_copies_are_deep_but_for_tables() -> None:
    state = make()[1]
    other = copy.deepcopy(state)
    assert other == state
    assert other.absmax.data_ptr() != state.absmax.data_ptr()
    assert other.state2 is not state.state2
    assert other.code is state.code


def test_pickle() -> None:
    codes, state = make()
    back = pickle.loads(pickle.dumps(state))
    assert back == state
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == state
    assert_same_bits(F.dequantize_4bit(codes, back), F.dequantize_4bit(codes, state), "values")


def test_class_attributes() -> None:
    assert QuantState.valid_quant_types == ("fp4", "nf4")
    assert QuantState.valid_qs_type_keys == ["bitsandbytes__fp4", "bitsandbytes__nf4"]
    assert set(make()[1].as_dict()) < set(QuantState.valid_qs_keys)
    assert "nf4" in repr(make()[1])


# ---- with bitsandbytes, where it is installed -----------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("packed", [False, True])
def test_bitsandbytes_reads_ours_and_we_read_its(nested: bool, quant_type: str, packed: bool) -> None:
    peer = pytest.importorskip("bitsandbytes.functional")
    codes, state = make(nested, quant_type, n=4096)
    theirs = peer.QuantState.from_dict(dict(state.as_dict(packed)), device=CPU)
    assert same(theirs.as_dict(packed), state.as_dict(packed))
    assert peer.QuantState.valid_qs_keys == QuantState.valid_qs_keys
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16().view(64, 64)
    codes, made = peer.quantize_4bit(x, quant_type=quant_type, compress_statistics=nested)
    back = QuantState.from_dict(made.as_dict(packed), "cpu")
    assert same(back.as_dict(packed), made.as_dict(packed))
    # By value: its CPU kernel reads FP4's code 8 as +0.0, its CUDA kernel as -0.0.
    assert torch.equal(F.dequantize_4bit(codes, back), peer.dequantize_4bit(codes, made))
