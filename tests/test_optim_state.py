"""State dicts: bitsandbytes' files are read and ours are theirs, and training goes on bit for bit."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import fewbits.optim
from arrays import assert_same_bits
from golden.inputs import OPTIMIZER_SHAPES, OPTIMIZER_STEPS, OPTIMIZERS, gradient, ordinary
from optimizers import ALL, give_gradients, make, parameters

GOLDEN = Path(__file__).parent / "golden"
QUANT_STATE = "__bnb_optimizer_quant_state__"
SHAPES = [(64, 81), (33,), (5000,)]

pytestmark = pytest.mark.filterwarnings("ignore:.*nothing is paged")


def run(optimizer: torch.optim.Optimizer, params: list[Any], steps: range) -> None:
    for t in steps:
        give_gradients(params, t)
        optimizer.step()


def through_file(state_dict: dict[str, Any], device: torch.device | str = "cpu") -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, map_location=device, weights_only=True)


# ---- bitsandbytes' files -------------------------------------------------------------------------------------------


def golden(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The state dict that bitsandbytes wrote, and the parameters before and after its next step."""
    with safe_open(GOLDEN / f"optimizer-{name}.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state: dict[int, Any] = {
        int(i): {"step": step, QUANT_STATE: {}} for i, step in json.loads(metadata["steps"]).items()
    }
    for key, tensor in tensors.items():
        if key.startswith("state/"):
            _, i, name = key.split("/")
            state[int(i)][QUANT_STATE][name] = tensor
    return {"state": state, "param_groups": json.loads(metadata["param_groups"])}, tensors


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bitsandbytes_checkpoint_goes_on(name: str, nested: bool, device: torch.device) -> None:
    saved, tensors = golden(name)
    if not nested:  # before 0.49
        saved["state"] = {i: {"step": s["step"], **s[QUANT_STATE]} for i, s in saved["state"].items()}
    params = [torch.nn.Parameter(tensors[f"before/{i}"].clone().to(device)) for i in range(len(OPTIMIZER_SHAPES))]
    optimizer = make(name, params, **OPTIMIZERS[name])
    optimizer.load_state_dict(through_file(saved))
    for i, p in enumerate(params):
        p.grad = gradient(OPTIMIZER_SHAPES[i], OPTIMIZER_STEPS).to(device)
        assert optimizer.state[p]["state1"].device == p.device
    optimizer.step()
    for i, p in enumerate(params):
        after, before = tensors[f"after/{i}"].to(device), tensors[f"before/{i}"].to(device)
        if name.startswith(("LAMB", "LARS")):  # its norms clip, ours are ratios
            assert (p != before).any()
            continue
        # The same step from the same state; the arithmetic is in another order.
        torch.testing.assert_close(p.detach() - before, after - before, rtol=2e-3, atol=3e-7)
    assert optimizer.state_dict()["state"][0]["step"] == OPTIMIZER_STEPS + 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_that_of_the_file(name: str, device: torch.device) -> None:
    saved, tensors = golden(name)
    params = [torch.nn.Parameter(tensors[f"before/{i}"].clone().to(device)) for i in range(len(OPTIMIZER_SHAPES))]
    optimizer = make(name, params, **OPTIMIZERS[name])
    optimizer.load_state_dict(copy.deepcopy(saved))
    written = optimizer.state_dict()
    assert list(written["state"]) == list(saved["state"])
    for i, state in saved["state"].items():
        mine = written["state"][i]
        assert type(mine["step"]) is int
        assert set(mine) == set(state)
        assert set(mine[QUANT_STATE]) == set(state[QUANT_STATE])
        for key, tensor in state[QUANT_STATE].items():
            assert mine[QUANT_STATE][key].shape == tensor.shape
            if key != "unorm_vec":
                assert_same_bits(mine[QUANT_STATE][key], tensor, f"{key} of {i}")
    for group, old in zip(written["param_groups"], saved["param_groups"], strict=True):
        assert {key: group[key] for key in old if key != "betas"} == {k: v for k, v in old.items() if k != "betas"}
        assert tuple(group["betas"]) == tuple(old["betas"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_layout_is_that_of_bitsandbytes(name: str) -> None:
    """A fresh optimizer writes the keys, shapes and dtypes that bitsandbytes writes."""
    saved, _ = golden(name)
    params = [torch.nn.Parameter(ordinary(shape, torch.float32)) for shape in OPTIMIZER_SHAPES]
    optimizer = make(name, params, **OPTIMIZERS[name])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for i, state in optimizer.state_dict()["state"].items():
        expected = saved["state"][i][QUANT_STATE]
        found = {key: (tensor.shape, tensor.dtype) for key, tensor in state[QUANT_STATE].items()}
        assert found == {key: (tensor.shape, tensor.dtype) for key, tensor in expected.items()}
        for key in ("qmap1", "qmap2"):
            if key in expected:
                assert_same_bits(state[QUANT_STATE][key], expected[key], key)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bitsandbytes_goes_on_with_ours(name: str) -> None:
    peer = pytest.importorskip("bitsandbytes")
    params = [torch.nn.Parameter(ordinary(shape, torch.float32)) for shape in OPTIMIZER_SHAPES]
    ours = make(name, params, **OPTIMIZERS[name])
    for t in range(OPTIMIZER_STEPS):
        for p, shape in zip(params, OPTIMIZER_SHAPES, strict=True):
            p.grad = gradient(shape, t)
        ours.step()
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    theirs = getattr(peer.optim, name)(others, **OPTIMIZERS[name])
    theirs.load_state_dict(through_file(ours.state_dict()))
    before = [p.detach().clone() for p in params]
    for p, q, shape in zip(params, others, OPTIMIZER_SHAPES, strict=True):
        p.grad = gradient(shape, OPTIMIZER_STEPS)
        q.grad = p.grad.clone()
    ours.step()
    theirs.step()
    for p, q, start in zip(params, others, before, strict=True):
        if not name.startswith(("LAMB", "LARS")):
            torch.testing.assert_close(p.detach() - start, q.detach() - start, rtol=2e-3, atol=3e-7)
    assert theirs.state[others[0]]["step"] == OPTIMIZER_STEPS + 1


# ---- ours ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ALL)
def test_resume_bit_for_bit(name: str, dtype: torch.dtype, device: torch.device) -> None:
    kwargs = {"stochastic_rounding": True, "seed": 5, "max_grad_norm": 1.0}
    params = parameters(SHAPES, device, dtype)
    optimizer = make(name, params, **kwargs)
    run(optimizer, params, range(3))
    saved = through_file(optimizer.state_dict())
    middle = [p.detach().clone() for p in params]
    run(optimizer, params, range(3, 6))
    again = [torch.nn.Parameter(p) for p in middle]
    resumed = make(name, again, **kwargs)
    resumed.load_state_dict(saved)
    run(resumed, again, range(3, 6))
    for i, (p, q) in enumerate(zip(params, again, strict=True)):
        assert_same_bits(q, p, f"parameter {i}")
    first, second = optimizer.state_dict()["state"], resumed.state_dict()["state"]
    for i, state in first.items():
        assert second[i]["step"] == state["step"] == 6
        for key, tensor in state[QUANT_STATE].items():
            assert_same_bits(second[i][QUANT_STATE][key], tensor, f"{key} of {i}")


def test_loading_copies(device: torch.device) -> None:
    params = parameters(SHAPES, device)
    optimizer = fewbits.optim.AdamW8bit(params)
    run(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    run(optimizer, params, range(2))
    for i, state in kept["state"].items():
        assert saved["state"][i]["step"] == state["step"] == 2
        for key, tensor in state[QUANT_STATE].items():
            assert torch.equal(saved["state"][i][QUANT_STATE][key], tensor)
    assert optimizer.state_dict()["state"][0]["step"] == 4


def test_old_groups_keep_what_they_lack(device: torch.device) -> None:
    params = parameters(SHAPES, device)
    optimizer = fewbits.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True)
    run(optimizer, params, range(1))
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["nesterov"], group["dampening"]
        group["lr"] = 0.5
    other = fewbits.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True)
    other.load_state_dict(saved)
    (group,) = other.param_groups
    assert group["nesterov"] is True
    assert group["dampening"] == 0
    assert group["lr"] == 0.5
    run(other, params, range(1))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedLion8bit", "LAMB", "SGD8bit"])
def test_copies_are_whole(name: str, way: str, device: torch.device) -> None:
    params = parameters(SHAPES, device)
    optimizer = make(name, params, seed=3, max_grad_norm=2.0)
    run(optimizer, params, range(2))
    twin = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    theirs = twin.param_groups[0]["params"]
    assert all(p is not q and torch.equal(p, q) for p, q in zip(params, theirs, strict=True))
    assert vars(twin.args) == vars(optimizer.args)
    assert (twin.seed, twin.max_grad_norm, twin.is_paged) == (3, 2.0, optimizer.is_paged)
    run(optimizer, params, range(2, 4))
    run(twin, theirs, range(2, 4))
    for i, (p, q) in enumerate(zip(params, theirs, strict=True)):
        assert_same_bits(q, p, f"parameter {i}")


def test_freed_with_the_optimizer(device: torch.device) -> None:
    params = parameters(SHAPES, device)
    optimizer = fewbits.optim.PagedAdamW8bit(params)
    run(optimizer, params, range(2))
    state = weakref.ref(optimizer.state[params[0]]["state1"])
    gc.collect()
    gc.disable()
    try:
        del optimizer  # no cycle keeps the states until the garbage collector comes
        assert state() is None
    finally:
        gc.enable()


@pytest.mark.cuda
def test_states_follow_a_move(cuda: torch.device) -> None:
    model = torch.nn.Linear(80, 64)
    optimizer = fewbits.optim.AdamW8bit(model.parameters())
    params = list(model.parameters())
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = fewbits.optim.AdamW8bit(twins)
    run(optimizer, params, range(2))
    run(other, twins, range(4))
    model.to(cuda)
    run(optimizer, params, range(2, 4))
    for i, (p, q) in enumerate(zip(params, twins, strict=True)):
        assert_same_bits(p, q, f"parameter {i}")


# ---- what is wrong is said before anything changes -------------------------------------------------------------------


def broken(saved: dict[str, Any], how: str) -> None:
    first = saved["state"][0]
    inner = first[QUANT_STATE]
    match how:
        case "groups":
            saved["param_groups"].append(saved["param_groups"][0])
        case "parameters":
            saved["param_groups"][0]["params"].append(3)
        case "no groups":
            del saved["param_groups"]
        case "shape":
            inner["state1"] = inner["state1"][:-1]
        case "dtype":
            inner["state2"] = inner["state2"].to(torch.int16)
        case "maxima":
            inner["absmax1"] = inner["absmax1"][:-1]
        case "code":
            inner["qmap1"] = torch.linspace(-1, 1, 256)
        case "code shape":
            inner["qmap2"] = inner["qmap2"][:16]
        case "missing":
            del inner["state2"]
        case "step":
            first["step"] = -1
        case "no step":
            del first["step"]
        case "betas":
            saved["param_groups"][0]["betas"] = (0.9, 1.5)
        case "lr":
            saved["param_groups"][0]["lr"] = -1.0
        case "nested":
            first[QUANT_STATE] = 3


MISTAKES = {
    "groups": "groups, got 2",
    "parameters": "3 parameters, got 4",
    "no groups": "param_groups",
    "shape": r"state1.*expected shape \(64, 81\)",
    "dtype": "state2.*expected torch.uint8, got torch.int16",
    "maxima": "absmax1.*expected shape",
    "code": "qmap1.*dynamic map",
    "code shape": "qmap2.*256",
    "missing": "state2",
    "step": "step.*at least 0",
    "no step": "entry 'step'",
    "betas": "betas",
    "lr": "lr: expected",
    "nested": "expected a mapping",
}


@pytest.mark.parametrize("how", MISTAKES)
def test_errors_change_nothing(how: str, device: torch.device) -> None:
    params = parameters(SHAPES, device)
    optimizer = fewbits.optim.AdamW8bit(params)
    run(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    broken(saved, how)
    with pytest.raises(ValueError, match=MISTAKES[how]):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, state in before["state"].items():
        assert after["state"][i]["step"] == state["step"]
        for key, tensor in state[QUANT_STATE].items():
            assert torch.equal(after["state"][i][QUANT_STATE][key], tensor)
    run(optimizer, params, range(2, 3))


def test_hooks_of_torch_run(device: torch.device) -> None:
    params = parameters(SHAPES, device)
    optimizer = fewbits.optim.Adam8bit(params)
    called = []
    optimizer.register_state_dict_pre_hook(lambda _: called.append("save"))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: called.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda _: called.append("loaded"))
    optimizer.register_step_post_hook(lambda *_: called.append("step"))
    run(optimizer, params, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert called == ["step", "save", "load", "loaded"]


def test_memory_report_is_what_there_is(device: torch.device) -> None:
    params = parameters([(64, 80), (33,)], device, torch.bfloat16)
    optimizer = fewbits.optim.AdamW8bit(params)
    assert optimizer.memory_report()["states"] == 0
    run(optimizer, params, range(1))
    report = optimizer.memory_report()
    keys = ("state1", "state2", "absmax1", "absmax2")
    states = [t.nbytes for s in optimizer.state.values() for key, t in s.items() if key in keys]
    assert report["states"] == sum(states) == report["states_8bit"] + report["states_32bit"]
    assert report["states_8bit"] == 2 * 64 * 80 + 2 * 4 * 20
    assert report["states_32bit"] == 2 * 4 * 33
    assert report["parameters"] == 2 * (64 * 80 + 33)
    assert (report["tensors_8bit"], report["tensors_32bit"]) == (1, 1)
    assert report["on_parameter_devices"] == report["states"]
