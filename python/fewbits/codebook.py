"""Code tables: the values that 8-bit and 4-bit codes stand for.

The tables that the kernels use come from ``fewbits._native``, which holds the only copy of them. The ``create_*_map``
functions build the other 256-entry tables that bitsandbytes offers, for use as the ``code`` of ``quantize_blockwise``.
"""

from __future__ import annotations

from statistics import NormalDist

import torch

from fewbits import _native
from fewbits._backend import NATIVE_TYPES

TABLES: dict[str, tuple[float, ...]] = {
    name: tuple(_native.codebook(name)) for name in ("nf4", "fp4", "dynamic", "dynamic_unsigned")
}

# AbnormalFloat for blocks of 64: Yoshida 2023, "NF4 Isn't Information Theoretically Optimal (and that's Good)".
_AF4 = (
    *(-1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0),
    *(0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0),
)

# By name and CUDA ordinal (-1 for the CPU), or the device where it is neither.
_cache: dict[tuple[str, int | torch.device], torch.Tensor] = {}


def shared_table(name: str, device: torch.device) -> torch.Tensor:
    """Return the one tensor of a native table on a device. Nobody may write to it; whoever gives it away clones it."""
    if torch.compiler.is_compiling() or device.type == "meta":
        return torch.tensor(TABLES[name], dtype=torch.float32, device=device)
    place: int | torch.device = device
    if device.type == "cpu":
        place = -1
    elif device.type == "cuda":
        place = torch.cuda.current_device() if device.index is None else device.index
    table = _cache.get((name, place))
    if table is None:
        if type(place) is int and place >= 0 and _is_capturing(device):
            return _build_in_capture(name, place)
        table = _build(TABLES[name], device)
        if type(table) is torch.Tensor:  # a fake tensor must not outlive the mode that made it
            if type(place) is not int:  # "mps" is "mps:0"
                table = _cache.setdefault((name, table.device), table)
            _cache[name, place] = table
            if device.type == "cuda" and device.type in NATIVE_TYPES and name in ("nf4", "fp4"):
                _native.remember_table(table.data_ptr(), ("nf4", "fp4").index(name))  # it is here for good
    return table


def native_table(name: str, ordinal: int) -> torch.Tensor | None:
    """Return `shared_table` of a CUDA ordinal (-1 for the CPU) if it is there, for calls that nobody compiles."""
    return _cache.get((name, ordinal))


def _is_capturing(device: torch.device) -> bool:
    return device.type in NATIVE_TYPES and torch.cuda.is_current_stream_capturing()


def is_shared(table: torch.Tensor) -> bool:
    """Return whether a tensor is one of the shared tables."""
    return any(table is shared for shared in _cache.values())


def is_default_map(code: torch.Tensor) -> bool:
    """Return whether `code` is the shared signed dynamic map, which the kernels know without reading it."""
    return code is _cache.get(("dynamic", code.get_device()))


def share_if_equal(name: str, table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the shared table `name` when `table` holds the same values, else `table`, on `device`.

    Only a table in host memory is compared: reading one from a GPU would make the host wait.
    """
    if type(table) is torch.Tensor and table.device.type == "cpu" and not torch.compiler.is_compiling():
        own = shared_table(name, table.device)
        if table.shape == own.shape and torch.equal(table, own):
            return shared_table(name, device)
    return table.to(device)


def _build(values: tuple[float, ...], device: torch.device | str | None) -> torch.Tensor:
    # Inference tensors cannot be used by autograd later on, and the cache outlives any inference_mode block.
    with torch.inference_mode(False):
        # +0.0 turns the -0.0 of FP4's code 8 into 0.0, as in bitsandbytes' files: a table is written bit for bit.
        return torch.tensor([value + 0.0 for value in values], dtype=torch.float32, device=device)


def _build_in_capture(name: str, ordinal: int) -> torch.Tensor:
    """Return a table made by the GPU itself: nothing can be copied to it while its stream is captured in a graph.

    It belongs to the graph, which makes it anew in every replay, so it is nobody else's.
    """
    device, stream = torch.device("cuda", ordinal), torch._C._cuda_getCurrentRawStream(ordinal)
    scale = torch.ones(1, device=device)
    values = torch.empty(len(TABLES[name]), device=device)
    if name == "dynamic":
        codes = torch.arange(256, dtype=torch.uint8, device=device)
        _native.dequantize_blockwise(
            codes.data_ptr(), 256, 256, 0, scale.data_ptr(), values.data_ptr(), 0, ordinal, stream
        )
    else:
        codes = torch.arange(0x01, 0xF0, 0x22, dtype=torch.uint8, device=device)  # 0x01, 0x23, ... 0xEF
        number = ("nf4", "fp4").index(name)
        _native.dequantize_4bit(
            codes.data_ptr(), 16, 32, number, scale.data_ptr(), values.data_ptr(), 0, ordinal, stream
        )
    return values.add_(0.0)  # -0.0 becomes 0.0, as in `_build`


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> torch.Tensor:
    """Return the 16 values of a 4-bit data type, by code.

    Parameters
    ----------
    typename : str
        ``"nf4"``, ``"fp4"``, ``"int4"`` (sign and magnitude, sevenths) or ``"af4"``.
    device : torch.device or str, optional
        Where to put the table; the current CUDA device by default, or the CPU where there is none.
    blocksize : int
        Only ``"af4"`` depends on it, and is known for 64 only.

    Returns
    -------
    torch.Tensor
        float32, shape (16,), largest magnitude 1. The caller owns it.

    Raises
    ------
    NotImplementedError
        For an unknown type, or ``"af4"`` at another block size.

    Examples
    --------
    >>> get_4bit_type("nf4", device="cpu")[7].item()
    0.0
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if typename in ("nf4", "fp4"):
        return _build(TABLES[typename], device)
    if typename == "int4":
        magnitudes = [step / 7 for step in range(7, -1, -1)]
        return _build((*magnitudes, *(-m for m in reversed(magnitudes))), device)
    if typename == "af4":
        if blocksize != 64:
            raise NotImplementedError(f"blocksize: the type af4 is known for 64 only, got {blocksize}")
        return _build(_AF4[::-1], device)
    raise NotImplementedError(f"typename: expected one of nf4, fp4, int4, af4, got {typename!r}")


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> torch.Tensor:
    """Return the dynamic data type (Dettmers 2015, 8-Bit Approximations for Parallelism in Deep Learning).

    A value is a power of ten and a linear fraction. With `s` = ``total_bits - 1``, exponent ``i`` of
    ``0 .. max_exponent_bits - 1`` splits [0.1, 1] into ``2**(i + s - max_exponent_bits)`` parts (twice that unsigned)
    whose midpoints are scaled by ``10**(i - max_exponent_bits + 1)``; 0 and 1 complete the table.

    Parameters
    ----------
    signed : bool
        Whether the negatives are in the table.
    max_exponent_bits, total_bits : int
        As above. Fewer than 8 bits give a table padded with zeros.

    Returns
    -------
    torch.Tensor
        float32, shape (256,), ascending, on the CPU.

    Raises
    ------
    ValueError
        If one of the two sizes is out of range.

    Examples
    --------
    >>> create_dynamic_map()[127].item(), create_dynamic_map()[255].item()
    (0.0, 1.0)
    """
    if (max_exponent_bits, total_bits) == (7, 8):
        return _build(TABLES["dynamic" if signed else "dynamic_unsigned"], "cpu")
    return _dynamic_map(signed, max_exponent_bits, total_bits)


def _dynamic_map(signed: bool, max_exponent_bits: int, total_bits: int) -> torch.Tensor:
    if not (1 <= max_exponent_bits <= 8 and 2 <= total_bits <= 8):
        raise ValueError(
            f"max_exponent_bits, total_bits: expected 1 to 8 and 2 to 8, got {max_exponent_bits} and {total_bits}"
        )
    fraction_bits = total_bits - 1 - max_exponent_bits
    values = [0.0, 1.0]
    for i in range(max_exponent_bits):
        parts = int(2.0 ** (i + fraction_bits + (not signed)))  # none in a decade too small for its share of the bits
        values += _decade(parts, 10 ** (i - max_exponent_bits + 1), signed)
    if fraction_bits > 0:  # the codes that are left refine the largest decade once more
        values += _decade(2**fraction_bits - 1, 1.0, signed)
    return _table(values)


def _decade(parts: int, scale: float, signed: bool) -> list[float]:
    bounds = torch.linspace(0.1, 1, parts + 1, dtype=torch.float32, device="cpu")
    middles: list[float] = (scale * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
    return [*middles, *(-m for m in middles)] if signed else middles


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> torch.Tensor:
    """Return evenly spaced values on [-1, 1] (or [0, 1]), padded with zeros in the middle to 256 entries.

    Parameters
    ----------
    signed : bool
        Whether the table starts at -1.
    total_bits : int
        ``2**total_bits`` values, one fewer where a signed table must hold an exact zero.
    add_zero : bool
        Whether a signed 8-bit table must hold an exact zero. Shorter tables get it from their padding.

    Returns
    -------
    torch.Tensor
        float32, shape (256,), on the CPU.

    Examples
    --------
    >>> create_linear_map(signed=False)[255].item()
    1.0
    """
    if not 1 <= total_bits <= 8:
        raise ValueError(f"total_bits: expected 1 to 8, got {total_bits}")
    count = 2**total_bits - (signed and (add_zero or total_bits < 8))
    values = torch.linspace(-1.0 if signed else 0.0, 1.0, count, dtype=torch.float32, device="cpu")
    half = count // 2
    return torch.cat([values[:half], values.new_zeros(256 - count), values[half:]])


def create_fp8_map(
    signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8
) -> torch.Tensor:
    """Return the values of a small float format, divided by the largest, padded with zeros to 256 entries.

    With ``b = 2**(exponent_bits - 1)`` and mantissa ``m``, exponent field ``e`` stands for
    ``(1 + m) * 2**(b + 1 - e)``, and field 0 for ``m * 2**-b``. These are bitsandbytes' values: the normal numbers are
    those of an IEEE-like format, its subnormals lie at a quarter of where such a format has them.

    Parameters
    ----------
    signed : bool
        Whether one of the bits is a sign.
    exponent_bits, precision_bits, total_bits : int
        ``exponent_bits + precision_bits + signed`` must be `total_bits`, at most 8.

    Returns
    -------
    torch.Tensor
        float32, shape (256,), ascending, on the CPU.

    Raises
    ------
    ValueError
        If the bits do not add up.

    Examples
    --------
    >>> create_fp8_map()[0].item()
    -1.0
    """
    if (
        exponent_bits < 1
        or precision_bits < 0
        or total_bits > 8
        or exponent_bits + precision_bits + signed != total_bits
    ):
        raise ValueError(
            "total_bits: expected exponent_bits + precision_bits + signed, at most 8, "
            f"got {total_bits} for {exponent_bits} + {precision_bits} + {int(signed)}"
        )
    bias = 2 ** (exponent_bits - 1)
    values: list[float] = []
    for exponent in range(2**exponent_bits):
        for fraction in range(2**precision_bits):
            mantissa = fraction / 2**precision_bits
            value = (1 + mantissa) * 2.0 ** (bias + 1 - exponent) if exponent else mantissa * 2.0**-bias
            values += [value, -value] if signed else [value]
    return _table(values)


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> torch.Tensor:
    """Return a 4-bit normal-float table (Dettmers et al. 2023, QLoRA, §3), padded with zeros to 256 entries.

    The values are the quantiles of N(0, 1) at evenly spaced probabilities between 1/2 and `offset`, mirrored, with an
    exact zero, divided by the largest. The defaults give NF4.

    Parameters
    ----------
    offset : float
        The probability of the outermost quantile, above 1/2 and below 1.
    use_extra_value : bool
        Whether the positive side has 8 values instead of 7.

    Returns
    -------
    torch.Tensor
        float32, shape (256,), ascending, on the CPU.

    Examples
    --------
    >>> create_normal_map().unique().numel()
    16
    """
    if not 0.5 < offset < 1:
        raise ValueError(f"offset: expected a probability between 0.5 and 1, got {offset}")

    def quantiles(count: int) -> list[float]:
        # The probabilities are float32 numbers, as in the paper's table, whose last digits would differ otherwise.
        spaced = torch.linspace(offset, 0.5, count + 1, dtype=torch.float32, device="cpu")[:-1]
        return [NormalDist().inv_cdf(p) for p in spaced.tolist()]

    return _table(quantiles(8 if use_extra_value else 7) + [-q for q in quantiles(7)])


def _table(values: list[float]) -> torch.Tensor:
    """Return values scaled to a largest of 1, padded with zeros to 256 and sorted."""
    padded = torch.tensor([*values, *[0.0] * (256 - len(values))], dtype=torch.float32, device="cpu")
    return (padded / padded.max()).sort().values
