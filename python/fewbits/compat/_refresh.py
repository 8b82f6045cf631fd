"""What libraries that are imported already remember about bitsandbytes, brought up to date.

They look for it once: some when they are imported, some when first asked. Only modules that are loaded are touched.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from fewbits.compat._finder import NAME, VERSION

# Functions that remember their answer, by module.
_CACHES = {
    "transformers.utils.import_utils": (
        "is_bitsandbytes_available",
        "is_bitsandbytes_multi_backend_available",
        "_package_distribution_mapping",
        "_is_package_available",
    ),
    "accelerate.utils.imports": ("is_bnb_available", "is_4bit_bnb_available", "is_8bit_bnb_available"),
    "peft.import_utils": ("is_bnb_available", "is_bnb_4bit_available"),
    "diffusers.utils.import_utils": ("is_bitsandbytes_available",),
}
# Answers kept as attributes of modules.
_ANSWERS: dict[str, dict[str, object]] = {
    "transformers.utils.import_utils": {"_bitsandbytes_available": True},
    "diffusers.utils.import_utils": {"_bitsandbytes_available": True, "_bitsandbytes_version": VERSION},
}
# Modules that import bitsandbytes as `bnb`, and more with it, only where they found it.
_IMPORTS: dict[str, dict[str, tuple[str, str | None]]] = {
    "transformers.integrations.bitsandbytes": {
        "torch": ("torch", None),
        "nn": ("torch.nn", None),
        "Conv1D": ("transformers.pytorch_utils", "Conv1D"),
    },
    "peft.helpers": {},
    "trl.generation.vllm_generation": {},
    "trl.experimental.online_dpo.online_dpo_trainer": {},
}


def refresh() -> None:
    """Bring the loaded modules up to date."""
    for name, functions in _CACHES.items():
        module = sys.modules.get(name)
        for function in functions:
            clear = getattr(getattr(module, function, None), "cache_clear", None)
            if clear is not None:
                clear()
    for name, answers in _ANSWERS.items():
        module = sys.modules.get(name)
        for attribute, answer in answers.items():
            if hasattr(module, attribute):
                setattr(module, attribute, answer)
    # transformers 5.0 to 5.12 keep which distributions there are as a table.
    table = getattr(sys.modules.get("transformers.utils.import_utils"), "PACKAGE_DISTRIBUTION_MAPPING", None)
    if isinstance(table, dict):
        table[NAME] = [NAME]
    for name, others in _IMPORTS.items():
        module = sys.modules.get(name)
        if module is not None and getattr(module, "bnb", None) is None:
            _bind(module, others)


def _bind(module: ModuleType, others: dict[str, tuple[str, str | None]]) -> None:
    module.__dict__["bnb"] = importlib.import_module(NAME)
    for name, (source, attribute) in others.items():
        if not hasattr(module, name):
            found = importlib.import_module(source)
            setattr(module, name, found if attribute is None else getattr(found, attribute))
