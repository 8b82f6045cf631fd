"""Helpers and functions that are there for old code."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import fewbits
from fewbits import _cpu_layout, _deprecated, _native, _pointers, nn, utils
from fewbits import functional as F
from fewbits._autograd_functions import GlobalOutlierPooler, MatMul4Bit, MatMul8bitFp, MatMul8bitLt
from fewbits._cuda_specs import CUDASpecs, get_cuda_specs, get_cuda_version_string
from fewbits.nn import repair

# ---- int8 products ---------------------------------------------------------------------------------------------------


def codes(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=device)


@pytest.mark.parametrize("transposed_A", [False, True])
@pytest.mark.parametrize("transposed_B", [False, True])
@pytest.mark.parametrize(
    ("a", "b"), [((5, 8), (8, 7)), ((2, 5, 8), (8, 7)), ((2, 5, 8), (2, 8, 7)), ((0, 5, 8), (0, 8, 7))]
)
def test_igemm(
    a: tuple[int, ...], b: tuple[int, ...], transposed_A: bool, transposed_B: bool, device: torch.device
) -> None:
    A, B = codes(*a, device=device), codes(*b, device=device)
    expected = (A.long().cpu() @ B.long().cpu()).int()
    A, B = A.mT.contiguous() if transposed_A else A, B.mT.contiguous() if transposed_B else B
    functions: list[Callable[..., torch.Tensor]] = [F.igemm, *([F.batched_igemm] if B.dim() == 3 else [])]
    for function in functions:
        with pytest.warns(FutureWarning, match="int8_linear_matmul"):
            product = function(A, B, transposed_A=transposed_A, transposed_B=transposed_B)
        assert torch.equal(product.cpu(), expected)
        assert product.dtype == torch.int32
    with pytest.warns(FutureWarning):
        assert tuple(F.check_matmul(A, B, None, transposed_A, transposed_B)) == tuple(expected.shape)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_igemm_into_and_over_batches(device: torch.device) -> None:
    A, B = codes(3, 4, 8, device=device), codes(3, 4, 6, device=device)
    out = torch.zeros(8, 6, dtype=torch.int32, device=device)
    assert F.igemm(A, B, out) is out
    assert torch.equal(out.cpu(), torch.einsum("bsi,bso->io", A.int().cpu(), B.int().cpu()))
    with pytest.raises(ValueError, match="out"):
        F.igemm(A[0].t(), B[0], torch.zeros(8, 5, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match="A, B"):
        F.igemm(A, B)
    with pytest.raises(ValueError, match="3 dimensions"):
        F.batched_igemm(A[0], B[0])
    with pytest.raises(TypeError, match="int8"):
        F.igemm(A.float(), B.float())


# ---- paged tensors, pointers -----------------------------------------------------------------------------------------


def test_paged_tensors() -> None:
    paged: Any = F.get_paged(3, 2)
    assert paged.is_paged
    assert paged.page_deviceid == 0
    assert paged.is_pinned() == torch.cuda.is_available()
    F.fill(paged, 3.0)
    _deprecated._mul(paged, torch.full((3, 2), 2.0))
    assert bool((paged == 6).all())
    F.elementwise_func("arange", paged, None, 0)
    assert paged.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    manager = F.GlobalPageManager.get_instance()
    assert manager is F.GlobalPageManager.get_instance()
    manager.initialize()
    manager.paged_tensors.append(paged)
    manager.prefetch_all()
    manager.paged_tensors.append(torch.ones(1))
    with pytest.raises(ValueError, match="get_paged"):
        manager.prefetch_all()
    manager.initialize()
    with pytest.raises(NotImplementedError, match="float16"):
        F.fill(torch.ones(2, dtype=torch.float16), 1)
    with pytest.raises(ValueError, match="B"):
        F.elementwise_func("_mul", torch.ones(2), None, 0)
    for cls in (F.GlobalPageManager, F.CUBLAS_Context, GlobalOutlierPooler, utils.OutlierTracer):
        with pytest.raises(RuntimeError, match="get_instance"):
            cls()


def test_is_on_gpu() -> None:
    on_meta: Any = torch.ones(1, device="meta")
    with pytest.raises(RuntimeError, match=r"\(1,\) on meta"):
        F.is_on_gpu([torch.ones(2), on_meta])
    on_meta.is_paged = True
    assert F.is_on_gpu([torch.ones(2), on_meta, None])
    assert F.get_ptr(None) is None


@pytest.mark.cuda
def test_handles_on_cuda(cuda: torch.device) -> None:
    x = torch.ones(1, device=cuda)
    assert _pointers._get_tensor_stream(x).value in (None, torch.cuda.current_stream().cuda_stream)
    with _pointers._cuda_device_of(x):
        assert torch.cuda.current_device() == cuda.index
    assert F.CUBLAS_Context.get_instance().get_context(cuda).value
    specs = get_cuda_specs()
    assert isinstance(specs, CUDASpecs)
    assert specs.cuda_version_string == get_cuda_version_string()
    assert specs.highest_compute_capability >= (7, 0)


# ---- the layout for AVX512-BF16 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_cpu_layout_and_back(nested: bool, storage: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    packed, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested, quant_storage=storage)
    changed = copy.deepcopy(state)
    there, changed = _cpu_layout._convert_weight_packed_for_cpu(packed, changed)
    assert there.shape == (64, 64)
    # By hand: byte (16 g + j) of a group holds row j low, and the pair after it high, of column pairs (2 g, 2 g + 1).
    nibbles = torch.stack([packed.view(torch.uint8).flatten() >> 4, packed.view(torch.uint8).flatten() & 15], 1)
    nibbles = nibbles.view(64, 128)
    first = there.flatten()[:32]
    assert torch.equal(first & 15, nibbles[:16, :2].flatten())
    assert torch.equal(first >> 4, nibbles[16:32, :2].flatten())
    assert changed.absmax.shape == (2, 64)
    assert changed.absmax.dtype == torch.bfloat16
    back, changed = _cpu_layout._convert_weight_packed_for_cpu_inverse(there, changed)
    assert torch.equal(back.view(torch.uint8), packed.view(torch.uint8))
    assert (back.dtype, changed.dtype, changed.nested) == (storage, torch.float32, nested)
    torch.testing.assert_close(F.dequantize_4bit(back, changed), F.dequantize_4bit(packed, state), rtol=0.05, atol=0.02)


def test_cpu_layout_bad_input() -> None:
    packed, state = F.quantize_4bit(torch.randn(48, 64))
    with pytest.raises(ValueError, match="multiple of 32"):
        _cpu_layout._convert_weight_packed_for_cpu(packed, state)
    with pytest.raises(ValueError, match="layout for the CPU"):
        _cpu_layout._convert_weight_packed_for_cpu_inverse(packed, state)
    packed, state = F.quantize_4bit(torch.randn(32, 32))
    with pytest.raises(ValueError, match="whole blocks"):
        _cpu_layout._convert_weight_packed_for_cpu(packed, state)
    assert _cpu_layout.has_avx512bf16() is ("avx512bf16" in _native.cpu_info()["features"])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_products_with_the_cpu_layout(quant_type: str, nested: bool) -> None:
    """Whoever computes with a repacked weight gets the numbers of its rounded maxima, and the state stays as it was."""
    torch.manual_seed(0)
    layer = nn.Linear4bit(128, 64, quant_type=quant_type, compress_statistics=nested).to("cpu")
    x = torch.randn(3, 128)
    expected = layer(x)
    state = copy.deepcopy(layer.weight.quant_state)
    there, state = _cpu_layout._convert_weight_packed_for_cpu(layer.weight.data, state)
    values = F.dequantize_4bit(there, state)
    bias = layer.bias.detach()
    for got in (
        fewbits.matmul_4bit(x, there, state, bias=bias),
        F.gemv_4bit(x, there.t(), state=state) + bias,
        x @ values.float().t() + bias,
    ):
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    assert state.packing_format_for_cpu
    assert state.absmax.shape == (2, 64)
    # A pickle of such a parameter is read in the ordinary layout.
    layer.weight.data, layer.weight.quant_state = there, state
    read = pickle.loads(pickle.dumps(layer))
    assert not read.weight.quant_state.packing_format_for_cpu
    torch.testing.assert_close(read(x), expected, rtol=0.02, atol=0.02)
    again = nn.Linear4bit(128, 64, quant_type=quant_type).to("cpu")
    again.load_state_dict(read.state_dict())
    assert torch.equal(again(x), read(x))


# ---- autograd functions, weights that lost their state ---------------------------------------------------------------


def test_autograd_functions() -> None:
    x = torch.randn(3, 64, requires_grad=True)
    bias = torch.randn(32, requires_grad=True)
    packed, state = F.quantize_4bit(torch.randn(32, 64))
    y = MatMul4Bit.apply(x, packed.t(), None, bias, state)
    assert torch.equal(y, F.matmul_4bit(x, packed.t(), state, bias=bias))
    y.sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    from fewbits import MatmulLtState, matmul

    weight = torch.randn(32, 64)
    for function in (MatMul8bitLt, MatMul8bitFp):
        assert torch.equal(function.apply(x, weight, None, bias, MatmulLtState()), matmul(x, weight, bias=bias))
    pooler = GlobalOutlierPooler.get_instance()
    pooler.initialize()
    for columns, width in (([3, 1], 64), ([2], 32), ([1, 5], 64)):
        pooler.add_outliers(torch.tensor(columns), width)
    assert pooler.get_current_outlier_idx().tolist() == [1, 3, 5]


def test_repairs() -> None:
    layer = nn.LinearNF4(64, 32).to("cpu")
    x = torch.randn(2, 64)
    expected, state = layer(x), layer.quant_state
    layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
    repair.fix_4bit_weight_quant_state_from_module(layer)
    assert isinstance(layer.weight, nn.Params4bit)
    assert layer.weight.quant_state is state
    assert torch.equal(layer(x), expected)
    layer.weight.quant_state = None
    repair.fix_4bit_weight_quant_state_from_module(layer)
    assert layer.weight.quant_state is state
    with pytest.raises(ValueError, match="quant_state"):
        repair.fix_4bit_weight_quant_state_from_module(nn.LinearNF4(64, 32))
    entries = {"a.weight": torch.ones(1), "a.weight_format": torch.tensor(0)}
    repair.maybe_rearrange_weight(entries, "a.", {}, True, [], [], [])
    assert list(entries) == ["a.weight"]
    for wrong in ("col32", torch.tensor(2)):
        with pytest.raises(ValueError, match="weight_format"):
            repair.maybe_rearrange_weight({"weight": torch.ones(1), "weight_format": wrong}, "", {}, True, [], [], [])


# ---- utils -----------------------------------------------------------------------------------------------------------


def test_outliers() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 400)
    weight[:, [3, 7]] *= 30
    assert utils.find_outlier_dims(weight).tolist() == [3, 7]
    assert sorted(utils.find_outlier_dims(weight, topk=2).tolist()) == [3, 7]
    assert utils.find_outlier_dims(weight, topk=5, rdm=True).max() < 400
    with pytest.raises(ValueError, match="topk"):
        utils.find_outlier_dims(weight, rdm=True)

    model = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(40, 40))
    model[1].weight.data[:, 5] *= 60
    tracer = utils.OutlierTracer.get_instance()
    tracer.initialize(model)
    x = torch.randn(4, 40)
    x[2, 9] = 50
    model(x)
    assert tracer.is_initialized()
    first, second = (tracer.get_outliers(layer.weight) for layer in model)
    assert first is not None
    assert second is not None
    assert 9 in first.tolist()
    assert second.tolist() == [5]
    assert tracer.get_outliers(torch.ones(2)) is None
    model(x)
    assert not model[0]._forward_pre_hooks
    with pytest.raises(TypeError, match="Linear"):
        utils.outlier_hook(torch.nn.ReLU(), (x,))


def test_replace_linear() -> None:
    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        inner = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        return torch.nn.ModuleDict({"body": inner, "lm_head": torch.nn.Linear(64, 8)})

    model: Any = make()
    assert utils.replace_linear(model, partial(nn.Linear4bit, quant_type="nf4"), copy_weights=True) is model
    assert type(model["body"][0]) is nn.Linear4bit
    assert type(model["lm_head"]) is torch.nn.Linear
    original: Any = make()
    x = torch.randn(3, 64)
    reference = nn.Linear4bit(64, 64, quant_type="nf4")
    reference.load_state_dict(original["body"][0].state_dict())
    assert torch.equal(model.to("cpu")["body"][0](x), reference.to("cpu")(x))
    seen: list[Any] = []
    torch.nn.Linear.note = lambda self, layer: seen.append(layer)  # type: ignore[attr-defined]
    try:
        utils.replace_linear(original, nn.LinearFP4, skip_modules=(), post_processing_function="note")
    finally:
        del torch.nn.Linear.note  # type: ignore[attr-defined]
    assert len(seen) == 2
    assert type(original["lm_head"]) is nn.LinearFP4
    with pytest.raises(TypeError, match="skip_modules"):
        utils.replace_linear(original, nn.LinearFP4, skip_modules="lm_head")


def test_other_helpers(device: torch.device) -> None:
    utils.sync_gpu(torch.ones(1, device=device))
    assert utils.execute_and_return("python3 -c \"import sys; print(' a b '); sys.stderr.write('c')\"") == ("a b", "c")
    with pytest.raises(OSError, match="no-such-program"):
        utils.execute_and_return("no-such-program")
    assert utils.LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING["row"] == 0
    assert utils.INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING[3] == "col_ampere"
