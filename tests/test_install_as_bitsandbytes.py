"""`install_as_bitsandbytes` in processes of their own: what a program sees after it, and before."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PATHS = [
    "nn",
    "nn.modules",
    "nn.parametrize",
    "functional",
    "optim",
    "optim.optimizer",
    "optim.adagrad",
    "optim.adam",
    "optim.adamw",
    "optim.ademamix",
    "optim.lamb",
    "optim.lars",
    "optim.lion",
    "optim.rmsprop",
    "optim.sgd",
    "autograd",
    "autograd._functions",
    "utils",
    "cextension",
    "consts",
    "cuda_specs",
    "backends",
    "backends.utils",
    "backends.cpu.ops",
    "backends.cuda.ops",
    "backends.default.ops",
    "backends.triton",
    "_ops",
    "diagnostics.main",
    "__main__",
]


def run(code: str, *arguments: str, cwd: Path | None = None) -> str:
    """Run a program; return what it printed, or fail with what went wrong."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([p for p in sys.path if p])}
    done = subprocess.run(
        [sys.executable, *arguments, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=240,
        env=env,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_alone_registers_nothing() -> None:
    run(
        """
        import sys, torch
        before = list(sys.meta_path)
        import fewbits, fewbits.optim
        assert sys.meta_path == before
        assert not [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]
        assert not hasattr(torch.ops.bitsandbytes, "gemm_4bit")
        assert "bitsandbytes" not in str(fewbits.optim.AdamW8bit)
        """
    )


def test_everything_resolves_to_fewbits() -> None:
    run(
        f"""
        import importlib, importlib.metadata, importlib.util, sys
        import fewbits
        fewbits.install_as_bitsandbytes()
        fewbits.install_as_bitsandbytes()
        assert "bitsandbytes" not in sys.modules, "an import that nobody asked for"
        assert importlib.util.find_spec("bitsandbytes").name == "bitsandbytes"
        assert "bitsandbytes" not in sys.modules
        import bitsandbytes as bnb
        for path in {PATHS!r}:
            module = importlib.import_module("bitsandbytes." + path)
            assert module.__spec__.name == module.__name__ == "bitsandbytes." + path
            assert "fewbits" in module.__file__
        assert bnb.nn.Linear4bit is bnb.nn.modules.Linear4bit is fewbits.nn.Linear4bit
        assert bnb.functional.QuantState is fewbits.functional.QuantState
        assert bnb.optim.AdamW8bit is bnb.optim.adamw.AdamW8bit is fewbits.optim.AdamW8bit
        assert bnb.matmul_4bit is bnb.autograd._functions.matmul_4bit is fewbits.matmul_4bit
        assert bnb.features == {{"multi_backend"}} and {{"cpu", "cuda"}} <= bnb.supported_torch_devices
        fewbits.install_as_bitsandbytes()
        assert importlib.import_module("bitsandbytes") is bnb
        """
    )


def test_distribution() -> None:
    run(
        """
        import importlib.metadata as metadata
        import fewbits
        fewbits.install_as_bitsandbytes()
        version = metadata.version("bitsandbytes")
        assert version == f"0.50.2+fewbits{fewbits.__version__}" == metadata.version("BitsAndBytes")
        distribution = metadata.distribution("bitsandbytes")
        assert distribution.metadata["Name"] == "bitsandbytes"
        assert distribution.read_text("top_level.txt").strip() == "bitsandbytes"
        assert distribution.read_text("no such file") is None
        assert "bitsandbytes" in metadata.packages_distributions()["bitsandbytes"]
        import bitsandbytes
        assert bitsandbytes.__version__ == version
        try:
            metadata.version("bitsandbytes-other")
        except metadata.PackageNotFoundError:
            pass
        else:
            raise AssertionError("answers to another name")
        """
    )


def test_floors() -> None:
    version = pytest.importorskip("packaging.version")
    from fewbits.compat import VERSION

    for floor in ("0.46.1", "0.48.1", "0.49.2", "0.50.2"):  # transformers, vLLM, vLLM on ROCm, its own
        assert version.parse(VERSION) >= version.parse(floor)
    assert VERSION > "0.46.1"  # sglang compares text


def test_optimizers_are_named_as_trainers_expect() -> None:
    run(
        """
        import pickle, abc
        import fewbits
        fewbits.install_as_bitsandbytes()
        import bitsandbytes as bnb
        for name in bnb.optim.__dict__:
            found = getattr(bnb.optim, name)
            if isinstance(found, type) and name != "GlobalOptimManager":
                assert str(found).startswith("<class 'bitsandbytes.optim."), found
                assert pickle.loads(pickle.dumps(found)) is found
        assert str(bnb.optim.optimizer.Optimizer2State) == "<class 'bitsandbytes.optim.optimizer.Optimizer2State'>"
        class Own(bnb.optim.AdamW8bit, abc.ABC):
            pass
        assert str(Own) == "<class '__main__.Own'>"
        """
    )


def test_the_real_one_is_imported_already(tmp_path: Path) -> None:
    (tmp_path / "bitsandbytes.py").write_text("__version__ = '0.49.0'\n")
    run(
        """
        import sys
        sys.path.insert(0, ".")
        import bitsandbytes, fewbits
        before = list(sys.meta_path)
        try:
            fewbits.install_as_bitsandbytes()
        except RuntimeError as error:
            assert "0.49.0" in str(error) and "fewbits shim install" in str(error), error
        else:
            raise AssertionError("no error")
        assert sys.meta_path == before and sys.modules["bitsandbytes"].__version__ == "0.49.0"
        """,
        cwd=tmp_path,
    )


def test_the_real_one_is_installed_but_not_imported(tmp_path: Path) -> None:
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("raise ImportError('the wrong one')\n")
    info = tmp_path / "bitsandbytes-0.49.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.49.0\n")
    run(
        """
        import importlib.metadata, sys
        sys.path.insert(0, ".")
        assert importlib.metadata.version("bitsandbytes") == "0.49.0"
        import fewbits
        fewbits.install_as_bitsandbytes()
        import bitsandbytes.nn
        assert importlib.metadata.version("bitsandbytes") == bitsandbytes.__version__ != "0.49.0"
        """,
        cwd=tmp_path,
    )


def test_a_forbidden_import_is_allowed_again() -> None:
    run(
        """
        import sys
        sys.modules["bitsandbytes"] = None
        import fewbits
        fewbits.install_as_bitsandbytes()
        import bitsandbytes
        """
    )


def test_pickles_are_read_with_and_without_it(tmp_path: Path) -> None:
    script = """
        import pickle, sys, torch
        import fewbits
        {install}
        import {package} as bnb
        torch.manual_seed(0)
        layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
        rows = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
        x = torch.ones(2, 64)
        torch.save((layer, rows, layer.weight, layer.weight.quant_state, layer(x), rows(x)), "{file}")
        """
    read = """
        import torch
        {install}
        import fewbits
        layer, rows, weight, state, y, z = torch.load("{file}", weights_only=False)
        x = torch.ones(2, 64)
        assert torch.equal(layer(x), y) and torch.equal(rows(x), z)
        assert type(layer) is fewbits.nn.Linear4bit and type(weight) is fewbits.nn.Params4bit
        assert state == weight.quant_state
        """
    install = "import fewbits; fewbits.install_as_bitsandbytes()"
    run(script.format(install=install, package="bitsandbytes", file="aliased.pt"), cwd=tmp_path)
    run(script.format(install="", package="fewbits", file="plain.pt"), cwd=tmp_path)
    for file in ("aliased.pt", "plain.pt"):
        run(read.format(install=install, file=file), cwd=tmp_path)
        run(read.format(install="", file=file), cwd=tmp_path)


def test_spawned_workers(tmp_path: Path) -> None:
    # The call stands under __main__, where a spawned process does not come by.
    (tmp_path / "program.py").write_text(
        textwrap.dedent(
            """
            import multiprocessing as mp
            import torch

            def work(layer, optimizer, x, queue):
                p = torch.nn.Parameter(torch.ones(8192))
                p.grad = torch.ones(8192)
                optimizer([p], lr=0.5).step()
                queue.put((layer(x).tolist(), p[0].item()))

            if __name__ == "__main__":
                import fewbits
                fewbits.install_as_bitsandbytes()
                import bitsandbytes as bnb
                context = mp.get_context("spawn")
                queue = context.Queue()
                layer, x = bnb.nn.LinearNF4(64, 4).to("cpu"), torch.ones(1, 64)
                worker = context.Process(target=work, args=(layer, bnb.optim.AdamW8bit, x, queue))
                worker.start()
                values, moved = queue.get(timeout=200)
                worker.join()
                assert values == layer(x).tolist() and abs(moved - 0.495) < 1e-4, (values, moved)
            """
        )
    )
    run("import runpy; runpy.run_path('program.py', run_name='__main__')", cwd=tmp_path)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([p for p in sys.path if p])}
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240, env=env
    )
    assert done.returncode == 0, done.stderr


def test_python_m() -> None:
    out = run(
        """
        import runpy, sys
        import fewbits
        fewbits.install_as_bitsandbytes()
        sys.argv = ["bitsandbytes"]
        try:
            runpy.run_module("bitsandbytes", run_name="__main__")
        except SystemExit as end:
            assert not end.code, end.code
        """
    )
    assert "self-test" in out


def test_a_backend_that_fails_to_load_is_named() -> None:
    run(
        """
        import importlib.metadata
        import fewbits
        fewbits.install_as_bitsandbytes()
        class Point:
            name = "broken"
            def load(self):
                raise OSError("no library")
        real = importlib.metadata.entry_points
        ours = {"group": "bitsandbytes.backends"}
        importlib.metadata.entry_points = lambda **by: [Point()] if by == ours else real(**by)
        try:
            import bitsandbytes
        except RuntimeError as error:
            assert "broken" in str(error) and "no library" in str(error)
        else:
            raise AssertionError("no error")
        """
    )


def test_compiled_code_calls_the_operations() -> None:
    run(
        """
        import torch
        import fewbits
        fewbits.install_as_bitsandbytes()
        import bitsandbytes as bnb
        codes, state = bnb.functional.quantize_4bit(torch.randn(32, 64), quant_type="nf4")

        @torch.compile(backend="aot_eager", fullgraph=True)
        def product(x):
            op = torch.ops.bitsandbytes.gemm_4bit
            product = op(x, codes, state.shape, state.absmax, state.blocksize, "nf4")
            return product + bnb.matmul_4bit(x, codes.t(), state)

        x = torch.randn(3, 64)
        assert torch.equal(product(x), 2 * bnb.matmul_4bit(x, codes.t(), state))
        """
    )
