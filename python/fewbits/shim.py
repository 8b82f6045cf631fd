"""A distribution called bitsandbytes that is fewbits: for programs that give no place for a line of one's own.

``fewbits.install_as_bitsandbytes()`` serves one process. The shim serves every process of an environment, launchers and
workers included. It is a wheel of a few kB, made here and installed by pip: being a distribution of the same name, it
takes the place of the real one instead of writing over its files.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory

from fewbits.compat._finder import METADATA, NAME, VERSION

__all__ = ["ShimError", "build_wheel", "describe", "install", "installed_version", "remove"]

_INIT = '''"""fewbits in the place of bitsandbytes: `fewbits shim remove` takes it away again."""

try:
    from fewbits.compat._install import load as _load
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "fewbits":
        raise
    raise ImportError(
        "this bitsandbytes stands for fewbits, which is not installed: install fewbits, "
        "or get the real one by `pip install --force-reinstall bitsandbytes`"
    ) from error

_load()
'''
_WHEEL = "Wheel-Version: 1.0\nGenerator: fewbits\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


class ShimError(Exception):
    """What stands in the way, in words for the user."""


def build_wheel(directory: Path | str) -> Path:
    """Write the wheel.

    Parameters
    ----------
    directory : path
        Where to; made if it is not there.

    Returns
    -------
    pathlib.Path
        The wheel. The same version of fewbits always writes the same bytes.

    Examples
    --------
    >>> from tempfile import mkdtemp
    >>> build_wheel(mkdtemp()).name.startswith("bitsandbytes-0.50.2+fewbits")
    True
    """
    info = f"{NAME}-{VERSION}.dist-info"
    files = {
        f"{NAME}/__init__.py": _INIT,
        f"{info}/METADATA": METADATA,
        f"{info}/WHEEL": _WHEEL,
        f"{info}/top_level.txt": f"{NAME}\n",
    }
    record = "".join(f"{name},{_digest(text)},{len(text.encode())}\n" for name, text in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n"
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    wheel = directory / f"{NAME}-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_STORED) as archive:
        for name, text in files.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o100644 << 16  # the same on every platform
            archive.writestr(entry, text.encode())
    return wheel


def _digest(text: str) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
    return f"sha256={digest.decode()}"


def installed_version() -> str | None:
    """Return the version of the distribution bitsandbytes in this environment, or None if there is none."""
    try:
        return distribution(NAME).version
    except PackageNotFoundError:
        return None


def is_shim(version: str | None) -> bool:
    """Return whether a version is that of a shim, of this version of fewbits or another."""
    return version is not None and "+fewbits" in version


def describe() -> str:
    """Return what ``import bitsandbytes`` gives in a process that does nothing about it."""
    version = installed_version()
    if version is None:
        return "not installed; fewbits.install_as_bitsandbytes() or `fewbits shim install` lets fewbits stand in"
    if not is_shim(version):
        return f"bitsandbytes {version}, the real one"
    stale = "" if version == VERSION else f"; of another fewbits than this one, whose shim is {VERSION}"
    return f"fewbits, by its shim {version}{stale}"


def install() -> str:
    """Build the wheel and install it with pip, in place of any bitsandbytes; return the version.

    Raises
    ------
    ShimError
        If there is no pip, or it fails.
    """
    with TemporaryDirectory() as directory:
        wheel = build_wheel(directory)
        _pip("install", "--no-deps", "--no-index", "--force-reinstall", str(wheel))
    return VERSION


def remove() -> str:
    """Uninstall the shim with pip; return its version.

    Raises
    ------
    ShimError
        If the installed bitsandbytes is not a shim, or there is none; if there is no pip, or it fails.
    """
    version = installed_version()
    if version is None:
        raise ShimError("no bitsandbytes is installed: there is nothing to remove")
    if not is_shim(version):
        raise ShimError(f"the installed bitsandbytes {version} is the real one: there is no shim to remove")
    _pip("uninstall", "--yes", NAME)
    return version


def _pip(*arguments: str) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ShimError(
            "pip is not in this environment: add it by `python -m ensurepip`, or write the wheel by "
            "`fewbits shim install --wheel DIR` and give it to another installer"
        )
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], capture_output=True, text=True
    )
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise ShimError(f"pip {arguments[0]} failed: {words[-1] if words else f'exit code {done.returncode}'}")
