"""FSDP2 on quantized layers: only packed bytes and their scales travel, and what comes out is what one process has."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

import fewbits.optim
from fewbits import _int8_prepared, _prepared
from fewbits.nn import Embedding4bit, Embedding8bit, Linear4bit, Linear8bitLt
from fewbits.nn.shard import shard_of
from ranks import Ranks

try:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
except ImportError:
    pytest.skip("this torch has no fully_shard", allow_module_level=True)

from distributed_model import backward_of_both, build, inputs, same, shard

# ---- forward and backward ------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kept": {"reshard_after_forward": False},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "bf16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "recomputed": {},
}


def equals_one_process(device: torch.device) -> None:
    for way, options in WAYS.items():
        dtype = torch.bfloat16 if way == "bf16" else torch.float32
        model = build(device, dtype)
        whole = copy.deepcopy(model)
        if way == "bf16":
            whole.to(torch.bfloat16)
        shard(model, **options)
        for layer in (*model, *whole):
            layer.recompute = way == "recomputed"
        for t in range(3):
            x, y = inputs(device, t), inputs(device, t, dtype=dtype)
            a, b = model(x), whole(y)
            same(a, b, f"{way}, output {t}")
            a.square().sum().backward()
            b.square().sum().backward()
            same(x.grad.to(dtype), y.grad, f"{way}, gradient of the input")
            for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
                if q.requires_grad:
                    torch.testing.assert_close(
                        p.grad.full_tensor().float().to(device), q.grad.float(), msg=f"{way} {name}"
                    )
                p.grad = q.grad = None


@pytest.mark.parametrize("world", [1, 2, 4])
def test_forward_and_backward(ranks: Ranks, world: int) -> None:
    """On the same batch every rank computes what one process computes, bit for bit."""
    ranks(world, equals_one_process)


def trains(device: torch.device) -> None:
    """Each rank has its part of the batch; losses and adapters are those of the whole batch in one process."""
    model = build(device)
    whole = copy.deepcopy(model)
    shard(model)
    trainable = [[p for p in m.parameters() if p.requires_grad] for m in (model, whole)]
    ours, plain = (fewbits.optim.AdamW32bit(params, lr=1e-2) for params in trainable)
    for t in range(10):
        backward_of_both(model, whole, inputs(device, t, rows=8).detach())
        ours.step()
        plain.step()
        ours.zero_grad()
        plain.zero_grad()
    for p, q in zip(*trainable, strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-3, atol=1e-4)


def test_training(ranks: Ranks) -> None:
    ranks(2, trains)


def random_layers(device: torch.device, seed: int) -> None:
    """Layers of random sizes and storages: sharded, multiplied by, exported."""
    random = np.random.default_rng(seed)
    for _ in range(12):
        n, k = (int(size) for size in random.integers(1, 80, 2))
        storage = [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32][random.integers(5)]
        options = {"compress_statistics": bool(random.integers(2)), "quant_storage": storage}
        what = f"{n} x {k}, {options}"
        torch.manual_seed(0)
        if random.integers(4):
            layer: nn.Module = Linear4bit(k, n, quant_type="nf4", compute_dtype=torch.float32, **options)
        else:
            layer = Linear8bitLt(k, n, has_fp16_weights=False)
        layer = layer.to(device).requires_grad_(False)
        whole, x = copy.deepcopy(layer), torch.randn(3, k, device=device)
        dist.broadcast(x, 0)
        fully_shard(layer)
        same(layer(x), whole(x), what)
        layer.reshard()
        same(layer(x), whole(x), what)
        for name, value in layer.state_dict().items():
            given = value.full_tensor() if hasattr(value, "full_tensor") else value
            same(given, whole.state_dict()[name], f"{what}, {name}")


@pytest.mark.parametrize("world", [2, 4])
def test_random_layers(ranks: Ranks, world: int) -> None:
    ranks(world, random_layers, world)


def tables(device: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([Embedding4bit(30, 12, quant_type="nf4"), Embedding8bit(31, 8)]).to(device)
    whole = copy.deepcopy(model)
    indices = torch.tensor([[0, 29], [17, 3]], device=device)
    for table, other in zip(model, whole, strict=True):
        fully_shard(table)
        same(table(indices), other(indices), type(table).__name__)
        same(table(indices), other(indices), type(table).__name__)


def test_embeddings(ranks: Ranks) -> None:
    ranks(2, tables)


def compiles(device: torch.device) -> None:
    model = build(device)
    whole = copy.deepcopy(model)
    for layer in model:
        layer.compile(backend="aot_eager")
    shard(model)
    for t in range(2):
        x, y = inputs(device, t), inputs(device, t)
        a, b = model(x), whole(y)
        torch.testing.assert_close(a, b)
        a.square().sum().backward()
        b.square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)


def test_compile(ranks: Ranks) -> None:
    ranks(2, compiles)


# ---- what is kept, and what travels --------------------------------------------------------------------------------


def memory(device: torch.device) -> None:
    world = dist.get_world_size()
    layer = Linear4bit(512, 256, bias=False, quant_type="nf4").to(device)
    eight = Linear8bitLt(512, 256, bias=False, has_fp16_weights=False).to(device)
    eight(torch.ones(1, 512, device=device))  # the layer has taken the scales over, and knows the codes
    references = [weakref.ref(layer.weight), weakref.ref(layer.weight.quant_state.absmax), weakref.ref(eight.weight)]
    packed = layer.weight.nbytes + layer.weight.quant_state.absmax.nbytes
    for module in (layer, eight):
        fully_shard(module)
        module(torch.ones(1, 512, device=device))
    gc.collect()
    alive = [reference() is not None for reference in references]
    assert not any(alive), f"whole weights are still there: {alive}"
    layer.reshard()  # a root keeps its weights until the backward pass
    piece = shard_of(layer.weight)
    assert piece is not None
    inputs, _ = piece.fsdp_pre_all_gather(layer.weight.device_mesh)
    travelling = sum(tensor.nbytes for tensor in inputs) * world
    assert packed <= travelling <= 1.03 * packed, f"{travelling} bytes travel, {packed} are packed"
    assert piece.nbytes + piece.recipe.scales.nbytes <= 1.03 * packed / world
    layer.state_dict()  # leaves on the weight what distributed checkpoints look for
    eight.reshard()
    for module, cls in ((layer, Linear4bit), (eight, Linear8bitLt)):
        with pytest.raises(RuntimeError, match="expected a whole weight, got a distributed tensor"):
            cls.forward(module, torch.ones(1, 512, device=device))


def gathers(device: torch.device) -> None:
    """From the second gather on, a weight costs the host next to nothing: no operation, and nothing prepared anew."""
    model = shard(build(device, layers=[("4", {"quant_type": "nf4"}, 128, 64), ("8", {}, 64, 33)]))
    mesh = model[0].base.weight.device_mesh
    x = inputs(device, 0)
    with (
        mock.patch.object(_prepared, "prepare", wraps=_prepared.prepare) as four,
        mock.patch.object(_int8_prepared, "prepare", wraps=_int8_prepared.prepare) as eight,
    ):
        model(x).sum().backward()
        counts = four.call_count, eight.call_count
        assert counts == (1, 1), f"{counts} weights were prepared for one step"
        for _ in range(2):
            model(x).sum().backward()
        assert (four.call_count, eight.call_count) == counts, "weights were prepared again"
    for layer in model:
        piece = shard_of(layer.base.weight)
        assert piece is not None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            piece.fsdp_pre_all_gather(mesh)
        launched = [event.name for event in profile.events() if event.name.startswith("aten::")]
        assert not launched, launched


def test_a_gathered_weight_costs_little(ranks: Ranks) -> None:
    ranks(2, gathers)


def test_each_rank_keeps_its_part(ranks: Ranks) -> None:
    ranks(2, memory)


def casts(device: torch.device) -> None:
    model = build(device)
    before = {name: t.full_tensor() for name, t in shard(model).state_dict().items() if hasattr(t, "full_tensor")}
    model.to(torch.bfloat16)
    after = model.state_dict()
    for name, value in before.items():
        if "base" in name and not name.endswith("bias"):
            same(after[name].full_tensor(), value, name)
        else:
            assert after[name].dtype == torch.bfloat16, name


def test_no_cast_reaches_the_codes(ranks: Ranks) -> None:
    ranks(2, casts)


# ---- state dicts ---------------------------------------------------------------------------------------------------


def exported(device: torch.device) -> None:
    model = build(device)
    expected = copy.deepcopy(model).state_dict()
    shard(model)
    model(inputs(device, 0))
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert list(full) == list(expected)
    for name, value in expected.items():
        same(full[name], value, name)
    for value in model.state_dict().values():
        assert type(value) is torch.Tensor or shard_of(value) is None  # plain shards, which others can pickle


def loaded(device: torch.device) -> None:
    """A full state dict of other values goes into a sharded model, on every rank or from the first."""
    source = build(device)
    for layer in source:
        for p in layer.parameters():
            if p.requires_grad:
                nn.init.normal_(p)
        values = torch.randn(layer.base.out_features, layer.base.in_features)
        layer.base.load_state_dict({"weight": values}, strict=False)
    full = source.state_dict()
    expected = source(inputs(device, 0))
    everywhere, first = StateDictOptions(full_state_dict=True), dist.get_rank() == 0
    from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    to_the_cpu = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
    for way in ("full", "sharded", "broadcast", "broadcast by the CPU", "after a step"):
        model = shard(build(device))
        if way == "full":
            set_model_state_dict(model, copy.deepcopy(full), options=everywhere)
        elif way == "sharded":
            again = shard(build(device))
            set_model_state_dict(again, copy.deepcopy(full), options=everywhere)
            model.load_state_dict(again.state_dict())
        elif way == "broadcast":
            set_model_state_dict(model, copy.deepcopy(full) if first else {}, options=from_first)
        elif way == "broadcast by the CPU":
            set_model_state_dict(model, copy.deepcopy(full) if first else {}, options=to_the_cpu)
            # Adapters alone, beside what is left of frozen weights when distributed checkpoints have dropped them.
            rest = {key: value for key, value in full.items() if not key.endswith("base.weight")}
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True, strict=False)
            set_model_state_dict(model, rest if first else {}, options=options)
        else:
            model(inputs(device, 0))
            set_model_state_dict(model, copy.deepcopy(full), options=everywhere)
        same(model(inputs(device, 0)), expected, way)
    # Values are quantized on the way, as one process does it.
    layer, other = model[0].base, source[0].base
    values = {"weight": torch.rand(layer.out_features, layer.in_features)}
    for module in (layer, other):
        module.load_state_dict(values, strict=False)
    same(model(inputs(device, 0)), source(inputs(device, 0)), "values")
    wrong = Linear4bit(128, 64, quant_type="nf4", compress_statistics=False).to(device).state_dict()
    with pytest.raises(RuntimeError, match="nested: expected True"):
        model[0].base.load_state_dict(wrong)


def test_full_state_dict(ranks: Ranks) -> None:
    ranks(2, exported)


def test_loading(ranks: Ranks) -> None:
    ranks(2, loaded)
