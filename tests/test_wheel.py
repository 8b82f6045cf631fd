"""What is shipped: one small wheel that links nothing but the C library and holds the kernels of every architecture."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

import fewbits
from fewbits import _native

ROOT = Path(__file__).parent.parent
LIMIT = 6_000_000  # bytes
# The C library and the compiler's own run-time: present wherever Python is.
SYSTEM = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libgcc_s.so.1"}
IMAGES = {"compute_70", "compute_80", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"}

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")


def wheels() -> list[Path]:
    """What make built: ``dist/local`` (from the sdist, installed here) and ``dist`` (portable, by ``make wheel``)."""
    dist = Path(os.environ.get("FEWBITS_DIST", ROOT / "dist"))
    return sorted([*dist.glob("*.whl"), *dist.glob("local/*.whl")])


def needed(library: bytes) -> set[str]:
    """Names of the shared libraries that an ELF file links."""
    section = ELFFile(io.BytesIO(library)).get_section_by_name(".dynamic")
    assert isinstance(section, DynamicSection)
    return {tag.needed for tag in section.iter_tags("DT_NEEDED")}


def newest_glibc(library: bytes) -> tuple[int, ...]:
    """The highest version of a glibc symbol that an ELF file asks for."""
    section = ELFFile(io.BytesIO(library)).get_section_by_name(".gnu.version_r")
    assert isinstance(section, GNUVerNeedSection)
    names = [entry.name for _, entries in section.iter_versions() for entry in entries]
    found = [re.fullmatch(r"GLIBC_(\d+(?:\.\d+)+)", name) for name in names]
    return max(tuple(map(int, match[1].split("."))) for match in found if match)


def native_of(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if re.fullmatch(r"fewbits/_native.*\.(so|pyd)", n)]
        return archive.read(name)


def test_the_installed_package_is_tested() -> None:
    assert "site-packages" in fewbits.__file__ or "dist-packages" in fewbits.__file__ or os.environ.get("FEWBITS_DEV")
    assert fewbits.__version__ == _native.__version__ == version("fewbits")


@linux
def test_links_the_c_library_alone() -> None:
    links = needed(Path(_native.__file__).read_bytes())
    extra = {name for name in links - SYSTEM if not name.startswith("ld-linux")}
    assert not extra, f"the native module links {extra}"


@linux
@pytest.mark.parametrize("wheel", wheels() or [None], ids=lambda w: w.name if w else "none")
def test_wheel(wheel: Path | None) -> None:
    if wheel is None:
        pytest.skip("no wheel in dist: run `make wheel`")
    assert wheel.stat().st_size <= LIMIT
    library = native_of(wheel)
    assert needed(library) <= SYSTEM | {n for n in needed(library) if n.startswith("ld-linux")}
    assert "-abi3-" in wheel.name, "one wheel for every Python"
    if "manylinux_2_17" in wheel.name:
        assert newest_glibc(library) <= (2, 17)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"fewbits/py.typed", "fewbits/_native.pyi", "fewbits/__init__.py"} <= set(names)
    assert not [n for n in names if n.startswith(("tests/", "benches/", "rust/"))]


def test_images_of_every_architecture() -> None:
    """The build compiles every kernel for each; a kernel that does not compile fails it."""
    if not _native.built_with_cuda:
        pytest.skip("CPU-only build")
    assert set(_native.images()) >= IMAGES


def test_import_is_quiet() -> None:
    """Nothing printed, nothing warned, no CUDA, no socket."""
    program = """
import socket, warnings
def refuse(*args, **kwargs): raise AssertionError("opened a socket")
import torch
socket.socket = refuse
warnings.simplefilter("error")
import fewbits, fewbits.nn, fewbits.functional
assert not torch.cuda.is_initialized()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
