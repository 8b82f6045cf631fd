"""Make the golden files: what bitsandbytes 0.50.2 wrote, on the CPU, for inputs that ``inputs.py`` can make again.

Run once, in an environment that holds bitsandbytes 0.50.2 and torch, and commit what it writes::

    python tests/golden/make.py

One safetensors file a group; the metadata of each says how it was made. Inputs are ordinary numbers in whole blocks,
where the two libraries must agree byte for byte (see ``tests/test_golden.py``).
"""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from inputs import (
    CASES_4BIT,
    CASES_8BIT,
    LINEARS,
    LINEARS_8BIT,
    OPTIMIZER_SHAPES,
    OPTIMIZER_STEPS,
    OPTIMIZERS,
    activations_8bit,
    all_bytes,
    case_name,
    gradient,
    linear_8bit_name,
    linear_name,
    ordinary,
)
from safetensors.torch import save_file

HERE = Path(__file__).parent
VERSION = "0.50.2"


def save(name: str, tensors: dict[str, torch.Tensor], **notes: object) -> None:
    metadata = {"bitsandbytes": VERSION, "torch": torch.__version__, **{k: json.dumps(v) for k, v in notes.items()}}
    path = HERE / f"{name}.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=metadata)
    path.chmod(0o644)


def blockwise_4bit() -> None:
    """Packed bytes, the state's packed dictionary and the dequantized tensor of each case."""
    out: dict[str, torch.Tensor] = {}
    for case in CASES_4BIT:
        x = ordinary(case.shape, case.dtype)
        packed, state = bnb.quantize_4bit(
            x,
            blocksize=case.blocksize,
            quant_type=case.quant_type,
            compress_statistics=case.nested,
            quant_storage=case.storage,
        )
        name = case_name(case)
        out[f"{name}/packed"] = packed
        out[f"{name}/dequantized"] = bnb.dequantize_4bit(packed, state)
        for key, value in state.as_dict(packed=True).items():
            out[f"{name}/state/{key}"] = value
    save("quantize_4bit", out)


def decode_4bit() -> None:
    """Every byte value under a spread of block maxima, read by bitsandbytes."""
    codes, absmax = all_bytes(64)
    out = {}
    for quant_type in ("nf4", "fp4"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            code = bnb.get_4bit_type(quant_type, device="cpu")
            shape = torch.Size([2, codes.numel()])
            state = bnb.QuantState(absmax, shape, code=code, blocksize=64, quant_type=quant_type, dtype=dtype)
            out[f"{quant_type}/{str(dtype).removeprefix('torch.')}"] = bnb.dequantize_4bit(codes.view(-1, 1), state)
    save("decode_4bit", out)


def blockwise_8bit() -> None:
    """Codes, block maxima and the dequantized tensor. Its CPU encoder is a lossy table: the codes are only read."""
    out: dict[str, torch.Tensor] = {}
    for case in CASES_8BIT:
        codes, state = bnb.quantize_blockwise(ordinary(case.shape, case.dtype), blocksize=case.blocksize)
        name = case_name(case)
        out[f"{name}/codes"] = codes
        out[f"{name}/absmax"] = state.absmax
        out[f"{name}/dequantized"] = bnb.dequantize_blockwise(codes, state)
    out["dynamic"] = bnb.create_dynamic_map()
    out["dynamic_unsigned"] = bnb.create_dynamic_map(signed=False)
    save("quantize_blockwise", out)


def linears() -> None:
    """state_dict of Linear4bit, and the weight that bitsandbytes reads back from it."""
    for case in LINEARS:
        layer = Linear4bit(
            case.in_features,
            case.out_features,
            bias=case.bias,
            compute_dtype=case.dtype,
            compress_statistics=case.nested,
            quant_type=case.quant_type,
            quant_storage=case.storage,
        )
        layer.weight.data.copy_(ordinary((case.out_features, case.in_features), torch.float32) * 0.02)
        if case.bias:
            layer.bias.data.copy_(ordinary((case.out_features,), torch.float32))
        layer = layer.to(case.dtype).to("cpu")
        if layer.weight.quant_state is None:
            layer.weight = layer.weight._quantize("cpu")
        state = {f"layer.{k}": v for k, v in layer.state_dict().items()}
        state["dequantized"] = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        save(linear_name(case), state)


def linears_8bit() -> None:
    """state_dict of Linear8bitLt, the weight read back from it, and its output; and what row-wise quantization gives.

    Weights and activations are float16 numbers, because bitsandbytes casts to that first. In training its CPU path
    multiplies in floating point: the output is that of evaluation.
    """
    for threshold, bias in LINEARS_8BIT:
        layer = Linear8bitLt(64, 48, bias=bias, has_fp16_weights=False, threshold=threshold)
        layer.weight.data.copy_((ordinary((48, 64), torch.float32) * 0.02).half())
        if bias:
            layer.bias.data.copy_(ordinary((48,), torch.float16))
        layer = layer.to("cpu")
        state = {f"layer.{k}": v.clone() for k, v in layer.state_dict().items()}
        state["dequantized"] = bnb.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
        with torch.no_grad():
            state["output"] = layer.eval()(activations_8bit())
        codes, row_stats, columns = bnb.int8_vectorwise_quant(activations_8bit(), threshold)
        state |= {"codes": codes, "row_stats": row_stats} | ({} if columns is None else {"columns": columns})
        save(linear_8bit_name(threshold, bias), state)


def optimizers() -> None:
    """state_dict of each optimizer after some steps, the parameters then, and after one step more."""
    for name, kwargs in OPTIMIZERS.items():
        params = [torch.nn.Parameter(ordinary(shape, torch.float32)) for shape in OPTIMIZER_SHAPES]
        optimizer = getattr(bitsandbytes.optim, name)(params, **kwargs)
        out = {}
        for step in range(OPTIMIZER_STEPS + 1):
            for p in params:
                p.grad = gradient(tuple(p.shape), step)
            if step == OPTIMIZER_STEPS:
                saved = optimizer.state_dict()
                out |= {f"before/{i}": p.detach().clone() for i, p in enumerate(params)}
                notes = {"param_groups": saved["param_groups"], "steps": {}}
                for i, state in saved["state"].items():
                    notes["steps"][i] = state["step"]
                    for key, value in state["__bnb_optimizer_quant_state__"].items():
                        out[f"state/{i}/{key}"] = value.clone()
            optimizer.step()
        out |= {f"after/{i}": p.detach() for i, p in enumerate(params)}
        save(f"optimizer-{name}", out, **notes)


if __name__ == "__main__":
    assert bitsandbytes.__version__ == VERSION, bitsandbytes.__version__
    blockwise_4bit()
    decode_4bit()
    blockwise_8bit()
    linears()
    linears_8bit()
    optimizers()
    print(sum(f.stat().st_size for f in HERE.glob("*.safetensors")), "bytes")
