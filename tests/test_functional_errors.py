"""How the functions refuse wrong arguments: named, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fewbits.functional as F
from arrays import sample
from fewbits.functional import QuantState

N = 300


def good() -> dict[str, Any]:
    x = sample()
    codes, state = F.quantize_4bit(x)
    _, nested = F.quantize_4bit(x, compress_statistics=True)
    codes8, state8 = F.quantize_blockwise(x)
    return {"x": x, "codes": codes, "state": state, "nested": nested, "codes8": codes8, "state8": state8}


def broken(state: QuantState, **changes: Any) -> QuantState:
    duplicate = QuantState(
        state.absmax,
        state.shape,
        state.code,
        state.blocksize,
        state.quant_type,
        state.dtype,
        state.offset,
        state.state2,
    )
    for name, value in changes.items():
        setattr(duplicate, name, value)
    return duplicate


E4, E8 = F.quantize_4bit, F.quantize_blockwise
D4, D8 = F.dequantize_4bit, F.dequantize_blockwise
WRONG: list[tuple[str, type[Exception], str, Callable[[dict[str, Any]], object]]] = [
    ("A list", TypeError, "A", lambda g: E4([1.0])),
    ("A int", ValueError, "A.*int64", lambda g: E4(torch.ones(4, dtype=torch.int64))),
    ("A double", ValueError, "A.*float64", lambda g: E4(torch.ones(4).double())),
    ("A complex", ValueError, "A.*complex", lambda g: E8(torch.ones(4, dtype=torch.complex64))),
    ("A sparse", ValueError, "A.*sparse", lambda g: E4(torch.ones(4).to_sparse())),
    ("blocksize 48", ValueError, "blocksize.*48", lambda g: E4(g["x"], blocksize=48)),
    ("blocksize 16", ValueError, "blocksize.*16", lambda g: E4(g["x"], blocksize=16)),
    ("blocksize 131072", ValueError, "blocksize.*131072", lambda g: E8(g["x"], blocksize=131072)),
    ("blocksize 0", ValueError, "blocksize.*0", lambda g: E8(g["x"], blocksize=0)),
    ("blocksize -64", ValueError, "blocksize.*-64", lambda g: E4(g["x"], blocksize=-64)),
    ("blocksize 64.0", ValueError, "blocksize.*64.0", lambda g: E4(g["x"], blocksize=64.0)),
    ("blocksize list", ValueError, "blocksize", lambda g: E4(g["x"], blocksize=[64])),
    ("blocksize 2**64", ValueError, "blocksize", lambda g: E4(g["x"], blocksize=2**64)),
    ("quant_type", ValueError, "quant_type.*nf5", lambda g: E4(g["x"], quant_type="nf5")),
    ("quant_type list", ValueError, "quant_type", lambda g: E4(g["x"], quant_type=["nf4"])),
    ("quant_type case", ValueError, "quant_type.*NF4", lambda g: E4(g["x"], quant_type="NF4")),
    ("quant_storage", TypeError, "quant_storage", lambda g: E4(g["x"], quant_storage="uint8")),
    ("out dtype", ValueError, "out.*uint8.*float16", lambda g: E4(g["x"], out=torch.zeros(150, dtype=torch.float16))),
    ("out size", ValueError, "out.*150.*149", lambda g: E4(g["x"], out=torch.zeros(149, dtype=torch.uint8))),
    (
        "out nested size",
        ValueError,
        "out.*150",
        lambda g: E4(g["x"], None, torch.zeros(1, dtype=torch.uint8), None, True),
    ),
    (
        "out overlap",
        ValueError,
        "out.*distinct",
        lambda g: E4(g["x"], out=torch.zeros(1, dtype=torch.uint8).expand(150)),
    ),
    ("out list", TypeError, "out", lambda g: E4(g["x"], out=[0] * 150)),
    ("out device", ValueError, "out.*meta.*A.*cpu|out.*A", lambda g: E4(g["x"], out=torch.zeros(150, device="meta"))),
    ("absmax size", ValueError, "absmax.*5.*4", lambda g: E4(g["x"], absmax=torch.zeros(4))),
    ("absmax dtype", ValueError, "absmax.*float64", lambda g: E4(g["x"], absmax=torch.zeros(5).double())),
    ("8-bit out size", ValueError, "out.*300.*150", lambda g: E8(g["x"], out=torch.zeros(150, dtype=torch.uint8))),
    ("8-bit absmax", ValueError, "absmax.*1.*5", lambda g: E8(g["x"], absmax=torch.zeros(5))),
    ("code size", ValueError, "code.*256.*16", lambda g: E8(g["x"], code=torch.zeros(16))),
    ("code dtype", ValueError, "code.*int", lambda g: E8(g["x"], code=torch.arange(256))),
    ("code list", TypeError, "code", lambda g: E8(g["x"], code=[0.0] * 256)),
    ("no state", ValueError, "absmax", lambda g: D4(g["codes"])),
    ("no out", ValueError, "out", lambda g: D4(g["codes"], absmax=g["state"].absmax)),
    ("no 8-bit state", ValueError, "absmax", lambda g: D8(g["codes8"])),
    ("state type", TypeError, "quant_state", lambda g: D4(g["codes"], g["codes"])),
    ("8-bit state type", TypeError, "quant_state", lambda g: D8(g["codes8"], {})),
    ("8-bit state for 4 bits", ValueError, "quant_state", lambda g: D4(g["codes8"], g["state8"])),
    ("4-bit state for 8 bits", ValueError, "code.*256", lambda g: D8(g["codes"], g["state"])),
    ("codes list", TypeError, "A", lambda g: D4([0], g["state"])),
    ("codes short", ValueError, "A.*150.*149", lambda g: D4(g["codes"][1:], g["state"])),
    ("codes cast", ValueError, "A.*75.*150", lambda g: D4(g["codes"].half(), g["state"])),
    ("codes short nested", ValueError, "A.*150.*149", lambda g: D4(g["codes"][1:], g["nested"])),
    ("8-bit codes dtype", ValueError, "A.*uint8.*int8", lambda g: D8(g["codes8"].to(torch.int8), g["state8"])),
    ("state absmax", ValueError, "absmax.*5.*4", lambda g: D4(g["codes"], broken(g["state"], absmax=torch.ones(4)))),
    (
        "state absmax dtype",
        ValueError,
        "absmax",
        lambda g: D4(g["codes"], broken(g["state"], absmax=torch.ones(5).int())),
    ),
    ("state absmax None", TypeError, "absmax", lambda g: D4(g["codes"], broken(g["state"], absmax=None))),
    ("state blocksize", ValueError, "blocksize.*48", lambda g: D4(g["codes"], broken(g["state"], blocksize=48))),
    ("state quant_type", ValueError, "quant_type", lambda g: D4(g["codes"], broken(g["state"], quant_type="int4"))),
    ("state dtype", ValueError, "dtype.*float64", lambda g: D4(g["codes"], broken(g["state"], dtype=torch.float64))),
    ("state dtype None", ValueError, "dtype", lambda g: D4(g["codes"], broken(g["state"], dtype=None))),
    ("state shape None", ValueError, "shape", lambda g: D4(g["codes"], broken(g["state"], shape=None))),
    (
        "nested absmax dtype",
        ValueError,
        "absmax.*uint8",
        lambda g: D4(g["codes"], broken(g["nested"], absmax=torch.ones(5))),
    ),
    ("nested without state2", ValueError, "state2", lambda g: D4(g["codes"], broken(g["nested"], state2=None))),
    ("nested without offset", ValueError, "offset", lambda g: D4(g["codes"], broken(g["nested"], offset=None))),
    ("nested offset size", ValueError, "offset", lambda g: D4(g["codes"], broken(g["nested"], offset=torch.ones(2)))),
    (
        "nested absmax size",
        ValueError,
        "nested_absmax.*1.*2",
        lambda g: D4(g["codes"], broken(g["nested"], state2=broken(g["nested"].state2, absmax=torch.ones(2)))),
    ),
    (
        "nested code",
        ValueError,
        "nested_code.*256",
        lambda g: D4(g["codes"], broken(g["nested"], state2=broken(g["nested"].state2, code=torch.ones(16)))),
    ),
    (
        "nested blocksize",
        ValueError,
        "nested_blocksize",
        lambda g: D4(g["codes"], broken(g["nested"], state2=broken(g["nested"].state2, blocksize=100))),
    ),
    (
        "values dtype",
        ValueError,
        "out.*float32.*float16",
        lambda g: D4(g["codes"], g["state"], out=torch.zeros(N).half()),
    ),
    ("values shape", ValueError, "out.*shape", lambda g: D4(g["codes"], g["state"], out=torch.zeros(2, N // 2))),
    ("values overlap", ValueError, "out.*distinct", lambda g: D4(g["codes"], g["state"], out=torch.zeros(1).expand(N))),
    ("values list", TypeError, "out.*list", lambda g: D4(g["codes"], g["state"], out=[0.0] * N)),
    ("values list nested", TypeError, "out.*list", lambda g: D4(g["codes"], g["nested"], out=[0.0] * N)),
    ("8-bit absmax list", TypeError, "absmax.*list", lambda g: D8(g["codes8"], absmax=[1.0])),
    ("state shape int", ValueError, "shape.*300", lambda g: D4(g["codes"], broken(g["state"], shape=300))),
    ("state shape str", ValueError, "shape.*'300'", lambda g: D4(g["codes"], broken(g["state"], shape="300"))),
    ("state shape float", ValueError, "shape.*0.5", lambda g: D4(g["codes"], broken(g["state"], shape=(600, 0.5)))),
    ("state shape < 0", ValueError, "shape.*-30", lambda g: D4(g["codes"], broken(g["state"], shape=(-30, -10)))),
    ("8-bit values dtype", ValueError, "out.*int", lambda g: D8(g["codes8"], g["state8"], out=torch.zeros(N).int())),
    ("8-bit values shape", ValueError, "out.*shape", lambda g: D8(g["codes8"], g["state8"], out=torch.zeros(1))),
]


@pytest.mark.parametrize(("error", "match", "call"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_arguments_are_named(
    error: type[Exception], match: str, call: Callable[[dict[str, Any]], object]
) -> None:
    with pytest.raises(error, match=f"^(?:quant_state.)?(?:{match})"):
        call(good())


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
def test_nothing_is_written_before_the_checks(storage: torch.dtype, nested: bool) -> None:
    x = sample()
    out = torch.zeros(150 // storage.itemsize, dtype=storage)
    absmax = torch.zeros(5)
    for arguments in ((absmax, out[1:]), (absmax[1:], out)):
        with pytest.raises(ValueError, match="expected"):
            F.quantize_4bit(x, *arguments, compress_statistics=nested, quant_storage=storage)
        assert not out.any()
        assert not absmax.any()
    out8 = torch.zeros(N, dtype=torch.uint8)
    with pytest.raises(ValueError, match="absmax"):
        F.quantize_blockwise(x, absmax=absmax[1:], out=out8)
    assert not out8.any()


def test_devices_without_kernels() -> None:
    x = torch.empty(64, device="meta")
    state = F.quantize_4bit(torch.ones(64))[1]
    with pytest.raises(ValueError, match=r"A and absmax.*A on meta and absmax on cpu"):
        F.dequantize_4bit(torch.empty(32, 1, dtype=torch.uint8, device="meta"), state)
    with pytest.raises(ValueError, match=r"absmax and A.*absmax on cpu and A on meta"):
        F.quantize_4bit(x, absmax=torch.zeros(1))
    with torch._subclasses.FakeTensorMode():
        codes, state = F.quantize_4bit(torch.empty(64, device="xpu"))
        assert (codes.device.type, state.absmax.device.type, codes.shape) == ("xpu", "xpu", (32, 1))


@pytest.mark.cuda
def test_mixed_devices(cuda: torch.device) -> None:
    codes, state = F.quantize_4bit(sample(), compress_statistics=True)
    with pytest.raises(ValueError, match=r"A and absmax.*cuda.*cpu"):
        F.dequantize_4bit(codes.to(cuda), state)
    with pytest.raises(ValueError, match=r"out and A.*cpu.*cuda"):
        F.quantize_4bit(sample(device=cuda), out=codes)
    state.to(cuda)
    assert state.offset is not None
    state.offset = state.offset.cpu()
    with pytest.raises(ValueError, match=r"A and offset.*cuda.*cpu"):
        F.dequantize_4bit(codes.to(cuda), state)
    # A code is a small table that bitsandbytes moves too.
    assert F.quantize_blockwise(sample(device=cuda), code=F.create_linear_map())[0].device.type == "cuda"
