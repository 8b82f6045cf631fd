"""What the three scripts share: their options, a model to work on, text to train on, and the measure of memory."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model is a directory here: nothing is downloaded

import torch
import transformers
from rich.console import Console
from rich.table import Table

if not sys.stderr.isatty():
    transformers.utils.logging.disable_progress_bar()

SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
    # The sizes of TinyLlama: 1.10 billion parameters.
    "1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
}


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every script has."""
    made = argparse.ArgumentParser(description=description)
    which = made.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, help="directory of an unquantized causal language model")
    which.add_argument("--tiny", action="store_true", help="a Llama of 3 M random parameters, made on the spot")
    which.add_argument("--random-1b", action="store_true", help="a Llama of 1.1 billion random parameters")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", default=default, help=f"where it runs (here by default: {default})")
    return made


@contextmanager
def model_directory(args: argparse.Namespace) -> Iterator[Path]:
    """Give the directory of the model that was asked for; a random one is removed at the end."""
    if args.model is not None:
        yield args.model
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SIZES["tiny" if args.tiny else "1b"])
        with torch.device(args.device):
            transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
        yield Path(folder)


def load(path: Path, device: str, quantization: Any = None, **kwargs: Any) -> Any:
    """Load a model in bfloat16, its linear layers quantized if a ``BitsAndBytesConfig`` is given."""
    kwargs = {"device_map": {"": device}, "quantization_config": quantization, **kwargs}
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **kwargs)


def text_rows(path: Path, vocabulary: int, length: int, count: int) -> list[torch.Tensor]:
    """Cut the topics of Python's own help into rows of tokens; byte by byte if the model brings no tokenizer."""
    text = "\n".join(topics[name] for name in sorted(topics))
    if (path / "tokenizer_config.json").exists():
        tokens = torch.tensor(transformers.AutoTokenizer.from_pretrained(path)(text)["input_ids"])
    else:
        tokens = torch.tensor(list(text.encode())) % vocabulary
    rows = tokens.unfold(0, length, length)[:count]
    return [row.clone() for row in rows]


def held_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of these tensors, each piece of memory counted once."""
    found = [t for t in tensors if isinstance(t, torch.Tensor) and not t.is_meta]
    storages = {(t.device, t.untyped_storage().data_ptr()): t.untyped_storage().nbytes() for t in found}
    return sum(storages.values())


def model_tensors(model: torch.nn.Module) -> list[Any]:
    """Return what a model holds: what it saves (codes and all that describes them), and gradients."""
    return [*model.state_dict().values(), *(p.grad for p in model.parameters())]


# What may be on the GPU before a run: a few small tensors that libraries keep.
LEFT_OVER = 50_000_000


class Measurements:
    """A table of what each run needed."""

    def __init__(self, device: str, title: str) -> None:
        self.device = torch.device(device)
        self.title = title
        self.rows: list[tuple[str, int, str]] = []

    def begin(self) -> None:
        """Forget what ran before: call it when nothing of that is referenced any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()  # one for each stream that multiplied, tens of MB
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            left = torch.cuda.memory_allocated(self.device)
            assert left < LEFT_OVER, f"{left} bytes of the run before are still there"

    def end(self, label: str, tensors: Iterable[Any], detail: str = "") -> None:
        """Note the peak of the GPU since ``begin``; on another device, which counts none, the bytes of ``tensors``."""
        cuda = self.device.type == "cuda"
        size = torch.cuda.max_memory_allocated(self.device) if cuda else held_bytes(tensors)
        self.rows.append((label, size, detail))

    def show(self, what: str) -> None:
        """Print the table; the first run is what the others are compared with."""
        cuda = self.device.type == "cuda"
        measured = "peak of the GPU's memory" if cuda else f"bytes of {what} at the end (the CPU counts no peak)"
        table = Table("run", "MB", "of the first", "", title=self.title, caption=measured)
        for label, size, detail in self.rows:
            table.add_row(label, f"{size / 1e6:,.1f}", f"{size / self.rows[0][1]:.0%}", detail)
        Console(width=None if Console().is_terminal else 110).print(table)
