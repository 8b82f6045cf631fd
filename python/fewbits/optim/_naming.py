"""What optimizer classes are called in text, where fewbits stands in for bitsandbytes.

transformers' Trainer gives embeddings 32-bit states if ``"bitsandbytes" in str(optimizer_class)``. The classes keep
their module, by which pickles find them.
"""

from __future__ import annotations

from abc import ABCMeta

from fewbits.compat import _differences

_PACKAGE = "fewbits.optim."


class Named(ABCMeta):
    """The class of optimizer classes. An ABCMeta, so that they can be mixed with abstract classes."""

    def __repr__(cls) -> str:
        module, name, stands_in_as = cls.__module__, cls.__qualname__, _differences.stands_in_as
        if stands_in_as is not None and module.startswith(_PACKAGE):
            module = f"{stands_in_as}.optim.{module.removeprefix(_PACKAGE).replace('_base', 'optimizer')}"
        return f"<class '{module}.{name}'>"
