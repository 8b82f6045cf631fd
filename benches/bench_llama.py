"""A model of Llama-8B's layers with a vocabulary of 32000 and random weights: decode, prefill and QLoRA in bf16, in
bitsandbytes' NF4 and LLM.int8() and in ours.

    python benches/bench_llama.py --device cuda
    python benches/bench_llama.py --device cuda --only decode --layers 8
    python benches/bench_llama.py --device cuda --weights int8
    python benches/bench_llama.py --device cpu --tiny

Needs transformers and peft, and no network. Decode: milliseconds a token with a static cache, by CUDA graph and eager.
Prefill: one prompt into an empty static cache. Train: a QLoRA step (LoRA on every linear layer, double quantization,
gradient checkpointing, torch's fused AdamW, the loss in chunks of tokens) and its peak memory. The head stays in bf16.
With a threshold bitsandbytes waits for the device in every layer and cannot be captured: of it, eager rows alone.
The weights are made on the device, and each library's layers take the place of ``nn.Linear`` one by one.
"""

from __future__ import annotations

import argparse
import gc
import logging
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

import fewbits
import fewbits.nn
from common import Row, bitsandbytes, captured, cell, judge, medians, save, show, wall_us

PARTS = ("decode", "prefill", "train")
PROMPT, CACHE, TOKENS = 256, 384, 32  # of decode: tokens before, room for, measured in a row
CHUNK = 512  # tokens whose logits exist at a time in training
DECODE_LIMITS = {1: 0.76, 8: 0.80, 32: 0.89}  # by CUDA graph, × bf16
INT8_LIMITS = {"decode": 0.92, "prefill": 0.85}  # with threshold 6, decode by CUDA graph, × bf16


class Kind(NamedTuple):
    """How the linear layers hold their weights, and what is measured of it."""

    weights: str
    parts: tuple[str, ...]
    nested: bool = False
    threshold: float = 0.0

    @property
    def prefix(self) -> str:
        if self.weights != "int8":
            return ""
        return f"int8, threshold {self.threshold:g}: " if self.threshold else "int8: "


KINDS = (
    Kind("nf4", ("decode", "prefill")),
    Kind("nf4", ("train",), nested=True),
    Kind("int8", ("decode", "prefill")),
    Kind("int8", ("decode", "prefill"), threshold=6.0),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", choices=PARTS, help="one part alone; nothing is written")
    parser.add_argument("--weights", choices=("nf4", "int8"), help="one kind of weights alone; nothing is written")
    parser.add_argument("--layers", type=int, default=32, help="with fewer than 32, nothing is judged or written")
    parser.add_argument("--tiny", action="store_true", help="a model of 2 small layers, to try the bench itself")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


ARGS = arguments()
DEVICE = torch.device(ARGS.device)
PEER = bitsandbytes()
COMPLETE = not ARGS.tiny and ARGS.only is None and ARGS.weights is None and ARGS.layers == 32
BATCHES = (1, 2) if ARGS.tiny else (1, 8, 32)
PREFILL = 64 if ARGS.tiny else 2048
TRAIN = (2, 64) if ARGS.tiny else (4, 1024)


# ---- the model -----------------------------------------------------------------------------------------------------


def config() -> transformers.LlamaConfig:
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": ARGS.layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    }
    if ARGS.tiny:
        sizes = {
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 1000,
        }
    return transformers.LlamaConfig(
        **sizes, max_position_embeddings=8192, tie_word_embeddings=False, attn_implementation="sdpa"
    )


def build(library: ModuleType | None, kind: Kind) -> transformers.LlamaForCausalLM:
    """The model, with its linear layers (but for the head) quantized by a library."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with DEVICE:
            model = transformers.LlamaForCausalLM(config())
    finally:
        torch.set_default_dtype(default)
    model.requires_grad_(False)
    if library is not None:
        for layer in model.model.layers:
            for name, linear in list(layer.named_modules()):
                if isinstance(linear, nn.Linear):
                    layer.set_submodule(name, quantized(library, linear, kind))
    return model.eval()


def quantized(library: ModuleType, linear: nn.Linear, kind: Kind) -> nn.Module:
    return int8(library, linear, kind.threshold) if kind.weights == "int8" else nf4(library, linear, kind.nested)


def int8(library: ModuleType, linear: nn.Linear, threshold: float) -> nn.Module:
    module = library.nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=False,
        has_fp16_weights=False,
        threshold=threshold,
        device="meta",
    )
    source = linear.weight.data.cpu() if library is PEER else linear.weight.data  # the peer moves from the CPU alone
    module.weight = library.nn.Int8Params(source, requires_grad=False).to(DEVICE)
    return module


def nf4(library: ModuleType, linear: nn.Linear, nested: bool) -> nn.Module:
    module = library.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=nested,
        quant_type="nf4",
        device="meta",
    )
    weight = library.nn.Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=nested, quant_type="nf4", module=module
    )
    weight = weight.to(DEVICE)
    if weight.quant_state is None:  # the peer quantizes on the CPU only when told
        weight = weight._quantize(DEVICE)
    module.weight = weight
    module.quant_state = weight.quant_state
    return module


# ---- what is measured ----------------------------------------------------------------------------------------------


def milliseconds(call: Callable[[], object], repeats: int = 1) -> float:
    (us,) = medians([lambda: wall_us([call], repeats)], ARGS.rounds)
    assert us is not None
    return us / 1e3


def rewind(cache: transformers.StaticCache, length: int) -> None:
    """Forget what came after `length` tokens. The keys stay: they are masked."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)


def decode(model: transformers.LlamaForCausalLM, graph: bool = True) -> Iterator[tuple[str, float]]:
    """Milliseconds a token, by graph and eager, for each batch size."""
    for batch in BATCHES:
        cache = transformers.StaticCache(config=model.config, max_cache_len=CACHE)
        tokens = torch.randint(0, model.config.vocab_size, (batch, PROMPT), device=DEVICE)
        model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = tokens[:, -1:].clone()

        def step(cache: Any = cache, token: torch.Tensor = token) -> None:
            logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token.copy_(logits.argmax(-1))

        replay = captured(step) if DEVICE.type == "cuda" and graph else None
        for name, call in (("CUDA graph", replay), ("eager", step)):
            if call is None:
                continue

            count = TOKENS if call is replay else TOKENS // 4  # a token takes several times as long

            def generate(call: Callable[[], object] = call, cache: Any = cache, count: int = count) -> None:
                rewind(cache, PROMPT)
                for _ in range(count):
                    call()

            yield f"decode, {name}, batch {batch}", milliseconds(generate) / count


def prefill(model: transformers.LlamaForCausalLM) -> Iterator[tuple[str, float]]:
    """Milliseconds of one long prompt."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=PREFILL)
    tokens = torch.randint(0, model.config.vocab_size, (1, PREFILL), device=DEVICE)

    def run() -> None:
        if cache.layers[0].is_initialized:
            rewind(cache, 0)
        model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

    yield f"prefill {PREFILL}", milliseconds(run)


def train(model: transformers.LlamaForCausalLM) -> Iterator[tuple[str, float]]:
    """Milliseconds of a QLoRA step, and the peak of memory in GB."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(r=16, lora_alpha=16, target_modules=names)
    wrapped = peft.inject_adapter_in_model(lora, model)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(DEVICE, torch.bfloat16)
        parameter.requires_grad_("lora_" in name)
    wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wrapped.train()
    adapters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-4, fused=True)
    tokens = torch.randint(0, model.config.vocab_size, TRAIN, device=DEVICE)
    labels = tokens.roll(-1, 1).reshape(-1)

    def loss_of(hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model.lm_head(hidden).float(), wanted, reduction="sum")

    def step() -> None:
        hidden = model.model(tokens, use_cache=False).last_hidden_state.flatten(0, 1)
        pieces = zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
        loss = torch.stack([checkpoint(loss_of, *piece, use_reentrant=False) for piece in pieces]).sum()
        (loss / labels.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    work = f"QLoRA step, {TRAIN[0]} x {TRAIN[1]} tokens"
    yield work, milliseconds(step)
    if DEVICE.type == "cuda":
        yield f"{work}, peak GB", torch.cuda.max_memory_allocated() / 1e9


MEASURES = {"decode": decode, "prefill": prefill, "train": train}


def measure(name: str, library: ModuleType | None, start: float) -> dict[str, float]:
    """Every figure of one library; each is printed as it is there."""
    figures: dict[str, float] = {}

    def note(work: str, value: float) -> None:
        figures[work] = value
        print(f"[{time.monotonic() - start:4.0f} s] {name}: {work}: {cell(value)}", flush=True)

    for kind in KINDS:
        wanted = [part for part in PARTS if part in kind.parts and ARGS.only in (None, part)]
        if not wanted or (library is not None and ARGS.weights not in (None, kind.weights)):
            continue
        if library is None and kind.weights != "nf4":  # not quantized: no other figures
            continue
        model = build(library, kind)
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            weights = "weights of the training, GB" if kind.nested else "weights, GB"
            note(kind.prefix + weights, torch.cuda.memory_allocated() / 1e9)
        for part in wanted:
            with torch.set_grad_enabled(part == "train"):
                # With a threshold the peer waits for the device.
                options = {"graph": not (library is PEER and kind.threshold)} if part == "decode" else {}
                for work, value in MEASURES[part](model, **options):
                    note(kind.prefix + work, value)
        del model
        gc.collect()
    return figures


# ---- rows ----------------------------------------------------------------------------------------------------------


def aim(row: Row) -> Row:
    work = row["work"]
    if work.startswith("int8"):
        kind, _, work = work.partition(": ")
        part = work.split()[0].rstrip(",")
        judged = part in INT8_LIMITS and "threshold" in kind and "eager" not in work
        return judge(row, "x_bf16", INT8_LIMITS[part], "× bf16") if judged else row
    if work.startswith("decode, CUDA graph"):
        return judge(row, "x_bf16", DECODE_LIMITS[int(work.split()[-1])], "× bf16")
    if work.startswith("decode"):
        return judge(row, "x_bf16", 1.0, "× bf16")
    if work.startswith("prefill"):
        return judge(row, "x_bf16", 1.04, "× bf16")
    if work.endswith("peak GB"):
        return judge(row, "value", 7.1, "GB")
    return judge(row, "x_bf16", 1.03, "× bf16") if work.startswith("QLoRA") else row


def main() -> None:
    transformers.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says on every call that it casts
    start = time.monotonic()
    sides = {"bf16": None, "bitsandbytes": PEER, "fewbits": fewbits}
    figures = {
        name: measure(name, library, start) for name, library in sides.items() if name == "bf16" or library is not None
    }
    rows = []
    for work, value in figures["fewbits"].items():
        dense = figures["bf16"][work.rpartition(": ")[2]]
        peer = figures.get("bitsandbytes", {}).get(work)
        row: Row = {"work": work, "value": value, "bf16": dense, "x_bf16": value / dense, "bitsandbytes": peer}
        row["times_faster"] = peer / value if peer else None
        rows.append(aim(row) if COMPLETE else row)
    show(f"Llama-8B's shape on {DEVICE.type}, ms or GB", rows)
    if COMPLETE:
        versions = {"transformers": transformers.__version__, "peft": peft.__version__}
        print("wrote", save("llama", DEVICE, rows, **versions).name)


if __name__ == "__main__":
    main()
