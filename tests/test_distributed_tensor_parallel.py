"""Tensor parallelism of quantized layers: rows and whole blocks cut out of the quantized weight, no value changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from fewbits.functional import dequantize_4bit, quantize_4bit
from fewbits.nn import Embedding4bit, Embedding8bit, Linear4bit, Linear8bitLt
from ranks import Ranks

try:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor import parallel as torch_parallel
    from torch.distributed.tensor.parallel import parallelize_module

    from fewbits.distributed import ColwiseParallel, RowwiseParallel, split_4bit, split_8bit, tensor_parallel
except ImportError:
    pytest.skip("this torch has no distributed tensors", allow_module_level=True)


class Block(nn.Module):
    """Two layers as in a transformer's MLP."""

    def __init__(self, make: Any, hidden: int, wide: int) -> None:
        super().__init__()
        self.up, self.down = make(hidden, wide), make(wide, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


def four(**options: Any) -> Any:
    return lambda k, n: Linear4bit(k, n, compute_dtype=torch.float32, **options)


def eight(k: int, n: int) -> Linear8bitLt:
    return Linear8bitLt(k, n, has_fp16_weights=False, threshold=3.0)


KINDS: dict[str, Any] = {
    "nf4": four(quant_type="nf4"),
    "plain scales": four(quant_type="nf4", compress_statistics=False),
    "fp4 in bfloat16": four(quant_type="fp4", quant_storage=torch.bfloat16),
    "int8": eight,
}
PLAN = {"up": ColwiseParallel, "down": RowwiseParallel}


def build(kind: str, device: torch.device, seed: int = 0) -> Block:
    torch.manual_seed(seed)
    return Block(KINDS[kind], 256, 512).to(device).requires_grad_(False)


def parallel(block: Block) -> Block:
    mesh = init_device_mesh(next(block.parameters()).device.type, (dist.get_world_size(),))
    return parallelize_module(block, mesh, {name: style() for name, style in PLAN.items()})


def near(a: torch.Tensor, b: torch.Tensor, rtol: float, what: str) -> None:
    error, size = (a - b).norm(), b.norm()
    assert error <= rtol * size, f"{what}: {error} beside {size}"


def products(device: torch.device, kind: str) -> None:
    whole = build(kind, device)
    block = parallel(copy.deepcopy(whole))
    # Activations of int8 layers are quantized by each rank for itself.
    rtol = 0.02 if kind == "int8" else 1e-5
    for shape in ((1, 256), (3, 5, 256)):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(device)
        given, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        near(block(x), whole(x), rtol, f"{kind}, {shape}")
        a, b = block(given), whole(other)
        near(a, b, rtol, f"{kind}, {shape}")
        a.square().sum().backward()
        b.square().sum().backward()
        near(given.grad, other.grad, rtol, f"{kind}, gradient")
    assert block.up.weight.nbytes * dist.get_world_size() == whole.up.weight.nbytes
    assert block.down.weight.nbytes * dist.get_world_size() == whole.down.weight.nbytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 4])
def test_products(ranks: Ranks, world: int, kind: str) -> None:
    ranks(world, products, kind)


def layouts(device: torch.device) -> None:
    whole = build("nf4", device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    x = torch.randn(4, 256, device=device)
    dist.broadcast(x, 0)
    mine = x.chunk(2, 0)[dist.get_rank()].clone().requires_grad_()
    plan = {
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(output_layouts=Shard(0), use_local_output=False),
    }
    block = parallelize_module(copy.deepcopy(whole), mesh, plan)
    y = block(mine)
    assert isinstance(y, DTensor)
    assert y.placements == (Shard(0),)
    near(y.full_tensor().detach(), whole(x), 1e-5, "sequence parallel")
    y.to_local().sum().backward()
    other = x.clone().requires_grad_()
    whole(other).sum().backward()
    near(mine.grad, other.grad.chunk(2, 0)[dist.get_rank()], 1e-5, "gradient")
    out = parallelize_module(copy.deepcopy(whole.up), mesh, ColwiseParallel(output_layouts=Replicate()))(x)
    near(out, whole.up(x), 1e-5, "gathered")
    # What is not quantized, torch cuts.
    linear = nn.Linear(256, 64, device=device)
    near(
        parallelize_module(linear, mesh, ColwiseParallel(output_layouts=Replicate()))(x).detach(), linear(x), 1, "torch"
    )


def test_layouts(ranks: Ranks) -> None:
    ranks(2, layouts)


def checkpoints(device: torch.device, kind: str, folder: str) -> None:
    """Pre-quantized checkpoints are cut, not quantized again, and parts are saved as a whole."""
    source = build(kind, device, seed=5)
    given = source.state_dict()
    block = parallel(build(kind, device))
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(3)).to(device)
    block.load_state_dict(given)
    expected = parallel(copy.deepcopy(source))(x)
    assert torch.equal(block(x), expected)
    saved = {
        key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in block.state_dict().items()
    }
    for name in ("up.weight", "down.weight"):
        assert torch.equal(saved[name].reshape(-1).view(torch.uint8), given[name].reshape(-1).view(torch.uint8)), name
    assert torch.equal(saved["up.bias"], given["up.bias"])
    assert torch.equal(saved["down.bias"], given["down.bias"])
    again = build(kind, device)
    again.load_state_dict(saved)
    assert torch.equal(again(x), source(x))
    dcp.save(block.state_dict(), checkpoint_id=folder)
    other = parallel(build(kind, device, seed=6))
    state = other.state_dict()
    dcp.load(state, checkpoint_id=folder)
    other.load_state_dict(state)
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints(ranks: Ranks, kind: str, tmp_path: Any) -> None:
    ranks(2, checkpoints, kind, str(tmp_path))


def refusals(device: torch.device) -> None:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    def refuse(layer: nn.Module, style: Any, match: str) -> None:
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        with pytest.raises(ValueError, match=match):
            parallelize_module(layer, mesh, style)
        for name, value in layer.state_dict().items():
            assert torch.equal(value, before[name]), name

    refuse(Linear4bit(64, 33).to(device), ColwiseParallel(), "out_features: expected a multiple of 2 ranks, got 33")
    refuse(Linear4bit(50, 66).to(device), ColwiseParallel(), "out_features: expected whole blocks of 64")
    refuse(Linear4bit(64, 64).to(device), RowwiseParallel(), "in_features: expected whole blocks of 64")
    refuse(
        Linear8bitLt(33, 4, has_fp16_weights=False).to(device), RowwiseParallel(), "in_features: expected a multiple"
    )
    refuse(
        Embedding4bit(33, 128).to(device), RowwiseParallel(), "num_embeddings: expected a multiple of 2 ranks, got 33"
    )
    refuse(Embedding4bit(32, 64).to(device), ColwiseParallel(), "embedding_dim: expected whole blocks of 64")
    refuse(Linear4bit(128, 64), RowwiseParallel(), "module.weight: expected a quantized weight")
    square = init_device_mesh(device.type, (1, 2), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match="device_mesh: expected one dimension, got 2"):
        ColwiseParallel()._apply(Linear4bit(128, 64).to(device), square)
    # Styles of torch cannot know how codes are packed.
    for layer in (Linear4bit(128, 64), Linear8bitLt(128, 64, has_fp16_weights=False)):
        cut = parallelize_module(layer.to(device).requires_grad_(False), mesh, torch_parallel.ColwiseParallel())
        with pytest.raises(RuntimeError, match=r"use ColwiseParallel and RowwiseParallel of fewbits\.distributed"):
            cut(torch.ones(1, 128, device=device))


def test_what_cannot_be_cut(ranks: Ranks) -> None:
    ranks(2, refusals)


def biases(device: torch.device, kind: str) -> None:
    """A trainable bias has one process's gradient, in sums of every layout, and is saved whole."""
    whole = build(kind, device)
    for layer in (whole.up, whole.down):
        layer.bias.requires_grad_()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    rtol = 0.02 if kind == "int8" else 1e-5
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(3)).to(device)
    whole(x).square().sum().backward()
    for layout, local in ((Replicate(), True), (Shard(0), False)):
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel(output_layouts=layout, use_local_output=local)}
        block = parallelize_module(copy.deepcopy(whole), mesh, plan)
        y = block(x)
        near(y.full_tensor() if isinstance(y, DTensor) else y, whole(x), rtol, f"{layout}")
        y.square().sum().backward()
        near(block.down.bias.grad, whole.down.bias.grad, rtol, f"{layout}, gradient of a bias that is whole")
        mine = whole.up.bias.grad.chunk(mesh.size())[dist.get_rank()]
        near(block.up.bias.grad, mine, rtol, f"{layout}, gradient of a bias that is cut")
        saved = block.state_dict()
        assert torch.equal(saved["down.bias"], whole.down.bias)
        with pytest.raises((RuntimeError, ValueError)):
            block.down(x[:, :3])
        assert block.down.bias is not None, "a product that fails leaves the bias where it was"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_trainable_bias(ranks: Ranks, kind: str) -> None:
    ranks(2, biases, kind)


def tables(device: torch.device) -> None:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for make in (lambda: Embedding4bit(40, 256, quant_type="nf4"), lambda: Embedding8bit(40, 256)):
        torch.manual_seed(0)
        whole = make().to(device)
        indices = torch.tensor([[0, 39, 17], [3, 20, 10]], device=device)
        for style in (RowwiseParallel(input_layouts=Replicate()), ColwiseParallel(output_layouts=Replicate())):
            part = parallelize_module(copy.deepcopy(whole), mesh, style)
            assert part.weight.nbytes * mesh.size() == whole.weight.nbytes
            assert torch.equal(part(indices), whole(indices)), f"{type(whole).__name__}, {type(style).__name__}"
            saved = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in part.state_dict().items()}
            again = make().to(device)
            again.load_state_dict(saved)
            assert torch.equal(again(indices), whole(indices))


@pytest.mark.parametrize("world", [2, 4])
def test_embeddings(ranks: Ranks, world: int) -> None:
    ranks(world, tables)


def by_a_plan(device: torch.device) -> None:
    whole, mesh = build("nf4", device), init_device_mesh(device.type, (dist.get_world_size(),))
    with pytest.raises(ValueError, match=r"plan: expected styles by names of modules, got none"):
        tensor_parallel(copy.deepcopy(whole), mesh)
    with pytest.raises(ValueError, match=r"plan: expected one of colwise, .* for up, got 'packed_colwise'"):
        tensor_parallel(copy.deepcopy(whole), mesh, {"up": "packed_colwise"})
    block = tensor_parallel(copy.deepcopy(whole), mesh, {"up": "colwise", "down": "rowwise"})
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(3)).to(device)
    near(block(x), whole(x), 1e-5, "plan")


def test_a_plan_of_transformers(ranks: Ranks) -> None:
    ranks(2, by_a_plan)


def with_shards(device: torch.device, kind: str) -> None:
    """FSDP2 over one dimension of a mesh, tensor parallelism over the other."""
    mesh = init_device_mesh(device.type, (2, 2), mesh_dim_names=("dp", "tp"))
    row, column = (mesh.get_local_rank(name) for name in ("dp", "tp"))
    whole = build(kind, device)
    for layer in (whole.up, whole.down):
        layer.bias.requires_grad_()
    block = parallelize_module(copy.deepcopy(whole), mesh["tp"], {name: style() for name, style in PLAN.items()})
    fully_shard(block, mesh=mesh["dp"])
    rtol = 0.02 if kind == "int8" else 1e-5
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(3)).to(device)
    y = block(x.chunk(2)[row])
    near(y, whole(x).chunk(2)[row], rtol, kind)
    y.square().mean().backward()
    whole(x).square().mean().backward()
    near(block.up.bias.grad.full_tensor(), whole.up.bias.grad.chunk(2)[column], rtol, "gradient of a bias that is cut")
    near(block.down.bias.grad.full_tensor(), whole.down.bias.grad, rtol, "gradient of a whole bias")
    expected = whole.state_dict()
    full = get_model_state_dict(block, options=StateDictOptions(full_state_dict=True))
    for name in ("up.weight", "down.weight", "up.bias", "down.bias"):
        a, b = (t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (full[name], expected[name]))
        assert torch.equal(a, b), name
    other = build(kind, device, seed=5)
    block.load_state_dict(other.state_dict())
    near(block(x), other(x), rtol, "loaded")


@pytest.mark.parametrize("kind", ["nf4", "fp4 in bfloat16", "int8"])
def test_fsdp2_in_two_dimensions(ranks: Ranks, kind: str) -> None:
    ranks(4, with_shards, kind)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("n", "k", "world"), [(4, 128, 2), (8, 512, 4), (256, 1024, 4), (6, 192, 3)])
def test_split(n: int, k: int, world: int, nested: bool, dim: int) -> None:
    """The parts hold the values of the whole, bit for bit."""
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(n))
    codes, state = quantize_4bit(values, blocksize=32, compress_statistics=nested, quant_type="nf4")
    parts = [dequantize_4bit(*split_4bit(codes, state, dim, rank, world)) for rank in range(world)]
    assert torch.equal(torch.cat(parts, dim), dequantize_4bit(codes, state))


@given(
    n=st.integers(1, 40),
    k=st.integers(1, 12).map(lambda blocks: 16 * blocks),
    world=st.integers(1, 5),
    dim=st.integers(0, 1),
    nested=st.booleans(),
    storage=st.sampled_from([torch.uint8, torch.int8, torch.bfloat16, torch.float32]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_is_cut_exactly_or_refused(
    n: int, k: int, world: int, dim: int, nested: bool, storage: torch.dtype
) -> None:
    """Parts that are whole rows, or columns, and whole blocks hold the values of the whole; all else is refused."""
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k))
    codes, state = quantize_4bit(
        values, blocksize=32, compress_statistics=nested, quant_type="nf4", quant_storage=storage
    )
    before = codes.clone()
    fits = (n, k)[dim] % world == 0 and ((n // world * k) if dim == 0 else k // world) % 32 == 0
    if not fits:
        with pytest.raises(ValueError, match=("out_features", "in_features")[dim]):
            split_4bit(codes, state, dim, 0, world)
    else:
        parts = [dequantize_4bit(*split_4bit(codes, state, dim, rank, world)) for rank in range(world)]
        assert torch.equal(torch.cat(parts, dim), dequantize_4bit(codes, state))
    assert torch.equal(codes.view(torch.uint8), before.view(torch.uint8))
    eight, scales = values.clamp(-1, 1).mul(127).to(torch.int8), torch.rand(n)
    if (n, k)[dim] % world:
        with pytest.raises(ValueError, match=("out_features", "in_features")[dim]):
            split_8bit(eight, scales, dim, 0, world)
    else:
        cut = [split_8bit(eight, scales, dim, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat([part for part, _ in cut], dim), eight)
        assert torch.equal(torch.cat([row for _, row in cut]) if dim == 0 else cut[-1][1], scales)
