"""The wheel that stands in for bitsandbytes, and the command that installs it: in environments made for the purpose."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fewbits
from fewbits import cli, shim
from fewbits.compat import VERSION


def run(python: Path, *arguments: str, code: int = 0) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, *arguments], capture_output=True, text=True, timeout=240, env=env, stdin=subprocess.DEVNULL
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_wheel(tmp_path: Path) -> None:
    wheel = shim.build_wheel(tmp_path / "a")
    assert wheel.name == f"bitsandbytes-{VERSION}-py3-none-any.whl"
    assert wheel.stat().st_size < 5000
    assert wheel.read_bytes() == shim.build_wheel(tmp_path / "b").read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        files = {name: archive.read(name) for name in archive.namelist()}
    info = f"bitsandbytes-{VERSION}.dist-info"
    assert set(files) == {
        "bitsandbytes/__init__.py",
        *(f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "top_level.txt")),
    }
    assert f"Version: {VERSION}\n" in files[f"{info}/METADATA"].decode()
    listed = set()
    for line in files[f"{info}/RECORD"].decode().splitlines():
        name, digest, size = line.split(",")
        listed.add(name)
        if digest:
            expected = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=").decode()
            assert (digest, int(size)) == (f"sha256={expected}", len(files[name]))
    assert listed == set(files)


PROGRAM = """
import importlib, importlib.metadata, importlib.util, sys
import bitsandbytes.nn.modules, bitsandbytes as bnb, torch
import fewbits
assert bnb.__version__ == importlib.metadata.version("bitsandbytes") == %r
assert bnb.nn.modules.Linear4bit is fewbits.nn.Linear4bit
assert str(bnb.optim.AdamW8bit) == "<class 'bitsandbytes.optim.adamw.AdamW8bit'>"
assert hasattr(torch.ops.bitsandbytes, "gemm_4bit")
assert importlib.util.find_spec("bitsandbytes").name == "bitsandbytes"
fewbits.install_as_bitsandbytes()
assert importlib.import_module("bitsandbytes") is bnb
print("works")
"""


def test_install_status_remove(python: Path) -> None:
    assert "Say --yes" in run(python, "-m", "fewbits", "shim", "install", code=2)
    assert f"installed bitsandbytes {VERSION}" in run(python, "-m", "fewbits", "shim", "install", "--yes")
    assert f"shim {VERSION}" in run(python, "-m", "fewbits", "shim", "status")
    assert "works" in run(python, "-c", PROGRAM % VERSION)
    assert "self-test" in run(python, "-m", "bitsandbytes")
    again = run(python, "-m", "fewbits", "shim", "install", "--yes")
    assert f"in place of the installed {VERSION}" in again
    out = run(python, "-m", "fewbits", "shim", "remove", "--yes")
    assert f"removed bitsandbytes {VERSION}" in out
    assert "pip install bitsandbytes" in out
    assert "shim" not in run(python, "-m", "fewbits", "shim", "status").replace("`fewbits shim install`", "")


def test_a_real_one_is_replaced_and_not_removed(python: Path, tmp_path: Path) -> None:
    info = "bitsandbytes-0.49.2.dist-info"
    wheel = tmp_path / "bitsandbytes-0.49.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("bitsandbytes/__init__.py", "__version__ = '0.49.2'\n")
        archive.writestr("bitsandbytes/only_there.py", "")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.49.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        names = ["bitsandbytes/__init__.py", "bitsandbytes/only_there.py", f"{info}/METADATA", f"{info}/WHEEL"]
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*names, f"{info}/RECORD"]))
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", str(wheel))
    assert "0.49.2, the real one" in run(python, "-m", "fewbits", "shim", "status")
    assert "is the real one" in run(python, "-m", "fewbits", "shim", "remove", "--yes", code=1)
    assert "in place of the installed 0.49.2" in run(python, "-m", "fewbits", "shim", "install", "--yes")
    assert "works" in run(python, "-c", PROGRAM % VERSION)
    run(python, "-c", "import bitsandbytes\ntry: import bitsandbytes.only_there\nexcept ImportError: pass\nelse: 1 / 0")


def test_without_fewbits(tmp_path: Path) -> None:
    with zipfile.ZipFile(shim.build_wheel(tmp_path)) as archive:
        archive.extract("bitsandbytes/__init__.py", tmp_path)
    out = run(
        Path(sys.executable),
        "-S",
        "-c",
        f"import sys; sys.path = [{str(tmp_path)!r}, *sys.path]; import bitsandbytes",
        code=1,
    )
    assert "ImportError: this bitsandbytes stands for fewbits, which is not installed" in out


def test_asking(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(shim, "_pip", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(shim, "installed_version", lambda: "0.50.2")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "n")
    assert cli.main(["shim", "install"]) == 1
    assert "in place of the installed 0.50.2" in asked[0]
    assert "nothing was changed" in capsys.readouterr().out
    assert not calls
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert cli.main(["shim", "install"]) == 0
    assert [call[0] for call in calls] == ["install"]
    assert "--no-index" in calls[0]
    monkeypatch.setattr(shim, "installed_version", lambda: "0.50.2+fewbits0.0.1")
    assert "of another fewbits" in shim.describe()
    assert cli.main(["shim", "remove", "--yes"]) == 0
    assert calls[1][0] == "uninstall"
    monkeypatch.setattr(shim, "installed_version", lambda: None)
    assert cli.main(["shim", "remove", "--yes"]) == 1
    assert "nothing to remove" in capsys.readouterr().err
    assert cli.main(["shim", "install", "--wheel", str(tmp_path / "new")]) == 0
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / f"bitsandbytes-{VERSION}-py3-none-any.whl"]
    assert cli.main(["shim", "status", "--wheel", "x"]) == 2
    assert len(calls) == 2


def test_pip_that_is_not_there_or_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(OSError, match="no-python"):
        shim._pip("install")
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'first' >&2\necho 'disk full' >&2\nexit 3\n")
    script.chmod(0o755)
    if os.name != "nt":
        monkeypatch.setattr(sys, "executable", str(script))
        with pytest.raises(shim.ShimError, match="pip install failed: disk full"):
            shim._pip("install")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(shim.ShimError, match="--wheel DIR"):
        shim._pip("install")


def test_info_tells(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert "bitsandbytes" in capsys.readouterr().out
    assert fewbits.__version__ in VERSION
