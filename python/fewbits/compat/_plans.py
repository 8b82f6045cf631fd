"""Tensor parallelism by transformers' plans (``tp_plan="auto"``): its styles, taught about quantized modules.

transformers keeps its styles in a registry for others to add to. Here those that cut layers and tables get a form that
treats quantized modules in our way and leaves all others to the style that was there. A quantized module waits for its
weight, which comes whole, as values that are quantized or as codes of a checkpoint, and keeps this rank's part of it.
"""

from __future__ import annotations

import sys
from typing import Any

# In transformers 5. Version 4 hands bitsandbytes' quantizer parts of files where it expects tensors.
_REGISTRY = "transformers.distributed.tensor_parallel"
_taught = False


class _Style:
    """A style of transformers that knows quantized modules."""

    def __init__(self, theirs: Any, ours: Any) -> None:
        self.theirs, self.ours = theirs, ours

    def __getattr__(self, name: str) -> Any:
        return getattr(self.theirs, name)

    def validate_param(self, module: Any, param: str, mesh: Any, parameter_name: str | None = None) -> None:
        """Leave a quantized parameter to `install_forward`, which has the whole module."""
        if not _is_quantized(module):
            self.theirs.validate_param(module, param, mesh, parameter_name)

    def shard_param(self, module: Any, param: str, mesh: Any) -> None:
        """Make a parameter a distributed one, unless it is quantized."""
        if not _is_quantized(module):
            self.theirs.shard_param(module, param, mesh)

    def install_forward(self, module: Any, mesh: Any) -> Any:
        """Let a module take its part, and its inputs and outputs travel."""
        if not _is_quantized(module):
            return self.theirs.install_forward(module, mesh)
        module._await(self.ours.split_of(module, mesh))
        return self.ours.attach(module, mesh)


def _is_quantized(module: Any) -> bool:
    from fewbits.nn.base import QuantizedModule  # which reads this module

    return isinstance(module, QuantizedModule)


def teach() -> None:
    """Register our forms of transformers' styles, once, if it is loaded."""
    global _taught
    module = sys.modules.get(_REGISTRY)
    if _taught or module is None:
        return
    _taught = True
    styles = getattr(module, "ALL_PARALLEL_STYLES", None)
    if styles is None or not hasattr(styles, "register"):
        return
    from fewbits.distributed import STYLES

    for name, ours in STYLES.items():
        if name in styles:
            styles.register(name, _Style(styles[name], ours()))
