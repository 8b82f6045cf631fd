"""Quantizing a directory of safetensors: what is written, and the other files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from checkpoint_files import (
    CONFIG,
    FORMATS,
    linear_names,
    load_directory,
    tiny_tensors,
    write_checkpoint,
)
from fewbits import functional as F
from fewbits._safetensors import read_header
from fewbits.checkpoint import (
    Checkpoint,
    CheckpointError,
    iter_dequantized,
    load_tensor,
    quantize_checkpoint,
    quantize_int8_rows,
)

KEYS = {
    "nf4": ["absmax", "quant_map", "quant_state.bitsandbytes__nf4"],
    "fp4": ["absmax", "quant_map", "quant_state.bitsandbytes__fp4"],
    "blockwise8": ["absmax", "quant_map", "quant_state.fewbits__blockwise8"],
}


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
    assert not any("8 bits or fewer" in n for n in report.notes), "F64 is not a small float"


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


def test_int8_rows_are_those_of_the_functions() -> None:
    """Elements of 8 bits lie halfway between codes often enough to tell how the factor was rounded."""
    weight = torch.randn(50_000, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    codes, scale, _ = F.int8_vectorwise_quant(weight)
    assert all(torch.equal(a, b) for a, b in zip(quantize_int8_rows(weight), (codes, scale), strict=True))


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
