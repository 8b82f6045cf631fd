"""`Embedding4bit`: the rows asked for, with the bits of the whole table dequantized; and state dicts that load back."""

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

from arrays import DTYPES, assert_same_bits
from fewbits._states import dequantize_as
from fewbits.nn import Embedding4bit, EmbeddingFP4, EmbeddingNF4, Linear4bit, Params4bit

N, K = 40, 96
STORAGES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(device: torch.device | str | None = "cpu", n: int = N, k: int = K, **kwargs: Any) -> Embedding4bit:
    table = Embedding4bit(n, k, **{"quant_type": "nf4", **kwargs})
    table.weight.data = randn(n, k).to(table.dtype)
    return table if device is None else table.to(device)


def dense(table: Embedding4bit, dtype: torch.dtype) -> torch.Tensor:
    assert table.quant_state is not None
    return dequantize_as(table.weight.data, table.quant_state, dtype)


@given(
    n=st.integers(1, 60),
    k=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    storage=st.sampled_from(STORAGES),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    shape=st.lists(st.integers(0, 4), max_size=3),
    stepped=st.booleans(),
)
def test_rows(
    n: int,
    k: int,
    dtype: torch.dtype,
    quant_type: str,
    storage: torch.dtype,
    index_dtype: torch.dtype,
    shape: list[int],
    stepped: bool,
    device: torch.device,
) -> None:
    table = make(device, n, k, dtype=dtype, quant_type=quant_type, quant_storage=storage)
    indices = torch.randint(0, n, shape, generator=torch.Generator().manual_seed(n)).to(device, index_dtype)
    if stepped and shape:
        indices = indices.repeat_interleave(2, -1)[..., ::2]
    values = table(indices)
    assert (values.shape, values.dtype) == ((*shape, k), dtype)
    assert not values.requires_grad
    assert_same_bits(values, nn.functional.embedding(indices, dense(table, dtype)), "rows")


def test_dtypes() -> None:
    """`dtype` is that of the result, whatever the table was quantized from: values are rounded to it once."""
    indices = torch.arange(N)
    assert make().dtype == torch.float32
    for dtype in (*DTYPES, torch.float64):
        table = make(dtype=dtype) if dtype != torch.float64 else make()
        table.dtype = dtype
        assert table(indices).dtype == dtype
    half = make(None, dtype=torch.float32).to("cpu", torch.bfloat16)
    assert half.quant_state is not None
    assert half.quant_state.dtype == torch.bfloat16
    assert_same_bits(half(indices), dense(half, torch.float32), "float32 of a bfloat16 table")


@pytest.mark.parametrize(("cls", "quant_type"), [(EmbeddingNF4, "nf4"), (EmbeddingFP4, "fp4")])
def test_named_types(cls: type[Embedding4bit], quant_type: str) -> None:
    table = cls(N, K, torch.float16, torch.bfloat16, "cpu")  # type: ignore[arg-type]
    assert (table.weight.quant_type, table.weight.compress_statistics) == (quant_type, False)
    assert (table.dtype, table.quant_storage, table.weight.device.type) == (torch.float16, torch.bfloat16, "cpu")
    assert Embedding4bit(N, K).weight.quant_type == "fp4"
    assert isinstance(table, nn.Embedding)
    assert (table.num_embeddings, table.embedding_dim) == (N, K)


def test_only_the_rows_are_dequantized(device: torch.device) -> None:
    """A table whose other rows are broken answers for those that are not."""
    table = make(device, 200, 64)
    expected = dense(table, torch.float32)
    assert table.quant_state is not None
    table.quant_state.absmax[100:] = torch.nan
    assert_same_bits(table(torch.arange(100, device=device)), expected[:100], "rows")
    assert bool(table(torch.arange(100, 200, device=device)).isnan().all())


@pytest.mark.parametrize("bad", [-1, N, 2**40])
def test_an_index_of_no_row(bad: int, device: torch.device) -> None:
    table = make(device)
    indices = torch.tensor([0, bad, 1], device=device)
    if device.type == "cpu":
        with pytest.raises(IndexError, match=rf"{bad} at place 1.*0 to 39"):
            table(indices)
        return
    values = table(indices)
    assert bool(values[1].isnan().all())
    assert_same_bits(values[::2], table(torch.tensor([0, 1], device=device)), "the others")


def test_wrong_arguments() -> None:
    table = make()
    with pytest.raises(ValueError, match=r"indices.*int64.*float32"):
        table(torch.ones(2))
    with pytest.raises(ValueError, match=r"indices.*uint8"):
        table(torch.ones(2, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"input.*list"):
        table([1, 2])
    with pytest.raises(ValueError, match=r"indices.*meta.*B.*cpu"):
        table(torch.ones(2, dtype=torch.int64, device="meta"))
    table.max_norm = 1.0
    with pytest.raises(ValueError, match=r"max_norm.*1\.0"):
        table(torch.tensor([1]))
    with pytest.raises(RuntimeError, match=r"Embedding4bit.*\.to\('cpu'\)"):
        make(None)(torch.tensor([1]))
    with pytest.raises(ValueError, match=r"quant_type.*nf5"):
        Embedding4bit(N, K, quant_type="nf5")


def test_padding_index_changes_nothing() -> None:
    table = make()
    table.padding_idx = 3
    assert_same_bits(table(torch.tensor([3])), dense(table, torch.float32)[3:4], "padding row")


# ---- copies and state dicts -----------------------------------------------------------------------------------------


def assert_same_table(got: Embedding4bit, expected: Embedding4bit) -> None:
    assert type(got.weight) is Params4bit
    assert got.quant_state is got.weight.quant_state
    assert list(got.state_dict()) == list(expected.state_dict())
    indices = torch.arange(expected.num_embeddings)
    assert_same_bits(got.to("cpu")(indices), expected.to("cpu")(indices), "rows")


def test_layout() -> None:
    state_dict = make().state_dict()
    assert {key: (value.dtype, tuple(value.shape)) for key, value in state_dict.items() if "state" not in key} == {
        "weight": (torch.uint8, (N * K // 2, 1)),
        "weight.absmax": (torch.float32, (N * K // 64,)),
        "weight.quant_map": (torch.float32, (16,)),
    }
    assert "weight.quant_state.bitsandbytes__nf4" in state_dict


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("target", ["unquantized", "quantized", "meta"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("k", [K, 33])
def test_load_strictly(assign: bool, target: str, storage: torch.dtype, k: int, device: torch.device) -> None:
    source = make(device, k=k, quant_storage=storage)
    state_dict = safetensors.torch.load(safetensors.torch.save(source.state_dict()))
    table = {
        "unquantized": lambda: Embedding4bit(N, k),
        "quantized": lambda: make(device, k=k, quant_type="fp4"),
        "meta": lambda: Embedding4bit(N, k, device="meta"),
    }[target]()
    result = nn.ModuleDict({"a": table}).load_state_dict(
        {f"a.{key}": value for key, value in state_dict.items()}, strict=True, assign=assign
    )
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same_table(table, source)


def test_load_floating_point_tables() -> None:
    plain = nn.Embedding(N, K)
    for table in (Embedding4bit(N, K), make()):
        table.load_state_dict(plain.state_dict())
        table.to("cpu")
        torch.testing.assert_close(table(torch.arange(N)), plain.weight.detach(), rtol=0, atol=0.7)


@pytest.mark.parametrize("missing", ["weight.absmax", "weight.quant_map", "weight"])
def test_corrupt_state_dicts(missing: str) -> None:
    state_dict = {key: value for key, value in make().state_dict().items() if key != missing}
    with pytest.raises(RuntimeError, match=r"While loading weight"):
        Embedding4bit(N, K).load_state_dict(state_dict)
    with pytest.raises(RuntimeError, match=rf"\({N}, {K + 1}\)"):
        Embedding4bit(N, K + 1).load_state_dict(make().state_dict())


def through_torch_save(table: Embedding4bit) -> Embedding4bit:
    file = io.BytesIO()
    torch.save(table, file)
    file.seek(0)
    loaded: Embedding4bit = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save])
def test_copies(copied: Callable[[Embedding4bit], Embedding4bit]) -> None:
    table = make()
    other = copied(table)
    assert other.weight.module is other
    assert other.weight.data_ptr() != table.weight.data_ptr()
    assert_same_table(other, table)
    assert_same_table(copied(make(None)).to("cpu"), table)


def test_moves(device: torch.device) -> None:
    table = make(None)
    weight = table.weight
    expected = make()(torch.arange(N))
    for move in (lambda: table.to(device), lambda: table.to("cpu"), lambda: table.bfloat16(), lambda: table.half()):
        assert move() is table
        assert table.weight is weight
        assert_same_bits(table(torch.arange(N, device=weight.device)), expected, "moved")


def test_double_quantization(device: torch.device) -> None:
    """A table that a file holds with nested scales."""
    layer = Linear4bit(K, N, bias=False, quant_type="nf4", compress_statistics=True)
    layer.weight.data = randn(N, K)
    state_dict = layer.to(device).state_dict()
    table = Embedding4bit(N, K, device=device)
    table.load_state_dict(state_dict)
    assert table.quant_state is not None
    assert table.quant_state.nested
    indices = torch.tensor([5, 0, 39], device=device)
    assert_same_bits(table(indices), dense(table, torch.float32)[indices], "nested rows")


def test_tied_to_a_head(device: torch.device) -> None:
    """A table and a head share one packed weight."""
    table, head = make(None), Linear4bit(K, N, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    head.weight = table.weight
    model = nn.ModuleDict({"table": table, "head": head}).to(device)
    assert head.weight.data_ptr() == table.weight.data_ptr()
    rows = table(torch.arange(N, device=device))
    torch.testing.assert_close(head(torch.eye(K, device=device)).t(), rows)
    assert model["head"].quant_state is model["table"].quant_state


def test_plain_weight_is_recovered() -> None:
    table = make()
    expected = table(torch.arange(N))
    table.weight = nn.Parameter(table.weight.data, requires_grad=False)  # type: ignore[assignment]
    assert_same_bits(table(torch.arange(N)), expected, "plain parameter")


# ---- tracing --------------------------------------------------------------------------------------------------------


def test_compiled(device: torch.device) -> None:
    torch._dynamo.reset()
    table = make(device, dtype=torch.bfloat16)
    compiled = torch.compile(table, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (3, 5):
        indices = torch.arange(count, device=device)
        assert_same_bits(compiled(indices), table(indices), "compiled")
    torch._dynamo.reset()


@pytest.mark.cuda
def test_capture_in_a_graph(cuda: torch.device) -> None:
    table = make(cuda, 1000, 4096, dtype=torch.bfloat16)
    indices = torch.arange(8, device=cuda)
    table(indices)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = table(indices)
    indices.copy_(torch.arange(990, 998))
    captured.fill_(torch.nan)
    graph.replay()
    assert_same_bits(captured, table(indices), "replayed")
