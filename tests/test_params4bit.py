"""`Params4bit`: quantize once on the first move, keep the bytes, survive whatever models do to their parameters."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewbits.functional as F
from arrays import assert_same_bits
from fewbits.nn import Linear4bit, Params4bit

STORAGES = [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
KEYWORDS = {"blocksize", "bnb_quantized", "compress_statistics", "module", "quant_state", "quant_storage", "quant_type"}


def values(shape: tuple[int, ...] = (8, 64), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def make(device: torch.device | str = "cpu", **kwargs: Any) -> Params4bit:
    return Params4bit(values(), **{"quant_type": "nf4", **kwargs}).to(device)


def assert_equal(got: Params4bit, expected: Params4bit) -> None:
    assert type(got) is Params4bit
    assert got.quant_state is not None
    assert expected.quant_state is not None
    assert (got.bnb_quantized, got.shape, got.dtype) == (True, expected.shape, expected.dtype)
    assert torch.equal(got.data.cpu().view(torch.uint8), expected.data.cpu().view(torch.uint8))
    left, right = copy.copy(got.quant_state), copy.copy(expected.quant_state)
    left.to("cpu")
    right.to("cpu")
    assert left == right
    assert F.dequantize_4bit(got.data, got.quant_state).device == got.device


# ---- construction ---------------------------------------------------------------------------------------------------


def test_attributes_are_the_keywords() -> None:
    parameter = Params4bit(values(), unknown=1, _is_hf_initialized=True)
    assert set(parameter.__dict__) == KEYWORDS
    assert set(make().__dict__) == KEYWORDS
    assert (parameter.quant_type, parameter.blocksize, parameter.compress_statistics) == ("fp4", 64, True)
    assert (parameter.quant_storage, parameter.bnb_quantized, parameter.quant_state) == (torch.uint8, False, None)
    assert not parameter.requires_grad
    assert isinstance(parameter, torch.nn.Parameter)
    assert type(parameter.data) is torch.Tensor


def test_no_data() -> None:
    assert Params4bit().numel() == 0


def test_from_another_parameter() -> None:
    source = make()
    for data in (source, source.data, torch.nn.Parameter(source.data, requires_grad=False)):
        again = Params4bit(data, **source.__dict__)
        assert_equal(again, source)
        assert again.data_ptr() == source.data_ptr()


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"data": [1.0]}, TypeError, "data"),
        ({"blocksize": 48}, ValueError, "blocksize.*48"),
        ({"quant_type": "int4"}, ValueError, "quant_type.*int4"),
        ({"quant_storage": "uint8"}, TypeError, "quant_storage"),
    ],
)
def test_wrong_keywords(kwargs: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Params4bit(**{"data": values(), **kwargs})


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8])
def test_values_that_cannot_be_quantized(dtype: torch.dtype) -> None:
    parameter = Params4bit(torch.ones(4, 4).to(dtype))
    with pytest.raises(ValueError, match=f"Params4bit.data.*{dtype}"):
        parameter.to("cpu")
    assert not parameter.bnb_quantized
    assert parameter.dtype == dtype


# ---- the first move -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "move",
    [
        lambda p: p.to("cpu"),
        lambda p: p.cpu(),
        lambda p: p.to(torch.device("cpu")),
        lambda p: p.to(device="cpu", non_blocking=True),
        lambda p: p.to("cpu", torch.float32),
        lambda p: p.to(torch.empty(1)),
        lambda p: p.to("cpu", copy=True),
    ],
)
@pytest.mark.parametrize("storage", STORAGES)
def test_first_move_quantizes_and_spares_the_source(
    move: Callable[[Params4bit], Params4bit], storage: torch.dtype
) -> None:
    source = Params4bit(values(), quant_type="nf4", blocksize=128, quant_storage=storage)
    moved = move(source)
    codes, state = F.quantize_4bit(
        values(), blocksize=128, compress_statistics=True, quant_type="nf4", quant_storage=storage
    )
    assert_same_bits(moved.data.view(torch.uint8), codes.view(torch.uint8), "codes")
    assert moved.quant_state == state
    assert moved.bnb_quantized
    assert not source.bnb_quantized
    assert source.quant_state is None
    assert torch.equal(source.data, values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_before_the_first_move(dtype: torch.dtype) -> None:
    source = Params4bit(values())
    for cast in (source.to(dtype), source.type(dtype), source.half() if dtype == torch.float16 else source.bfloat16()):
        assert type(cast) is Params4bit
        assert (cast.dtype, cast.bnb_quantized) == (dtype, False)
        state = cast.to("cpu").quant_state
        assert state is not None
        assert state.dtype == dtype
    state = source.to("cpu", dtype).quant_state
    assert state is not None
    assert state.dtype == dtype
    assert source.to(torch.float32) is source


def test_meta_stays_unquantized() -> None:
    parameter = Params4bit(values()).to("meta")
    assert (parameter.is_meta, parameter.bnb_quantized, parameter.shape) == (True, False, (8, 64))
    assert parameter.to("meta") is parameter
    with pytest.raises(NotImplementedError, match="meta"):
        parameter.to("cpu")
    parameter.data = parameter.data.to(torch.uint8)  # as transformers prepares a place for packed codes
    assert (type(parameter), parameter.dtype) == (Params4bit, torch.uint8)


def test_module_learns_the_state() -> None:
    layer = Linear4bit(64, 8)
    moved = layer.weight.to("cpu")
    assert layer.quant_state is moved.quant_state
    assert moved.module is layer


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_requires_grad(requires_grad: bool, storage: torch.dtype) -> None:
    moved = Params4bit(values(), requires_grad, quant_storage=storage).to("cpu")
    assert moved.requires_grad is (requires_grad and storage.is_floating_point)


# ---- later moves and casts ------------------------------------------------------------------------------------------

CASTS: list[Callable[[Params4bit], Params4bit]] = [
    lambda p: p.half(),
    lambda p: p.float(),
    lambda p: p.double(),
    lambda p: p.bfloat16(),
    lambda p: p.type(torch.float16),
    lambda p: p.to(torch.float32),
    lambda p: p.to(dtype=torch.bfloat16),
    lambda p: p.to("cpu", torch.float16),
    lambda p: p.to(torch.empty(1, dtype=torch.float16)),
    lambda p: p.cpu(),
    lambda p: p.to("cpu"),
]


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("storage", STORAGES)
def test_bytes_are_never_cast(cast: Callable[[Params4bit], Params4bit], storage: torch.dtype) -> None:
    parameter = make(quant_storage=storage)
    assert cast(parameter) is parameter
    assert parameter.dtype == storage


def test_copy_keyword() -> None:
    parameter = make()
    duplicate = parameter.to("cpu", copy=True)
    assert_equal(duplicate, parameter)
    assert duplicate.data_ptr() != parameter.data_ptr()


def test_to_meta_destroys_nothing() -> None:
    parameter = make()
    expected = F.dequantize_4bit(parameter.data, parameter.quant_state)
    shell = parameter.to("meta")
    assert (shell.is_meta, shell.shape, shell.bnb_quantized) == (True, parameter.shape, True)
    assert torch.equal(F.dequantize_4bit(parameter.data, parameter.quant_state), expected)
    # An offloader brings the bytes back into what the shell remembers.
    back = Params4bit(parameter.data.clone(), requires_grad=False, **shell.__dict__).to("cpu")
    assert_equal(back, parameter)


@pytest.mark.cuda
def test_round_trips_between_devices(cuda: torch.device) -> None:
    parameter = make()
    moved = parameter
    for _ in range(10):
        moved = moved.to(cuda)
        assert moved.device == cuda
        moved = moved.cpu()
    assert_equal(moved, parameter)
    assert_equal(parameter.cuda(), make(cuda))
    assert parameter.device.type == "cpu"


def test_unsupported_device() -> None:
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError, ValueError)):
        Params4bit(values()).xpu()


# ---- telling codes from values --------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    storage=st.sampled_from(STORAGES),
    flag=st.booleans(),
)
def test_packed_codes_are_recognized(rows: int, columns: int, storage: torch.dtype, flag: bool) -> None:
    source = Params4bit(values((rows, columns)), quant_type="nf4", quant_storage=storage).to("cpu")
    attributes = {**source.__dict__, "bnb_quantized": flag}
    if rows * columns > 1:  # one value and its one storage element look alike: there the flag counts
        assert_equal(Params4bit(source.data, **attributes).to("cpu"), source)
        again = Params4bit(values((rows, columns)), **attributes)
        assert not again.bnb_quantized, "values with the old state of the parameter they replace are new values"
        assert_equal(again.to("cpu"), source)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bytes_cast_by_an_offloader_are_restored(dtype: torch.dtype) -> None:
    source = make()
    again = Params4bit(source.data.to(dtype), **{**source.__dict__, "bnb_quantized": False})
    assert_equal(again, source)


# ---- prequantized ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "weight.", "model.layers.0.mlp.weight."])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
def test_from_prequantized(prefix: str, nested: bool, storage: torch.dtype, device: torch.device) -> None:
    source = make(compress_statistics=nested, blocksize=128, quant_storage=storage)
    assert source.quant_state is not None
    stats = {prefix + key: value for key, value in source.quant_state.as_dict(packed=True).items()}
    keys = list(stats)
    layer = Linear4bit(64, 8, device="meta")
    made = Params4bit.from_prequantized(
        source.data, stats, requires_grad=False, device=device, module=layer, _is_hf_initialized=True
    )
    assert list(stats) == keys
    assert_equal(made, source)
    assert made.device.type == device.type
    assert layer.quant_state is made.quant_state
    assert (made.blocksize, made.compress_statistics, made.quant_storage) == (128, nested, storage)
    assert (made.quant_type, made.bnb_quantized, made.module) == ("nf4", True, layer)
    assert set(made.__dict__) == KEYWORDS


def test_from_prequantized_checks_the_size() -> None:
    source = make()
    assert source.quant_state is not None
    stats = source.quant_state.as_dict(packed=True)
    with pytest.raises(ValueError, match=r"data.*256.*255"):
        Params4bit.from_prequantized(source.data[1:], stats, device="cpu")
    with pytest.raises(ValueError, match=r"data"):
        Params4bit.from_prequantized(values(), stats, device="cpu")
    with pytest.raises(ValueError, match=r"absmax"):
        Params4bit.from_prequantized(source.data, {k: v for k, v in stats.items() if k != "absmax"}, device="cpu")


# ---- what models do to parameters -----------------------------------------------------------------------------------


def test_properties_walk_the_state() -> None:
    """The names that distributed checkpoints look up, attribute by attribute."""
    parameter = make()
    state = parameter.quant_state
    assert state is not None
    assert state.state2 is not None
    assert parameter.absmax is state.absmax
    assert parameter.code is parameter.quant_map is state.code
    assert parameter.offset is parameter.nested_offset is state.offset
    assert parameter.state2 is state.state2
    assert parameter.nested_absmax is state.state2.absmax
    assert parameter.nested_quant_map is state.state2.code
    assert (parameter.nested_blocksize, parameter.nested_dtype) == (256, torch.float32)
    for key in state.as_dict(packed=True):
        found: Any = parameter
        for name in key.split("."):
            found = getattr(found, name)
        assert isinstance(found, torch.Tensor)
    plain, unquantized = make(compress_statistics=False), Params4bit(values())
    for name in (
        "offset",
        "state2",
        "nested_absmax",
        "nested_blocksize",
        "nested_quant_map",
        "nested_dtype",
        "nested_offset",
    ):
        assert not hasattr(plain, name)
        assert not hasattr(unquantized, name)
    for name in ("absmax", "code", "quant_map"):
        assert hasattr(plain, name)
        assert not hasattr(unquantized, name)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_chunk_and_split(storage: torch.dtype) -> None:
    parameter = make(quant_storage=storage)
    size = parameter.shape[0] // 2
    for pieces in (torch.chunk(parameter, 2), torch.split(parameter, size), torch.chunk(input=parameter, chunks=2)):
        assert len(pieces) == 2
        for piece in pieces:
            assert type(piece) is Params4bit
            assert piece.shape == (size, 1)
            assert {**piece.__dict__} == {**parameter.__dict__}
        assert torch.equal(torch.cat(list(pieces)), parameter.data)
    assert all(type(piece) is torch.Tensor for piece in parameter.chunk(2) + parameter.split(size))


@pytest.mark.parametrize(
    "function",
    [
        torch.clone, torch.detach, torch.t, torch.empty_like, lambda p: p.view(-1), lambda p: p[:2], lambda p: p + 0,
        lambda p: torch.cat([p, p]), lambda p: p.narrow(0, 0, 2), lambda p: p.new_empty(2), lambda p: p.data,
    ],
)  # fmt: skip
def test_other_operations_give_plain_tensors(function: Callable[[Params4bit], torch.Tensor]) -> None:
    assert type(function(make())) is torch.Tensor


def test_assigning_data() -> None:
    """`module.to()` assigns to `.data`: the parameter takes over the state with the bytes, and keeps its identity."""
    target, source = Params4bit(values(), requires_grad=True, module=None), make(quant_storage=torch.float16)
    layer = Linear4bit(64, 8)
    target.module = layer
    target.data = make()
    assert_equal(target, make())
    assert target.module is layer
    assert not target.requires_grad
    target.data = source
    assert_equal(target, source)
    state = target.quant_state
    target.data = source.data.clone()
    assert target.quant_state is state
    assert type(target) is Params4bit


def test_any_module_may_hold_one(device: torch.device) -> None:
    module = torch.nn.Module()
    module.first = Params4bit(values(), quant_type="nf4")
    module.second = torch.nn.ParameterList([Params4bit(values(), quant_type="nf4")])
    first = module.first
    module.to(device)
    assert module.first is first
    for parameter in module.parameters():
        assert isinstance(parameter, Params4bit)
        assert_equal(parameter, make(device))
    module.half()
    assert_equal(first, make(device))


def test_swapping_parameters_on_conversion() -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer = Linear4bit(64, 8, quant_type="nf4")
        weight = layer.weight
        weight.data = values()
        layer.to("cpu")
        assert layer.weight is weight
        assert_equal(weight, make())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


# ---- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
def test_deepcopy(storage: torch.dtype) -> None:
    parameter = make(quant_storage=storage, module=Linear4bit(64, 8))
    pair = copy.deepcopy([parameter, parameter])
    assert pair[0] is pair[1]
    assert_equal(pair[0], parameter)
    assert pair[0].data_ptr() != parameter.data_ptr()
    assert pair[0].quant_state is not parameter.quant_state
    assert pair[0].module is None
    assert copy.deepcopy(Params4bit(values())).quant_state is None


def test_copy() -> None:
    parameter = make()
    other = copy.copy(parameter)
    assert_equal(other, parameter)
    assert other.data_ptr() == parameter.data_ptr()
    assert other.quant_state is parameter.quant_state


def saved(parameter: Params4bit, weights_only: bool) -> Params4bit:
    file = io.BytesIO()
    torch.save({"weight": parameter}, file)
    file.seek(0)
    loaded: Params4bit = torch.load(file, weights_only=weights_only)["weight"]
    return loaded


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize(
    "copied",
    [
        lambda p: pickle.loads(pickle.dumps(p)),
        lambda p: pickle.loads(pickle.dumps(p, protocol=2)),
        lambda p: saved(p, weights_only=True),
        lambda p: saved(p, weights_only=False),
    ],
)
def test_pickle_keeps_the_class(copied: Callable[[Params4bit], Params4bit], storage: torch.dtype) -> None:
    parameter = make(quant_storage=storage, module=Linear4bit(64, 8))
    other = copied(parameter)
    assert_equal(other, parameter)
    assert set(other.__dict__) == KEYWORDS
    assert other.module is None
    unquantized = copied(Params4bit(values(), requires_grad=True, quant_type="nf4"))
    assert (type(unquantized), unquantized.requires_grad, unquantized.bnb_quantized) == (Params4bit, True, False)
    assert_equal(unquantized.to("cpu"), make())


def test_get_and_set_state() -> None:
    parameter, other = make(), Params4bit()
    other.__setstate__(parameter.__getstate__())
    assert_equal(other, parameter)


def _child(parameter: Params4bit, answer: Any) -> None:
    answer.put((type(parameter).__name__, F.dequantize_4bit(parameter.data, parameter.quant_state).tolist()))


def test_another_process() -> None:
    parameter = make()
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    process = context.Process(target=_child, args=(parameter, answer))
    process.start()
    name, got = answer.get()
    process.join(30)
    assert (name, process.exitcode) == ("Params4bit", 0)
    assert got == F.dequantize_4bit(parameter.data, parameter.quant_state).tolist()


def test_a_parameter_does_not_outlive_its_last_reference() -> None:
    import weakref

    parameter = make()
    gone = weakref.ref(parameter)
    del parameter
    gc.collect()
    assert gone() is None
