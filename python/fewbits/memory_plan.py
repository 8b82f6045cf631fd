"""How much memory a model needs in 16, 8 and 4 bits: the numbers behind ``fewbits plan``.

The weights are exact: they follow from the shapes in the headers of the safetensors files and from the formats that
``fewbits quantize`` writes, tensor by tensor. Everything else is an estimate, and every estimate carries its formula
(:attr:`MemoryPlan.estimates`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._reader import Checkpoint, UsageError
from ._selection import Choice, Format, quantized_parts, select
from .memory_gpus import STRATEGIES, Gpus, Strategy, describe

# What the driver, the kernels and cuBLAS take before the first tensor: 0.4 to 0.8 GB on current GPUs.
CONTEXT_BYTES = 600_000_000


@dataclass(frozen=True)
class Estimate:
    """An estimated amount of memory.

    Attributes
    ----------
    name : str
    formula : str
        With the numbers of this model put in.
    bytes : int
    training, inference : bool
        Where it counts.
    """

    name: str
    formula: str
    bytes: int
    training: bool
    inference: bool


@dataclass(frozen=True)
class Row:
    """Memory of the model in one format.

    Attributes
    ----------
    label : str
    quantized_bytes : int
        Exact: linear layers, codes and scales (in the row of 16 bits: 2 bytes an element).
    other_bytes : int
        Exact: all other tensors, floating point in 16 bits, the rest as stored.
    inference_bytes, training_bytes : int
        Weights plus estimates, on each GPU.
    """

    label: str
    quantized_bytes: int
    other_bytes: int
    inference_bytes: int
    training_bytes: int

    @property
    def weight_bytes(self) -> int:
        """All tensors of the model."""
        return self.quantized_bytes + self.other_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Result of :func:`plan_memory`."""

    rows: list[Row]
    estimates: list[Estimate]
    linear_parameters: int
    other_parameters: int
    linear_layers: int
    notes: list[str]


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration of the language model; multimodal models nest it."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _kv_cache(config: Mapping[str, Any], context: int, batch: int) -> Estimate | None:
    """Keys and values of every layer and token in 16 bits, if the model is one that generates."""
    architectures = " ".join(map(str, config.get("architectures") or []))
    if not any(word in architectures for word in ("CausalLM", "ConditionalGeneration", "LMHead")):
        return None
    text = _text_config(config)
    layers = _number(text, "num_hidden_layers", "n_layer", "num_layers")
    heads = _number(text, "num_attention_heads", "n_head", "num_heads")
    hidden = _number(text, "hidden_size", "n_embd", "d_model")
    if layers is None or heads is None or hidden is None:
        return None
    cached_heads = _number(text, "num_key_value_heads", "num_kv_heads") or heads
    latent_key = (_number(text, "qk_nope_head_dim") or 0) + (_number(text, "qk_rope_head_dim") or 0)
    key = latent_key or _number(text, "head_dim") or hidden // heads
    value = _number(text, "v_head_dim") or key
    size = layers * cached_heads * (key + value) * context * batch * 2
    formula = (
        f"{layers} layers x {cached_heads} heads x ({key} + {value}) x {context} tokens x batch {batch} x 2 bytes"
        " (an upper bound where attention is windowed)"
    )
    return Estimate("KV cache", formula, size, training=False, inference=True)


def _lora(choices: Sequence[Choice], rank: int) -> Estimate:
    parameters = sum(rank * sum(c.shape) for c in choices if c.quantize)
    # PEFT keeps adapters in float32: weight 4, gradient 4, two AdamW moments 8.
    formula = f"rank {rank} on every linear layer: {parameters} parameters x 16 bytes (float32 weight, gradient, AdamW)"
    return Estimate("LoRA and optimizer", formula, parameters * 16, training=True, inference=False)


def _activations(config: Mapping[str, Any], choices: Sequence[Choice], context: int, batch: int) -> list[Estimate]:
    text = _text_config(config)
    layers = _number(text, "num_hidden_layers", "n_layer", "num_layers")
    hidden = _number(text, "hidden_size", "n_embd", "d_model")
    if layers is None or hidden is None:
        return []
    wide = _number(text, "intermediate_size", "n_inner", "d_ff") or 4 * hidden
    tokens = context * batch
    estimates = [
        Estimate(
            "activations, training",
            f"gradient checkpointing: {tokens} tokens x ({layers} layers x {hidden} + one live layer 16 x {hidden}"
            f" + 6 x {wide}) x 2 bytes",
            tokens * (layers * hidden + 16 * hidden + 6 * wide) * 2,
            training=True,
            inference=False,
        ),
        Estimate(
            "activations, inference",
            f"{tokens} tokens x (4 x {hidden} + 2 x {wide}) x 2 bytes",
            tokens * (4 * hidden + 2 * wide) * 2,
            training=False,
            inference=True,
        ),
    ]
    vocabulary = _number(text, "vocab_size")
    if vocabulary and _kv_cache(config, 1, 1) is not None:
        size = tokens * vocabulary * 10
        formula = f"{tokens} tokens x {vocabulary} x 10 bytes (16-bit, float32, float32 gradient)"
        estimates.append(Estimate("logits, training", formula, size, training=True, inference=False))
    return estimates


def plan_memory(
    source: str | Path,
    *,
    context: int = 2048,
    batch: int = 1,
    lora_rank: int = 16,
    gpus: int = 1,
    strategy: Strategy = "ddp",
) -> MemoryPlan:
    """Compute what a model needs in each format.

    Reads the headers of the safetensors files only.

    Parameters
    ----------
    source : str or Path
        Directory with an unquantized checkpoint.
    context : int, default 2048
        Tokens of one sequence.
    batch : int, default 1
        Sequences at a time.
    lora_rank : int, default 16
        Rank of the adapters for the training column.
    gpus : int, default 1
        How many GPUs share the work. `inference_bytes`, `training_bytes` and the estimates are those of each.
    strategy : {"ddp", "fsdp", "tp"}
        How: copies of the model (DDP), shards that are gathered layer by layer (FSDP2, ZeRO-3), or parts of every
        linear layer (tensor parallelism).

    Returns
    -------
    MemoryPlan
        With one row for 16 bits, 8 bits (int8 rows), NF4, and NF4 with double quantization, all with block size 64.

    Raises
    ------
    UsageError
        If the directory holds no safetensors or a quantized model, or a number is not positive.
    CheckpointError
        If a file is corrupt.

    Examples
    --------
    >>> plan = plan_memory("model")
    """
    for name, number in (("context", context), ("batch", batch), ("lora_rank", lora_rank), ("gpus", gpus)):
        if number < 1:
            raise UsageError(f"{name}: got {number}, expected a positive number")
    if strategy not in STRATEGIES:
        raise UsageError(f"strategy: got {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    several = Gpus(gpus, strategy)
    model = Checkpoint(source)
    model.refuse_quantized()
    choices, _ = select(list(model.entries.values()), (), model.config)
    linear = [c for c in choices if c.quantize]
    others = [c for c in choices if not c.quantize]
    floats = ("F64", "F32", "F16", "BF16")
    other_bytes = sum(c.entry.numel * 2 if c.entry.dtype in floats else c.entry.nbytes for c in others)

    cache = _kv_cache(model.config, context, batch)
    estimates = [cache] if cache else []
    estimates += [*_activations(model.config, choices, context, batch), _lora(choices, lora_rank)]
    largest = max((c.entry.numel for c in linear), default=0)
    estimates.append(Estimate("CUDA context and libraries", "a constant", CONTEXT_BYTES, training=True, inference=True))
    adapters = sum(lora_rank * sum(c.shape) for c in linear)
    # A 16-bit model multiplies its weights as they are, so this one counts in the other rows only.
    temporary = Estimate(
        "dequantized weight",
        f"largest linear layer: {largest} x 2 bytes (not for 16-bit)",
        largest * 2,
        training=True,
        inference=True,
    )

    estimates, temporary = [several.share(e) for e in estimates], several.share(temporary)
    rows = []
    others_by_name = {c.entry.name: c.entry.numel * 2 if c.entry.dtype in floats else c.entry.nbytes for c in others}
    only: list[Estimate] = []  # of one format
    formats: list[tuple[str, Format | None, bool]] = [
        ("16-bit", None, False),
        ("8-bit", "int8rows", False),
        ("NF4", "nf4", False),
        ("NF4 double quant", "nf4", True),
    ]
    for label, quant_format, double_quant in formats:
        if quant_format is None:
            sizes = {c.entry.name: c.entry.numel * 2 for c in linear}
        else:
            blocksize = 64 if quant_format == "nf4" else None
            sizes = {
                c.entry.name: sum(
                    p.nbytes for p in quantized_parts(c.entry.name, c.shape, quant_format, blocksize, double_quant)
                )
                for c in linear
            }
        size = sum(sizes.values())
        mine = several.extra(label, {**sizes, **others_by_name}, adapters)
        only += [e for e in mine if e not in only]
        extra = [*estimates, *mine, *([temporary] if quant_format is not None else [])]
        weights = several.weights(size, other_bytes)
        inference = weights + sum(e.bytes for e in extra if e.inference)
        training = weights + sum(e.bytes for e in extra if e.training)
        rows.append(Row(label, size, other_bytes, inference, training))

    notes = list(describe(several))
    if cache is None:
        notes.append("no KV cache: config.json does not describe a model that generates text")
    if not model.config:
        notes.append("no config.json: activations are left out")
    stacked = [c.entry for c in others if len(c.entry.shape) == 3 and c.entry.dtype in floats]
    if stacked:
        notes.append(f"{len(stacked)} three-dimensional tensors (fused experts?) stay in 16 bits")
    return MemoryPlan(
        rows,
        [*estimates, *only, temporary],
        sum(c.entry.numel for c in linear),
        sum(c.entry.numel for c in others),
        len(linear),
        notes,
    )
