"""Code tables: the published values, the formulas, and bitsandbytes' results where it is installed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
import torch

import fewbits.functional as F
import oracle
from arrays import assert_same_bits
from fewbits import _native, codebook
from oracle import FP4, NF4


def sha1(table: torch.Tensor) -> str:
    return hashlib.sha1(table.numpy().tobytes()).hexdigest()


def test_dynamic_maps_are_the_published_ones() -> None:
    assert sha1(F.create_dynamic_map()) == "cb07ba0d1557267d68103e0f7bc95af7a44d75f8"
    assert sha1(F.create_dynamic_map(signed=False)) == "455646eccb91aa9c9e76eec41f55b43022a651ce"


@pytest.mark.parametrize("signed", [True, False])
def test_formula_gives_the_native_table(signed: bool) -> None:
    assert_same_bits(codebook._dynamic_map(signed, 7, 8), F.create_dynamic_map(signed), "dynamic map")
    assert_same_bits(F.create_dynamic_map(signed), oracle.dynamic_map(signed), "dynamic map")


@pytest.mark.parametrize(("name", "table"), [("nf4", NF4), ("fp4", FP4)])
def test_4bit_tables(name: str, table: np.ndarray, device: torch.device) -> None:
    got = F.get_4bit_type(name, device=device)
    assert got.device.type == device.type
    assert_same_bits(got, table + np.float32(0), name)  # files have +0.0 for FP4's code 8


def test_normal_map_is_nf4() -> None:
    assert_same_bits(F.create_normal_map().unique(), NF4, "NF4")


def test_int4_is_sign_and_magnitude() -> None:
    table = F.get_4bit_type("int4", device="cpu")
    assert table.dtype == torch.float32
    torch.testing.assert_close(table[:8], torch.arange(7, -1, -1) / 7)
    assert torch.equal(table[8:], -table[:8].flip(0))


def test_af4() -> None:
    table = F.get_4bit_type("af4", device="cpu")
    assert (table.shape, table[0].item(), table[8].item(), table[15].item()) == ((16,), 1.0, 0.0, -1.0)
    assert bool((table.diff() < 0).all())
    with pytest.raises(NotImplementedError, match=r"blocksize.*128"):
        F.get_4bit_type("af4", device="cpu", blocksize=128)


def test_unknown_type() -> None:
    with pytest.raises(NotImplementedError, match=r"typename.*'nf5'"):
        F.get_4bit_type("nf5", device="cpu")


def test_default_device_exists() -> None:
    assert F.get_4bit_type("nf4").device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: F.create_dynamic_map(max_exponent_bits=0), "max_exponent_bits"),
        (lambda: F.create_dynamic_map(total_bits=9), "total_bits"),
        (lambda: F.create_linear_map(total_bits=0), "total_bits"),
        (lambda: F.create_linear_map(total_bits=9), "total_bits"),
        (lambda: F.create_fp8_map(signed=False), "total_bits"),
        (lambda: F.create_fp8_map(exponent_bits=8, precision_bits=2, total_bits=11), "total_bits"),
        (lambda: F.create_normal_map(offset=0.5), "offset"),
        (lambda: F.create_normal_map(offset=1.0), "offset"),
    ],
)
def test_impossible_tables_are_refused(make: Callable[[], torch.Tensor], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        make()


def test_tables_given_away_are_private() -> None:
    """Writing into a table that was handed out changes nobody else's."""
    x = torch.linspace(-1, 1, 256)
    expected = F.quantize_blockwise(x)[0].clone()
    for table in (F.create_dynamic_map(), F.get_4bit_type("nf4", device="cpu")):
        table.zero_()
    state = F.quantize_4bit(x, compress_statistics=True)[1]
    for value in state.as_dict().values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    assert torch.equal(F.quantize_blockwise(x)[0], expected)
    assert F.get_4bit_type("nf4", device="cpu")[15] == 1
    assert F.quantize_4bit(x)[1].code is not None
    assert_same_bits(F.quantize_4bit(x, quant_type="nf4")[1].code, NF4, "shared table")


def test_shared_tables_survive_inference_mode_and_default_devices() -> None:
    codebook._cache.clear()
    with torch.inference_mode(), torch.device("meta"):
        F.quantize_4bit(torch.ones(64, device="cpu"), quant_type="nf4")
    table = codebook.shared_table("nf4", torch.device("cpu"))
    assert not table.is_inference()
    assert_same_bits(table, NF4, "shared table")
    with torch._subclasses.FakeTensorMode():
        F.quantize_4bit(torch.ones(64), quant_type="fp4")
    assert type(codebook.shared_table("fp4", torch.device("cpu"))) is torch.Tensor


def test_unknown_native_table() -> None:
    with pytest.raises(ValueError, match="nf5"):
        _native.codebook("nf5")


# ---- against bitsandbytes, where it is installed --------------------------------------------------------------------


def arguments() -> list[tuple[str, dict[str, object]]]:
    bits = range(2, 9)
    found: list[tuple[str, dict[str, object]]] = []
    for signed in (True, False):
        found += [
            ("create_dynamic_map", {"signed": signed, "max_exponent_bits": e, "total_bits": b})
            for e in range(1, 8)
            for b in bits
        ]
        found += [
            ("create_linear_map", {"signed": signed, "total_bits": b, "add_zero": zero})
            for b in range(1, 9)
            for zero in (True, False)
        ]
        found += [
            (
                "create_fp8_map",
                {"signed": signed, "exponent_bits": e, "precision_bits": p, "total_bits": e + p + signed},
            )
            for e in range(1, 8)
            for p in range(9 - e - signed)
        ]
    found += [
        ("create_normal_map", {"offset": o, "use_extra_value": x}) for o in (0.6, 0.9677083) for x in (True, False)
    ]
    found += [("get_4bit_type", {"typename": name, "device": "cpu"}) for name in ("nf4", "fp4", "af4")]
    return found


def test_bitsandbytes_has_the_same_tables() -> None:
    peer = pytest.importorskip("bitsandbytes.functional")
    compared = 0
    for name, kwargs in arguments():
        try:
            expected = getattr(peer, name)(**kwargs)
        except (AssertionError, ImportError, ValueError):
            continue  # its own checks refuse some tables that exist
        torch.testing.assert_close(getattr(F, name)(**kwargs), expected, rtol=0, atol=1e-7, msg=f"{name}({kwargs})")
        compared += 1
    assert compared > 100
