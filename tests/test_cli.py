"""The command line: output, exit codes, signals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fewbits
from checkpoint_files import leftovers, tiny_tensors, write_checkpoint
from fewbits import checkpoint, info
from fewbits.checkpoint import Checkpoint
from fewbits.cli import main

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")


Result = tuple[int, str, str]


def run(*arguments: str | Path, code: str | None = None) -> Result:
    """Run the command in a process of its own: ``python -m fewbits``, or ``code`` and then ``main``."""
    command = [sys.executable, "-m", "fewbits"]
    if code is not None:
        prelude = "import os, resource, signal, sys\nfrom fewbits.cli import main\n"
        command = [sys.executable, "-c", f"{prelude}{code}\nsys.exit(main(sys.argv[1:]))"]
    result = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    return result.returncode, result.stdout, result.stderr


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command in this process, which spares the seconds that importing torch takes."""

    def call(*arguments: str | Path) -> Result:
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as stop:
            code = int(stop.code or 0)
        return (code, *capsys.readouterr())

    return call


def check_refusal(result: Result, code: int, message: str) -> None:
    """One line on stderr, nothing on stdout, no traceback."""
    assert result[0] == code, result
    assert result[1] == ""
    assert result[2].startswith("fewbits: error: ")
    assert result[2].count("\n") == 1
    assert message in result[2]


def test_quantize(source: Path, tmp_path: Path) -> None:
    result = run("quantize", source, tmp_path / "dst", "--double-quant", "--skip", "layers.0", "--skip", "nothing")
    assert result[0] == 0, result[2]
    assert result[2] == "", "no progress bar where there is no terminal"
    for words in ("4 quantized", "size before", "size after", "mean relative error", "worst relative error", " s "):
        assert words in result[1]
    assert "--skip nothing named no tensor" in result[1]
    assert Checkpoint(tmp_path / "dst").quantized_format("model.layers.1.mlp.up_proj.weight") == "nf4"


def test_no_limit_of_shards(source: Path, tmp_path: Path, here: Callable[..., Result]) -> None:
    result = here("quantize", source, tmp_path / "dst", "--max-shard-gb", "1e300")
    assert result[0] == 0, result[2]


@pytest.mark.parametrize("quant_format", ["fp4", "int8rows", "blockwise8"])
def test_formats(source: Path, tmp_path: Path, quant_format: str, here: Callable[..., Result]) -> None:
    options = ["--blocksize", "128"] if quant_format != "int8rows" else []
    result = here("quantize", source, tmp_path / "dst", "--format", quant_format, *options)
    assert result[0] == 0, result[2]
    assert Checkpoint(tmp_path / "dst").quantized_format("model.layers.1.mlp.up_proj.weight") == quant_format


def test_plan(source: Path, here: Callable[..., Result]) -> None:
    result = here("plan", source, "--vram", "0.6005", "--context", "64")
    assert result[0] == 0, result[2]
    for words in ("16-bit", "8-bit", "NF4 double quant", "KV cache", "LoRA", "exact", "yes", "no"):
        assert words in result[1]
    widest = max(map(len, result[1].splitlines()[1:7]))
    assert widest <= 80


def test_plan_of_several_gpus(source: Path, here: Callable[..., Result]) -> None:
    result = here("plan", source, "--gpus", "2", "--strategy", "fsdp")
    assert result[0] == 0, result[2]
    for words in ("2 GPUs, fsdp: inference and QLoRA are the memory of each GPU", "gathered weights, NF4", "/ 2 GPUs"):
        assert words in result[1]


def test_info(here: Callable[..., Result]) -> None:
    result = here("info", "--json")
    facts = json.loads(result[1])
    assert result[0] == 0, facts["self_test"]
    assert facts["version"] == fewbits.__version__
    assert facts["torch"]["version"] == torch.__version__
    assert facts["self_test"]["passed"]
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    assert len(facts["self_test"]["checks"]) == 5 + devices
    table = here("info")
    assert table[0] == 0
    for words in ("driver", "CPU", "build", "passed"):
        assert words in table[1]


def test_info_forced_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBITS_SIMD", "portable")
    assert info.collect()["cpu"]["forced_by"] == "FEWBITS_SIMD=portable"


@pytest.mark.parametrize("part", ["quantize_4bit", "dequantize_4bit", "quantize_blockwise"])
def test_self_test_notices(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """A wrong kernel must not pass: here one element is off, or a call raises."""
    real = getattr(info.F, part)

    def wrong(*args: object, **kwargs: object) -> object:
        result = real(*args, **kwargs)
        target = result[0] if isinstance(result, tuple) else result
        target.view(-1)[1234] = 255 if target.dtype == torch.uint8 else 40.0
        return result

    def broken(*args: object, **kwargs: object) -> object:
        raise RuntimeError("no kernel\nfor this chip")

    monkeypatch.setattr(info.F, part, wrong)
    assert not info.report()["self_test"]["passed"]
    monkeypatch.setattr(info.F, part, broken)
    checks = info.self_test()
    assert not checks[0].passed
    assert "no kernel for this chip" in checks[0].detail


def test_failed_self_test_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, here: Callable[..., Result]) -> None:
    monkeypatch.setattr(info, "self_test", lambda: [info.Check("CPU", False, "made to fail")])
    for options in ([], ["--json"]):
        code, out, _ = here("info", *options)
        assert code == 1
        assert "made to fail" in out


def test_version_and_help(here: Callable[..., Result]) -> None:
    assert here("--version")[1] == f"fewbits {fewbits.__version__}\n"
    assert "examples:" in here("--help")[1]
    for command in ("quantize", "plan", "info"):
        result = here(command, "--help")
        assert result[0] == 0
        assert "usage: fewbits" in result[1]


@pytest.mark.parametrize("arguments", [
    [], ["unknown"], ["quantize"], ["quantize", "a"], ["quantize", "a", "b", "--format", "nf5"],
    ["quantize", "a", "b", "--blocksize", "48"], ["plan", "a", "--vram", "-3"], ["plan", "a", "--vram", "nan"],
    ["plan", "a", "--gpus", "0"], ["plan", "a", "--strategy", "pp"],
    ["plan", "a", "--context", "0"], ["plan", "a", "--batch", "two"], ["quantize", "a", "b", "--max-shard-gb", "0"],
])  # fmt: skip
def test_wrong_usage(arguments: list[str], here: Callable[..., Result]) -> None:
    result = here(*arguments)
    assert result[0] == 2
    assert "usage: fewbits" in result[2]
    assert "Traceback" not in result[2]


def test_refusals(source: Path, tmp_path: Path, here: Callable[..., Result]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "none").mkdir()
    dst = tmp_path / "dst"
    check_refusal(here("quantize", tmp_path / "none", dst), 2, "no *.safetensors")
    check_refusal(here("quantize", tmp_path / "missing", dst), 2, "no such directory")
    check_refusal(here("quantize", source, tmp_path / "full"), 2, "not empty")
    check_refusal(here("quantize", source, tmp_path / "full", "--overwrite"), 2, "only replaces a checkpoint")
    check_refusal(here("quantize", source, source / "dst"), 2, "must not lie in one another")
    check_refusal(here("quantize", source, dst, "--format", "int8rows", "--double-quant"), 2, "expected nf4 or fp4")
    check_refusal(here("quantize", source, dst, "--device", "gpu"), 2, "device: got 'gpu'")
    check_refusal(here("quantize", source, dst, "--skip", "re:("), 2, "re:(")
    check_refusal(here("plan", tmp_path / "none"), 2, "no *.safetensors")
    if not torch.cuda.is_available():
        check_refusal(here("quantize", source, dst, "--device", "cuda"), 2, "finds no CUDA device")
    assert leftovers(tmp_path) == ["full", "none", "src"]


def test_corrupt_file_is_a_failure(source: Path, tmp_path: Path, here: Callable[..., Result]) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    check_refusal(here("quantize", source, tmp_path / "dst"), 1, "model.safetensors: not a whole safetensors file")
    check_refusal(here("plan", source), 1, "model.safetensors: not a whole safetensors file")
    assert leftovers(tmp_path) == ["src"]


def test_unreadable_destination(source: Path, tmp_path: Path, here: Callable[..., Result]) -> None:
    (tmp_path / "file").write_text("")
    check_refusal(here("quantize", source, tmp_path / "file" / "dst"), 1, "file")


# Sends itself a signal, twice, while the third tensor is quantized.
_SIGNAL = """
import fewbits.checkpoint as module
real, calls = module._write_tensor, []
def write(*args):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.{name})
        os.kill(os.getpid(), signal.{name})
    return real(*args)
module._write_tensor = write
"""


@posix
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_interrupt(source: Path, tmp_path: Path, name: str, code: int) -> None:
    result = run("quantize", source, tmp_path / "dst", code=_SIGNAL.format(name=name))
    check_refusal(result, code, "interrupted; nothing was written")
    assert leftovers(tmp_path) == ["src"]


@posix
def test_full_disk(tmp_path: Path) -> None:
    """Files may not grow past 100 kB, which the weights do."""
    src = write_checkpoint(tmp_path / "src", tiny_tensors(layers=12))
    result = run(
        "quantize", src, tmp_path / "dst", code="resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    )
    check_refusal(result, 1, "File too large")
    assert leftovers(tmp_path) == ["src"]


@posix
def test_reader_that_leaves_early(source: Path) -> None:
    """``fewbits plan ... | head -c 1`` ends quietly."""
    command = f"{sys.executable} -m fewbits plan {source} | head -c 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in result.stderr
    assert "Broken" not in result.stderr


def test_unexpected_error_is_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Callable[..., Result]
) -> None:
    monkeypatch.setattr(checkpoint, "_write_tensor", None)
    check_refusal(here("quantize", source, tmp_path / "dst"), 1, "TypeError")
    monkeypatch.setenv("FEWBITS_TRACEBACK", "1")
    with pytest.raises(TypeError):
        here("quantize", source, tmp_path / "dst")
    assert leftovers(tmp_path) == ["src"]


def test_import_stays_lean() -> None:
    """``import fewbits`` takes neither rich nor safetensors, and prints nothing."""
    code = "import fewbits, sys; assert not {'rich', 'safetensors', 'fewbits.cli'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
