"""Quantize a directory of safetensors, one tensor at a time, and read such checkpoints back.

Nothing here prints; ``fewbits quantize`` is the front (:mod:`fewbits.cli`).

What is written for a weight ``X.weight`` of n elements:

==============  ===============================================================================================
``nf4 | fp4``   bitsandbytes' 4-bit layout: ``X.weight`` uint8 ``((n + 1) // 2, 1)``, ``X.weight.absmax``,
                ``X.weight.quant_map``, with double quantization ``X.weight.nested_absmax`` and
                ``X.weight.nested_quant_map``, and the state ``X.weight.quant_state.bitsandbytes__nf4``
``int8rows``    bitsandbytes' LLM.int8() layout: ``X.weight`` int8 ``(rows, columns)``, ``X.SCB`` float32 ``(rows,)``
                (largest magnitude of each row), ``X.weight_format`` uint8 scalar 0
``blockwise8``  fewbits' own: ``X.weight`` uint8 codes of the weight's shape, ``X.weight.absmax`` float32 (one for each
                block of the flattened weight), ``X.weight.quant_map`` float32 ``(256,)`` (value of each code), and
                ``X.weight.quant_state.fewbits__blockwise8``, uint8 UTF-8 JSON ``{"quant_type", "blocksize", "dtype",
                "shape"}``
==============  ===============================================================================================
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ._backend import device_types
from ._encode import quantize_int8_rows, quantize_weight, relative_error
from ._reader import Checkpoint, CheckpointError, UsageError, iter_dequantized, load_tensor
from ._safetensors import CorruptFileError, Part, Writer
from ._selection import (
    BLOCKSIZES,
    DEFAULT_BLOCKSIZE,
    FORMATS,
    Choice,
    Format,
    matches,
    quantization_config,
    quantized_parts,
    select,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Report",
    "UsageError",
    "iter_dequantized",
    "load_tensor",
    "quantize_checkpoint",
    "quantize_int8_rows",
]

_DEFAULT_SHARD = 5 * 10**9
# Weights in other containers, which would make the copy as large as the original.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".tflite", ".ot")


@dataclass
class Report:
    """Outcome of :func:`quantize_checkpoint`.

    Attributes
    ----------
    errors : dict of str to float
        For each quantized weight W the relative error ``||W - dequantized||_F / ||W||_F`` (0 for an all-zero weight),
        with the dequantized values in float32.
    kept : dict of str to list of str
        Names of the tensors that were copied, by reason.
    bytes_before, bytes_after : int
        Tensor data of the source and of the result, kept tensors included.
    seconds : float
    notes : list of str
        Things that the user should know.
    """

    errors: dict[str, float] = field(default_factory=dict)
    kept: dict[str, list[str]] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def mean_error(self) -> float:
        """Mean of ``errors`` over the quantized weights whose values are all finite."""
        finite = [e for e in self.errors.values() if math.isfinite(e)]
        return sum(finite) / len(finite) if finite else 0.0

    @property
    def worst(self) -> tuple[str, float]:
        """Name and error of the worst of them."""
        finite = {k: e for k, e in self.errors.items() if math.isfinite(e)}
        name = max(finite, key=finite.__getitem__, default="")
        return name, finite.get(name, 0.0)


def _check_destination(source: Path, destination: Path, overwrite: bool) -> Path:
    try:
        destination = destination.resolve()
        destination.exists()
    except (OSError, RuntimeError) as error:  # RuntimeError before Python 3.13
        raise UsageError(f"{destination}: cannot be resolved ({error})") from None
    source = source.resolve()
    if destination == source or source in destination.parents or destination in source.parents:
        raise UsageError(f"{destination}: DST and SRC must not lie in one another (SRC is {source})")
    if destination.exists():
        if not destination.is_dir():
            raise UsageError(f"{destination}: exists and is not a directory")
        if os.path.ismount(destination):
            raise UsageError(f"{destination}: is a mount point; name a directory inside it")
        if any(destination.iterdir()):
            if not overwrite:
                raise UsageError(f"{destination}: exists and is not empty (--overwrite replaces it)")
            if not any(destination.glob("*.safetensors")):
                raise UsageError(f"{destination}: holds no *.safetensors; --overwrite only replaces a checkpoint")
    return destination


def _compute_dtype(config: dict[str, Any], choices: Sequence[Choice]) -> str:
    """Dtype for ``bnb_4bit_compute_dtype``: the model's own, as config.json or its weights say."""
    declared = config.get("dtype", config.get("torch_dtype"))
    if declared in ("float32", "float16", "bfloat16"):
        return str(declared)
    counts: dict[str, int] = {}
    for choice in choices:
        if choice.quantize:
            counts[choice.entry.dtype] = counts.get(choice.entry.dtype, 0) + choice.entry.numel
    common = max(counts, key=counts.__getitem__, default="F32")
    return {"BF16": "bfloat16", "F16": "float16"}.get(common, "float32")


def _shards(choices: Sequence[Choice], parts: dict[str, list[Part]], limit: int) -> list[list[Choice]]:
    """Divide the tensors over files of at most ``limit`` bytes; what describes a weight stays beside it."""
    shards: list[list[Choice]] = [[]]
    size = 0
    for choice in choices:
        nbytes = sum(p.nbytes for p in parts[choice.entry.name])
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(choice)
        size += nbytes
    return shards


def _copy_other_files(source: Path, destination: Path) -> None:
    """Copy tokenizer, generation config, modules and the like; no other weights of the top directory."""
    for folder, folders, files in os.walk(source):
        here = Path(folder)
        top = here == source
        folders[:] = [f for f in folders if not f.startswith(".")]
        for name in files:
            if name.endswith(_OTHER_WEIGHTS) or name == ".gitattributes":
                continue
            if top and (name.endswith((".safetensors", ".index.json")) or name == "config.json"):
                continue
            if not (here / name).is_file():
                continue  # a link to nowhere
            target = destination / here.relative_to(source) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(here / name, target)


def _notes(source: Checkpoint, choices: Sequence[Choice], skip: Sequence[str]) -> list[str]:
    notes = []
    floats64 = sum(c.quantize and c.entry.dtype == "F64" for c in choices)
    if floats64:
        notes.append(f"{floats64} float64 weights were rounded to float32 before they were quantized")
    used = {e.path for e in source.entries.values()}
    others = sorted(f.name for f in source.path.glob("*.safetensors") if f not in used)
    if others and used:
        notes.append(f"{len(others)} other safetensors files were neither quantized nor copied, first {others[0]}")
    small = [c.entry for c in choices if re.match(r"F[468]_", c.entry.dtype)]
    if small:
        notes.append(f"{len(small)} tensors of 8 bits or fewer ({small[0].dtype}) were copied as they are")
    stacked = [c.entry for c in choices if len(c.entry.shape) == 3 and c.entry.dtype in ("F32", "F16", "BF16", "F64")]
    size = sum(e.nbytes for e in stacked) / 1e9
    if size > 0.05 * sum(e.nbytes for e in source.entries.values()) / 1e9:
        notes.append(
            f"{len(stacked)} three-dimensional tensors ({size:.2f} GB, fused experts?) were copied as they are"
        )
    experts = [c.entry.name for c in choices if c.quantize and re.search(r"\.experts\.\d+\.", c.entry.name)]
    if experts:
        notes.append(
            f"{len(experts)} expert weights were quantized: transformers 5, which fuses experts, cannot load them so"
            " (--skip experts keeps them)"
        )
    lookalikes = [c.entry.name for c in choices if c.reason.startswith("a loader")]
    if lookalikes:
        notes.append(f"{len(lookalikes)} weights were kept because a loader would skip them too, first {lookalikes[0]}")
    for pattern in skip:
        if not any(c.reason == f"--skip {pattern}" for c in choices):
            notes.append(f"--skip {pattern} named no tensor that would have been quantized")
    if not any(c.quantize for c in choices):
        notes.append("no weight was quantized")
    return notes


def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    quant_format: Format = "nf4",
    double_quant: bool = False,
    blocksize: int | None = None,
    skip: Sequence[str] = (),
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    max_shard_bytes: int = _DEFAULT_SHARD,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Quantize the linear layers of a checkpoint, one tensor at a time.

    The result is written beside ``destination`` under a hidden name that ends in ``.partial`` and renamed at the very
    end; whatever goes wrong before (an interrupt, a full disk), it is removed.

    Parameters
    ----------
    source : str or Path
        Directory with ``*.safetensors`` and perhaps ``config.json``.
    destination : str or Path
        New or empty directory.
    quant_format : {"nf4", "fp4", "int8rows", "blockwise8"}
    double_quant : bool, default False
        Quantize the scales of 4-bit blocks too.
    blocksize : int, optional
        32 to 4096, a power of two. Default 64 for 4 bits, 256 for ``blockwise8``.
    skip : sequence of str
        Patterns of weights to keep, see :func:`fewbits._selection.matches`.
    device : str or torch.device, default "cpu"
        Where the tensors are quantized; the bytes are the same on every device.
    overwrite : bool, default False
        Replace a checkpoint at ``destination``.
    max_shard_bytes : int, default 5e9
        A larger result is divided into files of at most this size with an index.
    progress : callable, optional
        Called as ``progress(name, bytes_done, bytes_total)`` before each tensor of the source and once at the end.

    Returns
    -------
    Report

    Raises
    ------
    UsageError
        If the source is no directory of safetensors or already quantized, the destination is not free, or an option
        is wrong. Nothing has been written then.
    CheckpointError
        If the source is corrupt, or the disk is too small.

    Examples
    --------
    >>> report = quantize_checkpoint("model", "model-nf4", double_quant=True)
    """
    began = time.monotonic()
    _check_options(quant_format, double_quant, blocksize, device, max_shard_bytes)
    _check_patterns(skip)
    blocksize = blocksize or DEFAULT_BLOCKSIZE[quant_format]
    model = Checkpoint(source)
    model.refuse_quantized()
    if not os.fspath(destination):
        raise UsageError("destination: got an empty path, expected a directory to write")
    target = _check_destination(model.path, Path(destination), overwrite)
    choices, skip_modules = select(list(model.entries.values()), skip, model.config)

    parts: dict[str, list[Part]] = {}
    for choice in choices:
        entry = choice.entry
        parts[entry.name] = [Part(entry.name, entry.dtype, entry.shape, entry.nbytes)]
        if choice.quantize:
            parts[entry.name] = quantized_parts(entry.name, choice.shape, quant_format, blocksize, double_quant)
    names = {p.name for some in parts.values() for p in some}
    if len(names) != sum(map(len, parts.values())):
        raise UsageError(f"{model.path}: a tensor has the name of a scale that would be written beside a weight")

    report = Report(notes=_notes(model, choices, skip), bytes_before=sum(e.nbytes for e in model.entries.values()))
    for choice in choices:
        if not choice.quantize:
            report.kept.setdefault(choice.reason, []).append(choice.entry.name)

    target.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(p.nbytes for some in parts.values() for p in some)
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise CheckpointError(f"{target}: needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB left")
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir()
        _copy_other_files(model.path, partial)
        shards = _shards(choices, parts, max_shard_bytes)
        weight_map: dict[str, str] = {}
        done = 0
        for number, shard in enumerate(shards, 1):
            name = f"{model.stem}.safetensors"
            if len(shards) > 1:
                name = f"{model.stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            announced = [p for c in shard for p in parts[c.entry.name]]
            with Writer(partial / name, announced, model.metadata or {"format": "pt"}) as writer:
                for choice in shard:
                    if progress:
                        progress(choice.entry.name, done, report.bytes_before)
                    error = _write_tensor(writer, choice, quant_format, blocksize, double_quant, device)
                    if error is not None:
                        report.errors[choice.entry.name] = error
                    done += choice.entry.nbytes
                report.bytes_after += writer.finish()
            weight_map |= {p.name: name for p in announced}
        if progress:
            progress("", done, report.bytes_before)
        if len(shards) > 1:
            index = {"metadata": {"total_size": report.bytes_after}, "weight_map": weight_map}
            (partial / f"{model.stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        config = model.config | {
            "quantization_config": quantization_config(
                quant_format, blocksize, double_quant, skip_modules, _compute_dtype(model.config, choices)
            )
        }
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        _move_into_place(partial, target)
    except CorruptFileError as error:
        raise CheckpointError(str(error)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    strange = [name for name, error in report.errors.items() if not math.isfinite(error)]
    if strange:
        report.notes.append(f"{len(strange)} weights hold NaN or infinity, first {strange[0]}; not in the errors")
    report.seconds = time.monotonic() - began
    return report


def _check_options(
    quant_format: str, double_quant: bool, blocksize: int | None, device: str | torch.device, max_shard_bytes: int
) -> None:
    if quant_format not in FORMATS:
        raise UsageError(f"format: got {quant_format!r}, expected one of {', '.join(FORMATS)}")
    if double_quant and quant_format not in ("nf4", "fp4"):
        raise UsageError(f"double quantization: got the format {quant_format}, expected nf4 or fp4")
    if blocksize is not None and quant_format == "int8rows":
        raise UsageError("blocksize: int8rows has one scale a row and takes none")
    if blocksize is not None and blocksize not in BLOCKSIZES:
        raise UsageError(f"blocksize: got {blocksize}, expected one of {', '.join(map(str, BLOCKSIZES))}")
    if max_shard_bytes <= 0:
        raise UsageError(f"max_shard_bytes: got {max_shard_bytes}, expected a positive number")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda", "xpu", "mps"):
        raise UsageError(f"device: got {device!r}, expected cpu, cuda, xpu or mps")
    if kind not in device_types():
        raise UsageError(f"device: got {device!r}, but torch {torch.__version__} finds no {kind.upper()} device")


def _check_patterns(skip: Sequence[str]) -> None:
    for pattern in skip:
        try:
            matches(pattern, "")
        except re.error as error:
            raise UsageError(f"skip: got {pattern!r}, which is no regular expression ({error})") from None


def _write_tensor(
    writer: Writer,
    choice: Choice,
    quant_format: Format,
    blocksize: int | None,
    double_quant: bool,
    device: str | torch.device,
) -> float | None:
    """Quantize or copy one tensor; return the relative error of a quantized one."""
    name = choice.entry.name
    if not choice.quantize:
        writer.copy(name, choice.entry)
        return None
    weight = choice.entry.read().to(device)
    if weight.dtype == torch.float64:
        weight = weight.float()
    if choice.transpose:
        weight = weight.T.contiguous()
    tensors, dequantize = quantize_weight(name, weight, quant_format, blocksize, double_quant)
    for key, tensor in tensors.items():
        writer.write(key, tensor)
    return relative_error(weight, dequantize)


def _move_into_place(partial: Path, target: Path) -> None:
    """Give the finished directory its name; what had that name goes away only after that."""
    if not target.exists():
        partial.rename(target)
        return
    old = target.parent / f"{partial.name}.old"
    try:
        target.rename(old)
        partial.rename(target)
    finally:
        if partial.exists() and old.exists():
            old.rename(target)
        else:
            shutil.rmtree(old, ignore_errors=True)
