"""`install_as_bitsandbytes`: from here on, ``import bitsandbytes`` gives fewbits."""

from __future__ import annotations

import sys
from types import ModuleType

from fewbits.compat import _finder
from fewbits.compat._finder import NAME, ROOT, VERSION

__all__ = ["VERSION", "install_as_bitsandbytes"]


def install_as_bitsandbytes() -> None:
    """Let ``import bitsandbytes`` give fewbits in this process.

    Works before and after ``import transformers``, ``peft``, ``accelerate``, ``diffusers`` or ``trl``: what they
    remember about bitsandbytes not being there is brought up to date. A second call does nothing. Where bitsandbytes is
    installed as well, fewbits comes first. Nothing is imported before somebody asks.

    Afterwards all module paths of bitsandbytes 0.50.2 can be imported, ``importlib.metadata`` knows a distribution
    ``bitsandbytes`` of version ``0.50.2+fewbits…``, and ``torch.ops.bitsandbytes`` has its operations. Classes keep
    their names in ``fewbits``, so that pickles can be read, and spawned workers started, with or without this call.

    Raises
    ------
    RuntimeError
        If the real bitsandbytes has been imported already.

    Examples
    --------
    >>> import fewbits
    >>> fewbits.install_as_bitsandbytes()
    >>> import bitsandbytes as bnb
    >>> bnb.nn.Linear4bit is fewbits.nn.Linear4bit
    True
    """
    loaded = sys.modules.get(NAME)
    if loaded is not None and not is_alias(loaded):
        raise RuntimeError(
            f"install_as_bitsandbytes: expected that nobody has imported bitsandbytes yet, got "
            f"{getattr(loaded, '__version__', 'a version')} from {getattr(loaded, '__file__', 'an unknown place')}; "
            "call it in the first lines of the program (`import peft` and transformers' Trainer import bitsandbytes), "
            "or run `fewbits shim install`, which needs no line at all"
        )
    if loaded is None:
        sys.modules.pop(NAME, None)  # None there forbids the import
    _finder.register()
    stand_in()


def stand_in() -> None:
    """Do what an import of bitsandbytes under this name entails beside the import itself."""
    from fewbits.compat import _differences, _ops, _refresh

    _ops.register()
    _differences.stands_in_as = NAME
    _refresh.refresh()


def is_alias(module: ModuleType) -> bool:
    """Return whether a module called bitsandbytes is fewbits."""
    return list(getattr(module, "__path__", ())) == [str(ROOT)]


def load() -> ModuleType:
    """Import the package from its place in fewbits, under the name that is in ``sys.modules``: for the shim."""
    from importlib.util import module_from_spec

    spec = _finder.spec()
    module = module_from_spec(spec)
    sys.modules[NAME] = module
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module
