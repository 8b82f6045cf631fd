"""What fewbits does otherwise while it stands in for bitsandbytes, and that it does not otherwise."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fewbits
from fewbits.compat import _differences
from fewbits.nn import Embedding4bit, Embedding8bit, Linear4bit, Linear8bitLt
from test_install_as_bitsandbytes import run


@pytest.fixture(params=[False, True], ids=["fewbits", "bitsandbytes"])
def stands_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    stands_in: bool = request.param
    monkeypatch.setattr(_differences, "stands_in_as", "bitsandbytes" if stands_in else None)
    monkeypatch.setattr(_differences, "_warned", set())
    return stands_in


def test_installing_turns_them_on() -> None:
    run(
        """
        import fewbits
        from fewbits.compat import _differences
        assert _differences.stands_in_as is None
        fewbits.install_as_bitsandbytes()
        assert _differences.stands_in_as == "bitsandbytes"
        """
    )


LAYERS: list[Callable[[], Any]] = [
    lambda: Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float16),
    lambda: Linear8bitLt(64, 32, has_fp16_weights=False),
]


@pytest.mark.parametrize("make", LAYERS, ids=["4 bits", "8 bits"])
def test_dtype_of_the_bias(stands_in: bool, make: Callable[[], Any]) -> None:
    layer = make().to("cpu")
    x = torch.randn(2, 64).half()
    first = layer(x)
    assert layer.bias.dtype == (torch.float16 if stands_in else torch.float32)
    assert torch.equal(layer(x), first)  # in the product, it is rounded either way
    trained = make().to("cpu")
    trained(torch.randn(2, 64)).sum().backward()
    trained(x)
    assert trained.bias.dtype == torch.float32


def test_warnings(stands_in: bool, caplog: pytest.LogCaptureFixture) -> None:
    name = "bitsandbytes.nn.modules" if stands_in else "fewbits.nn"
    for rows, text in ((1, "in inference."), (3, "in inference or training.")):
        caplog.clear()
        with caplog.at_level(logging.WARNING, name):
            for _ in range(2):
                Linear4bit(64, 64).to("cpu")(torch.ones(rows, 64).half())
        assert [record.name for record in caplog.records] == [name] * (2 if stands_in else 1)
        assert all(text in message for message in caplog.messages)
    caplog.clear()
    with caplog.at_level(logging.WARNING, name):
        for columns in (64, 65):
            Embedding4bit(128, columns).to("cpu")(torch.tensor([1]))
    assert len(caplog.messages) == stands_in


@pytest.mark.parametrize("make", [lambda: Embedding4bit(16, 64), lambda: Embedding8bit(16, 64)])
def test_saving_embeddings(stands_in: bool, make: Callable[[], Any]) -> None:
    table = make()
    if stands_in:
        with pytest.raises(NotImplementedError, match=r"\.to\('cpu'\)"):
            table.state_dict()
    else:
        assert list(table.state_dict()) == ["weight"]
    assert list(make().to("meta").state_dict()) == ["weight"]
    quantized = table.to("cpu")
    assert len(quantized.state_dict()) > 1
    make().to("cpu").load_state_dict(quantized.state_dict())


def test_loading_int8_codes(stands_in: bool) -> None:
    def make() -> Linear8bitLt:
        return Linear8bitLt(64, 32, has_fp16_weights=False)

    saved, fresh = make().to("cpu").state_dict(), make()
    before = fresh.weight.data.clone(), fresh.bias.data.clone()
    if stands_in:
        with pytest.raises(RuntimeError, match="into non-quantized Linear8bitLt is refused"):
            torch.nn.Sequential(fresh).load_state_dict({f"0.{key}": value for key, value in saved.items()})
        assert torch.equal(fresh.weight.data, before[0])
        assert torch.equal(fresh.bias.data, before[1])
    else:
        fresh.load_state_dict(saved)
        assert torch.equal(fresh.weight.data, saved["weight"])
    for other, assign in ((make().to("cpu"), False), (make().to("meta"), False), (make(), True)):
        other.load_state_dict(saved, assign=assign)
        assert torch.equal(other.weight.data, saved["weight"])
    make().load_state_dict(make().state_dict())


def test_trust_factor_of_8_bits(stands_in: bool) -> None:
    params = [torch.nn.Parameter(torch.ones(8))]
    if stands_in:
        with pytest.raises(ValueError, match=r"max_unorm: expected 1\.0 with 8-bit states"):
            fewbits.optim.LAMB8bit(params, max_unorm=0.5)
    else:
        fewbits.optim.LAMB8bit(params, max_unorm=0.5)
    fewbits.optim.LAMB8bit(params)
    fewbits.optim.LAMB(params, max_unorm=0.5)


@pytest.mark.parametrize("bits", [8, 32])
def test_norm_of_the_update(stands_in: bool, bits: int) -> None:
    p = torch.nn.Parameter(torch.randn(64, 128))
    p.grad = torch.randn(64, 128)
    optimizer = fewbits.optim.LARS([p], lr=0.1, momentum=0.9, optim_bits=bits)
    before = p.detach().clone()
    optimizer.step()
    state = optimizer.state[p]
    assert "unorm_vec" not in state
    if stands_in:
        torch.testing.assert_close(0.1 * state["unorm_vec"], (before - p.detach()).norm()[None], rtol=0.01, atol=0)
    else:
        with pytest.raises(KeyError, match="unorm_vec"):
            state["unorm_vec"]
    with pytest.raises(KeyError, match="other"):
        state["other"]


def test_gradient_scalers(stands_in: bool) -> None:
    """A scaler unscales the gradients itself, so that others can clip them, and skips the step by not calling it."""
    p = torch.nn.Parameter(torch.ones(8))
    optimizer = fewbits.optim.AdamW([p], lr=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(p.grad[0].item()))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value in (1.0, float("inf")):
        optimizer.zero_grad()
        scaler.scale((p * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert calls == ([1.0] if stands_in else [4.0, float("inf")])
    assert optimizer.state_dict()["state"][0]["step"] == 1
    assert torch.allclose(p.detach(), torch.tensor(0.899))


def test_bases_called_with_an_older_signature(stands_in: bool) -> None:
    """GaLore's optimizers pass percentile_clipping=100 and block_wise=True where max_unorm and skip_zeros stand now."""
    params = [torch.nn.Parameter(torch.ones(8))]
    for base in (fewbits.optim.Optimizer2State, fewbits.optim.Optimizer1State):
        name = "adam" if base is fewbits.optim.Optimizer2State else "lion"
        older: Any = (name, params, 0.1, (0.9, 0.999), 1e-8, 0.01, 8, None, 4096, 100, True)
        if stands_in:
            args = base(*older).args
            assert (args.max_unorm, args.skip_zeros, args.min_8bit_size) == (0.0, False, 4096)
        else:
            with pytest.raises(ValueError, match="skip_zeros: expected False"):
                base(*older)
        with pytest.raises(ValueError, match="skip_zeros: expected False"):
            base(*older[:-2], 5, True)
