"""Read a directory of safetensors, quantized or not, one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import functional as F
from ._checks import check_blocksize
from ._safetensors import CorruptFileError, TensorEntry, read_header
from ._selection import BLOCKWISE8_STATE, Format
from .nn.module8bit import check_format
from .nn.params import as_packed
from .utils import unpack_tensor_to_dict

_STATS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format")
_QUANTIZED_SUFFIXES = (".SCB", ".weight_format", ".absmax", ".quant_map", ".qweight", ".weight_scale_inv")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message is one line that names the file."""


class UsageError(CheckpointError, ValueError):
    """The request itself cannot be served: wrong directory, wrong option, source already quantized."""


class Checkpoint:
    """A directory of safetensors, quantized or not, opened for reading.

    Reads the headers only; every tensor is read when it is asked for.

    Parameters
    ----------
    path : str or Path
        Directory with ``*.safetensors``, one file or shards with an index.

    Raises
    ------
    UsageError
        If there is no such directory or it holds no safetensors.
    CheckpointError
        If a file or the index is corrupt, or a shard is missing.

    Attributes
    ----------
    entries : dict of str to TensorEntry
        Every stored tensor, in the order of the files.
    config : dict
        ``config.json``, empty if there is none.
    stem : str
        Name of the weights file without its ending, ``model``.
    metadata : dict of str to str
        Free-form metadata of the first file.
    """

    def __init__(self, path: str | Path) -> None:
        if not os.fspath(path):  # an unset variable of a shell; Path would make the current directory of it
            raise UsageError("source: got an empty path, expected a directory with *.safetensors")
        self.path = Path(path)
        self.config = _read_config(self.path / "config.json") if (self.path / "config.json").is_file() else {}
        files, self.stem = _weight_files(self.path)
        self.entries: dict[str, TensorEntry] = {}
        self.metadata: dict[str, str] = {}
        for file in files:
            try:
                entries, metadata = read_header(file)
            except CorruptFileError as error:
                raise CheckpointError(str(error)) from None
            self.metadata = self.metadata or metadata
            for entry in entries:
                if entry.name in self.entries:
                    other = self.entries[entry.name].path.name
                    raise CheckpointError(f"{file}: tensor {entry.name!r} is in {other} too")
                self.entries[entry.name] = entry
        self._stats: dict[str, dict[str, TensorEntry]] = {}
        for name, entry in self.entries.items():
            owner = self._owner(name)
            if owner is not None:
                self._stats.setdefault(owner, {})[name] = entry

    def _owner(self, name: str) -> str | None:
        """Name of the weight that a tensor describes, or None if the tensor stands for itself."""
        module, _, leaf = name.rpartition(".")
        if leaf in ("SCB", "weight_format") and f"{module}.weight" in self.entries:
            return f"{module}.weight"
        for suffix in _STATS[:4]:
            if name.endswith(suffix):
                owner = name.removesuffix(suffix)
                return owner if owner in self.entries else None
        owner, found, _ = name.partition(".quant_state.")
        return owner if found and owner in self.entries else None

    def names(self) -> list[str]:
        """Names of the tensors of the model, without those that only describe a quantized weight."""
        companions = {name for stats in self._stats.values() for name in stats}
        return [name for name in self.entries if name not in companions]

    def quantized_format(self, name: str) -> Format | None:
        """Format of one weight, None if it is stored as it is."""
        stats = self._stats.get(name, {})
        candidates: dict[str, Format] = {
            f"{name}.quant_state.bitsandbytes__nf4": "nf4",
            f"{name}.quant_state.bitsandbytes__fp4": "fp4",
            f"{name}.{BLOCKWISE8_STATE}": "blockwise8",
            f"{name.removesuffix('weight')}SCB": "int8rows",
        }
        return next((quant_format for key, quant_format in candidates.items() if key in stats), None)

    def refuse_quantized(self) -> None:
        """Raise :class:`UsageError` if the checkpoint is quantized already, by whatever method."""
        method = self.config.get("quantization_config")
        if method is not None:
            name = method.get("quant_method", "unknown method") if isinstance(method, dict) else method
            raise UsageError(f"{self.path}: already quantized ({name}, see quantization_config in config.json)")
        for name in self.entries:
            if name.endswith(_QUANTIZED_SUFFIXES) or ".quant_state." in name:
                raise UsageError(f"{self.path}: already quantized (holds the tensor {name})")

    def refuse_orphans(self) -> None:
        """Raise :class:`CheckpointError` if a tensor describes a quantized weight that is not there."""
        for name, entry in self.entries.items():
            if self._owner(name) is None and (name.endswith(_STATS) or ".quant_state." in name):
                raise CheckpointError(f"{entry.path}: {name}: the weight that it describes is missing")

    def load_tensor(
        self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> torch.Tensor:
        """Read one tensor, dequantized.

        Parameters
        ----------
        name : str
        dtype : torch.dtype, optional
            Of a quantized weight. Default: the dtype it had before it was quantized (``int8rows``, which does not
            record it: float32). A tensor that is stored as it is keeps its dtype.
        device : str or torch.device, default "cpu"

        Returns
        -------
        torch.Tensor
            Of the weight's own shape. 4-bit and 8-bit blocks: ``code[codes] * absmax``; rows: ``codes * SCB / 127``.

        Raises
        ------
        KeyError
            If there is no tensor of this name.
        CheckpointError
            If the tensors that describe the weight contradict each other.
        """
        if name not in self.entries:
            raise KeyError(f"{self.path}: no tensor {name!r}")
        quant_format = self.quantized_format(name)
        entry = self.entries[name]
        if quant_format is None:
            if name in self._stats:
                found = ", ".join(key.rpartition(".")[2] for key in self._stats[name])
                raise CheckpointError(f"{entry.path}: {name}: what tells how to read it is missing (found {found})")
            return _read(entry).to(device)
        try:
            stored = _read(entry).to(device)
            stats = {key: _read(other) for key, other in self._stats[name].items()}
            if quant_format == "int8rows":
                return _dequantize_rows(stored, stats, name).to(dtype or torch.float32)
            stats = {key.removeprefix(f"{name}."): value for key, value in stats.items()}
            if quant_format == "blockwise8":
                return _dequantize_blocks(stored, stats, dtype)
            quant_state = F.QuantState.from_dict(stats, device=torch.device(device))
            if dtype is not None:
                quant_state.dtype = dtype
            # bitsandbytes takes a single packed row for a transposed weight; the state knows the shape.
            values = F.dequantize_4bit(as_packed("weight", stored, quant_state), quant_state)
            return values if quant_state.shape is None else values.reshape(quant_state.shape)
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise CheckpointError(f"{entry.path}: {name}: cannot dequantize ({error})") from error


def load_tensor(
    path: str | Path, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """Read one tensor of a checkpoint, dequantized: ``Checkpoint(path).load_tensor(name, dtype, device)``."""
    return Checkpoint(path).load_tensor(name, dtype, device)


def iter_dequantized(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and value of every tensor of a checkpoint, quantized weights dequantized, one at a time.

    Parameters
    ----------
    path : str or Path
    dtype : torch.dtype, optional
        See :meth:`Checkpoint.load_tensor`.
    device : str or torch.device, default "cpu"

    Examples
    --------
    >>> state = dict(iter_dequantized("model-nf4"))
    """
    checkpoint = Checkpoint(path)
    checkpoint.refuse_orphans()
    for name in checkpoint.names():
        yield name, checkpoint.load_tensor(name, dtype, device)


def _read(entry: TensorEntry) -> torch.Tensor:
    """Read a tensor; what is wrong with it names the file."""
    try:
        return entry.read()
    except (CorruptFileError, TypeError) as error:
        raise CheckpointError(str(error)) from None


def _dequantize_rows(codes: torch.Tensor, stats: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return the values of int8 rows, float32."""
    SCB = stats[f"{name.removesuffix('weight')}SCB"].to(codes.device)
    check_format(stats.get(f"{name}_format", 0))
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ValueError(f"weight: expected torch.int8 of two dimensions, got {codes.dtype} of {tuple(codes.shape)}")
    if not SCB.is_floating_point() or SCB.numel() != codes.shape[0]:
        raise ValueError(f"SCB: expected {codes.shape[0]} floating-point values, got {SCB.numel()} of {SCB.dtype}")
    return codes.float() * (SCB.float().view(-1) / 127).unsqueeze(1)


def _dequantize_blocks(codes: torch.Tensor, stats: dict[str, torch.Tensor], dtype: torch.dtype | None) -> torch.Tensor:
    """Return the values of 8-bit blocks."""
    state = unpack_tensor_to_dict(stats[BLOCKWISE8_STATE])
    if state["shape"] != list(codes.shape):
        raise ValueError(f"shape: expected {list(codes.shape)}, got {state['shape']}")
    if codes.dtype != torch.uint8:
        raise ValueError(f"weight: expected torch.uint8, got {codes.dtype}")
    own = getattr(torch, str(state["dtype"]), None)
    if not isinstance(own, torch.dtype):
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {state['dtype']!r}")
    absmax, code = (stats[key].to(codes.device) for key in ("absmax", "quant_map"))
    check_blocksize(state["blocksize"])
    blocks = F.QuantState(absmax, code=code, blocksize=state["blocksize"], dtype=dtype or own)
    return F.dequantize_blockwise(codes, blocks)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: got a JSON {type(value).__name__}, expected an object")
    return value


def _read_config(path: Path) -> dict[str, Any]:
    """Read a model's config.json, of which all fields may be missing."""
    config = _read_json(path)
    for key, kind, expected in (("model_type", str, "a string"), ("architectures", list, "a list of names")):
        value = config.get(key)
        if value is not None and not isinstance(value, kind):
            raise CheckpointError(f"{path}: {key}: expected {expected}, got {value!r}")
    return config


def _weight_files(path: Path) -> tuple[list[Path], str]:
    """Find the files of a checkpoint and the stem of their names."""
    if not path.is_dir():
        raise UsageError(f"{path}: {'not a directory' if path.exists() else 'no such directory'}")
    if (path / "model.safetensors").is_file():
        # As transformers has it, which leaves the index of older shards behind when it saves to the same place.
        return [path / "model.safetensors"], "model"
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        preferred = path / "model.safetensors.index.json"
        index = preferred if preferred in indices else indices[0]
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) and n == Path(n).name for n in names.values()):
            raise CheckpointError(f"{index}: weight_map is not a table of tensor names to file names")
        if not names:
            raise CheckpointError(f"{index}: weight_map names no tensors")
        files = sorted({path / n for n in names.values()})
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise CheckpointError(f"{index}: {len(missing)} of {len(files)} shards are missing, first {missing[0]}")
        return files, index.name.removesuffix(".safetensors.index.json")
    files = sorted(f for f in path.glob("*.safetensors") if f.is_file())
    if not files:
        raise UsageError(f"{path}: no *.safetensors in this directory")
    return files, files[0].stem if len(files) == 1 else "model"
