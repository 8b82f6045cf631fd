"""Reading and writing of safetensors files one tensor at a time.

``safetensors.torch.save_file`` wants every tensor of a file in memory, and ``safe_open`` maps the file, so that the
pages of every tensor read so far stay in the process. Quantizing a model larger than the memory needs neither, hence
this module: the library still judges whether a file is whole (:func:`read_header`), and everything that is read or
written goes through plain file reads and writes of one tensor.

File format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header
``{name: {"dtype", "shape", "data_offsets": [begin, end]}}`` that may end in spaces, then the data without holes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

# Bytes of one element. Types that are not listed here (8-bit and smaller floats among them) need no alignment.
ITEMSIZE = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
TORCH_DTYPE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip

COPY_BYTES = 8 << 20
# Upper bound of the length of one packed quantization state (JSON text, some 200 bytes); only the width of the
# offsets in the reserved header follows from it.
MAX_BLOB_BYTES = 1 << 16


class CorruptFileError(ValueError):
    """A safetensors file that is truncated or whose header does not describe its data."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file: where it lies and what it is.

    Attributes
    ----------
    path : Path
        The file.
    name, dtype : str
        Name of the tensor and its type as the file spells it (``"BF16"``).
    shape : tuple of int
    start, nbytes : int
        Position of the first byte in the file, and the length in bytes.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def read(self) -> torch.Tensor:
        """Read the tensor into fresh memory (no mapping of the file stays behind).

        Returns
        -------
        torch.Tensor
            On the CPU, of the entry's shape and dtype.

        Raises
        ------
        TypeError
            If torch has no dtype for this entry's (8-bit floats and smaller are only ever copied here).
        CorruptFileError
            If the file became shorter since its header was read.
        """
        dtype = TORCH_DTYPE.get(self.dtype)
        if dtype is None:
            raise TypeError(
                f"{self.path}: {self.name}: got dtype {self.dtype}, expected one of {', '.join(TORCH_DTYPE)}"
            )
        buffer = torch.empty(self.nbytes, dtype=torch.uint8)
        if self.nbytes:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.start)
                view = buffer.numpy().data
                while view:
                    got = file.readinto(view)
                    if not got:
                        raise CorruptFileError(f"{self.path}: {self.name}: the file ends inside this tensor")
                    view = view[got:]
        return buffer.view(dtype).reshape(self.shape)

    def chunks(self) -> Iterator[bytes]:
        """Yield the raw bytes in pieces of at most ``COPY_BYTES``."""
        left = self.nbytes
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            while left:
                piece = file.read(min(left, COPY_BYTES))
                if not piece:
                    raise CorruptFileError(f"{self.path}: {self.name}: the file ends inside this tensor")
                left -= len(piece)
                yield piece


def read_header(path: Path) -> tuple[list[TensorEntry], dict[str, str]]:
    """Read what a safetensors file holds, without its data.

    Parameters
    ----------
    path : Path

    Returns
    -------
    entries : list of TensorEntry
        In the order in which they lie in the file.
    metadata : dict of str to str
        The free-form ``__metadata__`` of the file.

    Raises
    ------
    CorruptFileError
        If the safetensors library refuses the file: truncated, header that is no JSON, offsets that overlap, leave
        holes or contradict shape and dtype.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise CorruptFileError(f"{path}: not a whole safetensors file ({error})") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    entries = []
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        entries.append(TensorEntry(path, name, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin))
    return sorted(entries, key=lambda entry: entry.start), metadata


@dataclass(frozen=True)
class Part:
    """A tensor that a file is going to hold.

    Attributes
    ----------
    name, dtype : str
    shape : tuple of int
        Of a blob: ignored.
    nbytes : int
        Of a blob: 0.
    blob : bool
        True for a packed quantization state, whose length is known only once the tensor is quantized.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    blob: bool = False


def part(name: str, dtype: str, shape: Sequence[int]) -> Part:
    """Describe a tensor of a dtype that torch knows; its length follows from shape and dtype."""
    return Part(name, dtype, tuple(shape), math.prod(shape) * ITEMSIZE[dtype])


class Writer:
    """Write one safetensors file whose tensors arrive one by one, in any order.

    Lengths are known before any tensor is quantized, with one exception: the packed quantization states hold a
    decimal number. They need no alignment, so they go to the end of the file, wait in memory (some 200 bytes each) and
    are written last; every other tensor has its final place from the start. The header is written at the very end into
    room that was kept for its longest form, so that an unfinished file is never readable. Like the
    library's own writer, tensors lie in descending alignment and then by name.

    Parameters
    ----------
    path : Path
        File to create.
    parts : sequence of Part
        Everything the file will hold.
    metadata : mapping of str to str
    """

    def __init__(self, path: Path, parts: Sequence[Part], metadata: Mapping[str, str]) -> None:
        self._metadata = dict(metadata)
        self._parts = sorted(parts, key=lambda p: (p.blob, -ITEMSIZE.get(p.dtype, 1), p.name))
        self._begin: dict[str, int] = {}
        self._pending = {p.name: p for p in self._parts}
        if len(self._pending) != len(self._parts):
            names = [p.name for p in self._parts]
            raise ValueError(
                f"two tensors of the name {next(n for n in names if names.count(n) > 1)!r} for {path.name}"
            )
        end = 0
        for p in self._parts:
            self._begin[p.name] = end
            end += p.nbytes
        self._blobs: dict[str, bytes] = {p.name: b"" for p in self._parts if p.blob}
        longest = dict.fromkeys(self._blobs, MAX_BLOB_BYTES)
        # Multiple of 8, as the library does, so that the data is aligned in a mapping of the file.
        self._reserved = (len(self._header(longest)) + 7) // 8 * 8
        self._file = path.open("xb")

    def _header(self, blob_lengths: Mapping[str, int]) -> bytes:
        header: dict[str, object] = {"__metadata__": self._metadata} if self._metadata else {}
        shift = 0
        for p in self._parts:
            length = blob_lengths[p.name] if p.blob else p.nbytes
            begin = self._begin[p.name] + shift
            shift += length if p.blob else 0
            shape = [length] if p.blob else list(p.shape)
            header[p.name] = {"dtype": p.dtype, "shape": shape, "data_offsets": [begin, begin + length]}
        return json.dumps(header, separators=(",", ":")).encode()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor (on any device) to its place.

        Raises
        ------
        ValueError
            If the tensor's length is not the one announced.
        """
        data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        p = self._pending.pop(name)
        if p.blob:
            if data.nbytes > MAX_BLOB_BYTES:
                raise ValueError(
                    f"{name}: {data.nbytes} bytes of quantization state, expected at most {MAX_BLOB_BYTES}"
                )
            self._blobs[name] = data.tobytes()
            return
        if data.nbytes != p.nbytes:
            raise ValueError(f"{name}: got {data.nbytes} bytes, expected {p.nbytes}")
        self._file.seek(8 + self._reserved + self._begin[name])
        self._file.write(data.data)

    def copy(self, name: str, entry: TensorEntry) -> None:
        """Copy a tensor unchanged from another file, piece by piece, whatever its dtype."""
        p = self._pending.pop(name)
        if entry.nbytes != p.nbytes:
            raise ValueError(f"{name}: got {entry.nbytes} bytes, expected {p.nbytes}")
        self._file.seek(8 + self._reserved + self._begin[name])
        for piece in entry.chunks():
            self._file.write(piece)

    def finish(self) -> int:
        """Write the blobs and the header, flush to the disk, close.

        Returns
        -------
        int
            Bytes of tensor data in the file.

        Raises
        ------
        ValueError
            If an announced tensor was never written.
        """
        if self._pending:
            raise ValueError(
                f"{len(self._pending)} tensors were announced but not written, first {min(self._pending)!r}"
            )
        fixed = sum(p.nbytes for p in self._parts)
        self._file.seek(8 + self._reserved + fixed)
        for p in self._parts:
            if p.blob:
                self._file.write(self._blobs[p.name])
        header = self._header({name: len(blob) for name, blob in self._blobs.items()})
        self._file.flush()
        self._file.seek(0)
        self._file.write(self._reserved.to_bytes(8, "little") + header.ljust(self._reserved, b" "))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return fixed + sum(map(len, self._blobs.values()))

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._file.closed:
            # After a full disk the buffer cannot be flushed either; the file goes away with its directory.
            with contextlib.suppress(OSError):
                self._file.close()
