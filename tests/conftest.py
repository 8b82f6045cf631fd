"""Fixtures and settings shared by all tests.

Tests marked ``cuda`` are skipped where torch sees no GPU, and tests marked ``slow`` unless ``FEWBITS_SLOW=1``. With
``FEWBITS_BACKEND=portable``, which gives every device plain torch operations, tests about native code are skipped.
``HYPOTHESIS_PROFILE`` picks ``ci`` (the same examples on every run; the default), ``dev`` (random) or ``deep`` (many).
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from checkpoint_files import write_checkpoint
from ranks import Ranks

_quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("ci", max_examples=150, deadline=None, derandomize=True, suppress_health_check=_quiet)
settings.register_profile("dev", max_examples=150, deadline=None, suppress_health_check=_quiet)
settings.register_profile("deep", max_examples=2000, deadline=None, suppress_health_check=_quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# A failing example may hold thousands of elements; its recipe and seed say more.
np.set_printoptions(threshold=16)
torch.set_printoptions(threshold=16)


if os.environ.get("FEWBITS_BACKEND"):  # what passes does so without native code
    from portable_mode import refuse_native

    refuse_native()

# About native code: its calls, its ways to be fast, its memory, its sums that are the same in any company.
NATIVE_FILES = {
    *("test_blockwise_cuda", "test_int8_cuda", "test_int8_native", "test_matmul4_cpu", "test_optim_control"),
    *(
        "test_optim_cuda",
        "test_optim_native",
        "test_optim_paging",
        "test_optim_whereabouts_native",
        "test_panel",
        "test_prepared",
        "test_prepared_changes",
    ),
    *("test_prepared_gradient", "test_settled", "test_wheel"),
}
NATIVE_TESTS = {
    *("test_native_arguments", "test_the_short_way_is_taken", "test_every_simd_path_gives_the_same_bytes"),
    *("test_wrong_device_index", "test_cuda_graph", "test_nothing_waits_for_the_device"),
    *("test_memory_on_the_cpu", "test_peak_memory", "test_a_row_does_not_depend_on_the_others"),
}


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name dtypes in ids as what they are: ``compatibility.py`` counts by them."""
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    name = item.name.partition("[")[0]
    if os.environ.get("FEWBITS_BACKEND") and (item.path.stem in NATIVE_FILES or name in NATIVE_TESTS):
        pytest.skip("about native code")
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if item.get_closest_marker("slow") and os.environ.get("FEWBITS_SLOW") != "1":
        pytest.skip("slow: set FEWBITS_SLOW=1")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Tests with transformers make fewbits bitsandbytes for their whole process: they run where they are asked for."""
    asked = any("test_hf" in argument for argument in config.args)
    return True if collection_path.name.startswith("test_hf") and not asked else None


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that a test must pass on: the same test, the same bytes."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """For tests marked ``cuda``, which have no twin on the CPU."""
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.multi_gpu])])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Runs functions on several processes: gloo on the CPU, or NCCL with a GPU each."""
    group = Ranks(request.param)
    yield group
    group.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small checkpoint."""
    return write_checkpoint(tmp_path / "src")


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter with its own site-packages, which sees what this one sees after them."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=os.name != "nt")
    folder = "Scripts" if os.name == "nt" else "bin"
    interpreter = tmp_path / "env" / folder / Path(sys.executable).name
    command = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([interpreter, "-c", command], capture_output=True, text=True, check=True).stdout.strip()
    Path(own, "host.pth").write_text(f"import sys; sys.path += {[p for p in sys.path if p]!r}\n")
    return interpreter
