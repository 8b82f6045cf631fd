"""Damaged safetensors files: each reads as equal values, or is refused by one line that names the file and the tensor.

The command line refuses them in the same way, and leaves nothing behind.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from arrays import assert_same_bits
from checkpoint_files import leftovers, write_checkpoint
from fewbits.checkpoint import Checkpoint, CheckpointError, iter_dequantized, quantize_checkpoint
from fewbits.cli import main

N, K = 48, 64
EACH = 5  # damaged files for each format and recipe

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_format": "nf4"},
    "fp4 nested": {"quant_format": "fp4", "double_quant": True},
    "int8rows": {"quant_format": "int8rows"},
    "blockwise8": {"quant_format": "blockwise8"},
    "plain": {},
}
_LINEARS = ("model.layers.0.q_proj.weight", "model.layers.0.up_proj.weight")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the bytes of a file in each format. Everything in it is quantized, but in the plain one."""
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(3)
    source = write_checkpoint(
        folder / "plain", {name: torch.randn(N, K, generator=generator) for name in _LINEARS}, None
    )
    for name, options in FORMATS.items():
        if options:
            quantize_checkpoint(source, folder / name, **options)
    return {name: (folder / name / "model.safetensors").read_bytes() for name in FORMATS}


def parse(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def assemble(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def flipped_header(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 2)):
        changed[rng.randrange(8 + struct.unpack("<Q", data[:8])[0])] ^= 1 << rng.randrange(8)
    return bytes(changed)


def edited_header(rng: random.Random, data: bytes) -> bytes:
    header, body = parse(data)
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    entry = header[name]
    begin, end = entry["data_offsets"]
    size = end - begin
    edits: list[dict[str, Any]] = [
        {"dtype": rng.choice(["U8", "I8", "F32", "I32", "BOOL", "F8_E4M3", "F13", "", None, 7])},
        {"shape": rng.choice([[size], [1, size], [-1], [1 << 62, 4], [size // 4], [], None, ["x"], [2, size // 2]])},
        {
            "data_offsets": rng.choice(
                [[begin, end - 1], [begin + 1, end], [end, begin], [-1, end], [0, 1 << 60], [], 3]
            )
        },
    ]
    header[name] = entry | rng.choice(edits)
    return assemble(header, body)


def lost_tensor(rng: random.Random, data: bytes) -> bytes:
    header, body = parse(data)
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    begin, end = header.pop(name)["data_offsets"]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset - (end - begin) for offset in entry["data_offsets"]]
    return assemble(header, body[:begin] + body[end:])


def renamed_tensor(rng: random.Random, data: bytes) -> bytes:
    header, body = parse(data)
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    return assemble({(k + "_" if k == name else k): v for k, v in header.items()}, body)


def absurd_blob(rng: random.Random, data: bytes) -> bytes:
    """Change the packed JSON of a 4-bit or blockwise weight in place, or else the header."""
    header, body = parse(data)
    names = [name for name in header if ".quant_state." in name]
    if not names:
        return edited_header(rng, data)
    name = rng.choice(sorted(names))
    begin, end = header[name]["data_offsets"]
    items = json.loads(body[begin:end])
    field = rng.choice([key for key in items if key != "nested_offset"])
    values: list[Any] = [None, -1, 0, 48, 1 << 40, float("nan"), "x", [], [-1], [1 << 70], [K, N], {}, True]
    items[field] = rng.choice(values)
    text = json.dumps(items).encode()
    body = body[:begin] + text + body[end:]
    shift = len(text) - (end - begin)
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset + shift for offset in entry["data_offsets"]]
    header[name] |= {"shape": [len(text)], "data_offsets": [begin, begin + len(text)]}
    return assemble(header, body)


FILE_RECIPES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    recipe.__name__: recipe
    for recipe in (truncated, flipped_header, edited_header, lost_tensor, renamed_tensor, absurd_blob)
}


def test_their_number() -> None:
    assert len(FORMATS) * len(FILE_RECIPES) * EACH == 150


@pytest.mark.parametrize("recipe", FILE_RECIPES)
@pytest.mark.parametrize("name", FORMATS)
def test_file(
    files: dict[str, bytes], tmp_path: Path, name: str, recipe: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "src", {"a": torch.ones(1)}, None)
    path = folder / "model.safetensors"
    path.write_bytes(files[name])
    expected = dict(iter_dequantized(folder))
    assert sorted(expected) == sorted(_LINEARS)
    for seed in range(EACH):
        rng = random.Random(f"{name} {recipe} {seed}")
        path.write_bytes(FILE_RECIPES[recipe](rng, files[name]))
        what = f"{name}, {recipe}, seed {seed}"
        _read(folder, expected, name == "plain", what)
        _run_commands(folder, tmp_path, capfd, what)


def _read(folder: Path, expected: dict[str, torch.Tensor], plain: bool, what: str) -> None:
    got = read(folder)
    if isinstance(got, CheckpointError):
        assert str(folder / "model.safetensors") in str(got), what
        assert "\n" not in str(got), what
        checkpoint = open_checkpoint(folder)
        if checkpoint is not None:  # the file is whole: a tensor in it is not what it should be
            assert any(name in str(got) for name in checkpoint.entries), f"{what}: {got}"
        return
    for key, value in got.items():
        if key in expected and not plain:  # nothing tells of another dtype of a tensor that is stored as it is
            assert_same_bits(value, expected[key], f"{what}: {key}")
        # A reader cannot know which weights a model has, but no part of a quantized one is taken for a tensor.
        assert not key.endswith((".absmax", ".quant_map", ".SCB", "__nf4", "__fp4", "__blockwise8")), what


def read(folder: Path) -> dict[str, torch.Tensor] | CheckpointError:
    try:
        return dict(iter_dequantized(folder))
    except CheckpointError as error:
        return error


def open_checkpoint(folder: Path) -> Checkpoint | None:
    try:
        return Checkpoint(folder)
    except CheckpointError:
        return None


def _run_commands(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str) -> None:
    for command in (["quantize", str(folder), str(tmp_path / "dst")], ["plan", str(folder)]):
        code = main(command)
        said = capfd.readouterr().err
        assert code in (0, 1, 2), what
        if code:
            assert said.count("\n") == 1, f"{what}: {said}"
            assert str(folder) in said, f"{what}: {said}"
            assert "FEWBITS_TRACEBACK" not in said, f"{what}: {said}"
            assert leftovers(tmp_path) == ["src"], what
        elif command[0] == "quantize":
            for file in (tmp_path / "dst").iterdir():
                file.unlink()
            (tmp_path / "dst").rmdir()
