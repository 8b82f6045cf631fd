"""Quantizing a directory of safetensors: what is written, what is left alone, and what happens when it goes wrong."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from checkpoint_files import (
    CONFIG,
    leftovers,
    linear_names,
    load_directory,
    tiny_tensors,
    write_checkpoint,
)
from fewbits import checkpoint as module
from fewbits import functional as F
from fewbits._safetensors import read_header
from fewbits._selection import matches
from fewbits.checkpoint import (
    Checkpoint,
    CheckpointError,
    UsageError,
    iter_dequantized,
    load_tensor,
    quantize_checkpoint,
    quantize_int8_rows,
)

FORMATS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8rows", False), ("blockwise8", False)]
KEYS = {
    "nf4": ["absmax", "quant_map", "quant_state.bitsandbytes__nf4"],
    "fp4": ["absmax", "quant_map", "quant_state.bitsandbytes__fp4"],
    "blockwise8": ["absmax", "quant_map", "quant_state.fewbits__blockwise8"],
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "src")


# ---- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quant_format", "double_quant"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layout(tmp_path: Path, quant_format: str, double_quant: bool, dtype: torch.dtype) -> None:
    tensors = tiny_tensors(dtype)
    src = write_checkpoint(tmp_path / "src", tensors)
    report = quantize_checkpoint(src, tmp_path / "dst", quant_format=quant_format, double_quant=double_quant)
    written = load_directory(tmp_path / "dst")
    assert sorted(report.errors) == sorted(linear_names())
    expected = set()
    for name, tensor in tensors.items():
        expected.add(name)
        if name not in report.errors:
            assert written[name].dtype == tensor.dtype
            assert torch.equal(written[name], tensor)
        elif quant_format == "int8rows":
            codes, scale = quantize_int8_rows(tensor)
            prefix = name.removesuffix("weight")
            assert torch.equal(written[name], codes)
            assert torch.equal(written[f"{prefix}SCB"], scale)
            assert written[f"{prefix}weight_format"].shape == ()
            assert written[f"{prefix}weight_format"].dtype == torch.uint8
            assert written[f"{prefix}weight_format"].item() == 0
            expected |= {f"{prefix}SCB", f"{prefix}weight_format"}
        elif quant_format == "blockwise8":
            codes, state = F.quantize_blockwise(tensor, blocksize=256)
            assert torch.equal(written[name], codes)
            assert torch.equal(written[f"{name}.absmax"], state.absmax)
            assert torch.equal(written[f"{name}.quant_map"], state.code)
            blob = json.loads(bytes(written[f"{name}.quant_state.fewbits__blockwise8"].tolist()))
            dtype_name = str(dtype).removeprefix("torch.")
            shape = list(tensor.shape)
            assert blob == {"quant_type": "blockwise8", "blocksize": 256, "dtype": dtype_name, "shape": shape}
            expected |= {f"{name}.{k}" for k in KEYS[quant_format]}
        else:
            codes, state = F.quantize_4bit(
                tensor, blocksize=64, quant_type=quant_format, compress_statistics=double_quant
            )
            stats = state.as_dict(packed=True)
            nested = ["nested_absmax", "nested_quant_map"] if double_quant else []
            assert sorted(stats) == sorted(KEYS[quant_format] + nested)
            assert torch.equal(written[name], codes)
            assert written[name].shape == ((tensor.numel() + 1) // 2, 1)
            for key, value in stats.items():
                assert torch.equal(written[f"{name}.{key}"], value)
                assert written[f"{name}.{key}"].dtype == value.dtype
                expected.add(f"{name}.{key}")
    assert set(written) == expected
    assert report.bytes_before == sum(t.nbytes for t in tensors.values())
    assert report.bytes_after == sum(t.nbytes for t in written.values())


@pytest.mark.parametrize(("quant_format", "double_quant"), FORMATS)
def test_read_back(source: Path, tmp_path: Path, quant_format: str, double_quant: bool) -> None:
    report = quantize_checkpoint(source, tmp_path / "dst", quant_format=quant_format, double_quant=double_quant)
    original = load_directory(source)
    back = dict(iter_dequantized(tmp_path / "dst"))
    assert set(back) == set(original)
    for name, tensor in original.items():
        assert back[name].shape == tensor.shape
        if name in report.errors:
            # The definition in the Report, in float64.
            w, q = tensor.double(), load_tensor(tmp_path / "dst", name, torch.float32).double()
            error = float((w - q).norm() / w.norm())
            assert report.errors[name] == pytest.approx(error, rel=1e-6)
            assert error < {"nf4": 0.11, "fp4": 0.14, "int8rows": 0.02, "blockwise8": 0.02}[quant_format]
        else:
            assert torch.equal(back[name], tensor)
    assert report.mean_error == pytest.approx(sum(report.errors.values()) / len(report.errors))
    assert report.worst == max(report.errors.items(), key=lambda item: item[1])


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    form=st.sampled_from(FORMATS),
    blocksize=st.sampled_from([None, 32, 64, 4096]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_any_shape(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    columns: int,
    form: tuple[str, bool],
    blocksize: int | None,
    dtype: torch.dtype,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)).to(dtype)
    src = write_checkpoint(folder / "src", {"a.weight": weight, "b": torch.ones(3)}, None)
    blocksize = None if form[0] == "int8rows" else blocksize
    report = quantize_checkpoint(src, folder / "dst", quant_format=form[0], double_quant=form[1], blocksize=blocksize)
    back = load_tensor(folder / "dst", "a.weight")
    assert back.shape == weight.shape
    load_directory(folder / "dst")
    assert math.isfinite(report.errors["a.weight"])
    relative = float((weight.double() - back.double()).norm() / weight.double().norm())
    assert relative < 0.35


def test_every_tensor_is_aligned(source: Path, tmp_path: Path) -> None:
    """A mapping of the file can only be viewed as float32 where the offset is a multiple of four."""
    quantize_checkpoint(source, tmp_path / "dst", double_quant=True)
    entries, metadata = read_header(tmp_path / "dst" / "model.safetensors")
    size = {"F32": 4, "I64": 8, "U8": 1}
    assert all(e.start % size[e.dtype] == 0 for e in entries)
    assert metadata == {"format": "pt"}


def test_other_dtypes_are_copied(tmp_path: Path) -> None:
    tensors = {
        "fp8.weight": torch.randn(8, 8).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
        "complex": torch.randn(3, dtype=torch.complex64),
        "int.weight": torch.arange(6, dtype=torch.int16).view(2, 3),
        "a.weight": torch.randn(8, 64),
        "experts": torch.randn(4, 8, 64),
    }
    src = write_checkpoint(tmp_path / "src", tensors, None)
    report = quantize_checkpoint(src, tmp_path / "dst")
    written = load_directory(tmp_path / "dst")
    for name, tensor in tensors.items():
        if name != "a.weight":
            assert torch.equal(written[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
            assert written[name].dtype == tensor.dtype
    assert any("8 bits or fewer" in n for n in report.notes)
    assert any("three-dimensional" in n for n in report.notes)
    # Without a config.json the result still says what it is.
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert list(config) == ["quantization_config"]


def test_float64_is_rounded_first(tmp_path: Path) -> None:
    weight = torch.randn(16, 64, dtype=torch.float64)
    src = write_checkpoint(tmp_path / "src", {"a.weight": weight}, None)
    report = quantize_checkpoint(src, tmp_path / "dst")
    codes, _ = F.quantize_4bit(weight.float(), blocksize=64, quant_type="nf4")
    assert torch.equal(load_directory(tmp_path / "dst")["a.weight"], codes)
    assert any("float64" in n for n in report.notes)


def test_strange_values(tmp_path: Path) -> None:
    nan = torch.randn(8, 64)
    nan[3, 3] = torch.nan
    src = write_checkpoint(tmp_path / "src", {"z.weight": torch.zeros(8, 64), "n.weight": nan}, None)
    report = quantize_checkpoint(src, tmp_path / "dst")
    assert report.errors["z.weight"] == 0.0
    assert torch.equal(load_tensor(tmp_path / "dst", "z.weight"), torch.zeros(8, 64))
    assert report.mean_error == 0.0
    assert any("NaN" in n and "n.weight" in n for n in report.notes)


def test_conv1d_is_transposed(tmp_path: Path) -> None:
    """Loaders build a linear layer for GPT-2's Conv1D and expect its weight as (out_features, in_features)."""
    tensors = {"h.0.attn.c_attn.weight": torch.randn(32, 96), "wte.weight": torch.randn(50, 32)}
    src = write_checkpoint(tmp_path / "src", tensors, {"model_type": "gpt2"})
    report = quantize_checkpoint(src, tmp_path / "dst")
    back = load_tensor(tmp_path / "dst", "h.0.attn.c_attn.weight")
    assert back.shape == (96, 32)
    assert list(report.errors) == ["h.0.attn.c_attn.weight"]
    assert float((back.T - tensors["h.0.attn.c_attn.weight"]).norm() / back.norm()) < 0.11


# ---- config.json and the other files --------------------------------------------------------------------------------


@pytest.mark.parametrize(("quant_format", "double_quant"), FORMATS)
def test_config(source: Path, tmp_path: Path, quant_format: str, double_quant: bool) -> None:
    quantize_checkpoint(
        source, tmp_path / "dst", quant_format=quant_format, double_quant=double_quant, skip=["layers.1"]
    )
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert config == CONFIG
    if quant_format == "blockwise8":
        skipped = settings["skip_modules"]
        assert settings["quant_method"] == "fewbits"
        assert settings["blocksize"] == 256
    else:
        skipped = settings["llm_int8_skip_modules"]
        assert settings["quant_method"] == "bitsandbytes"
        assert settings["load_in_8bit"] == settings["_load_in_8bit"] == (quant_format == "int8rows")
        assert settings["load_in_4bit"] == settings["_load_in_4bit"] == (quant_format != "int8rows")
        assert settings["bnb_4bit_quant_type"] == (quant_format if quant_format != "int8rows" else "fp4")
        assert settings["bnb_4bit_use_double_quant"] == double_quant
        assert settings["bnb_4bit_quant_storage"] == "uint8"
        assert settings["llm_int8_threshold"] == 6.0
    assert {"lm_head", "model.embed_tokens", "model.layers.0.mlp.gate"} <= set(skipped)
    assert {n.removesuffix(".weight") for n in linear_names() if ".1." in n} <= set(skipped)
    assert not {n.removesuffix(".weight") for n in linear_names() if ".0." in n} & set(skipped)


@pytest.mark.parametrize(("dtype", "declared", "expected"), [
    (torch.bfloat16, None, "bfloat16"),
    (torch.float16, None, "float16"),
    (torch.float32, None, "float32"),
    (torch.float32, "bfloat16", "bfloat16"),
])  # fmt: skip
def test_compute_dtype(tmp_path: Path, dtype: torch.dtype, declared: str | None, expected: str) -> None:
    src = write_checkpoint(tmp_path / "src", tiny_tensors(dtype), {"torch_dtype": declared} if declared else {})
    quantize_checkpoint(src, tmp_path / "dst")
    settings = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
    assert settings["bnb_4bit_compute_dtype"] == expected


def test_other_files(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("[]")
    (source / "2_Dense").mkdir()
    save_file({"linear.weight": torch.ones(2, 2)}, source / "2_Dense" / "model.safetensors")
    (source / "pytorch_model.bin").write_bytes(b"weights")
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("ref")
    (source / "gone").symlink_to("nowhere")
    quantize_checkpoint(source, tmp_path / "dst")
    files = {str(p.relative_to(tmp_path / "dst")) for p in (tmp_path / "dst").rglob("*") if p.is_file()}
    assert files == {
        "config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json", "2_Dense/model.safetensors"
    }  # fmt: skip


def test_shards(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    src = write_checkpoint(tmp_path / "src", tensors, shards=3)
    quantize_checkpoint(src, tmp_path / "one", double_quant=True)
    quantize_checkpoint(src, tmp_path / "many", double_quant=True, max_shard_bytes=20_000)
    assert (tmp_path / "one" / "model.safetensors").is_file()
    assert not list((tmp_path / "one").glob("*.index.json"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    one, many = load_directory(tmp_path / "one"), load_directory(tmp_path / "many")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in many.values())
    assert set(one) == set(many) == set(index["weight_map"])
    for name, tensor in one.items():
        assert torch.equal(many[name], tensor)
    for file in files:
        assert {k for k, v in index["weight_map"].items() if v == file.name} == set(load_file(file))
    for name in linear_names():
        files_of = {v for k, v in index["weight_map"].items() if k == name or k.startswith(f"{name}.")}
        assert len(files_of) == 1, "loaders expect what describes a weight in the same file"
    assert set(Checkpoint(tmp_path / "many").names()) == set(tensors)


def test_same_bytes_from_every_run(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize_checkpoint(source, tmp_path / name, double_quant=True)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.cuda
@pytest.mark.parametrize(("quant_format", "double_quant"), FORMATS)
def test_same_bytes_from_the_gpu(source: Path, tmp_path: Path, quant_format: str, double_quant: bool) -> None:
    reports = [
        quantize_checkpoint(source, tmp_path / d, quant_format=quant_format, double_quant=double_quant, device=d)
        for d in ("cpu", "cuda")
    ]
    assert (tmp_path / "cpu/model.safetensors").read_bytes() == (tmp_path / "cuda/model.safetensors").read_bytes()
    assert reports[0].errors == pytest.approx(reports[1].errors)


# ---- which tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "quantized"), [
    ("model.layers.0.mlp.gate_proj", True),
    ("encoder.layer.0.output.dense", True),
    ("time_embedding.linear_1", True),
    ("model.layers.0.mlp.experts.3.w1", True),
    ("transformer.wte", False),
    ("shared", False),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", False),
    ("embeddings.word_embeddings", False),
    ("lm_head", False),
    ("model.lm_head.dense", False),
    ("score", False),
    ("output", False),
    ("model.layers.0.block_sparse_moe.gate", False),
    ("model.layers.0.q_proj.lora_A", False),
    ("model.layers.0.post_norm", False),
    ("encoder.block.0.layer.1.DenseReluDense.wi", True),
    ("encoder.block.0.layer.1.DenseReluDense.wo", False),
    ("qformer.encoder.layer.0.attention.query", False),
    ("proj_out", False),
    ("block.proj_out", True),
    ("predictions.dense", False),
])  # fmt: skip
def test_default_choice(tmp_path: Path, name: str, quantized: bool) -> None:
    src = write_checkpoint(tmp_path / "src", {f"{name}.weight": torch.randn(8, 64)}, None)
    assert (f"{name}.weight" in quantize_checkpoint(src, tmp_path / "dst").errors) == quantized


@pytest.mark.parametrize(("pattern", "names"), [
    ("layers.1", {"model.layers.1.mlp.up.weight"}),
    ("mlp", {"model.layers.1.mlp.up.weight", "model.layers.11.mlp.up.weight"}),
    ("model.layers.1*", {"model.layers.1.mlp.up.weight", "model.layers.11.mlp.up.weight", "model.layers.1.q.weight"}),
    ("*.q", {"model.layers.1.q.weight"}),
    ("re:layers\\.1\\.", {"model.layers.1.mlp.up.weight", "model.layers.1.q.weight"}),
    ("re:^layers", set()),
    ("up_proj", set()),
])  # fmt: skip
def test_skip_patterns(pattern: str, names: set[str]) -> None:
    every = ["model.layers.1.mlp.up.weight", "model.layers.11.mlp.up.weight", "model.layers.1.q.weight"]
    if pattern == "layers.1":
        names = names | {"model.layers.1.q.weight"}
    assert {n for n in every if matches(pattern, n)} == names


def test_skip_that_names_nothing_is_noted(source: Path, tmp_path: Path) -> None:
    report = quantize_checkpoint(source, tmp_path / "dst", skip=["layres.1"])
    assert any("layres.1" in n for n in report.notes)


def test_what_a_loader_would_skip_is_not_quantized(tmp_path: Path) -> None:
    """Transformers compares suffixes: skipping `head.out` skips `other.head.out` too."""
    tensors = {f"{n}.weight": torch.randn(8, 64) for n in ("head.out", "other.head.out", "free")}
    src = write_checkpoint(tmp_path / "src", tensors, None)
    report = quantize_checkpoint(src, tmp_path / "dst", skip=["head.out*"])
    assert list(report.errors) == ["free.weight"]
    assert any("other.head.out" in n for n in report.notes)


@pytest.mark.parametrize(("architecture", "other", "expected"), [
    ("BertForPreTraining", "encoder.dense", {"lm_head", "cls.predictions.decoder", "predictions.decoder"}),
    ("WhisperForConditionalGeneration", "encoder.dense", {"lm_head", "proj_out"}),
    ("OtherForConditionalGeneration", "vision.proj_out", {"lm_head"}),
    ("LlamaForCausalLM", "model.dense", {"lm_head"}),
])  # fmt: skip
def test_tied_heads_are_named(tmp_path: Path, architecture: str, other: str, expected: set[str]) -> None:
    """A tied head is not in the file, yet a loader must be told to leave it alone."""
    src = write_checkpoint(tmp_path / "src", {f"{other}.weight": torch.randn(8, 64)}, {"architectures": [architecture]})
    report = quantize_checkpoint(src, tmp_path / "dst")
    assert list(report.errors) == [f"{other}.weight"]
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert set(config["quantization_config"]["llm_int8_skip_modules"]) == expected


def test_experts_are_noted(tmp_path: Path) -> None:
    src = write_checkpoint(tmp_path / "src", {"layers.0.mlp.experts.7.w1.weight": torch.randn(8, 64)}, None)
    assert any("experts" in n for n in quantize_checkpoint(src, tmp_path / "a").notes)
    assert not quantize_checkpoint(src, tmp_path / "b", skip=["experts"]).errors


# ---- int8 rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_rows_formula(dtype: torch.dtype) -> None:
    weight = (torch.randn(33, 130, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    weight[5] = 0
    codes, scale = quantize_int8_rows(weight)
    x = weight.float().numpy()
    largest = np.abs(x).max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.rint(x * (np.float32(127) / largest)[:, None])
    expected[5] = 0
    assert np.array_equal(codes.numpy(), expected.astype(np.int8))
    assert np.array_equal(scale.numpy(), largest)


def test_int8_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 16)
    whole = quantize_int8_rows(weight)
    monkeypatch.setattr("fewbits._encode.CHUNK", 48)
    assert all(torch.equal(a, b) for a, b in zip(whole, quantize_int8_rows(weight), strict=True))


def test_int8_rows_extremes() -> None:
    tiny, huge = 1e-42, torch.finfo(torch.float32).max
    weight = torch.tensor([[tiny, -tiny], [1e-38, 5e-39], [torch.nan, 1.0], [torch.inf, -1.0], [0.0, -0.0]])
    codes, scale = quantize_int8_rows(weight)
    assert codes[0].tolist() == [127, -127]
    assert codes[1, 0] == 127
    assert codes[2].tolist() == [0, 127]
    assert codes[3].tolist() == [127, 0]
    assert codes[4].tolist() == [0, 0]
    assert scale.tolist()[3:] == [huge, 0.0]
    assert [t.shape for t in quantize_int8_rows(torch.empty(3, 0))] == [(3, 0), (3,)]
    for wrong in (torch.ones(4), torch.ones(2, 2, dtype=torch.int32)):
        with pytest.raises(ValueError, match="weight: got"):
            quantize_int8_rows(wrong)


# ---- what is refused -------------------------------------------------------------------------------------------------


def corrupt(path: Path, how: str) -> None:
    """Damage a safetensors file."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    first = next(k for k in header if k != "__metadata__")
    if how == "truncated":
        data = data[:-7]
    elif how == "truncated header":
        data = data[: length // 2]
    elif how == "empty file":
        data = b""
    elif how == "seven bytes":
        data = data[:7]
    elif how == "header length":
        data = struct.pack("<Q", 1 << 62) + data[8:]
    elif how == "not JSON":
        data = data[:8] + b"x" * length + data[8 + length :]
    elif how == "trailing bytes":
        data = data + b"x"
    else:
        if how == "offsets beyond the file":
            header[first]["data_offsets"][1] += 1 << 40
        elif how == "shape contradicts":
            header[first]["shape"] = [3, 5, 7]
        elif how == "overflowing shape":
            header[first]["shape"] = [1 << 62, 1 << 62]
        elif how == "negative offset":
            header[first]["data_offsets"][0] = -8
        elif how == "unknown dtype":
            header[first]["dtype"] = "F13"
        text = json.dumps(header).encode()
        data = struct.pack("<Q", len(text)) + text + data[8 + length :]
    path.write_bytes(data)


CORRUPT = [
    "truncated", "truncated header", "empty file", "seven bytes", "header length", "not JSON", "trailing bytes",
    "offsets beyond the file", "shape contradicts", "overflowing shape", "negative offset", "unknown dtype",
]  # fmt: skip


@pytest.mark.parametrize("how", CORRUPT)
def test_corrupt_file(source: Path, tmp_path: Path, how: str) -> None:
    corrupt(source / "model.safetensors", how)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file") as caught:
        quantize_checkpoint(source, tmp_path / "dst")
    assert not isinstance(caught.value, UsageError)
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == ["src"]


def test_file_that_shrinks_while_it_is_read(source: Path, tmp_path: Path) -> None:
    path = source / "model.safetensors"

    def shrink(name: str, done: int, total: int) -> None:
        os.truncate(path, path.stat().st_size // 2)

    with pytest.raises(CheckpointError, match="ends inside this tensor"):
        quantize_checkpoint(source, tmp_path / "dst", progress=shrink)
    assert leftovers(tmp_path) == ["src"]


@pytest.mark.parametrize(("content", "message"), [
    ("{", "not JSON"),
    ("[1]", "expected an object"),
    ('{"weight_map": 3}', "weight_map"),
    ('{"weight_map": {"a": "../../etc/passwd"}}', "weight_map"),
    ('{"weight_map": {"a": "/etc/passwd"}}', "weight_map"),
    ('{"weight_map": {"a": "missing.safetensors"}}', "1 of 1 shards are missing"),
    ("[" * 100_000, "not JSON"),
])  # fmt: skip
def test_bad_index(source: Path, tmp_path: Path, content: str, message: str) -> None:
    (source / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(source, tmp_path / "dst")
    assert leftovers(tmp_path) == ["src"]


def test_bad_config(source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        quantize_checkpoint(source, tmp_path / "dst")


def test_tensor_in_two_files(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").rename(source / "a.safetensors")
    save_file({"lm_head.weight": torch.ones(2, 2)}, source / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is in a\.safetensors too"):
        quantize_checkpoint(source, tmp_path / "dst")


@pytest.mark.parametrize("extra", ["a.weight.absmax", "x.SCB", "y.qweight", "z.weight.quant_state.bitsandbytes__nf4"])
def test_source_that_is_quantized(tmp_path: Path, extra: str) -> None:
    src = write_checkpoint(tmp_path / "src", {"a.weight": torch.ones(8, 8), extra: torch.ones(4)}, None)
    with pytest.raises(UsageError, match="already quantized"):
        quantize_checkpoint(src, tmp_path / "dst")


@pytest.mark.parametrize(("quant_format", "double_quant"), FORMATS)
def test_own_output_is_refused(source: Path, tmp_path: Path, quant_format: str, double_quant: bool) -> None:
    quantize_checkpoint(source, tmp_path / "dst", quant_format=quant_format, double_quant=double_quant)
    with pytest.raises(UsageError, match="already quantized"):
        quantize_checkpoint(tmp_path / "dst", tmp_path / "again")
    (tmp_path / "dst" / "config.json").unlink()
    with pytest.raises(UsageError, match="already quantized"):
        quantize_checkpoint(tmp_path / "dst", tmp_path / "again")


def test_source_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, message in [("empty", "no \\*.safetensors"), ("file", "not a directory"), ("none", "no such directory")]:
        with pytest.raises(UsageError, match=message):
            quantize_checkpoint(tmp_path / name, tmp_path / "dst")


def test_destination_rules(source: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for target, message in [
        (source, "must not lie in one another"),
        (source / "nf4", "must not lie in one another"),
        (tmp_path, "must not lie in one another"),
        (tmp_path / "full", "not empty"),
        (tmp_path / "file", "not a directory"),
    ]:
        with pytest.raises(UsageError, match=message):
            quantize_checkpoint(source, target)
    with pytest.raises(UsageError, match=r"holds no \*\.safetensors"):
        quantize_checkpoint(source, tmp_path / "full", overwrite=True)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    quantize_checkpoint(source, tmp_path / "empty")
    quantize_checkpoint(source, tmp_path / "new" / "deep")
    quantize_checkpoint(source, tmp_path / "empty", overwrite=True, quant_format="fp4")
    config = json.loads((tmp_path / "empty" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "fp4"
    assert leftovers(tmp_path) == ["empty", "file", "full", "new", "src"]


@pytest.mark.parametrize(("options", "message"), [
    ({"quant_format": "nf5"}, "format: got 'nf5'"),
    ({"quant_format": "int8rows", "double_quant": True}, "expected nf4 or fp4"),
    ({"quant_format": "int8rows", "blocksize": 64}, "takes none"),
    ({"blocksize": 48}, "blocksize: got 48"),
    ({"device": "tpu"}, "device: got 'tpu'"),
    ({"max_shard_bytes": 0}, "max_shard_bytes: got 0"),
])  # fmt: skip
def test_bad_options(source: Path, tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quantize_checkpoint(source, tmp_path / "dst", **options)  # type: ignore[arg-type]
    assert leftovers(tmp_path) == ["src"]


# ---- what goes wrong on the way --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
@pytest.mark.parametrize("overwrite", [False, True])
def test_failure_leaves_nothing(source: Path, tmp_path: Path, error: type[BaseException], overwrite: bool) -> None:
    if overwrite:
        quantize_checkpoint(source, tmp_path / "dst")
        before = (tmp_path / "dst" / "model.safetensors").read_bytes()

    def fail(name: str, done: int, total: int) -> None:
        if done > total // 2:
            raise error

    with pytest.raises(error):
        quantize_checkpoint(source, tmp_path / "dst", progress=fail, overwrite=overwrite)
    assert leftovers(tmp_path) == (["dst", "src"] if overwrite else ["src"])
    if overwrite:
        assert (tmp_path / "dst" / "model.safetensors").read_bytes() == before


def test_unfinished_file_is_not_readable(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where nothing can clean up (a power cut), the file that is left does not look whole."""
    monkeypatch.setattr(module.shutil, "rmtree", lambda *args, **kwargs: None)

    def fail(name: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "dst", progress=fail)
    (partial,) = [p for p in tmp_path.iterdir() if p.name != "src"]
    assert partial.name.startswith(".dst.")
    assert partial.name.endswith(".partial")
    assert not (partial / "config.json").exists()
    with pytest.raises(CheckpointError):
        Checkpoint(partial)


def test_disk_too_small(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs .* GB, the disk has"):
        quantize_checkpoint(source, tmp_path / "dst")
    assert leftovers(tmp_path) == ["src"]


_MEASURE = """
import sys
from pathlib import Path
from fewbits.checkpoint import quantize_checkpoint
def status(key):
    (line,) = [l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key)]
    return int(line.split()[1])
warm, source, target, *options = sys.argv[1:]
keywords = dict(quant_format=options[0], double_quant=options[0] == "nf4")
quantize_checkpoint(warm, target + "-warm", **keywords)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = status("VmRSS:")
quantize_checkpoint(source, target, **keywords)
print(status("VmHWM:") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("quant_format", ["nf4", "int8rows", "blockwise8"])
def test_peak_memory(tmp_path: Path, quant_format: str) -> None:
    """Twelve tensors of 16 MB, three of them copied, take about the memory of one."""
    warm = write_checkpoint(tmp_path / "warm", {"a.weight": torch.randn(64, 64)}, None)
    big = torch.randn(2048, 2048)
    tensors = {f"layers.{i}.up.weight": big + i for i in range(9)} | {f"embed_{i}.weight": big + i for i in range(3)}
    src = write_checkpoint(tmp_path / "src", tensors, None)
    total, largest = sum(t.nbytes for t in tensors.values()), big.nbytes
    del tensors
    command = [sys.executable, "-c", _MEASURE, str(warm), str(src), str(tmp_path / "dst"), quant_format]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = int(result.stdout) * 1024
    # The tensor, its codes (a quarter here), and pieces of 1 MB while the error is measured.
    assert grown < 2.5 * largest, f"{grown / 1e6:.0f} MB for tensors of {largest / 1e6:.0f} MB"
    assert grown < total / 2


# ---- against bitsandbytes ------------------------------------------------------------------------------------------


def _nibbles(packed: torch.Tensor, quant_format: str) -> torch.Tensor:
    """Codes of a packed weight; its CPU path mixes up fp4's codes 0 and 8, which are both zero."""
    codes = torch.cat([packed >> 4, packed & 15], 1)
    return codes.where(codes != 8, 0) if quant_format == "fp4" else codes


@pytest.mark.parametrize(("quant_format", "double_quant"), FORMATS[:4])
def test_bitsandbytes_writes_the_same(tmp_path: Path, quant_format: str, double_quant: bool) -> None:
    """Names, dtypes, shapes and bytes of a state dict of bitsandbytes' own Linear4bit."""
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(3))
    layer = bnb.nn.Linear4bit(128, 96, bias=False, quant_type=quant_format, compress_statistics=double_quant)
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type=quant_format, compress_statistics=double_quant, blocksize=64
    ).to("cpu")
    theirs = {f"a.{k}": v for k, v in layer.state_dict().items()}
    src = write_checkpoint(tmp_path / "src", {"a.weight": weight}, None)
    quantize_checkpoint(src, tmp_path / "dst", quant_format=quant_format, double_quant=double_quant)
    ours = load_directory(tmp_path / "dst")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        if "quant_state" not in name:
            assert ours[name].shape == tensor.shape, name
    assert torch.equal(_nibbles(ours["a.weight"], quant_format), _nibbles(theirs["a.weight"], quant_format))
    assert torch.equal(ours["a.weight.quant_map"], theirs["a.weight.quant_map"])
    blobs = [
        json.loads(bytes(d[f"a.weight.quant_state.bitsandbytes__{quant_format}"].tolist())) for d in (ours, theirs)
    ]
    if double_quant:
        # Its 8-bit CPU codes come from a lossy table, and its mean is a float32 sum.
        assert blobs[0].pop("nested_offset") == pytest.approx(blobs[1].pop("nested_offset"), rel=1e-6)
        assert torch.equal(ours["a.weight.nested_quant_map"], theirs["a.weight.nested_quant_map"])
    else:
        assert torch.equal(ours["a.weight.absmax"], theirs["a.weight.absmax"])
    assert blobs[0] == blobs[1]
    assert list(blobs[0]) == list(blobs[1])


@pytest.mark.parametrize(("quant_format", "double_quant"), FORMATS[:4])
def test_bitsandbytes_reads_it(source: Path, tmp_path: Path, quant_format: str, double_quant: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    quantize_checkpoint(source, tmp_path / "dst", quant_format=quant_format, double_quant=double_quant)
    written = load_directory(tmp_path / "dst")
    # Its CPU kernel loses the scales of blocks that straddle rows, so only rows of whole blocks tell anything.
    for name in (n for n in linear_names() if tiny_tensors()[n].shape[1] % 64 == 0):
        stats = {k.removeprefix(f"{name}."): v for k, v in written.items() if k.startswith(f"{name}.")}
        weight = bnb.nn.Params4bit.from_prequantized(written[name], stats, device="cpu")
        values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(values, load_tensor(tmp_path / "dst", name))


@pytest.mark.parametrize("damage", ["absmax short", "state not JSON", "state missing field"])
def test_damaged_quantized_checkpoint(source: Path, tmp_path: Path, damage: str) -> None:
    quantize_checkpoint(source, tmp_path / "dst")
    file = tmp_path / "dst" / "model.safetensors"
    tensors = load_file(file)
    name = linear_names()[0]
    if damage == "absmax short":
        tensors[f"{name}.absmax"] = tensors[f"{name}.absmax"][:1].clone()
    else:
        text = b"{" if damage == "state not JSON" else b'{"quant_type": "nf4"}'
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"{name}: cannot dequantize"):
        load_tensor(tmp_path / "dst", name)
    with pytest.raises(KeyError, match="no tensor 'nothing'"):
        load_tensor(tmp_path / "dst", "nothing")
