"""Quantizing a directory of safetensors: what is refused, and what goes wrong on the way."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_files import (
    FORMATS,
    leftovers,
    write_checkpoint,
)
from fewbits import checkpoint as module
from fewbits.checkpoint import (
    Checkpoint,
    CheckpointError,
    UsageError,
    quantize_checkpoint,
)

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
    ('{"weight_map": {}}', "weight_map names no tensors"),
    ('{"weight_map": {"a": "../../etc/passwd"}}', "weight_map"),
    ('{"weight_map": {"a": "/etc/passwd"}}', "weight_map"),
    ('{"weight_map": {"a": "missing.safetensors"}}', "1 of 1 shards are missing"),
    ("[" * 100_000, "not JSON"),
])  # fmt: skip
def test_bad_index(source: Path, tmp_path: Path, content: str, message: str) -> None:
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    (source / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(source, tmp_path / "dst")
    assert leftovers(tmp_path) == ["src"]


def test_bad_config(source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        quantize_checkpoint(source, tmp_path / "dst")


@pytest.mark.parametrize(("key", "value"), [("model_type", ["gpt2"]), ("model_type", {}), ("architectures", 5)])
def test_config_of_wrong_types(source: Path, tmp_path: Path, key: str, value: object) -> None:
    (source / "config.json").write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError, match=rf"config\.json: {key}: expected a .*, got "):
        quantize_checkpoint(source, tmp_path / "dst")
    assert leftovers(tmp_path) == ["src"]


def test_one_file_comes_before_a_stale_index(source: Path, tmp_path: Path) -> None:
    """Transformers loads it so: what saves a smaller model over shards removes these, and leaves their index."""
    stale = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(stale))
    assert "lm_head.weight" in Checkpoint(source).names()
    quantize_checkpoint(source, tmp_path / "dst")
    assert sorted(f.name for f in (tmp_path / "dst").iterdir()) == ["config.json", "model.safetensors"]


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
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match=r"loop: cannot be resolved|loop: exists and is not a directory"):
        quantize_checkpoint(source, tmp_path / "loop")
    (tmp_path / "loop").unlink()
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    quantize_checkpoint(source, tmp_path / "empty")
    quantize_checkpoint(source, tmp_path / "new" / "deep")
    quantize_checkpoint(source, tmp_path / "empty", overwrite=True, quant_format="fp4")
    config = json.loads((tmp_path / "empty" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "fp4"
    assert leftovers(tmp_path) == ["empty", "file", "full", "new", "src"]


def test_empty_paths(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an unset variable of a shell gives is not the current directory, which --overwrite would replace."""
    other = write_checkpoint(tmp_path / "other", {"a.weight": torch.ones(8, 8)}, None)
    monkeypatch.chdir(other)
    with pytest.raises(UsageError, match="destination: got an empty path"):
        quantize_checkpoint(source, "", overwrite=True)
    with pytest.raises(UsageError, match="source: got an empty path"):
        quantize_checkpoint("", tmp_path / "dst")
    assert leftovers(tmp_path) == ["other", "src"]
    assert [f.name for f in other.iterdir()] == ["model.safetensors"]


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
