"""Around the optimizer step: norms, clipping, leaving steps out, trust ratios. The oracle's bits on every device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracle_optim as oracle
from arrays import DTYPES, dtype_name
from fewbits import _native
from optim_cases import PAIRS, VARIANTS, launch_of
from optim_launch import Launch
from oracle_optim import Group

# ---- control -------------------------------------------------------------------------------------------------------


def control_of(
    launch: Launch, partials: torch.Tensor, max_norm: float, grad_scale: float | None, found_inf: float | None,
    skip_nonfinite: bool,
) -> torch.Tensor:  # fmt: skip
    """The native {scale, skip}, checked against the oracle's."""
    __tracebackhide__ = True
    device = launch.device
    scales = torch.tensor([grad_scale or 0.0, found_inf or 0.0], dtype=torch.float32, device=device)
    control = torch.full((3,), 77.0, dtype=torch.float32, device=device)
    addresses = [scales.data_ptr() if grad_scale is not None else 0]
    addresses += [scales.data_ptr() + 4 if found_inf is not None else 0]
    target = (-1, 1) if device.type == "cpu" else (control.device.index, torch.cuda.current_stream().cuda_stream)
    _native.optim_control(
        partials.data_ptr(), partials.numel(), max_norm, *addresses, skip_nonfinite, control.data_ptr(), *target
    )
    scale, skip = oracle.control(
        partials.cpu().numpy(),
        max_norm,
        None if grad_scale is None else np.float32(grad_scale),
        None if found_inf is None else np.float32(found_inf),
        skip_nonfinite,
    )
    bits = control.view(torch.int32).tolist()
    got = np.array(bits[:1], dtype=np.int32).view(np.float32)[0]
    assert got == scale or (np.isnan(got) and np.isnan(scale))
    assert bits[1] == skip
    assert control[2].item() == 77
    return control


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("recipes", [["normal", "wide"], ["huge"], ["subnormal"], ["nan"], ["infinite"]], ids=str)
@pytest.mark.parametrize("arguments", [(0.0, None, None, False), (0.5, None, None, True), (1e30, 1024.0, 0.0, True),
                                       (2.0, 65536.0, 1.0, False)], ids=str)  # fmt: skip
def test_control_and_clipping(
    dtype: torch.dtype, recipes: list[str], arguments: tuple[float, float | None, float | None, bool],
    device: torch.device,
) -> None:  # fmt: skip
    launch = launch_of("adam", Group(), 8, (torch.float32, dtype), recipes, 3, device)
    partials = launch.norms(0)
    expected = np.concatenate([oracle.tile_sums(oracle.widen(piece.g)) for piece in launch.pieces])
    np.testing.assert_array_equal(partials[:, 0], expected)
    control = control_of(launch, launch.partials[:-1], *arguments)
    bits = control[:2].view(torch.int32).tolist()
    if not bits[1]:
        launch.expect(np.float32(control[0].item()))
    launch.step(control)
    launch.check()


@pytest.mark.parametrize("count", [0, 1, 1023, 1025, 5000])
def test_control_sums_in_one_order(count: int, device: torch.device) -> None:
    partials = torch.from_numpy(10.0 ** np.random.default_rng(count).uniform(-9, 9, count)).to(device)
    launch = launch_of("sgd", Group(beta1=0.0), 32, (torch.float32, torch.float32), ["zeros"], 0, device)
    control_of(launch, partials, 1.0, 3.0, None, True)


# ---- trust ratios --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: "-".join(map(dtype_name, p)))
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(("family", "variant"), [("lamb", 0), ("lamb", 1), ("lamb", 2), ("lars", 0), ("lars", 1)])
def test_trust_ratio(
    family: str, variant: int, bits: int, pair: tuple[torch.dtype, torch.dtype], device: torch.device
) -> None:
    group = VARIANTS[family][variant]
    launch = launch_of(family, group, bits, pair, ["normal", "wide"], variant, device, zero=False, t=2)
    launch.pieces[3].memory["p"].view.zero_()
    launch.pieces[3].p[:] = 0
    control = torch.tensor([0.25, 0.0], device=device)
    for _ in range(2):
        partials, tile = launch.norms(1, control), 0
        for piece in launch.pieces:
            expected = oracle.trust_sums(
                family, launch.groups[piece.group], piece.t + 1, piece.p, piece.g, piece.states, np.float32(0.25)
            )
            got = partials[tile : tile + expected[0].size]
            np.testing.assert_array_equal(got, np.stack(expected, axis=1))
            piece.ratio = oracle.trust_ratio(family, launch.groups[piece.group], *expected)
            tile += expected[0].size
        np.testing.assert_array_equal(launch.trust(), [piece.ratio for piece in launch.pieces])
        launch.expect(np.float32(0.25))
        launch.step(control)
        launch.check()
